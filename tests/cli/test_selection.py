"""`pituning rank --select` and `pituning interpolate --select`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from pituning.cli.rank import SoupWeights, Way
from pituning.experts import ExpertPool
from pituning.similarity.selection import SOUPS, WAYS
from tests.cli.test_cli import error, run, run_json


@pytest.fixture
def shared(pool: ExpertPool, data: Path, bert: Path) -> list[object]:
    return ["movie_quotes", "--pool", pool.folder, "--data", data, "--backbone", bert, "--shots", 4]


def test_every_way_is_an_option() -> None:
    assert (get_args(Way), get_args(SoupWeights)) == (WAYS, SOUPS)


@pytest.mark.parametrize("how", ["top-k", "greedy", "auto", "diverse"])
def test_rank_says_what_to_use_and_why(shared: list[object], how: str) -> None:
    found = run_json("rank", *shared, "--select", how, "--top", 1)["selection"]
    assert found["how"] == how
    assert found["helps"] is bool(found["experts"])
    assert len(found["experts"]) == found["helps"]
    assert [a["name"] for a in found["arms"]] == [f"soup by {how}", "nearest expert alone", "bare backbone"]
    shown = run("rank", *shared, "--select", how).stdout
    assert "Checked on held-out folds" in shown
    assert "a gain of" in shown


def test_rank_by_gradient_and_average(shared: list[object]) -> None:
    assert run_json("rank", *shared, "--kind", "gradient")["kind"] == "gradient"
    averaged = run_json("rank", *shared, "--kind", "average", "--average-of", "gradient,score")
    assert averaged["kind"] == "average of gradient, score"
    assert all(0 <= e["similarity"] <= 1 for e in averaged["experts"])
    assert "selection" not in averaged
    assert "--average-of needs --kind average" in run("rank", *shared, "--average-of", "score", code=2).stderr


@pytest.mark.usefixtures("short_search")
def test_interpolate_blends_what_was_selected(shared: list[object]) -> None:
    ranked = run_json("rank", *shared)["experts"]
    middle = (ranked[0]["similarity"] + ranked[1]["similarity"]) / 2
    found = run_json("interpolate", *shared, "--select", "threshold", "--threshold", middle, "--train-mode", "none")
    assert found["selection"]["experts"] == [ranked[0]["name"]]
    assert list(found["weights"]) == [ranked[0]["name"]]
    both = run_json("interpolate", *shared, "--select", "diverse", "--train-mode", "none", "--save", "both")
    assert len(both["selection"]["experts"]) == 2


def test_interpolate_stops_where_none_helps(shared: list[object], pool: ExpertPool) -> None:
    before = pool.names()
    if run_json("rank", *shared, "--select", "greedy")["selection"]["helps"]:
        pytest.fail("these answers are noise, so no expert should help")
    message = error("interpolate", *shared, "--select", "greedy")
    assert "none of these helps: " in message
    assert "--select top-k takes the highest ranked experts all the same" in message
    assert "none is so similar" in error("interpolate", *shared, "--select", "threshold", "--threshold", 9)
    assert pool.names() == before
