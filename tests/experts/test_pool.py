"""A pool is a folder of experts: what lies there whole is listed, everything else is not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, ExpertError, UnknownNameError
from pituning.experts import ExpertPool


@pytest.fixture
def pool(bert: Backbone, random_expert: Any, tmp_path: Path) -> ExpertPool:
    """Three experts of two methods."""
    pool = ExpertPool(tmp_path / "pool")
    pool.add(random_expert(bert, "lora", 1), "b")
    pool.add(random_expert(bert, "lora", 2), "a")
    pool.add(random_expert(bert, "bottleneck", 3), "c")
    return pool


def test_lists_by_name_and_loads_what_was_added(pool: ExpertPool, bert: Backbone, random_expert: Any) -> None:
    assert pool.names() == ["a", "b", "c"]
    assert len(pool) == 3
    assert [e.name for e in pool] == ["a", "b", "c"]
    assert [e.name for e in pool.load_all(bert, exclude=["b"])] == ["a", "c"]
    loaded, added = pool.load("a"), random_expert(bert, "lora", 2)
    assert all(torch.equal(loaded.tensors[k], t) for k, t in added.tensors.items())


def test_a_renamed_folder_renames_its_expert(pool: ExpertPool) -> None:
    (pool.folder / "a").rename(pool.folder / "z")
    assert pool.names() == ["b", "c", "z"]
    assert pool.load("z").name == "z"


def test_adding_again_replaces(pool: ExpertPool, bert: Backbone, random_expert: Any) -> None:
    other = random_expert(bert, "lora", 9)
    pool.add(other, "a")
    assert pool.names() == ["a", "b", "c"]
    assert all(torch.equal(pool.load("a").tensors[k], t) for k, t in other.tensors.items())


def test_a_deleted_expert_stays_deleted(
    pool: ExpertPool, bert: Backbone, random_expert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that died after swapping the folders leaves the replaced version behind; it must not come back."""
    new = random_expert(bert, "lora", 9)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        pool.add(new, "a")
    assert all(torch.equal(pool.load("a").tensors[k], t) for k, t in new.tensors.items())
    shutil.rmtree(pool.folder / "a")
    assert pool.names() == ["b", "c"]


def test_other_things_in_the_folder_are_not_experts(pool: ExpertPool) -> None:
    (pool.folder / "notes.txt").write_text("x")
    (pool.folder / "empty").mkdir()
    (pool.folder / ".b.12345.partial").mkdir()
    (pool.folder / ".b.12345.partial" / "adapter_config.json").write_text("{}")
    assert pool.names() == ["a", "b", "c"]


def test_a_folder_that_does_not_exist_is_an_empty_pool(tmp_path: Path) -> None:
    pool = ExpertPool(tmp_path / "none")
    assert (pool.names(), len(pool), list(pool), pool.load_all()) == ([], 0, [], [])


def test_an_unknown_name_suggests_the_nearest(bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
    pool = ExpertPool(tmp_path)
    pool.add(random_expert(bert), "sst2-lora")
    with pytest.raises(
        UnknownNameError, match=f"unknown expert 'sst-lora': did you mean 'sst2-lora'.*pool is {tmp_path}"
    ):
        pool.load("sst-lora")


@pytest.mark.parametrize("name", ["../outside", "sub/expert", ".hidden", ""])
def test_names_that_would_not_be_listed_are_refused(
    pool: ExpertPool, bert: Backbone, random_expert: Any, name: str, message: Any
) -> None:
    before = sorted(p.name for p in pool.folder.parent.rglob("*"))
    assert repr(name) in message(pool.add, random_expert(bert, "lora", 5, name=name or "x").with_card(name=name))
    assert sorted(p.name for p in pool.folder.parent.rglob("*")) == before


def test_verify_reports_each_experts_problem(
    pool: ExpertPool, bert: Backbone, t5: Backbone, random_expert: Any
) -> None:
    pool.add(random_expert(t5, "lora", 4), "foreign")
    data = (pool.folder / "b" / "adapter_model.safetensors").read_bytes()
    (pool.folder / "b" / "adapter_model.safetensors").write_bytes(data[:-7])
    report = pool.verify(bert)
    assert (report["a"], report["c"]) == ("", "")
    assert "truncated" in report["b"]
    assert "trained on backbone 'tiny-t5'" in report["foreign"]
    with pytest.raises(ExpertError, match="truncated"):
        pool.load_all()


def test_verify_reports_a_configuration_that_peft_refuses(pool: ExpertPool, bert: Backbone) -> None:
    card = pool.folder / "a" / "expert.json"
    card.unlink()  # a foreign PEFT folder
    config = pool.folder / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"query"', '"qwery"').replace('"value"', '"valve"'))
    report = pool.verify(bert)
    assert "qwery" in report["a"]
    assert report["b"] == ""


def test_experts_of_another_backbone_are_refused(pool: ExpertPool, t5: Backbone) -> None:
    with pytest.raises(BackboneMismatchError, match="'a' was trained on backbone 'tiny-bert'"):
        pool.load_all(t5)
