"""The task graph against slow loops over pairs; a pool's graph names whom it leaves out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, RefusedError, UnknownNameError
from pituning.experts import ExpertPool
from pituning.similarity import TaskEmbedding
from pituning.similarity.graph import TaskGraph, pool_graph, task_graph
from tests.similarity.test_measures import by_hand, embedding, random_fisher


def random_graph(count: int, seed: int = 0) -> TaskGraph:
    values = np.random.default_rng(seed).uniform(size=(count, count))
    matrix = np.triu(values, 1) + np.triu(values, 1).T + np.eye(count)
    return TaskGraph("x", tuple(f"t{n}" for n in range(count)), tuple(map(tuple, matrix.tolist())))


@pytest.fixture
def pool(bert: Backbone, random_expert: Any, tmp_path: Path) -> ExpertPool:
    """Four LoRA experts; three of them have a shared embedding."""
    pool = ExpertPool(tmp_path / "pool")
    for seed, name in enumerate("abcd"):
        pool.add(random_expert(bert, "lora", seed), name)
    for seed, name in enumerate("abc"):
        embedding(random_fisher(seed), task=f"task-{seed}", reference="shared").save(pool.folder / name)
    return pool


def make_infinite(path: Path, key: str) -> None:
    """Put an infinite value into a tensor of a stored embedding."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - no mapping
    tensors[key][1] = torch.inf
    safetensors.torch.save_file(tensors, path, metadata=metadata)


class TestTaskGraph:
    @pytest.mark.parametrize("kind", ["fisher-cosine", "fisher", "fisher-paper"])
    def test_every_pair_has_the_similarity_computed_by_hand(self, kind: str) -> None:
        fishers = {f"t{seed}": random_fisher(seed) for seed in range(4)}
        graph = task_graph({name: embedding(f) for name, f in fishers.items()}, kind)
        slow = [[1.0 if a == b else by_hand(fishers[a], fishers[b], kind) for b in fishers] for a in fishers]
        np.testing.assert_allclose(graph.matrix, slow, rtol=1e-9)

    def test_a_tensor_without_fisher_in_one_task_is_left_out_for_all(self) -> None:
        fishers = [random_fisher(seed) for seed in range(3)]
        fishers[1]["a.bias"].zero_()
        graph = task_graph({str(n): embedding(f) for n, f in enumerate(fishers)})
        for f in fishers:
            del f["a.bias"]
        assert graph.matrix[0][2] == pytest.approx(by_hand(fishers[0], fishers[2], "fisher-cosine"), rel=1e-9)

    def test_nothing_in_common_is_an_error_and_not_zero(self) -> None:
        zero = {key: torch.zeros_like(f) for key, f in random_fisher(0).items()}
        with pytest.raises(ExpertError, match="nothing to compare"):
            task_graph({"a": embedding(random_fisher(0)), "b": embedding(zero)})

    def test_embeddings_at_different_shared_experts_are_refused(self) -> None:
        left = embedding(random_fisher(0), reference="shared", reference_hash="x")
        right = embedding(random_fisher(1), reference="shared", reference_hash="y")
        with pytest.raises(ExpertError, match="different shared experts"):
            task_graph({"a": left, "b": right})


class TestEdges:
    @pytest.mark.parametrize("nearest", [1, 3, 20])
    def test_nearest_takes_each_nodes_most_similar_others(self, nearest: int) -> None:
        graph = random_graph(9)
        expected = set()
        for node in range(9):
            others = sorted((other for other in range(9) if other != node), key=lambda o: -graph.matrix[node][o])
            expected |= {tuple(sorted((node, other))) for other in others[:nearest]}
        edges = graph.edges(nearest=nearest)
        assert {(e.left, e.right) for e in edges} == expected
        assert [e.similarity for e in edges] == sorted((graph.matrix[i][j] for i, j in expected), reverse=True)

    def test_threshold_takes_every_pair_so_similar(self) -> None:
        graph = random_graph(9)
        edges = graph.edges(threshold=0.7)
        slow = {(i, j) for i in range(9) for j in range(i + 1, 9) if graph.matrix[i][j] >= 0.7}
        assert {(e.left, e.right) for e in edges} == slow
        assert 0 < len(slow) < 36
        assert graph.edges(threshold=2.0) == []

    def test_both_take_the_nearest_that_are_so_similar(self) -> None:
        graph = random_graph(9)
        nearest, similar = graph.edges(nearest=2), graph.edges(threshold=0.7)
        assert set(graph.edges(nearest=2, threshold=0.7)) == set(nearest) & set(similar)


def test_clusters_stand_together() -> None:
    group = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    matrix = np.where(group[:, None] == group, 0.9, 0.2) + 0.05 * np.array(random_graph(10).matrix)
    order = TaskGraph("x", tuple(map(str, range(10))), tuple(map(tuple, matrix.tolist()))).clustered()
    assert sorted(order) == list(range(10))
    assert sum(group[a] != group[b] for a, b in pairwise(order)) == 2


class TestPoolGraph:
    def test_is_the_task_graph_of_the_stored_embeddings(self, pool: ExpertPool) -> None:
        found = pool_graph(pool)
        slow = by_hand(random_fisher(0), random_fisher(2), "fisher-cosine")
        assert found.graph.kind == "fisher-cosine (shared)"
        assert found.graph.names == ("a", "b", "c")
        assert found.graph.matrix[0][2] == pytest.approx(slow, rel=1e-6)
        assert [card.name for card in found.cards] == ["a", "b", "c"]
        assert "pituning embed d --reference shared" in found.left_out["d"]

    def test_weights_compare_what_was_trained(self, pool: ExpertPool, lora_deltas: Any) -> None:
        found = pool_graph(pool, "weights")
        left, right = (lora_deltas(pool.load(name)) for name in "bd")
        slow = np.mean([float((left[m] * right[m]).sum() / left[m].norm() / right[m].norm()) for m in left])
        assert found.graph.names == ("a", "b", "c", "d")
        assert found.graph.matrix[1][3] == pytest.approx(slow, rel=1e-9)

    def test_weights_of_other_methods_need_the_backbone(
        self, bert: Backbone, random_expert: Any, tmp_path: Path
    ) -> None:
        pool = ExpertPool(tmp_path / "other")
        for seed, name in enumerate("ab"):
            pool.add(random_expert(bert, "bottleneck", seed), name)
        with pytest.raises(RefusedError, match="--backbone"):
            pool_graph(pool, "weights")
        assert 0 < abs(pool_graph(pool, "weights", backbone=bert).graph.matrix[0][1]) < 1

    def test_broken_experts_are_named_with_what_is_wrong(self, pool: ExpertPool) -> None:
        path = pool.folder / "a" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
        make_infinite(pool.folder / "b" / "task_embedding.shared.safetensors", "a.bias")
        with pytest.raises(ExpertError, match="has 1 that can be compared") as caught:
            pool_graph(pool)
        for part in ("a: ", "truncated", "b: ", "not finite in tensor a.bias", "d: "):
            assert part in str(caught.value)

    def test_tensors_that_nothing_compares_are_named(self, pool: ExpertPool) -> None:
        stored = TaskEmbedding.load(pool.folder / "b", "shared")
        replace(stored, fisher={**stored.fisher, "a.bias": torch.zeros(4)}).save(pool.folder / "b")
        assert pool_graph(pool).skipped == ("a.bias",)

    def test_experts_that_do_not_compare_are_refused(
        self, pool: ExpertPool, bert: Backbone, t5: Backbone, random_expert: Any
    ) -> None:
        pool.add(random_expert(bert, "bottleneck", 7), "other")
        with pytest.raises(RefusedError, match="bottleneck and lora: choose with --method"):
            pool_graph(pool)
        assert pool_graph(pool, method="lora").graph.names == ("a", "b", "c")
        pool.add(random_expert(t5, "lora", 8), "foreign")
        with pytest.raises(RefusedError, match="tiny-t5"):
            pool_graph(pool, method="lora")
        assert pool_graph(pool, names=["a", "c"]).graph.names == ("a", "c")

    def test_unknown_words(self, pool: ExpertPool) -> None:
        for wrong in ({"kind": "cosine"}, {"reference": "mine"}, {"names": ["nobody"]}):
            with pytest.raises(UnknownNameError):
                pool_graph(pool, **wrong)  # type: ignore[arg-type]
