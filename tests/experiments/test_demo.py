"""The demo and what ships for it: the small OFA, its experts, the recipe, the verb."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pituning as pt
from pituning.backbones import Backbone
from pituning.cli import app
from pituning.errors import RecipeError
from pituning.experiments import demo
from pituning.experiments.recipe import load_recipe
from pituning.tasks import emoji


def test_its_extra_brings_the_metrics_of_its_captions() -> None:
    recipe = load_recipe(demo.FOLDER / "demo.yaml")
    assert "emoji-caption-small" in recipe.pool.tasks
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert "pituning[metrics]" in extras["demo"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return pt.load_backbone("ofa-nano")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every named task on scenes in a size for tests, and a demo of few steps."""
    monkeypatch.setattr(emoji, "SIZES", {"train": 700, "dev": 4, "test": 8})
    monkeypatch.setattr(demo, "FAST", {**demo.FAST, "gallery": 4})
    monkeypatch.setattr(demo, "FAST_SEARCH", {**demo.FAST_SEARCH, "steps": 2, "eval_every": 2})


class TestBackbone:
    def test_is_a_small_ofa_and_fits_into_a_clone(self, backbone: Backbone) -> None:
        assert backbone.model.config.model_type == "ofa"
        assert 3e6 < sum(p.numel() for p in backbone.model.parameters()) < 8e6
        assert sum(p.stat().st_size for p in demo.FOLDER.rglob("*") if p.is_file()) < 20e6
        assert not any(p.requires_grad for p in backbone.model.parameters())

    def test_its_card_says_how_it_was_made(self) -> None:
        record = json.loads((demo.FOLDER / "model" / "pretraining.json").read_text(encoding="utf-8"))
        shipped = load_recipe(Path(__file__).parents[2] / "recipes" / "ofa-nano.yaml").model_dump(mode="json")
        assert {**record["recipe"], "workers": 0} == {**shipped, "workers": 0}
        assert record["steps"] == shipped["steps"]
        assert (demo.FOLDER / "README.md").is_file()

    def test_finds_things_in_scenes_it_has_not_seen(self, backbone: Backbone) -> None:
        task = pt.load_task("emoji-pretraining-grounding-small")
        assert pt.evaluate(backbone, None, task, "test", 60).value > 0.6


class TestExperts:
    @pytest.mark.parametrize("name", demo.demo_recipe().pool.tasks)
    def test_belong_to_the_backbone_and_to_the_recipe(self, backbone: Backbone, name: str) -> None:
        expert, recipe = pt.ExpertPool(demo.EXPERTS).load(name), demo.demo_recipe()
        expert.verify(backbone)
        assert expert.card.training["examples"] == recipe.pool.examples
        assert (expert.card.method, expert.card.task) == (recipe.method, name)

    def test_load_as_their_readme_says(self, tmp_path: Path) -> None:
        folder = pt.ExpertPool(demo.EXPERTS).load("refemoji-small").save(tmp_path / "expert")
        text = (folder / "README.md").read_text(encoding="utf-8")
        code = text.split("```python\n")[1].split("```")[0].replace("PATH/TO/THIS/FOLDER", str(folder))
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)
        assert any("bottleneck" in name for name, _ in names["model"].named_parameters())
        assert "base_model:" not in text, "it is on no hub"


class TestRecipe:
    def test_needs_nothing_that_is_not_in_the_package(self) -> None:
        recipe = demo.demo_recipe()
        assert recipe.missing_inputs() == []
        kinds = {pt.load_task(name).kind for name in recipe.pool.tasks}
        assert kinds >= {"grounding", "captioning", "visual question answering"}

    def test_everything_goes_into_one_folder(self, tmp_path: Path) -> None:
        recipe = demo.demo_recipe(tmp_path)
        assert (recipe.output, recipe.pool.folder) == (str(tmp_path), str(tmp_path / "experts"))
        assert demo.demo_recipe(tmp_path, fast=True).pool.folder != recipe.pool.folder

    def test_says_if_the_package_has_no_expert(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "EXPERTS", tmp_path / "none")
        with pytest.raises(RecipeError, match="no expert for 'refemoji-small'"):
            demo.run_demo(tmp_path / "out", fast=True)


@pytest.mark.slow
def test_the_verb_runs_all_of_it(small: None, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["demo", "--fast", "--output", str(tmp_path / "out"), "--json", "--quiet"])
    assert found.exit_code == 0, found.output
    results = json.loads(found.stdout)
    assert results["command"] == "pituning demo --fast"
    assert [arm["name"] for arm in results["arms"]] == list(demo.FAST["arms"])
    assert results["weights"]["experts"] or results["candidates"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('<img class="pixels"') == 12
    assert all(f"<h2>{part}</h2>" in page for part in ("Results", "Gallery", "Task graph", "Candidates"))
    assert set(pt.ExpertPool(tmp_path / "out" / "packaged-experts").names()) == set(demo.demo_recipe().pool.tasks)
    assert not any(p.name not in demo.demo_recipe().pool.tasks for p in demo.EXPERTS.iterdir())
