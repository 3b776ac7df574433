"""The Fisher diagonal of IA3, prefixes and soft prompts, by family, against the loop over single examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoHaConfig

from pituning.errors import RefusedError
from pituning.similarity.fisher import fisher_diagonal
from tests.methods.tiny import CHOICES, backbone, examples, expert
from tests.similarity.test_fisher import assert_close, loop_model, loop_true

METHODS = ("ia3", "prefix", "prompt")
EXACT = [(kind, torch.float64, 1e-10) for kind in ("t5", "bart", "gpt_neox")]
CASES = [*EXACT, ("llama", torch.float32, 1e-5)]  # Llama's norms compute in float32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "dtype", "tolerance"), CASES)
def test_true_labels_of_different_lengths(kind: str, dtype: torch.dtype, tolerance: float, method: str) -> None:
    model = backbone(kind, dtype)
    own, several = expert(model, method), examples(4)
    assert_close(fisher_diagonal(model, own, several, batch_size=3), loop_true(model, own, several), tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "dtype", "tolerance"), EXACT[2:])
def test_model_labels_over_closed_choices(kind: str, dtype: torch.dtype, tolerance: float, method: str) -> None:
    """Decoder-only scores continue from a cache: each layer is called for the prompts, and again for the answers."""
    model = backbone(kind, dtype)
    own, several = expert(model, method), examples(3, choices=CHOICES)
    found = fisher_diagonal(model, own, several, labels="model", batch_size=2)
    assert_close(found, loop_model(model, own, several), tolerance)


@pytest.mark.parametrize("method", ["ia3", "prefix"])
def test_on_an_encoder(backbone_of: Any, random_examples: Any, method: str) -> None:
    model = backbone_of("encoder", torch.float64)
    own, several = expert(model, method), random_examples(5)
    assert_close(fisher_diagonal(model, own, several, batch_size=3), loop_true(model, own, several), 1e-10)


def test_layers_without_per_example_gradients_are_named(bert: Any, random_examples: Any) -> None:
    own = expert(bert, LoHaConfig(r=2, target_modules=["query"]))
    with pytest.raises(RefusedError, match=r"query\.hada_w\w+ \[.* belongs to a Linear; exact per-example"):
        fisher_diagonal(bert, own, random_examples(2))
