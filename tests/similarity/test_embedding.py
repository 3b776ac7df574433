"""Task embeddings: what they record, and that they come back from disk as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError
from pituning.experts import ExpertPool
from pituning.methods import attached
from pituning.similarity import TaskEmbedding, embed_task
from pituning.similarity.embedding import shared_reference


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
