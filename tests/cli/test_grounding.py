"""A grounding task from the user's own files, through every verb that takes a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pituning.backbones.base import Backbone
from pituning.experts import Expert, ExpertPool
from tests.cli.test_cli import LABELS, error, run, run_json
from tests.pointing import pointing, write_grounding

CORNERS = "a grounding file with corners"
GROUNDING = ["--task-kind", "grounding"]


@pytest.fixture
def seeing(t5: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone that can point stands in for whatever is loaded."""
    monkeypatch.setattr("pituning.backbones.load_backbone", lambda name, **_: pointing(t5))


@pytest.mark.usefixtures("seeing", "short_search")
def test_from_files_to_one_expert_that_reloads(tmp_path: Path) -> None:
    pool = ["--pool", tmp_path / "experts"]

    def files(number: int) -> list[Any]:
        train, test = (write_grounding(tmp_path / "data", count, 10 * number + i) for i, count in enumerate((20, 12)))
        return [*pool, *GROUNDING, "--train-file", train, "--test-file", test]

    for number in (1, 2):
        trained = run_json("train", f"other{number}", *files(number), "--steps", 2)
        assert (trained["choices"], trained["training"]["examples"]) == ([], 20)
        embedded = run_json("embed", f"other{number}", *files(number))
        assert embedded["embeddings"][0]["samples"] == 20
    shots = [*files(3), "--shots", 6]
    own = run_json("train", "target", *shots)
    assert own["name"] == "target-6shot-seed0"
    assert own["metrics"].keys() == {"cross-fitted log-loss"}
    assert "trained on 6 examples, seed 0" in " ".join(run("pool", "show", own["name"], *pool).stdout.split())
    ranked = run_json("rank", "target", *shots)["experts"]
    assert {e["name"] for e in ranked} == {"other1", "other2"}
    by_fisher = run_json("rank", "target", *shots, "--kind", "fisher")
    assert {e["name"] for e in by_fisher["experts"]} == {"other1", "other2"}
    blended = run_json("interpolate", "target", *shots, "--own", own["name"])
    assert [c["chosen"] for c in blended["candidates"]].count(True) == 1
    found = run_json("eval", "target", *files(3), "target-pi")
    assert (found["metric"], found["examples"], set(found["metrics"])) == ("acc@0.5", 12, {"acc@0.5", "log-loss"})
    assert "acc@0.5" in run("eval", "target", *files(3), "target-pi").stdout
    assert run_json("pool", "verify", *pool)["broken"] == 0
    expert = Expert.load(ExpertPool(tmp_path / "experts").folder / "target-pi")
    assert expert.card.choices == ()
    card = (tmp_path / "experts" / "target-pi" / "README.md").read_text()
    assert "for the task `target`, from 6 labelled examples.\n" in card


def test_a_mistake_in_the_file_names_its_line(tmp_path: Path) -> None:
    path = write_grounding(tmp_path, 3)
    path.write_text(path.read_text() + "white.png\tit\t0\t0\t50\t10\n")
    message = error("train", "mine", *GROUNDING, "--train-file", path)
    assert f"{path}:5: box 0.0,0.0,50.0,10.0 (x0,y0,x1,y1) is outside the image of 40 × 30 pixels" in message


def test_a_backbone_that_cannot_see_refuses(tmp_path: Path, t5: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pituning.backbones.load_backbone", lambda name, **_: t5)
    path = write_grounding(tmp_path, 3)
    for verb, where in (("train", "--train-file"), ("eval", "--test-file")):
        message = error(
            verb, "mine", *GROUNDING, where, path, "--pool", tmp_path / "experts", *["--steps", "1"] * (verb == "train")
        )
        assert "has an image, and backbone 'tiny-t5' reads text alone; use an OFA backbone" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "mine", *GROUNDING],
        ["train", "mine", *GROUNDING, "--train-file", "a.tsv", *LABELS],
        ["rank", "mine", *GROUNDING, "--train-file", "a.tsv", "--text-column", "phrase"],
        ["eval", "mine", "--task-kind", "pointing", "--test-file", "a.tsv"],
        ["eval", "mine", *GROUNDING, "--test-file", CORNERS, "--prompt-type", "src"],
        ["eval", "mine", *GROUNDING, "--test-file", CORNERS, "--answers", "a.txt"],
    ],
)
def test_wrong_use_ends_with_2(arguments: list[str], tmp_path: Path) -> None:
    files = {CORNERS: str(write_grounding(tmp_path, 3))}
    assert "Error" in run(*(files.get(a, a) for a in arguments), code=2).stderr


@pytest.mark.parametrize("verb", ["train", "embed", "rank", "interpolate", "eval", "pool audit"])
def test_every_verb_that_takes_a_task_takes_a_grounding_file(verb: str) -> None:
    assert "--task-kind" in run(*verb.split(), "--help").stdout
