"""`pituning merge`: what it writes into the pool, prints, and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from pituning.backbones import load_backbone
from pituning.cli.merge import Combination, Operator
from pituning.experts import Expert, ExpertPool
from pituning.interpolation.operators import COMBINATIONS, OPERATORS
from pituning.interpolation.operators import merge as merge_experts
from pituning.methods import attached, initial_tensors
from pituning.similarity import embed_task
from pituning.tasks import load_task
from pituning.training.evaluation import mean_log_loss
from tests.cli.test_cli import error, run, run_json
from tests.conftest import RandomExpert

PREFIX = "base_model.model."


def same(left: Expert, right: Expert) -> bool:
    """Whether two experts have the same tensors and weights."""
    weights = [[(p["name"], p["weight"]) for p in e.card.lineage] for e in (left, right)]
    tensors = left.tensors.keys() == right.tensors.keys()
    return (
        tensors and weights[0] == weights[1] and all(torch.equal(t, right.tensors[k]) for k, t in left.tensors.items())
    )


@pytest.fixture
def adapters(bert: Path, tmp_path: Path, random_expert: RandomExpert) -> ExpertPool:
    """A pool of two bottleneck experts."""
    found = ExpertPool(tmp_path / "adapters")
    backbone = load_backbone(str(bert))
    for seed, name in enumerate(("a", "b")):
        found.add(random_expert(backbone, "bottleneck", seed, name=name))
    return found


def test_help_says_what_it_does_and_knows_every_operator() -> None:
    assert "pituning merge" in run("merge", "--help").stdout.split("Example", 1)[1]
    assert "│ merge " in run("--help").stdout
    assert set(get_args(Operator)) == set(OPERATORS)
    assert get_args(Combination) == COMBINATIONS


@pytest.mark.parametrize(
    ("operator", "options", "settings"),
    [
        ("uniform_soup", [], {}),
        ("task_arithmetic", ["--weights=0.7,-0.2", "--scale", 0.5], {"weights": [0.7, -0.2], "scale": 0.5}),
        ("concatenate", ["--weights", "2,1"], {"weights": [2.0, 1.0]}),
        ("ties", ["--density", 0.3, "--rank", 2], {"density": 0.3, "rank": 2}),
        ("dare", ["--drop", 0.4, "--drop-seed", 3, "--combine", "ties"], {"drop": 0.4, "seed": 3, "combine": "ties"}),
    ],
)
def test_the_library_result_is_saved_and_told(
    pool: ExpertPool, operator: str, options: list[Any], settings: dict[str, Any]
) -> None:
    """No backbone is loaded: the default one is not even installed under that name."""
    expected = merge_experts([pool.load("word_tone"), pool.load("pocket_gear")], operator, **settings)
    arguments = ["merge", "word_tone", "pocket_gear", "--pool", pool.folder, "--operator", operator, *options]
    found = run_json(*arguments, "--name", "mine", "--backbone", "no-such-backbone")
    saved = pool.load("mine")
    assert same(saved, expected.expert)
    assert (found["name"], found["operator"], found["folder"]) == ("mine", operator, str(pool.folder / "mine"))
    assert found["errors"] == dict(expected.errors)
    assert found["largest_error"] == max(expected.errors.values())
    assert [(e["name"], e["weight"]) for e in found["experts"]] == [
        (p["name"], p["weight"]) for p in expected.expert.card.lineage
    ]
    assert all(e["rank"] == 3 for e in found["experts"])
    assert set(found["ranks"].values()) == {2 if "rank" in settings else 6}
    shown = " ".join(run(*arguments, "--name", "mine").stdout.split())
    assert "Merged from" in shown
    assert f"operator {operator}" in shown
    assert f"rank {2 if 'rank' in settings else 6}" in shown
    assert ("largest error of a module 0 saved" in shown) == (
        operator in ("uniform_soup", "task_arithmetic", "concatenate")
    )
    assert "blended from" in run("pool", "show", "mine", "--pool", pool.folder).stdout


def test_the_default_name_and_another_folder(pool: ExpertPool, tmp_path: Path) -> None:
    arguments = ["merge", "word_tone", str(pool.folder / "pocket_gear"), "--pool", pool.folder]
    assert run_json(*arguments)["name"] == "word_tone-pocket_gear-uniform_soup"
    assert run_json(*arguments, "--out", tmp_path / "elsewhere")["folder"] == str(tmp_path / "elsewhere")
    assert same(Expert.load(tmp_path / "elsewhere"), pool.load("word_tone-pocket_gear-uniform_soup"))
    assert "is not replaced" in error(*arguments, "--name", "word_tone")
    assert pool.load("word_tone").card.lineage == ()


def test_greedy_soup_scores_the_experts_on_a_task(pool: ExpertPool, data: Path, bert: Path) -> None:
    task, backbone = load_task("movie_quotes", shots=4, seed=1, data=data), load_backbone(str(bert))
    examples = task.split("train")

    def score(expert: Expert) -> float:
        with attached(backbone, expert.config, expert.tensors):
            return mean_log_loss(backbone, examples)

    experts = [pool.load(name) for name in pool.names()]
    expected = merge_experts(experts, "greedy_soup", score=score).expert
    shared = ["--pool", pool.folder, "--data", data, "--backbone", bert, "--operator", "greedy_soup", "--seed", 1]
    found = run_json("merge", *pool.names(), *shared, "--task", "movie_quotes", "--shots", 4, "--name", "soup")
    saved = pool.load("soup")
    assert same(saved, expected)
    assert {e["name"]: e["log_loss"] for e in found["experts"]} == {e.name: score(e) for e in experts}
    assert found["training"]["soup_log_loss"] == pytest.approx(score(saved), rel=1e-6)
    assert (saved.card.task, saved.card.shots, saved.card.choices) == ("movie_quotes", 4, task.choices)
    text = error("merge", "pocket_gear", "word_tone", *shared, "--task", "word_tone")
    assert "'word_tone' was trained for word_tone" in text
    assert "not held out" in text
    run("merge", "pocket_gear", "word_tone", *shared, "--task", "word_tone", "--split", "test")


def test_fisher_merge_reads_the_stored_embeddings(pool: ExpertPool, data: Path, bert: Path) -> None:
    names = ["word_tone", "word_tone-2"]
    shared = [*names, "--pool", pool.folder, "--operator", "fisher_merge", "--name", "fisher"]
    pool.add(pool.load("pocket_gear").with_card(task="word_tone"), "word_tone-2")
    assert "run `pituning embed word_tone --reference own` first" in error("merge", *shared)
    backbone, task = load_backbone(str(bert)), load_task("word_tone", data=data)
    experts = [pool.load(name) for name in names]
    embeddings = {e.name: embed_task(backbone, e, task) for e in experts}
    for name, embedding in embeddings.items():
        embedding.save(pool.folder / name)
    run("merge", *shared)
    assert same(pool.load("fisher"), merge_experts(experts, "fisher_merge", embeddings=embeddings).expert)


def test_the_start_comes_from_the_backbone_where_it_is_needed(adapters: ExpertPool, bert: Path) -> None:
    experts = [adapters.load(name) for name in "ab"]
    initial = initial_tensors(load_backbone(str(bert)), experts[0].config)
    expected = merge_experts(experts, "ties", initial=initial).expert
    arguments = ["merge", "a", "b", "--pool", adapters.folder, "--backbone", bert]
    found = run_json(*arguments, "--operator", "ties", "--name", "tied")
    assert same(adapters.load("tied"), expected)
    assert (found["ranks"], [e["rank"] for e in found["experts"]]) == ({}, [None, None])
    shown = run(*arguments, "--operator", "ties", "--name", "tied").stdout
    assert "rank" not in shown
    run("merge", "a", "b", "--pool", adapters.folder, "--backbone", "no-such-backbone", "--name", "mean")


def test_what_the_library_refuses_is_one_line(pool: ExpertPool, adapters: ExpertPool) -> None:
    shared = ["--pool", pool.folder, "--name", "new"]
    assert "unknown setting of uniform_soup 'density'" in error("merge", *pool.names(), *shared, "--density", 0.2)
    assert "1 weights were given for the 2 experts" in error(
        "merge", *pool.names(), *shared, "--operator", "ties", "--weights", 1
    )
    assert "different methods" in error("merge", "word_tone", str(adapters.folder / "a"), *shared)
    assert "did you mean 'word_tone'" in error("merge", "word_ton", *shared)
    assert "two experts are called" in error("merge", "word_tone", "word_tone", *shared)
    assert not (pool.folder / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--operator", "tie"],
        ["--operator", "greedy_soup"],
        ["--operator", "ties", "--task", "sst2"],
        ["--operator", "ties", "--shots", "4"],
        ["--operator", "ties", "--split", "test"],
        ["--operator", "dare", "--seed", "4"],
        ["--operator", "ties", "--weights", "1,half"],
        ["--save", "x", "--out", "y"],
    ],
)
def test_wrong_use_ends_with_2(pool: ExpertPool, options: list[str]) -> None:
    result = run("merge", *pool.names(), "--pool", pool.folder, *options, code=2)
    assert result.stdout == ""
    assert "Error" in result.stderr
