"""Task embeddings: what they record, and that they come back from disk as they were."""

from __future__ import annotations

from dataclasses import replace
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
from pituning.similarity.compact import compact_fisher, compact_similarity
from pituning.similarity.embedding import load_compact, shared_reference
from pituning.similarity.measures import compact_agreement, fisher_similarity


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


class TestCompact:
    def slow(self, left: dict[str, Tensor], right: dict[str, Tensor], count: int) -> float:
        """Mean over tensors of the cosine between the means of ``count`` blocks, by loops."""
        cosines = []
        for key in left:
            sides = []
            for fisher in (left[key], right[key]):
                flat = fisher.double().flatten().tolist()
                base, more = divmod(len(flat), count)
                sizes = [base + (i < more) for i in range(count)]
                ends = [sum(sizes[: i + 1]) for i in range(count)]
                sides.append([sum(flat[e - s : e]) / s for s, e in zip(sizes, ends, strict=True)])
            a, b = map(np.array, sides)
            cosines.append(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))
        return float(np.mean(cosines))

    def test_an_inner_product_is_the_mean_cosine_of_the_block_means(self) -> None:
        shapes = {"a.weight": (30, 41), "b.weight": (500,), "c.weight": (7, 11, 13)}
        left, right = (random_embedding(s, shapes) for s in (1, 2))
        found = left.compact()
        assert (found.dtype, found.shape, found.nbytes) == (np.float32, (255,), 1020)
        assert compact_similarity(found, right.compact()) == pytest.approx(
            self.slow(dict(left.fisher), dict(right.fisher), 85), rel=1e-6
        )
        assert compact_similarity(found, found) == pytest.approx(1, rel=1e-6)

    def test_small_tensors_are_kept_whole_and_give_fisher_cosine(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {"a": (8, 10), "b": (6,), "c": (1,)}
        left, right = (random_embedding(s, shapes) for s in (3, 4))
        assert compact_similarity(left.compact(), right.compact()) == pytest.approx(
            fisher_similarity(left, right, "fisher-cosine"), rel=1e-6
        )

    @pytest.mark.parametrize("tensors", [1, 24, 63, 64, 65, 100, 256, 700])
    def test_is_never_longer_than_a_kilobyte(self, tensors: int) -> None:
        found = random_embedding(5, {f"layer.{i}.weight": (4, 9) for i in range(tensors)}).compact()
        assert len(found) <= 256
        assert np.linalg.norm(found) == pytest.approx(1, rel=1e-6)
        assert (found > 0).all()

    def test_neither_the_scale_of_a_tensor_nor_the_order_of_names_matters(self) -> None:
        fisher = dict(random_embedding(6, {f"l{i}": (6, 50) for i in range(90)}).fisher)
        scaled = {k: f * 10.0 ** (int(k[1:]) % 5) for k, f in reversed(fisher.items())}
        np.testing.assert_allclose(compact_fisher(scaled), compact_fisher(fisher), rtol=1e-5)

    def test_a_tensor_without_fisher_has_no_part(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {"a": (20,), "b": (20,), "c": (20,)}
        left, right = (random_embedding(s, shapes) for s in (7, 8))
        dead = [replace(e, fisher={**e.fisher, "b": torch.zeros(20)}) for e in (left, right)]
        assert compact_similarity(dead[0].compact(), dead[1].compact()) == pytest.approx(
            fisher_similarity(*dead, "fisher-cosine"), rel=1e-6
        )
        nothing = compact_fisher({k: torch.zeros(s) for k, s in shapes.items()})
        assert nothing.shape == (60,)
        assert not nothing.any()

    def test_lies_beside_the_full_one_and_old_files_are_read(self, tmp_path: Path) -> None:
        embedding = random_embedding(9, {"a": (30, 30), "b": (400,)})
        path = embedding.save(tmp_path)
        assert np.array_equal(load_compact(tmp_path), embedding.compact())
        assert TaskEmbedding.load(tmp_path).fisher.keys() == {"a", "b"}
        with safetensors.safe_open(path, "pt") as file:
            record = file.metadata()["pituning"]
        safetensors.torch.save_file(dict(embedding.fisher), path, metadata={"pituning": record})
        np.testing.assert_array_equal(load_compact(tmp_path), embedding.compact())
        path.write_bytes(b"nothing")
        with pytest.raises(ExpertError, match=r"task_embedding\.safetensors cannot be read"):
            load_compact(tmp_path)
        with pytest.raises(ExpertError, match="no task embedding at the shared reference point"):
            load_compact(tmp_path, "shared")

    def test_what_does_not_compare_is_refused(self) -> None:
        short, long = np.ones(12, np.float32), np.ones(24, np.float32)
        with pytest.raises(ExpertError, match=r"shapes \[12\] and \[24\]: they are of different methods or backbones"):
            compact_similarity(short, long)
        with pytest.raises(ExpertError, match="is not finite"):
            compact_similarity(short, short * np.float32("nan"))

    def test_agreement_counts_the_pairs_that_both_rank_alike(self) -> None:
        shapes = {"a": (300,), "b": (50, 20)}
        embeddings = [random_embedding(s, shapes) for s in range(6)]
        expected = []
        for target in embeddings:
            others = [e for e in embeddings if e is not target]
            full = [fisher_similarity(target, e, "fisher-cosine") for e in others]
            brief = [compact_similarity(target.compact(), e.compact()) for e in others]
            pairs = [(i, j) for i in range(5) for j in range(i)]
            expected.append(np.mean([np.sign(full[i] - full[j]) * np.sign(brief[i] - brief[j]) for i, j in pairs]))
        assert compact_agreement(embeddings) == pytest.approx(np.mean(expected), abs=1e-12)
        small = [random_embedding(s, {"a": (40,), "b": (5, 5)}) for s in range(5)]
        assert compact_agreement(small) == pytest.approx(1), "nothing is lost of small tensors"
        with pytest.raises(PituningError, match="2 embeddings cannot be ranked"):
            compact_agreement(embeddings[:2])
