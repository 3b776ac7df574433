"""Searching a pool: the index follows the folder, and a search finds what a slow comparison with every expert finds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, PituningError, UnknownNameError
from pituning.experts import Expert, ExpertPool
from pituning.similarity import TaskEmbedding
from pituning.similarity import index as index_module
from pituning.similarity.compact import anchor_of, compact_similarity
from pituning.similarity.index import INDEX_FILE, open_index
from pituning.similarity.search import MetricBound, Wanted, compact_similarities, search_pool
from tests.similarity.test_graph import make_infinite
from tests.similarity.test_measures import by_hand, embedding

NAMES = tuple(f"e{n:02d}" for n in range(12))


def fisher(seed: int) -> dict[str, Tensor]:
    """One of three groups of tasks, plus noise of its own."""
    generators = [torch.Generator().manual_seed(s) for s in (seed % 3, 100 + seed)]
    shapes = {"a.weight": (40, 6), "a.bias": (40,), "b.weight": (6, 40)}
    return {k: sum(torch.randn(s, generator=g) ** 4 for g in generators) for k, s in shapes.items()}  # type: ignore[misc]


@pytest.fixture
def pool(bert: Backbone, random_expert: Any, tmp_path: Path) -> ExpertPool:
    """Twelve experts, every third one alike; the last has no embedding and the last but one a point of its own."""
    pool = ExpertPool(tmp_path / "pool")
    for n, name in enumerate(NAMES):
        expert = random_expert(bert, "bottleneck" if n == 5 else "lora", n, name=name)
        licence = ("apache-2.0", "MIT", "")[n % 3]
        pool.add(
            expert.with_card(task=f"task-{n % 6}", metrics={"accuracy": n / 20, "loss": 1 - n / 20}, licence=licence)
        )
        if n < 11:
            point = "elsewhere" if n == 10 else "here"
            embedding(fisher(n), task=f"task-{n % 6}", reference="shared", reference_hash=point).save(
                pool.folder / name
            )
    return pool


class TestIndex:
    def test_holds_every_card_and_compact_embedding(self, pool: ExpertPool) -> None:
        index = open_index(pool)
        assert (index.read, index.saved, index.problems) == (12, True, {})
        assert [entry.name for entry in index.entries] == list(NAMES)
        scores = compact_similarities(index, [0], "shared")
        anchor = anchor_of(fisher(n) for n in range(10))
        for row in range(10):
            slow = compact_similarity(embedding(fisher(0)).compact(anchor), embedding(fisher(row)).compact(anchor))
            assert scores[row] == pytest.approx(slow, rel=1e-5)
        assert np.isneginf(scores[10:]).all()
        assert index.vectors["shared"].dtype == np.uint8
        assert not index.vectors["own"].any()

    def test_is_the_same_when_it_is_read_again(self, pool: ExpertPool, monkeypatch: pytest.MonkeyPatch) -> None:
        first = open_index(pool)
        monkeypatch.setattr(index_module, "file_hash", lambda path: pytest.fail(f"{path} was read"))
        again = open_index(pool)
        assert (again.read, again.saved) == (0, True)
        assert again.entries == first.entries
        assert all(np.array_equal(again.vectors[r], first.vectors[r]) for r in first.vectors)

    def test_only_what_changed_is_read_again(self, pool: ExpertPool, bert: Backbone, random_expert: Any) -> None:
        open_index(pool)
        pool.add(random_expert(bert, "lora", 50), "new")
        pool.add(pool.load("e03").with_card(metrics={"accuracy": 0.9}))
        embedding(fisher(7), reference="shared", reference_hash="here").save(pool.folder / "e04")
        os.utime(pool.folder / "e05" / "expert.json")  # another time, the same bytes
        (pool.folder / "e06" / "expert.json").unlink()
        (pool.folder / "e07").rename(pool.folder / "z")
        index = open_index(pool)
        assert index.read == 5
        assert [entry.name for entry in index.entries] == sorted({*NAMES, "new", "z"} - {"e07"})
        found = {entry.name: entry for entry in index.entries}
        assert found["e03"].card is not None
        assert found["e03"].card.metrics == {"accuracy": 0.9}
        assert found["z"].card is not None
        assert found["z"].card.name == "z"
        row = [entry.name for entry in index.entries].index("e04")
        # the anchor stays that of the first ten
        compact = embedding(fisher(7)).compact(anchor_of(fisher(n) for n in range(10)))
        np.testing.assert_array_equal(index.vectors["shared"][row], compact)

    def test_the_anchor_is_made_anew_when_there_are_twice_as_many(
        self, pool: ExpertPool, bert: Backbone, random_expert: Any
    ) -> None:
        def add(number: int) -> None:
            name = f"n{number}"
            pool.add(random_expert(bert, "lora", number), name)
            embedding(fisher(number), reference="shared", reference_hash="here").save(pool.folder / name)

        open_index(pool)
        for number in range(20, 29):
            add(number)
        index = open_index(pool)  # 19 of them
        expected = embedding(fisher(3)).compact(anchor_of(fisher(n) for n in range(10)))
        np.testing.assert_array_equal(index.vectors["shared"][3], expected)
        add(29)
        index = open_index(pool)
        assert index.read == 1, "cards and files were as they are in the index"
        anchor = anchor_of(fisher(n) for n in (*range(10), *range(20, 30)))
        names = [entry.name for entry in index.entries]
        for number, name in ((3, "e03"), (29, "n29")):
            expected = embedding(fisher(number)).compact(anchor)
            np.testing.assert_array_equal(index.vectors["shared"][names.index(name)], expected)
        again = open_index(pool)
        assert (again.read, again.saved) == (0, True)
        np.testing.assert_array_equal(again.vectors["shared"], index.vectors["shared"])

    def test_broken_experts_are_named_and_the_others_found(self, pool: ExpertPool) -> None:
        card = pool.folder / "e01" / "expert.json"
        card.write_text(card.read_text()[:-20])
        tensors = pool.folder / "e02" / "adapter_model.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-7])
        make_infinite(pool.folder / "e04" / "task_embedding.shared.safetensors", "a.bias")
        shapes = pool.folder / "e06" / "expert.json"
        record = json.loads(shapes.read_text())
        key = next(iter(record["tensors"]))
        record["tensors"][key] = [1, 1]
        shapes.write_text(json.dumps(record))
        for read in (12, 0):
            index = open_index(pool)
            assert index.read == read
            assert list(index.problems) == ["e01", "e02", "e04", "e06"]
        for name, part in {"e01": "not valid JSON", "e02": "truncated", "e04": "infinite", "e06": key}.items():
            assert part in index.problems[name]
        found = search_pool(index, "e00")
        assert dict(found.problems) == index.problems
        assert [hit.card.name for hit in found.hits[:2]] == ["e03", "e09"]

    @pytest.mark.parametrize("damage", ["cut", "version", "rubbish", "shape"])
    def test_a_damaged_index_is_made_again(self, pool: ExpertPool, damage: str) -> None:
        first = open_index(pool)
        path = pool.folder / INDEX_FILE
        data = path.read_bytes()
        path.write_bytes(
            {
                "cut": data[:-9],
                "version": data.replace(b'"version": 4', b'"version": 0'),
                "rubbish": b"rubbish",
                "shape": data.replace(b"[12,1024]", b"[6,2048]"),
            }[damage]
        )
        assert path.read_bytes() != data
        again = open_index(pool)
        assert (again.read, again.entries) == (12, first.entries)
        assert np.array_equal(again.vectors["shared"], first.vectors["shared"])

    def test_an_index_that_cannot_be_stored_still_answers(
        self, pool: ExpertPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError("read-only")

        monkeypatch.setattr(index_module.safetensors.numpy, "save_file", refuse)
        index = open_index(pool)
        assert (index.saved, index.read) == (False, 12)
        assert search_pool(index, "e00").hits
        assert not list(pool.folder.glob(f"{INDEX_FILE}*"))

    def test_foreign_folders_and_an_empty_pool(self, pool: ExpertPool, tmp_path: Path) -> None:
        (pool.folder / "e00" / "expert.json").unlink()
        card = open_index(pool).entries[0].card
        expert = pool.load("e00")
        assert card is not None
        assert (card.name, card.method, card.parameters) == ("e00", "lora", expert.card.parameters)
        assert search_pool(open_index(ExpertPool(tmp_path / "none"))).hits == ()


class TestSearch:
    def test_finds_the_experts_that_a_slow_comparison_finds(self, pool: ExpertPool) -> None:
        found = search_pool(open_index(pool), "e00", top=4)
        slow = {NAMES[n]: by_hand(fisher(0), fisher(n), "fisher-cosine") for n in range(1, 10)}
        assert [hit.card.name for hit in found.hits] == sorted(slow, key=lambda name: -slow[name])[:4]
        assert [hit.similarity for hit in found.hits] == pytest.approx(
            sorted(slow.values(), reverse=True)[:4], rel=1e-6
        )
        assert (found.like, found.matching, found.incomparable) == (("e00",), 11, 2)

    def test_a_task_stands_for_the_nearest_of_its_experts(self, pool: ExpertPool) -> None:
        found = search_pool(open_index(pool), "task-2")
        assert found.like == ("e02", "e08")
        slow = {
            NAMES[n]: max(by_hand(fisher(q), fisher(n), "fisher-cosine") for q in (2, 8))
            for n in range(10)
            if n not in (2, 8)
        }
        assert {hit.card.name: hit.similarity for hit in found.hits} == pytest.approx(slow, rel=1e-6)

    @pytest.mark.parametrize(
        ("wanted", "names"),
        [
            (Wanted(method="bottleneck"), ["e05"]),
            (Wanted(licence="mit"), ["e01", "e04", "e07", "e10"]),
            (Wanted(backbone="tiny-bert", metrics=(MetricBound("accuracy", ">=", 0.45),)), ["e11", "e10", "e09"]),
            (Wanted(metrics=(MetricBound.parse("loss < 0.55"),)), ["e11", "e10"]),
            (Wanted(metrics=(MetricBound.parse("accuracy>0.2"), MetricBound.parse("loss>=.7"))), ["e06", "e05"]),
        ],
    )
    def test_cards_say_what_is_wanted(self, pool: ExpertPool, wanted: Wanted, names: list[str]) -> None:
        found = search_pool(open_index(pool), wanted=wanted)
        assert [hit.card.name for hit in found.hits] == names
        assert found.matching == len(names)
        assert all(hit.similarity is None for hit in found.hits)

    def test_likeness_among_the_wanted_only(self, pool: ExpertPool) -> None:
        found = search_pool(open_index(pool), "e00", Wanted(licence="MIT"))
        assert {hit.card.name for hit in found.hits} == {"e01", "e04", "e07"}
        assert found.incomparable == 1

    def test_an_embedding_that_breaks_after_the_index_was_read_is_named(self, pool: ExpertPool) -> None:
        index = open_index(pool)
        (pool.folder / "e03" / "task_embedding.shared.safetensors").write_bytes(b"rubbish")
        found = search_pool(index, "e00")
        assert "e03" in found.problems
        assert "e03" not in [hit.card.name for hit in found.hits]

    def test_without_an_embedding_there_is_nothing_to_be_like(self, pool: ExpertPool) -> None:
        with pytest.raises(ExpertError, match="pituning embed e11 --reference shared"):
            search_pool(open_index(pool), "e11")
        with pytest.raises(ExpertError, match="--reference own"):
            search_pool(open_index(pool), "e00", reference="own")

    @pytest.mark.parametrize(
        ("like", "wanted", "text"),
        [
            ("task-22", Wanted(), "did you mean 'task-2'"),
            (None, Wanted(method="lara"), "did you mean 'lora'"),
            (None, Wanted(licence="gpl"), "Known: MIT, apache-2.0"),
            (None, Wanted(backbone="tiny-t5"), "tiny-bert"),
            (None, Wanted(metrics=(MetricBound.parse("acc>=1"),)), "did you mean 'accuracy'"),
        ],
    )
    def test_words_that_are_nowhere_in_the_pool(
        self, pool: ExpertPool, like: str | None, wanted: Wanted, text: str
    ) -> None:
        with pytest.raises(UnknownNameError, match=text):
            search_pool(open_index(pool), like, wanted)


@pytest.mark.parametrize("text", ["accuracy", "accuracy=0.8", ">=0.8", "accuracy>=high", "a>=0.1>=0.2"])
def test_bounds_that_are_none(text: str, message: Any) -> None:
    assert repr(text) in message(MetricBound.parse, text)


def test_bounds() -> None:
    assert MetricBound.parse("dev log-loss<=-1.5e-3") == MetricBound("dev log-loss", "<=", -0.0015)
    with pytest.raises(PituningError):
        MetricBound.parse("")


def test_cards_keep_their_licence_and_old_cards_have_none(
    pool: ExpertPool, bert: Backbone, random_expert: Any, tmp_path: Path
) -> None:
    assert Expert.load(pool.folder / "e00").card.licence == "apache-2.0"
    assert "license: apache-2.0" in (pool.folder / "e00" / "README.md").read_text()
    path = pool.folder / "e00" / "expert.json"
    record = json.loads(path.read_text())
    del record["licence"]
    path.write_text(json.dumps(record))
    assert Expert.load(pool.folder / "e00").card.licence == ""
    assert TaskEmbedding.load(pool.folder / "e00", "shared").samples == 8
