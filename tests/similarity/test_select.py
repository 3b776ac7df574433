"""Ranking a pool's experts for a target task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pituning.backbones.base import Backbone
from pituning.errors import (
    BackboneMismatchError,
    DataError,
    ExpertError,
    PituningError,
    RefusedError,
    UnknownNameError,
)
from pituning.example import Example
from pituning.experts import Expert, ExpertPool
from pituning.experts.expert import start_of
from pituning.methods import attached, folded, initial_tensors
from pituning.similarity import rank_experts
from pituning.similarity.embedding import shared_reference
from pituning.similarity.select import Ranking, audit_pool
from pituning.similarity.selection import select
from pituning.tasks import Task, load_task
from pituning.training.train_expert import train_expert
from pituning.training.trainer import TrainSettings

SOURCES = ("cr", "sst2", "cola")


@pytest.fixture
def data(tmp_path: Path, random_examples: Any) -> Path:
    """Tiny files for three of the built-in tasks."""
    for number, name in enumerate(SOURCES):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        rows = [f"{e.prompt}\t{i % 2}" for i, e in enumerate(random_examples(8, 50 + number))]
        (folder / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def pool(bert: Backbone, random_expert: Any, tmp_path: Path) -> ExpertPool:
    """Three LoRA experts, one per source task."""
    pool = ExpertPool(tmp_path / "pool")
    for number, name in enumerate(SOURCES):
        pool.add(random_expert(bert, "lora", number).with_card(name=f"{name}-lora", task=name))
    return pool


def log_loss(backbone: Backbone, expert: Expert, examples: tuple[Example, ...]) -> float:
    """Mean −log p(right choice), one example at a time."""
    with torch.no_grad(), attached(backbone, expert.config, expert.tensors):
        return float(torch.cat([backbone.loss(backbone.collate([e])) for e in examples]).double().mean())


def fisher(backbone: Backbone, expert: Expert, task: Task) -> dict[str, Any]:
    with attached(backbone, expert.config, expert.tensors) as site:
        parameters = list(site.parameters.values())
        each = [torch.autograd.grad(backbone.loss(backbone.collate([e]))[0], parameters) for e in task.split("train")]
        return {k: np.mean([g[i].double().numpy() ** 2 for g in each], axis=0) for i, k in enumerate(site.parameters)}


def fisher_cosine(left: dict[str, Any], right: dict[str, Any]) -> float:
    values = [(left[k] * right[k]).sum() / np.sqrt((left[k] ** 2).sum() * (right[k] ** 2).sum()) for k in left]
    return float(np.mean(values))


def assert_ranking(found: Any, expected: dict[str, float], tolerance: float = 1e-5) -> None:
    names = [e.name for e in found.experts]
    assert names == sorted(expected, key=lambda n: -expected[n])
    for name, value in zip(names, found.similarities, strict=True):
        assert value == pytest.approx(expected[name], rel=tolerance), name


def test_score_is_minus_each_experts_log_loss(bert: Backbone, pool: ExpertPool, make_task: Any) -> None:
    task = make_task()
    found = rank_experts(bert, task, pool, kind="score")
    assert_ranking(found, {e.name: -log_loss(bert, e, task.split("train")) for e in pool})
    assert found.target == "target"
    assert [e.name for e in found.top(2)] == [e.name for e in found.experts[:2]]
    assert len(found.top(9)) == 3
    assert [e.name for e in found.above(found.similarities[1])] == [e.name for e in found.experts[:2]]
    assert str(found).splitlines()[1].startswith(f"  {found.experts[0].name}")


def test_five_of_lora_are_the_top_and_three_of_other_methods(random_experts: Any, bert: Backbone) -> None:
    for method, expected in (("lora", 5), ("bottleneck", 3)):
        experts = tuple(random_experts(bert, method, 6))
        found = Ranking("target", "score", experts, tuple(range(6, 0, -1)))
        assert found.top() == list(experts[:expected])
        assert select(found).experts == experts[:expected]
    assert Ranking("target", "score", (), ()).top() == []


def test_weights_is_the_cosine_of_the_changes(
    bert: Backbone, pool: ExpertPool, make_task: Any, random_expert: Any, lora_deltas: Any
) -> None:
    own = random_expert(bert, "lora", 9)
    mine = lora_deltas(own)
    expected = {}
    for expert in pool:
        deltas = lora_deltas(expert)
        cosines = [float((mine[m] * d).sum() / mine[m].norm() / d.norm()) for m, d in deltas.items()]
        expected[expert.name] = sum(cosines) / len(cosines)
    assert_ranking(rank_experts(bert, make_task(), pool, own, kind="weights"), expected)


def test_fisher_at_each_tasks_own_expert(
    bert: Backbone, pool: ExpertPool, make_task: Any, random_expert: Any, data: Path
) -> None:
    own, task = random_expert(bert, "lora", 9), make_task()
    target = fisher(bert, own, task)
    expected = {e.name: fisher_cosine(target, fisher(bert, e, load_task(e.card.task, data=data))) for e in pool}
    found = rank_experts(bert, task, pool, own, kind="fisher-cosine", reference="own", data=data)
    assert_ranking(found, expected)
    assert (pool.folder / "cr-lora" / "task_embedding.safetensors").is_file(), "embeddings are computed once"
    stored = rank_experts(bert, task, pool, own, kind="fisher-cosine", reference="own", data=data / "gone")
    assert stored.similarities == found.similarities


def test_fisher_of_all_tasks_at_one_shared_expert(bert: Backbone, pool: ExpertPool, make_task: Any, data: Path) -> None:
    task = make_task()
    found = rank_experts(bert, task, pool, kind="fisher-cosine", data=data)
    at = shared_reference(pool, "lora")
    target = fisher(bert, at, task)
    assert_ranking(
        found, {e.name: fisher_cosine(target, fisher(bert, at, load_task(e.card.task, data=data))) for e in pool}
    )


def test_a_stored_embedding_of_an_expert_that_changed_is_made_anew(
    bert: Backbone, pool: ExpertPool, make_task: Any, random_expert: Any, data: Path
) -> None:
    own, task = random_expert(bert, "lora", 9), make_task()
    rank_experts(bert, task, pool, own, kind="fisher-cosine", reference="own", data=data)
    stale = (pool.folder / "cr-lora" / "task_embedding.safetensors").read_bytes()
    changed = random_expert(bert, "lora", 77).with_card(name="cr-lora", task="cr")
    pool.add(changed)
    (pool.folder / "cr-lora" / "task_embedding.safetensors").write_bytes(stale)
    found = rank_experts(bert, task, pool, own, kind="fisher-cosine", reference="own", data=data)
    expected = fisher_cosine(fisher(bert, own, task), fisher(bert, changed, load_task("cr", data=data)))
    assert dict(zip([e.name for e in found.experts], found.similarities, strict=True))["cr-lora"] == pytest.approx(
        expected, rel=1e-5
    )


def test_leaves_out_the_target_other_methods_and_the_excluded(
    bert: Backbone, pool: ExpertPool, make_task: Any, random_expert: Any
) -> None:
    pool.add(random_expert(bert, "lora", 5).with_card(name="mine", task="target"))
    pool.add(random_expert(bert, "bottleneck", 6, name="narrow"))
    task = make_task()
    assert {e.name for e in rank_experts(bert, task, pool).experts} == {"cr-lora", "sst2-lora", "cola-lora", "narrow"}
    own = random_expert(bert, "lora", 9)
    assert {e.name for e in rank_experts(bert, task, pool, own).experts} == {"cr-lora", "sst2-lora", "cola-lora"}
    left = rank_experts(bert, task, pool, own, exclude=["cr-lora"])
    assert {e.name for e in left.experts} == {"sst2-lora", "cola-lora"}


def test_blends_of_what_has_seen_the_target_are_left_out_however_many_blends_lie_between(
    bert: Backbone, pool: ExpertPool, make_task: Any, random_expert: Any
) -> None:
    task, own = make_task(), random_expert(bert, "lora", 9, name="kept elsewhere")
    blends = {"one": ["cr-lora", "mine"], "two": ["one", "cola-lora"], "three": ["two"], "four": ["kept elsewhere"]}
    pool.add(random_expert(bert, "lora", 5).with_card(name="mine", task="target"))
    pool.add(random_expert(bert, "lora", 6).with_card(name="harmless", lineage=({"name": "cr-lora", "weight": 1.0},)))
    for seed, (name, parents) in enumerate(blends.items()):
        lineage = tuple({"name": p, "weight": 1 / len(parents)} for p in parents)
        pool.add(random_expert(bert, "lora", 20 + seed).with_card(name=name, lineage=lineage))
    free = {"cr-lora", "sst2-lora", "cola-lora", "harmless"}
    for exclude in ([], ["mine"], ["mine", "one", "two"]):
        found = rank_experts(bert, task, pool, own, exclude=exclude)
        assert {e.name for e in found.experts} == free, exclude
    assert {e.name for e in rank_experts(bert, task, pool, exclude=["mine"]).experts} == {*free, "four"}
    path = pool.folder / "one" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    broken = rank_experts(bert, task, pool, own, exclude=["one", "two", "three"])
    assert {e.name for e in broken.experts} == free, "a broken expert may be left out by its name"


def test_a_similarity_that_is_not_finite_is_an_error(
    bert: Backbone, pool: ExpertPool, make_task: Any, random_expert: Any
) -> None:
    pool.add(random_expert(bert, "lora", 5, scale=1e30).with_card(name="huge"))
    for kind, options in (("calibrated-score", {}), ("score", {}), ("average", {"average_of": ["score"]})):
        with pytest.raises(ExpertError, match=r"'(calibrated-)?score' to task 'target' .* number for 'huge' \(\+nan\)"):
            rank_experts(bert, make_task(), pool, kind=kind, **options)


def test_mistakes_are_explained(
    bert: Backbone, t5: Backbone, pool: ExpertPool, make_task: Any, random_expert: Any, tmp_path: Path
) -> None:
    task = make_task()
    with pytest.raises(UnknownNameError, match="unknown similarity 'fishr': did you mean 'fisher'"):
        rank_experts(bert, task, pool, kind="fishr")
    with pytest.raises(UnknownNameError, match="unknown reference point 'shard': did you mean 'shared'"):
        rank_experts(bert, task, pool, kind="fisher", reference="shard")
    with pytest.raises(PituningError, match="'weights' needs the target's own expert"):
        rank_experts(bert, task, pool, kind="weights")
    with pytest.raises(PituningError, match="'fisher' needs the target's own expert"):
        rank_experts(bert, task, pool, kind="fisher", reference="own")
    with pytest.raises(PituningError, match="k must be at least 1, not 0"):
        rank_experts(bert, task, pool).top(0)
    with pytest.raises(PituningError, match="holds no expert for another task"):
        rank_experts(bert, task, ExpertPool(tmp_path / "empty"))
    with pytest.raises(BackboneMismatchError, match="'cola-lora' was trained on backbone 'tiny-bert'"):
        rank_experts(t5, task, pool)


def test_audit_finds_sentences_that_target_and_sources_share(pool: ExpertPool, make_task: Any, data: Path) -> None:
    task = make_task()
    leaked = task.splits["test"][3]
    lines = (data / "cr" / "train.tsv").read_text().splitlines()
    lines[4] = f"{leaked.texts[0].upper()} !\t1"
    (data / "cr" / "train.tsv").write_text("\n".join(lines) + "\n")
    (data / "cola" / "train.tsv").write_text("nothing\n")
    report = audit_pool(pool, task, data)
    assert isinstance(report["cr-lora"], list)
    assert (leaked.id, "cr/train/3", 1.0) in [(o.left, o.right, o.similarity) for o in report["cr-lora"]]
    assert report["sst2-lora"] == []
    assert "train" in str(report["cola-lora"])


def test_the_measure_is_defined_on_the_common_start(
    bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path
) -> None:
    pool = ExpertPool(tmp_path)
    for seed in range(3):
        pool.add(random_expert(bert, "bottleneck", seed))
    own = random_expert(bert, "bottleneck", 9)
    start = initial_tensors(bert, own.config)
    expected = {}
    for expert in pool:
        pairs = [(own.tensors[k] - start[k], expert.tensors[k] - start[k]) for k in start]
        expected[expert.name] = float(np.mean([float((a * b).sum() / a.norm() / b.norm()) for a, b in pairs]))
    assert_ranking(rank_experts(bert, make_task(), pool, own, kind="weights"), expected, 1e-4)


def test_prefixes_trained_with_a_projection_are_measured_from_their_own_start(
    ofa: Backbone, random_expert: Any, make_task: Any, tmp_path: Path
) -> None:
    settings = TrainSettings(learning_rate=1e-2, steps=2, batch_size=4)
    options: dict[str, Any] = {"settings": settings, "length": 2, "projection": True, "projection_dim": 4}
    own, other = (train_expert(ofa, make_task(n), "prefix", name=n, **options) for n in ("target", "other"))
    pool = ExpertPool(tmp_path)
    pool.add(other)
    start = folded(*start_of(ofa, own))[1]
    pairs = [(own.tensors[k] - start[k], other.tensors[k] - start[k]) for k in start]
    expected = {"other": float(np.mean([float((a * b).sum() / a.norm() / b.norm()) for a, b in pairs]))}
    assert_ranking(rank_experts(ofa, make_task(), pool, own, kind="weights"), expected, 1e-4)
    pool.add(random_expert(ofa, "prefix", 1, name="plain", length=2, decoder_length=None))
    with pytest.raises(RefusedError, match=r"expert 'plain' was trained is another.*use another similarity"):
        rank_experts(ofa, make_task(), pool, own, kind="weights")


@pytest.mark.parametrize(("reference", "option"), [("shared", ""), ("own", " --reference own")])
def test_an_expert_of_an_unknown_task_needs_a_stored_embedding(
    bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path, reference: str, option: str
) -> None:
    pool = ExpertPool(tmp_path)
    pool.add(random_expert(bert, "lora", 1, name="mine"))
    with pytest.raises(DataError) as caught:
        rank_experts(bert, make_task(), pool, random_expert(bert, "lora", 2), kind="fisher", reference=reference)
    assert "expert 'mine' has no stored embedding" in str(caught.value)
    assert f"run `pituning embed mine{option} --train-file … [--task-kind grounding]` first" in str(caught.value)
