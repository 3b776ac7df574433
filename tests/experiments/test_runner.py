"""A small recipe end to end on a tiny random backbone: every arm, the report, and resuming."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest

import pituning as pt
from pituning.experiments.recipe import ARMS
from pituning.experiments.runner import paired_interval

from ..conftest import SYLLABLES, build_bert

LABELS = {"movie_quotes": ("negative", "positive"), "word_tone": ("negative", "positive")}
LABELS |= {"verb_field": ("moving", "owning", "speaking", "thinking")}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe over three tasks of made-up sentences whose words tell the label."""
    import torch

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


def test_paired_interval_is_students() -> None:
    values = [0.02, 0.05, -0.01, 0.03, 0.04]
    mean, low, high = paired_interval(values)
    half = 2.7764451 * statistics.stdev(values) / math.sqrt(5)  # t quantile 0.975 with 4 degrees of freedom
    assert (mean, low, high) == pytest.approx((0.026, 0.026 - half, 0.026 + half), rel=1e-6)
