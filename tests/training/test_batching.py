"""Steps in parts of similar length: the cheapest partition, and the very step of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pituning.backbones.base import Backbone
from pituning.example import Example
from pituning.interpolation import build_mixture
from pituning.methods import attached
from pituning.training.batching import parts_of_similar_length, text_length
from pituning.training.trainer import TrainSettings, fit

WORDS = (1, 20, 2, 18, 1, 3, 19, 2)


def partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """All of them, whatever their order."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for n, part in enumerate(rest):
            yield [*rest[:n], [items[0], *part], *rest[n + 1 :]]


def cost(parts: Sequence[Sequence[int]], lengths: Sequence[int], overhead: float) -> float:
    return sum(len(part) * max(lengths[n] for n in part) + overhead for part in parts)


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=6), overhead=st.sampled_from([0.5, 10, 40, 1e6]))
def test_no_partition_is_cheaper(lengths: list[int], overhead: float) -> None:
    found = parts_of_similar_length(lengths, overhead)
    assert sorted(n for part in found for n in part) == list(range(len(lengths)))
    least = min(cost(parts, lengths, overhead) for parts in partitions(range(len(lengths))))
    assert cost(found, lengths, overhead) == pytest.approx(least)


def test_texts_of_one_length_stay_together() -> None:
    assert parts_of_similar_length([30] * 16) == [list(range(16))]


@pytest.fixture
def uneven(random_examples: Any) -> list[Example]:
    """Examples of very different lengths, with weights."""
    texts = [" ".join([e.texts[0].split()[0]] * n) for e, n in zip(random_examples(len(WORDS), 1), WORDS, strict=True)]
    examples = enumerate(zip(random_examples(len(WORDS), 1), texts, strict=True))
    return [replace(e, texts=(text,), prompt=text, weight=1.0 + n) for n, (e, text) in examples]


@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(
    backbone_of: Any, random_expert: Any, uneven: list[Example], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of AdamW on one padded batch, in float64; the losses keep the weights of their examples."""
    backbone: Backbone = backbone_of(family, torch.float64)
    sizes: list[int] = []
    collate = backbone.collate
    expert = random_expert(backbone, "lora", 1)
    weights = torch.tensor([e.weight for e in uneven], dtype=torch.float64)
    with attached(backbone, expert.config, expert.tensors) as site:
        optimizer = torch.optim.AdamW(site.parameters.values(), lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            (backbone.loss(collate(uneven)) * weights).mean().backward()
            optimizer.step()
        expected = {k: p.detach().clone() for k, p in site.parameters.items()}
    assert len(parts_of_similar_length([text_length(e) for e in uneven])) > 1
    monkeypatch.setattr(backbone, "collate", lambda part: sizes.append(len(part)) or collate(part))
    mixture, config = build_mixture([expert], train="experts")
    settings = TrainSettings(
        learning_rate=1e-2, steps=2, batch_size=8, schedule="constant", warmup=0.0, max_grad_norm=0.0
    )
    fit(backbone, mixture, config, uneven, settings)
    assert max(sizes) < len(uneven)
    for key, tensor in mixture().items():
        torch.testing.assert_close(tensor.detach(), expected[key], rtol=1e-6, atol=1e-9)
