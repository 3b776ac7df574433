"""Task embeddings: what they record, and that they come back from disk as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, PituningError
from pituning.experts import ExpertPool
from pituning.methods import attached
from pituning.similarity import TaskEmbedding, embed_task
from pituning.similarity import embedding as embedding_module
from pituning.similarity.compact import anchor_of, compact_fisher, compact_similarity, hadamard
from pituning.similarity.embedding import pool_embedding, shared_reference
from pituning.similarity.fisher import fisher_diagonal
from pituning.similarity.index import open_index
from pituning.similarity.measures import compact_agreement, fisher_similarity
from pituning.similarity.settling import settled_fisher
from pituning.tasks.task import Task


def test_records_fisher_loss_and_where_it_was_taken(
    bert: Backbone, random_expert: Any, make_task: Any, distance: Any
) -> None:
    task, expert = make_task(), random_expert(bert, "lora", 1)
    found = embed_task(bert, expert, task)
    examples = task.split("train")
    with attached(bert, expert.config, expert.tensors) as site:
        losses = [bert.loss(bert.collate([e]))[0] for e in examples]
        gradients = [torch.autograd.grad(loss, list(site.parameters.values())) for loss in losses]
        slow = {k: sum(g[i].double() ** 2 for g in gradients) / len(examples) for i, k in enumerate(site.parameters)}
    assert (found.task, found.samples, found.labels, found.reference) == ("target", 12, "true", "own")
    assert found.mean_loss == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-5)
    assert found.fisher.keys() == slow.keys() == expert.tensors.keys()
    assert all(f.dtype == torch.float32 and distance(f, slow[k]) < 1e-5 for k, f in found.fisher.items())
    other = random_expert(bert, "lora", 2)
    assert embed_task(bert, other, task, max_examples=4).samples == 4
    assert embed_task(bert, other, task, max_examples=4).reference_hash != found.reference_hash


def test_comes_back_from_disk_as_it_was(bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path) -> None:
    embedding = embed_task(bert, random_expert(bert, "lora", 3), make_task(), reference="shared")
    embedding.save(tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]
    loaded = TaskEmbedding.load(tmp_path, "shared")
    assert all(torch.equal(loaded.fisher[k], f) for k, f in embedding.fisher.items())
    assert replace(loaded, fisher={}) == replace(embedding, fisher={})


def test_missing_and_broken_files(bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match="no task embedding at the own reference point"):
        TaskEmbedding.load(tmp_path)
    path = embed_task(bert, random_expert(bert), make_task()).save(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ExpertError, match=r"task_embedding\.safetensors cannot be read"):
        TaskEmbedding.load(tmp_path)


@pytest.mark.parametrize("record", ['{"task": "x"}', "[1]", "3", "none"])
def test_a_record_of_something_else_is_a_broken_file(
    bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path, record: str
) -> None:
    pool = ExpertPool(tmp_path)
    for seed in range(2):
        pool.add(random_expert(bert, "lora", seed, name=f"e{seed}"))
        embedding = embed_task(bert, random_expert(bert, "lora", seed), make_task())
        path = embedding.save(tmp_path / f"e{seed}")
    safetensors.torch.save_file(dict(embedding.fisher), path, metadata={"pituning": record})
    with pytest.raises(ExpertError, match=r"task_embedding\.safetensors cannot be read .*; embed the expert again"):
        TaskEmbedding.load(tmp_path / "e1")
    assert list(open_index(pool).problems) == ["e1"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_written_nor_read(
    bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path, value: float
) -> None:
    embedding = embed_task(bert, random_expert(bert, "lora", 3), make_task())
    key = list(embedding.fisher)[1]
    spoilt = {**embedding.fisher, key: embedding.fisher[key].clone().fill_(value)}
    said = rf"is not finite in tensor {key} \[\d+, \d+\]: {spoilt[key].numel()} values are NaN or infinite"
    with pytest.raises(ExpertError, match=f"the task embedding of 'target' {said}"):
        replace(embedding, fisher=spoilt).save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = embedding.save(tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        safetensors.torch.save_file(spoilt, path, metadata=file.metadata())
    with pytest.raises(ExpertError, match=rf"task_embedding\.safetensors {said}"):
        TaskEmbedding.load(tmp_path)
    huge = random_expert(bert, "lora", 5, scale=1e30)
    with pytest.raises(ExpertError, match=r"the Fisher information of expert 'lora-5' on task 'target' is not finite"):
        embed_task(bert, huge, make_task())


def test_the_shared_reference_has_the_start_and_the_licence_that_all_have(
    bert: Backbone, random_expert: Any, tmp_path: Path
) -> None:
    prompting = {"chat": False, "separator": " "}
    for method, licences in (("lora", ("mit", "mit")), ("bottleneck", ("mit", "apache-2.0"))):
        pool = ExpertPool(tmp_path / method)
        for seed, licence in enumerate(licences):
            expert = random_expert(bert, method, seed)
            pool.add(expert.with_card(licence=licence, training={"steps": 3, "prompting": prompting}))
        card = shared_reference(pool, method).card
        assert card.init_hash == ("" if method == "lora" else expert.card.init_hash)
        assert card.licence == ("mit" if method == "lora" else "")
        assert card.training == {"prompting": prompting}


def test_the_shared_reference_is_the_pools_mean_and_stays(
    bert: Backbone, random_expert: Any, lora_deltas: Any, distance: Any, tmp_path: Path
) -> None:
    pool = ExpertPool(tmp_path)
    experts = [random_expert(bert, "lora", s, r=2 + s, name=f"e{s}") for s in range(3)]
    for expert in experts:
        pool.add(expert)
    pool.add(random_expert(bert, "bottleneck", 9))
    reference = shared_reference(pool, "lora")
    found = lora_deltas(reference)
    for module, delta in found.items():
        assert distance(delta, sum(lora_deltas(e)[module] for e in experts) / 3) < 1e-6
    assert {p["name"] for p in reference.card.lineage} == {"e0", "e1", "e2"}
    pool.add(random_expert(bert, "lora", 5, name="later"))
    again = shared_reference(pool, "lora")
    assert all(torch.equal(again.tensors[k], t) for k, t in reference.tensors.items())
    assert pool.names() == ["bottleneck-9", "e0", "e1", "e2", "later"], "the reference is not an expert of the pool"


def test_a_pool_without_experts_has_no_reference(tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match="no 'lora' expert"):
        shared_reference(ExpertPool(tmp_path), "lora")


def test_the_reference_of_ofa_experts_says_what_to_import(ofa: Backbone, random_expert: Any, tmp_path: Path) -> None:
    pool = ExpertPool(tmp_path)
    for seed in range(2):
        expert = random_expert(ofa, "lora", seed)
        pool.add(expert.with_card(training={"family": "seq2seq", "architecture": "ofa", "steps": 3}))
    reference = shared_reference(pool, "lora")
    assert reference.card.training == {"family": "seq2seq", "architecture": "ofa"}
    assert "\nimport pituning.backbones.ofa.modeling" in (reference.save(tmp_path / "r") / "README.md").read_text()


def random_embedding(seed: int, shapes: dict[str, tuple[int, ...]]) -> TaskEmbedding:
    generator = torch.Generator().manual_seed(seed)
    fisher = {
        k: torch.randn(s, generator=generator) ** 2 * 10.0 ** (i % 7 - 3) for i, (k, s) in enumerate(shapes.items())
    }
    return TaskEmbedding(fisher, f"t{seed}", 8, "true", "own", str(seed), 1.0, 1.0)


def scrambled(number: int) -> int:
    """SplitMix64's output for the state after one step from ``number`` steps, in Python's whole numbers."""
    mask = (1 << 64) - 1
    z = (number + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


class TestCompact:
    def slow(self, fisher: dict[str, Tensor], numbers: int) -> list[bool]:
        """The first bits, each from its own direction, entry by entry."""
        parts = [fisher[key].double().flatten() for key in sorted(fisher)]
        entries = [value / float(part.norm()) for part in parts for value in part.tolist()]
        keys = [scrambled((1 << 40) + bucket) for bucket in range(1 << 16)]
        rows = sorted(range(1 << 16), key=lambda bucket: keys[bucket])[:numbers]
        found = []
        for row in rows:
            total = 0.0
            for place, value in enumerate(entries):
                number = scrambled(place)
                bucket = number % (1 << 16)
                minus = (
                    (number >> 63) + (keys[bucket] >> 63) + (row & bucket).bit_count()
                )  # Hadamard's entry is ±1 by parity
                total += -value if minus % 2 else value
            found.append(total > 0)
        return found

    def test_bits_are_signs_of_inner_products(self) -> None:
        embedding = random_embedding(1, {"b.weight": (10, 21), "a": (70,)})
        found = embedding.compact()
        assert (found.dtype, found.shape, found.nbytes) == (np.uint8, (1024,), 1024)
        assert found[:8].view(np.float64)[0] == 0, "there is no anchor"
        assert np.unpackbits(found[8:])[:300].astype(bool).tolist() == self.slow(dict(embedding.fisher), 300)

    def test_what_is_common_is_exact_and_the_rest_orthogonal_to_the_anchor(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {"a.weight": (30, 41), "b": (500,)}
        embeddings = [random_embedding(s, shapes) for s in range(4)]
        anchor = anchor_of(e.fisher for e in embeddings)
        units = [
            np.concatenate([(f / f.norm()).double().flatten().numpy() for _, f in sorted(e.fisher.items())]) / 2**0.5
            for e in embeddings
        ]
        mean = sum(units)
        np.testing.assert_allclose(anchor, mean / np.linalg.norm(mean), rtol=1e-5)
        for embedding, unit in zip(embeddings, units, strict=True):
            found = embedding.compact(anchor)
            assert found.nbytes == 1024
            assert found[:8].view(np.float64)[0] == pytest.approx(float(unit @ anchor), rel=1e-6)
        near = [embeddings[0], replace(embeddings[0], fisher={k: f + 1e-3 for k, f in embeddings[0].fisher.items()})]
        exact = fisher_similarity(near[0], near[1], "fisher-cosine")
        # the error of the angle shrinks with the rests' lengths
        rest = 1 - float(units[0] @ anchor) ** 2
        found = compact_similarity(near[0].compact(anchor), near[1].compact(anchor))
        assert abs(found - exact) < 4 * np.pi * 0.5 / 8128**0.5 * rest
        with pytest.raises(ExpertError, match="no part along an anchor of 1730"):
            random_embedding(1, {"a": (5,)}).compact(anchor)

    @pytest.mark.parametrize("shapes", [{"a.weight": (30, 41), "b": (500,)}, {"a": (8, 10), "b": (6,), "c": (1,)}])
    def test_approximates_fisher_cosine(self, shapes: dict[str, tuple[int, ...]]) -> None:
        left, right = (random_embedding(s, shapes) for s in (3, 4))
        found = compact_similarity(left.compact(), right.compact())
        exact = fisher_similarity(left, right, "fisher-cosine")
        # four standard errors of an angle read from 8,192 bits
        assert abs(np.arccos(found) - np.arccos(exact)) < 4 * np.pi * 0.5 / 8128**0.5
        assert compact_similarity(left.compact(), left.compact()) == 1

    @pytest.mark.parametrize("power", [0, 2, 8])
    def test_hadamard_is_the_product_with_the_matrix(self, power: int) -> None:
        x = np.random.default_rng(power).normal(size=2**power)
        matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(2**power)] for i in range(2**power)])
        np.testing.assert_allclose(hadamard(x), matrix @ x, atol=1e-12)

    def test_neither_the_scale_of_a_tensor_nor_the_order_of_names_matters(self) -> None:
        fisher = dict(random_embedding(6, {f"l{i}": (6, 50) for i in range(90)}).fisher)
        scaled = {k: f * 2.0 ** (int(k[1:]) % 5) for k, f in reversed(fisher.items())}
        np.testing.assert_array_equal(compact_fisher(scaled), compact_fisher(fisher))

    def test_a_tensor_without_fisher_has_no_part(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {"a": (20,), "b": (20,), "c": (20,)}
        left, right = (random_embedding(s, shapes) for s in (7, 8))
        dead = [replace(e, fisher={**e.fisher, "b": torch.zeros(20)}) for e in (left, right)]
        assert compact_similarity(dead[0].compact(), dead[1].compact()) == pytest.approx(
            fisher_similarity(*dead, "fisher-cosine"), abs=0.07
        )
        assert not compact_fisher({k: torch.zeros(s) for k, s in shapes.items()}).any()

    def test_what_does_not_compare_is_refused(self) -> None:
        with pytest.raises(ExpertError, match=r"shapes \[16\] and \[24\]: one of them is broken or of another version"):
            compact_similarity(np.ones(16, np.uint8), np.ones(24, np.uint8))

    def test_agreement_counts_the_pairs_that_both_rank_alike(self) -> None:
        shapes = {"a": (300,), "b": (50, 20)}
        embeddings = [random_embedding(s, shapes) for s in range(6)]
        anchor = anchor_of(e.fisher for e in embeddings)
        expected = []
        for target in embeddings:
            others = [e for e in embeddings if e is not target]
            full = [fisher_similarity(target, e, "fisher-cosine") for e in others]
            brief = [compact_similarity(target.compact(anchor), e.compact(anchor)) for e in others]
            pairs = [(i, j) for i in range(5) for j in range(i)]
            expected.append(np.mean([np.sign(full[i] - full[j]) * np.sign(brief[i] - brief[j]) for i, j in pairs]))
        assert compact_agreement(embeddings) == pytest.approx(np.mean(expected), abs=1e-12)
        with pytest.raises(PituningError, match="2 embeddings cannot be ranked"):
            compact_agreement(embeddings[:2])


class TestSettling:
    def test_a_target_takes_examples_until_its_ranking_rests(
        self, bert: Backbone, random_expert: Any, random_examples: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expert = random_expert(bert, "lora", 1)
        task = Task("many", (), {"train": random_examples(40, 1)})
        seen = []

        def ranking(fisher: Mapping[str, Tensor]) -> list[str]:
            seen.append(fisher)
            return ["a"]

        monkeypatch.setattr(embedding_module, "settled_fisher", partial(settled_fisher, first=4, agreement=-1.0))
        found = embed_task(bert, expert, task, max_examples=32, ranking=ranking)
        assert (found.settled, found.samples, len(seen)) == (True, 16, 3)
        order = sorted(task.split("train"), key=lambda e: hashlib.sha256(e.id.encode()).hexdigest())
        plain = fisher_diagonal(bert, expert, order[:16]).mean()
        for key, fisher in found.fisher.items():
            torch.testing.assert_close(fisher.double(), plain[key].double(), rtol=1e-5, atol=0)
        turns = iter("abcdef")
        assert embed_task(bert, expert, task, max_examples=32, ranking=lambda f: next(turns)).settled is False
        assert embed_task(bert, expert, task, max_examples=32).settled is None

    def test_what_was_summed_for_an_experts_embedding_is_gone_when_it_is_done(
        self, bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = ExpertPool(tmp_path)
        pool.add(random_expert(bert, "lora", 1, name="e").with_card(task="known"))
        task = make_task()
        monkeypatch.setattr(embedding_module, "task_names", lambda: ["known"])
        monkeypatch.setattr(embedding_module, "load_task", lambda name, data=None: task)
        found = pool_embedding(bert, pool, "e", "own")
        assert found.samples == len(task.split("train"))
        assert not list(tmp_path.rglob("*partial*"))
        assert pool.names() == ["e"]
