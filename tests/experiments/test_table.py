"""The recipes of the paper's tables: each is bound without being run; one small table runs, stops, and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pituning import load_recipe, run_recipe, run_table
from pituning.backbones.base import Backbone
from pituning.errors import PituningError, RecipeError, UnknownNameError
from pituning.experiments.recipe import Recipe
from pituning.experiments.table_recipe import TableRecipe
from pituning.experts import ExpertPool
from pituning.methods import make_config
from pituning.metrics.registry import metric_named
from pituning.tasks.task import _REGISTRY, task_names
from tests.backbones.ofa.conftest import build_backbone

RECIPES = Path(__file__).parents[2] / "recipes"
TABLES = sorted([*RECIPES.glob("ofa/*.yaml"), *RECIPES.glob("t5/*.yaml")])
SENTENCES = {"no": ("bad", "dull", "poor"), "yes": ("good", "fine", "neat")}


def loaded(path: Path) -> TableRecipe:
    recipe = load_recipe(path)
    assert isinstance(recipe, TableRecipe)
    return recipe


def test_every_table_of_the_paper_has_its_recipes() -> None:
    assert {loaded(p).table for p in TABLES} == {"1", "2", "3"}
    assert len(TABLES) == 7


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_a_recipe_is_bound_without_being_run(path: Path, t5: Backbone) -> None:
    """Its first line runs it; every task, metric, option and setting exists and fits; the names in it are used."""
    recipe = loaded(path)
    assert path.read_text().splitlines()[0] == f"# pituning run recipes/{path.parent.name}/{path.name}"
    backbone: Backbone = t5 if path.parent.name == "t5" else build_backbone()
    task_names()
    for method, section in recipe.methods.items():
        make_config(method, backbone, **section.options)
    for name, task in recipe.tasks.items():
        kind: Any = _REGISTRY[name]
        splits = {"train", *kind.stems}
        for column in task.evaluate:
            split, _, metric = column.partition(":")
            assert split in splits, f"{name} has no split {split}"
            assert metric_named(metric or kind.kind.metrics[0])
        for method in recipe.methods:
            settings = recipe.settings(method, name)
            assert (settings is None) == (recipe.shots is not None)
        for row, figures in task.published.items():
            assert figures, (name, row)
            assert all(0 < figure < 150 for figure in figures.values())
        assert set(task.experts) <= set(recipe.tasks)
        if recipe.interpolation is not None:
            recipe.blend_settings(name)


def test_figures_are_the_papers() -> None:
    """A sample, and the averages that Table 2 prints."""
    base, large = (loaded(RECIPES / "ofa" / f"table1-{size}.yaml") for size in ("base", "large"))
    assert base.tasks["refcocog"].published["pi"] == {"dev": 81.72, "test": 81.75}
    assert large.tasks["caption"].published["bottleneck"]["test"] == 140.6
    for setting, row, average in (("16shot", "bottleneck", 61.46), ("16shot", "pi", 66.01), ("full", "pi", 81.47)):
        tasks = loaded(RECIPES / "ofa" / f"table2-{setting}.yaml").tasks.values()
        assert sum(t.published[row]["test"] for t in tasks) / 8 == pytest.approx(average, abs=0.01)
    t5 = loaded(RECIPES / "t5" / "table3-base.yaml").tasks.values()
    assert sum(t.published["pi"]["test"] for t in t5) / 6 == pytest.approx(89.68, abs=0.02)


class TestValidation:
    def recipe(self, tmp_path: Path, **changes: Any) -> Path:
        values = yaml.safe_load((RECIPES / "t5" / "table3-base.yaml").read_text())
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return path

    def test_all_mistakes_come_at_once(self, tmp_path: Path) -> None:
        path = self.recipe(
            tmp_path,
            methods={"bottleneck": {"options": {"rr": 3}}, "loora": {}},
            tasks={
                "glue-rt": {"evaluate": ["test:BLUE-4"]},
                "glue-rte": {"evaluate": ["test"], "published": {"x": {}}},
            },
            training={"schedule": "linaer", "steps": 3, "epochs": 1},
        )
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        message = str(caught.value)
        for mistake in (
            "unknown task 'glue-rt': did you mean 'glue-rte'",
            "unknown method 'loora'",
            "unknown metric 'BLUE-4'",
            "method 'bottleneck' has no setting 'rr'",
            "unknown schedule 'linaer'",
            "give either steps or epochs",
            "there is no row 'x'",
        ):
            assert mistake in message
        assert "7 problem(s)" in message

    def test_wrong_types_and_unknown_entries_come_at_once(self, tmp_path: Path) -> None:
        path = self.recipe(tmp_path, shots=0, backbnoe="x", training={"learning_rate": "fast"})
        with pytest.raises(RecipeError, match=r"3 problem\(s\)") as caught:
            load_recipe(path)
        assert all(word in str(caught.value) for word in ("shots", "backbnoe", "training.learning_rate"))

    def test_shots_leave_rate_and_steps_to_cross_fitting(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="training: with shots"):
            load_recipe(self.recipe(tmp_path, shots=4))

    def test_missing_inputs_are_all_named_before_anything_runs(self, tmp_path: Path) -> None:
        recipe = load_recipe(self.recipe(tmp_path, data=str(tmp_path), backbone=str(tmp_path / "gone")))
        assert isinstance(recipe, TableRecipe)
        missing = recipe.missing_inputs()
        assert len(missing) == 7
        with pytest.raises(RecipeError, match=r"7 input\(s\) are missing, nothing was run"):
            run_table(recipe, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()

    def test_a_table_is_no_comparison(self) -> None:
        with pytest.raises(RecipeError, match="run_table"):
            run_recipe(TABLES[0])
        assert isinstance(load_recipe(RECIPES / "text" / "demo.yaml"), Recipe)


@pytest.fixture
def small(tmp_path: Path, t5: Backbone, monkeypatch: pytest.MonkeyPatch) -> TableRecipe:
    """Two GLUE tasks of six sentences each, on the tiny T5."""
    monkeypatch.setattr("pituning.experiments.table_runner.load_backbone", lambda name: t5)
    for task, words in (("cola", SENTENCES), ("sst2", {"negative": SENTENCES["no"], "positive": SENTENCES["yes"]})):
        rows = [(w, str(n)) for n, ws in enumerate(words.values()) for w in ws]
        text = "".join(f"{w}\t{n}\n" for w, n in [("sentence", "label"), *rows])
        for split in ("train", "dev"):
            path = tmp_path / "data" / "glue_data" / f"{task}_{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    run = {"learning_rate": 1e-3, "steps": 2, "batch_size": 2, "accumulate": 2, "label_smoothing": 0.1}
    values = {
        "table": "3", "title": "small", "backbone": "tiny", "data": str(tmp_path / "data"),
        "pool": str(tmp_path / "experts"), "output": str(tmp_path / "out"), "training": run,
        "methods": {"bottleneck": {"options": {"r": 4}}, "lora": {"options": {"r": 2}}},
        "interpolation": {"top": 1, "kind": "fisher-paper", "training": {"steps": 3, "alpha_learning_rate": 0.01}},
        "tasks": {
            "glue-cola": {"evaluate": ["test", "test:accuracy"], "published": {"pi": {"test": 50}}},
            "glue-sst2": {"evaluate": ["test"], "published": {"pi": {"server": 1}}},
        },
    }  # fmt: skip
    return TableRecipe(**values)  # type: ignore[arg-type]


def test_inputs_of_the_chosen_tasks_alone_and_what_their_metrics_need(
    small: TableRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small.missing_inputs() == []
    (Path(str(small.data)) / "glue_data" / "sst2_dev.tsv").unlink()
    assert len(small.missing_inputs()) == 1
    assert small.missing_inputs(["glue-cola"]) == []
    captioned = small.tasks["glue-cola"].model_copy(update={"evaluate": ["test:METEOR", "test:BLEU-4"]})
    recipe = small.model_copy(update={"tasks": {"glue-cola": captioned}})
    assert recipe.missing_inputs() == [] or shutil.which("java") is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (missing,) = recipe.missing_inputs()
    assert missing.startswith("task 'glue-cola': METEOR is a Java program")


def test_a_table_runs_stage_by_stage_and_computes_nothing_twice(
    small: TableRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ExpertPool(tmp_path / "experts")
    with pytest.raises(PituningError, match="run the stage 'experts' first"):
        run_table(small, stages=["interpolation"], progress=False)
    run_table(small, stages=["experts"], tasks=["glue-cola"], progress=False)
    assert pool.names() == ["glue-cola-bottleneck", "glue-cola-lora"]
    results = run_table(small, progress=False)
    assert pool.names() == [f"glue-{t}-{m}" for t in ("cola", "sst2") for m in ("bottleneck", "lora", "pi")]
    blended = pool.load("glue-cola-pi").card
    assert [parent["name"] for parent in blended.lineage] == ["glue-sst2-bottleneck", "glue-cola-bottleneck"]
    assert sum(parent["weight"] for parent in blended.lineage) == pytest.approx(1)
    assert blended.training["steps"] == 3
    assert blended.training["label_smoothing"] == 0.1
    assert pool.load("glue-sst2-lora").card.training["accumulate"] == 2
    assert (pool.folder / "glue-sst2-bottleneck" / "task_embedding.safetensors").is_file()
    rows = {(r["task"], r["row"]): {c["name"]: c for c in r["columns"]} for r in results["rows"]}
    assert rows.keys() == {(f"glue-{t}", m) for t in ("cola", "sst2") for m in ("bottleneck", "lora", "pi")}
    assert rows["glue-cola", "pi"]["test"]["published"] == 50
    assert 0 <= rows["glue-cola", "pi"]["test:accuracy"]["measured"] <= 1
    assert rows["glue-sst2", "pi"]["server"] == {"name": "server", "measured": None, "published": 1}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == results["rows"]

    def fails(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    for name in ("train_expert", "blend", "evaluate"):
        monkeypatch.setattr(f"pituning.experiments.table_runner.{name}", fails)
    assert run_table(small, progress=False)["rows"] == results["rows"]


def test_zero_shot_rows(small: TableRecipe) -> None:
    run_table(small, stages=["experts"], progress=False)
    table = small.model_copy(update={"interpolation": None, "zero_shot": True, "output": small.output + "-zero"})
    results = run_table(table, stages=["interpolation"], progress=False)
    rows = {(r["task"], r["row"]): r["columns"][0]["measured"] for r in results["rows"]}
    assert set(rows) >= {("glue-cola", "zero-shot"), ("glue-cola", "pi")}
    assert rows["glue-sst2", "pi"] is not None


@pytest.mark.usefixtures("short_search")
def test_few_shots_are_cross_fitted_and_kept_apart(small: TableRecipe, tmp_path: Path) -> None:
    run_table(small, stages=["experts"], progress=False)
    few = small.model_copy(
        update={
            "shots": 2, "own": str(tmp_path / "own"), "training": type(small.training)(),
            "interpolation": small.interpolation and small.interpolation.model_copy(
                update={"training": type(small.training)(), "reference": "shared"}
            ),
            "methods": {"bottleneck": small.methods["bottleneck"]}, "output": small.output + "-few",
        }
    )  # fmt: skip
    run_table(few, tasks=["glue-cola"], progress=False)
    assert ExpertPool(tmp_path / "own").names() == ["glue-cola-bottleneck-2shot-seed0", "glue-cola-pi-2shot-seed0"]
    assert "glue-cola-pi-2shot-seed0" not in ExpertPool(tmp_path / "experts").names()


def test_a_task_that_the_recipe_lacks(small: TableRecipe) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'glue-cola'"):
        run_table(small, tasks=["glue-colaa"], progress=False)
