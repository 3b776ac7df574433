"""A small recipe end to end on a tiny random backbone: every arm, the report, and resuming."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pituning as pt
from pituning.errors import MissingDependencyError, RecipeError
from pituning.experiments import runner
from pituning.experiments.recipe import ARMS, Recipe
from pituning.experiments.runner import paired_interval

from ..conftest import SYLLABLES, build_bert

LABELS = {"movie_quotes": ("negative", "positive"), "word_tone": ("negative", "positive")}
LABELS |= {"verb_field": ("moving", "owning", "speaking", "thinking")}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe over three tasks of made-up sentences whose words tell the label."""
    backbone = build_bert(torch.float32)
    backbone.model.save_pretrained(tmp_path / "bert")
    backbone.tokenizer.save_pretrained(tmp_path / "bert")
    rng = random.Random(0)
    for task, labels in LABELS.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for split, size in (("train", 12), ("test", 8)):
            rows = ["text\tlabel"]
            for label_index, label in enumerate(labels):
                own = SYLLABLES[label_index * 7 : label_index * 7 + 7]
                rows += [f"{' '.join(rng.choices(own, k=5))}\t{label}" for _ in range(size)]
            (tmp_path / "data" / task / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("PITUNING_DATA", str(tmp_path / "data"))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "title: tiny\ntarget: movie_quotes\nshots: 4\ndraws: [0, 1]\ntraining_seeds: [0, 1]\n"
        f"backbone: {tmp_path / 'bert'}\n"
        f"pool: {{folder: {tmp_path / 'pool'}, tasks: [word_tone, verb_field], epochs: 1}}\n"
        "search: {learning_rates: [0.01], steps: 2, eval_every: 1, batch_size: 4}\n"
        f"interpolation: {{top: 2}}\noutput: {tmp_path / 'out'}\n"
    )
    return path


@pytest.mark.slow
def test_a_recipe_runs_resumes_and_reports(recipe: Path) -> None:
    results = pt.run_recipe(recipe, progress=False)
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert list(arms) == list(ARMS)
    for arm in arms.values():
        assert len(arm["values"]) == 2
        assert all(0 <= v <= 1 for v in arm["values"])
        assert all(math.isfinite(v) for v in arm["log_loss"])
    for difference in results["differences"]:
        pairs = zip(arms["pi"]["values"], arms[difference["rival"]]["values"], strict=True)
        assert difference["mean"] == pytest.approx(statistics.fmean(a - b for a, b in pairs))
    assert Path(results["report"]).read_text(encoding="utf-8").count("movie_quotes") > 1
    assert [row for row in results["candidates"] if row["chosen"]]
    folder = recipe.parent / "out"
    stored = json.loads((folder / "results.json").read_text())
    assert stored["summary"] == results["summary"]

    cells = {p: p.stat().st_mtime_ns for p in (folder / "cells").glob("*.json")}
    dropped = next(p for p in cells if ".pi.1." in p.name)
    before = json.loads(dropped.read_text())
    dropped.unlink()
    pt.run_recipe(recipe, progress=False)
    assert json.loads(dropped.read_text())["values"] == before["values"], "a resumed cell must come out the same"
    assert all(p.stat().st_mtime_ns == t for p, t in cells.items() if p != dropped), "finished cells are not run again"


def test_a_pools_expert_is_stored_before_it_is_evaluated(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise MissingDependencyError("a metric's package is gone")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate", fails)
        with pytest.raises(MissingDependencyError):
            pt.run_recipe(recipe, progress=False)
    pool = pt.ExpertPool(recipe.parent / "pool")
    assert pool.names() == ["word_tone"]
    loaded, task = pt.load_recipe(recipe), {name: pt.load_task(name) for name in ("word_tone", "verb_field")}
    assert isinstance(loaded, Recipe)
    runner._train_pool(loaded, pt.load_backbone(loaded.backbone), task, lambda *_: None)
    assert "test accuracy" in pool.load("verb_field").card.metrics


def test_inputs_are_looked_at_before_anything_is_trained(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="each of them once"):
        pt.run_recipe(recipe, seeds=[0, 0], progress=False)
    (recipe.parent / "data" / "verb_field" / "test.tsv").unlink()
    with pytest.raises(
        RecipeError, match=r"1 input\(s\) are missing, nothing was run:\n  task 'verb_field': no split 'test'"
    ):
        pt.run_recipe(recipe, progress=False)
    assert not (recipe.parent / "pool").exists()


def test_cells_of_another_backbone_or_pool_are_not_taken(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pituning.report.write_report", lambda *_: None)
    recipe.write_text(recipe.read_text().replace("[0, 1]", "[0]") + "arms: [zero-shot]\nceiling: false\n")

    def run() -> tuple[set[str], set[str]]:
        pt.run_recipe(recipe, progress=False)
        out = recipe.parent / "out"
        return {p.name for p in (out / "cells").iterdir()}, {p.name for p in (out / "own").iterdir()}

    first = run()
    assert run() == first
    pool = pt.ExpertPool(recipe.parent / "pool")
    expert = pool.load("word_tone")
    pool.add(replace(expert, tensors={k: t * 1.5 for k, t in expert.tensors.items()}))
    second = run()
    assert [len(names) for names in second] == [2, 1], "the target's own expert does not depend on the pool"
    shutil.rmtree(pool.folder)
    backbone = build_bert(torch.float32)
    backbone.model.embeddings.word_embeddings.weight.data *= 2
    backbone.model.save_pretrained(recipe.parent / "bert")
    assert [len(names) for names in run()] == [3, 2]


def test_paired_interval_is_students() -> None:
    values = [0.02, 0.05, -0.01, 0.03, 0.04]
    mean, low, high = paired_interval(values)
    half = 2.7764451 * statistics.stdev(values) / math.sqrt(5)  # t quantile 0.975 with 4 degrees of freedom
    assert (mean, low, high) == pytest.approx((0.026, 0.026 - half, 0.026 + half), rel=1e-6)
