"""An experiment on pictures end to end: a tiny OFA, three tasks on emoji scenes, the report, and the notebook."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import pituning as pt
from pituning.errors import RecipeError
from pituning.example import Example
from pituning.experiments.pretrain_recipe import PretrainRecipe
from pituning.experiments.pretraining import pretrain
from pituning.experiments.runner import picture_audit
from pituning.tasks import emoji, emoji_task

from .test_pretraining import SETTINGS

ROOT = Path(__file__).parents[2]
SIZES = {"train": 20, "dev": 4, "test": 10}
POOL = ("refemoji-small", "emoji-vqa-small")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny OFA, pretrained for three steps."""
    folder = tmp_path_factory.mktemp("ofa")
    model = {**SETTINGS["model"], "max_source_positions": 128, "max_target_positions": 128}
    pretrain(PretrainRecipe(**{**SETTINGS, "steps": 3, "model": model}), folder)
    return folder / "model"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every named task on scenes in a size for tests."""
    monkeypatch.setattr(emoji, "SIZES", SIZES)


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """A tiny recipe whose folders are relative to the working directory."""
    return {
        "title": "tiny", "target": "refemojig-small", "backbone": "./ofa", "method": "bottleneck", "shots": 8, "draws": [0],
        "training_seeds": [0], "test_limit": 8, "ceiling": False, "output": "out", "arms": ["zero-shot", "own", "pi"],
        "pool": {"folder": "pool", "tasks": list(POOL), "examples": 12, "epochs": 1},
        "search": {"learning_rates": [1e-3], "steps": 2, "eval_every": 2, "batch_size": 4},
        "interpolation": {"top": 2, "alternatives": False}, "gallery": 4, "gallery_tasks": ["emoji-vqa-small"],
    }  # fmt: skip


def run(recipe: dict[str, Any], folder: Path, backbone: Path) -> dict[str, Any]:
    """Run a recipe in a folder as the working directory, with a link to the backbone in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(emoji, "SIZES", SIZES)
        if not Path("ofa").exists():
            Path("ofa").symlink_to(backbone)
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return pt.run_recipe("recipe.yaml", progress=False)


@pytest.fixture(scope="module")
def finished(
    recipe: dict[str, Any], backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished run, and its results."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(recipe, folder, backbone)


def test_a_recipe_on_pictures_runs_and_reports(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, results = finished
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert list(arms) == ["zero-shot", "own", "pi"]
    assert all(math.isfinite(loss) for arm in arms.values() for loss in arm["log_loss"])
    assert results["metric"] == "acc@0.5"
    assert "from 8 examples;" in results["summary"]
    assert [pt.ExpertPool(folder / "pool").load(name).card.training["examples"] for name in POOL] == [12, 12]
    assert set(results["graph"]["names"]) == {"refemojig-small", *POOL}

    page = (folder / results["report"]).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Results", "Differences", "Gallery", "Predicted helpers", "Task graph", "Weights", "Candidates", "Leak audit",
        "How this was made",
    ]  # fmt: skip
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["refemojig-small", "emoji-vqa-small"]
    assert page.count('<img class="pixels" src="data:image/png;base64,') == 8
    assert page.count("Of 8 test pictures") == 2
    assert all(name in page for name in ("π, from 8 shots (draw 0)", "the pool&#x27;s expert for emoji-vqa-small"))
    assert (
        "none of its 8 test pictures is among them. Scenes of training and test are disjoint by construction." in page
    )
    assert "Noto Emoji" in page
    assert {p.name for p in (folder / "out").glob("*.png")} == {"results.png", "graph.png", "weights.png"}
    assert json.loads((folder / "out" / "results.json").read_text())["summary"] == results["summary"]


def test_a_gallery_of_another_size_is_chosen_without_computing_any_arm_again(
    recipe: dict[str, Any], backbone: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    folder, results = finished
    cells = {p: p.stat().st_mtime_ns for p in (folder / "out" / "cells").glob("*.json")}
    again = run({**recipe, "gallery": 3, "title": "other"}, folder, backbone)
    assert {p: p.stat().st_mtime_ns for p in cells} == cells
    assert (folder / again["report"]).read_text(encoding="utf-8").count('<img class="pixels"') == 6
    assert again["arms"] == results["arms"]


def test_experts_of_another_number_of_examples_are_not_taken_for_those_asked_for(
    recipe: dict[str, Any], backbone: Path, small: None, tmp_path: Path
) -> None:
    task = pt.load_task("refemoji-small")
    task = replace(task, splits={"train": task.split("train", 4)})
    expert = pt.train_expert(pt.load_backbone(str(backbone)), task, "bottleneck", settings=pt.TrainSettings(steps=1))
    pt.ExpertPool(tmp_path / "pool").add(expert)
    with pytest.raises(
        RecipeError, match=r"'refemoji-small' was trained with epochs 3, .*; examples 4, the recipe says 12"
    ):
        run(recipe, tmp_path, backbone)
    for said, found in (
        ({"epochs": 1}, "epochs 3, the recipe says 1"),
        ({"learning_rate": 5e-4}, r"rate 0\.001, .* 0\.0005"),
    ):
        with pytest.raises(RecipeError, match=found):
            run({**recipe, "pool": {"folder": "pool", "tasks": list(POOL), "examples": 4, **said}}, tmp_path, backbone)


def test_a_gallery_of_a_task_without_pictures_is_refused_before_anything_is_trained(
    recipe: dict[str, Any], backbone: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="'movie_quotes' has no pictures"):
        run({**recipe, "target": "movie_quotes"}, tmp_path, backbone)
    assert not (tmp_path / "pool").exists()


class TestPictureAudit:
    def test_shots_share_scenes_with_the_pool_and_test_pictures_do_not(self) -> None:
        target, draws, pool = self.tasks()
        found = picture_audit(target, pool, draws, None)
        trained = {scene_of(e) for task in pool.values() for e in task.split("train")}
        shots = {e.id: scene_of(e) for task in draws for e in task.split("train")}
        assert found["pictures"] == {
            "training": 40,
            "test": 10,
            "shots": len(shots),
            "test_seen": 0,
            "shots_seen": sum(scene in trained for scene in shots.values()),
        }
        assert found["pictures"]["shots_seen"] > 0
        assert found["overlaps"] == []
        assert found["disjoint_scenes"]

    def test_a_test_picture_that_an_expert_has_seen_is_found_and_with_its_text_listed(self) -> None:
        target, draws, pool = self.tasks()
        leaked = target.split("test")[3]
        asked = replace(leaked, id="leak/0")
        other = replace(leaked, id="leak/1", texts=("something else altogether",))
        pool["leak"] = replace(pool["refemoji-small"], splits={"train": (asked, other), "test": (asked,)})
        found = picture_audit(target, pool, draws, None)
        assert found["pictures"]["test_seen"] == 1
        assert [(o["left"], o["right"]) for o in found["overlaps"]] == [(leaked.id, "leak/0")]
        assert not found["disjoint_scenes"]

    def test_pictures_without_any_text_are_compared_alone(self) -> None:
        task = emoji_task("emoji-style", vocabulary="small", sizes=SIZES)
        seen: Sequence[Example] = task.split("test", 2)
        found = picture_audit(task, {"x": replace(task, splits={"train": seen, "test": seen})}, [], None)
        assert {o["left"] for o in found["overlaps"]} == {e.id for e in seen}

    def tasks(self) -> tuple[pt.tasks.Task, list[pt.tasks.Task], dict[str, pt.tasks.Task]]:
        target = emoji_task("refemojig", vocabulary="small", sizes=SIZES)
        pool = {name: emoji_task(name.removesuffix("-small"), vocabulary="small", sizes=SIZES) for name in POOL}
        return target, [target.few_shot(4, seed) for seed in (0, 1)], pool


def scene_of(example: Example) -> Any:
    """The scene that an example's picture is drawn from."""
    return example.image.read.args[0]  # type: ignore[union-attr]


class TestNotebook:
    def test_stores_no_outputs_and_tells_what_each_of_its_ten_steps_does(self) -> None:
        cells = json.loads((ROOT / "notebooks" / "emoji.ipynb").read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            if cell["cell_type"] == "code":
                assert (cell["outputs"], cell["execution_count"]) == ([], None)
        headings = [m[1] for c in cells if (m := re.match(r"## (\d+)\. ", "".join(c["source"])))]
        assert headings == [f"{n}" for n in range(1, 11)]

    def test_its_cells_run(
        self, backbone: Path, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cells = json.loads((ROOT / "notebooks" / "emoji.ipynb").read_text(encoding="utf-8"))["cells"]
        sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        names: dict[str, Any] = {}
        exec(compile(sources[0], "settings", "exec"), names)
        assert {"BACKBONE", "WORK", "EXAMPLES", "SHOTS", "STEPS", "TEST"} <= names.keys()
        names |= {"BACKBONE": str(backbone), "WORK": tmp_path, "EXAMPLES": 8, "SHOTS": 4, "STEPS": 1, "TEST": 4}
        for number, source in enumerate(sources[1:], 1):
            exec(compile(source, f"cell {number}", "exec"), names)
        assert names["gallery"]._repr_html_().count("<img") == 4
        assert names["found"].expert.card.task == "refemojig-small"
        assert pt.Expert.load(tmp_path / "refemojig-pi").name == names["found"].expert.name
        assert "π: " in capsys.readouterr().out


def test_experts_of_another_method_are_not_taken_for_the_recipes(
    recipe: dict[str, Any], backbone: Path, small: None, tmp_path: Path
) -> None:
    task = pt.load_task("refemoji-small")
    expert = pt.train_expert(pt.load_backbone(str(backbone)), task, "bitfit", settings=pt.TrainSettings(steps=1))
    pt.ExpertPool(tmp_path / "pool").add(expert)
    with pytest.raises(
        RecipeError, match="'refemoji-small' was trained with method bitfit, the recipe says bottleneck"
    ):
        run(recipe, tmp_path, backbone)
