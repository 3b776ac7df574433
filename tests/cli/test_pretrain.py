"""`pituning pretrain`: a tiny model from nothing, broken off, gone on with, and used by another verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.cli.test_cli import error, run, run_json
from tests.experiments.test_pretraining import ROOT, SETTINGS


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "steps": 3, "log_every": 2, "output": str(tmp_path / "run")}))
    return path


def test_trains_goes_on_and_is_evaluated(recipe: Path, tmp_path: Path) -> None:
    found = run_json("pretrain", recipe, "--steps", 2)
    assert (found["steps"], found["examples"], Path(found["model"])) == (2, 8, tmp_path / "run" / "model")
    assert "checkpoint-2: go on from it with resume" in error("pretrain", recipe)
    shown = run("pretrain", recipe, "--resume", "--workers", 1)
    assert "a tiny one: 3 steps in" in shown.stdout
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [2, 3]
    task = "emoji-pretraining-caption-small"
    metrics = run_json("eval", task, "--backbone", tmp_path / "run" / "model", "--limit", 2)["metrics"]
    assert {"CIDEr-D", "BLEU-4", "objects-named"} <= metrics.keys()


def test_recipes_of_other_kinds_are_sent_where_they_belong(recipe: Path) -> None:
    other = ROOT / "recipes" / "text" / "demo.yaml"
    for arguments, verb in ((("pretrain", other), "pituning run"), (("run", recipe), "pituning pretrain")):
        assert verb in " ".join(run(*arguments, code=2).output.replace("│", " ").split())
    assert "valid" in run("validate", recipe).stdout
    assert "no such recipe" in error("pretrain", recipe.with_name("nothing.yaml"))
