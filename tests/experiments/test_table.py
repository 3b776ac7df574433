"""The recipes of the paper's tables: each is bound without being run; one small table runs, stops, and goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pituning import load_recipe, run_recipe, run_table
from pituning.backbones.base import Backbone
from pituning.errors import PituningError, RecipeError, UnknownNameError
from pituning.example import Example
from pituning.experiments.recipe import Recipe
from pituning.experiments.table_recipe import BARE, MethodSection, StageThree, TableRecipe, TrainingSection
from pituning.experiments.table_runner import _Run
from pituning.experts import Expert, ExpertPool
from pituning.methods import make_config
from pituning.metrics.registry import metric_named
from pituning.tasks.task import _REGISTRY, Task, task_names
from pituning.training.evaluation import Evaluation, evaluate
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

    @pytest.mark.parametrize("said", [{"label_smoothing": 0.1}, {"batch_size": 99, "weight_decay": 0.01}])
    def test_shots_leave_every_setting_to_cross_fitting(self, tmp_path: Path, said: dict[str, Any]) -> None:
        path = self.recipe(tmp_path, shots=4, training=said, interpolation={"training": {"alpha_learning_rate": 0.1}})
        with pytest.raises(RecipeError, match=r"2 problem\(s\)") as caught:
            load_recipe(path)
        assert f"has settings of its own; leave out {', '.join(said)}" in str(caught.value)
        assert "interpolation.training: with shots" in str(caught.value)
        assert isinstance(load_recipe(self.recipe(tmp_path, shots=4, training={}, interpolation={})), TableRecipe)

    def test_a_special_sections_epochs_take_the_place_of_general_steps(self, tmp_path: Path) -> None:
        tasks = {"glue-rte": {"evaluate": ["test"], "training": {"epochs": 5}}, "glue-qqp": {"evaluate": ["test"]}}
        recipe = load_recipe(self.recipe(tmp_path, training={"steps": 1000}, tasks=tasks))
        assert isinstance(recipe, TableRecipe)
        found = [recipe.settings("bottleneck", name) for name in tasks]
        assert [(s.steps, s.epochs) for s in found if s] == [(None, 5), (1000, 3)]
        blended = recipe.model_copy(update={"interpolation": StageThree(training=TrainingSection(steps=7))})
        assert [blended.said_of_blend(name) for name in tasks] == [{"steps": 7}, {"steps": 7}]

    def test_the_seed_is_the_recipes_alone(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"training\.seed: Extra inputs"):
            load_recipe(self.recipe(tmp_path, training={"seed": 3}))

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


def small_captions() -> tuple[Example, ...]:
    return (Example("1", (), "what does it show?", "a dog"),)


def test_inputs_of_the_chosen_tasks_alone_and_what_their_metrics_need(
    small: TableRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small.missing_inputs() == []
    (Path(str(small.data)) / "glue_data" / "sst2_dev.tsv").unlink()
    assert len(small.missing_inputs()) == 1
    assert small.missing_inputs(["glue-cola"]) == []
    columns = ["test", "test:METEOR", "test:BLEU-4"]
    captioned = small.tasks["glue-cola"].model_copy(update={"evaluate": columns})
    recipe = small.model_copy(update={"tasks": {"glue-cola": captioned}})
    examples = small_captions()
    captions = Task("glue-cola", (), {"train": examples, "test": examples}, metric="BLEU-4")
    monkeypatch.setattr("pituning.tasks.task.load_task", lambda *_, **__: captions)
    assert recipe.missing_inputs() == [] or shutil.which("java") is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (missing,) = recipe.missing_inputs()
    assert missing.startswith("task 'glue-cola': METEOR is a Java program")


def test_a_metric_that_does_not_fit_the_answers_is_found_before_anything_runs(small: TableRecipe) -> None:
    section = small.tasks["glue-cola"].model_copy(update={"evaluate": ["test", "test:METEOR", "test:acc@0.5"]})
    recipe = small.model_copy(update={"tasks": {"glue-cola": section}})
    meteor, boxes = recipe.missing_inputs()
    assert meteor.startswith("tasks.glue-cola.evaluate: metric 'METEOR' compares answers of the kind 'references'")
    assert "'acc@0.5'" in boxes
    with pytest.raises(RecipeError, match="nothing was run"):
        run_table(recipe, progress=False)


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
    assert not list(pool.folder.glob("*-pi/task_embedding*")), "no blend is a candidate"


class TestKeptExperts:
    @pytest.fixture
    def one(self, small: TableRecipe) -> TableRecipe:
        """Bottlenecks alone, ranked without Fisher information."""
        assert small.interpolation is not None
        return small.model_copy(
            update={
                "methods": {"bottleneck": small.methods["bottleneck"]},
                "interpolation": small.interpolation.model_copy(update={"kind": "score"}),
            }
        )

    def test_are_refused_if_the_recipe_says_other_settings_now(self, one: TableRecipe, tmp_path: Path) -> None:
        run_table(one, stages=["experts"], progress=False)
        slower = TrainingSection(**{**one.training.given(), "learning_rate": 1e-4})
        smaller = {"bottleneck": MethodSection(options={"r": 3})}
        changed = one.model_copy(update={"training": slower, "methods": smaller})
        with pytest.raises(RecipeError, match=r"2 problem\(s\) with experts, nothing was run") as caught:
            run_table(changed, progress=False)
        for part in (
            "expert 'glue-cola-bottleneck' was made with learning_rate 0.001, the recipe says 0.0001; r 4, the recipe says 3",
            f"Remove the folder {tmp_path / 'experts' / 'glue-cola-bottleneck'}",
        ):
            assert part in str(caught.value)
        shutil.rmtree(tmp_path / "experts")
        run_table(changed, stages=["experts"], tasks=["glue-cola"], progress=False)
        card = ExpertPool(tmp_path / "experts").load("glue-cola-bottleneck").card
        assert (card.training["learning_rate"], card.training["steps_taken"]) == (1e-4, 2)

    def test_blends_are_refused_if_they_would_be_others_now(self, one: TableRecipe, tmp_path: Path) -> None:
        run_table(one, progress=False)
        assert one.interpolation is not None
        changed = {"granularity": "model", "training": TrainingSection(steps=1, alpha_learning_rate=0.01)}
        other = one.model_copy(update={"interpolation": one.interpolation.model_copy(update=changed)})
        with pytest.raises(
            RecipeError, match="'glue-cola-pi' was made with steps 3, the recipe says 1; granularity module"
        ):
            run_table(other, progress=False)
        pool = ExpertPool(tmp_path / "experts")
        expert = pool.load("glue-sst2-bottleneck")
        pool.add(replace(expert, tensors={k: t + 0.1 for k, t in expert.tensors.items()}))
        with pytest.raises(
            RecipeError, match="'glue-cola-pi' was made with expert 'glue-sst2-bottleneck' as it was then"
        ):
            run_table(one, progress=False)

    def test_what_a_named_blend_does_not_depend_on_may_change(self, one: TableRecipe) -> None:
        """Named experts are not cut off at ``top``, and have no order."""
        assert one.interpolation is not None
        named = one.tasks["glue-cola"].model_copy(update={"experts": ("glue-sst2",)})
        recipe = one.model_copy(update={"tasks": {**one.tasks, "glue-cola": named}})
        run_table(recipe, progress=False)
        three = recipe.model_copy(update={"interpolation": one.interpolation.model_copy(update={"top": 3})})
        run_table(three, tasks=["glue-cola"], progress=False)
        with pytest.raises(RecipeError, match="'glue-sst2-pi' was made with top 1, the recipe says 3"):
            run_table(three, tasks=["glue-sst2"], progress=False)

    def test_named_experts_must_be_there_before_anything_runs(self, one: TableRecipe, tmp_path: Path) -> None:
        named = one.tasks["glue-cola"].model_copy(update={"experts": ("glue-sst2", "glue-mrpc")})
        recipe = one.model_copy(update={"tasks": {**one.tasks, "glue-cola": named}})
        with pytest.raises(RecipeError, match="no expert 'glue-mrpc-bottleneck' in") as caught:
            run_table(recipe, progress=False)
        assert "glue-sst2" not in str(caught.value), "stage 1 trains it"
        assert ExpertPool(tmp_path / "experts").names() == []
        run_table(recipe, stages=["experts"], tasks=["glue-cola"], progress=False)

    def test_blends_are_no_candidates_for_later_tasks(self, one: TableRecipe, tmp_path: Path) -> None:
        assert one.interpolation is not None
        section = one.interpolation.model_copy(update={"top": 3, "method": "lora"})
        named = one.tasks["glue-cola"].model_copy(update={"experts": ("glue-rte",)})
        recipe = one.model_copy(
            update={
                "methods": {"lora": MethodSection(options={"r": 2})}, "interpolation": section,
                "tasks": {"glue-cola": named, "glue-sst2": one.tasks["glue-sst2"]}, "own": str(tmp_path / "experts"),
            }
        )  # fmt: skip
        run_table(recipe, stages=["experts"], progress=False)
        pool = ExpertPool(tmp_path / "experts")
        third = pool.load("glue-cola-lora")
        tensors = {k: t + 0.01 for k, t in third.tensors.items()}
        pool.add(replace(third, tensors=tensors).with_card(task="glue-rte"), "glue-rte-lora")
        run_table(recipe, stages=["interpolation"], progress=False)
        lineage = [{parent["name"] for parent in pool.load(f"glue-{t}-pi").card.lineage} for t in ("cola", "sst2")]
        assert lineage == [{f"glue-{t}-lora" for t in ts} for ts in (("rte", "cola"), ("cola", "rte", "sst2"))]

    def test_own_experts_must_be_there_before_anything_runs(self, one: TableRecipe) -> None:
        run_table(one, stages=["experts"], tasks=["glue-cola"], progress=False)
        with pytest.raises(
            RecipeError, match=r"tasks\.glue-sst2: there is no expert 'glue-sst2-bottleneck' of its own"
        ):
            run_table(one, stages=["interpolation"], progress=False)
        assert not (Path(one.pool) / "glue-cola-pi").exists()

    def test_data_of_experts_to_embed_must_be_there_before_anything_runs(
        self, small: TableRecipe, tmp_path: Path
    ) -> None:
        run_table(small, stages=["experts"], tasks=["glue-sst2"], progress=False)
        for split in ("train", "dev"):
            (tmp_path / "data" / "glue_data" / f"sst2_{split}.tsv").unlink()
        with pytest.raises(
            RecipeError, match=r"expert 'glue-sst2-bottleneck' of .* is to be embedded: task 'glue-sst2'"
        ):
            run_table(small, tasks=["glue-cola"], progress=False)
        assert ExpertPool(tmp_path / "experts").names() == ["glue-sst2-bottleneck", "glue-sst2-lora"]

    def test_full_data_experts_go_into_the_pool_and_blends_beside_it(self, one: TableRecipe, tmp_path: Path) -> None:
        run_table(one.model_copy(update={"own": str(tmp_path / "own")}), progress=False)
        assert ExpertPool(tmp_path / "experts").names() == ["glue-cola-bottleneck", "glue-sst2-bottleneck"]
        assert ExpertPool(tmp_path / "own").names() == ["glue-cola-pi", "glue-sst2-pi"]


class TestCells:
    def test_zero_shot_transfer_is_measured_again_where_the_pool_is_another(
        self, small: TableRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        methods = {"lora": small.methods["lora"]}
        table = small.model_copy(update={"interpolation": None, "zero_shot": True, "methods": methods})
        run_table(table, stages=["experts"], progress=False)
        pool, measured = ExpertPool(tmp_path / "experts"), list[Any]()

        def evaluated(backbone: Backbone, expert: Expert | None, *rest: Any, **options: Any) -> Evaluation:
            measured.append(expert and expert.name)
            return evaluate(backbone, expert, *rest, **options)

        monkeypatch.setattr("pituning.experiments.table_runner.evaluate", evaluated)
        run_table(table, tasks=["glue-cola"], stages=["interpolation"], progress=False)
        assert measured == [None, "glue-sst2-lora"]
        blended = pool.load("glue-sst2-lora").with_card(lineage=({"name": "x", "weight": 1.0},))
        pool.add(blended, "glue-sst2-pi")
        run_table(table, tasks=["glue-cola"], stages=["interpolation"], progress=False)
        assert measured == [None, "glue-sst2-lora"], "nothing has changed: no blend is a candidate"
        pool.add(blended.with_card(lineage=()), "glue-sst2-lora-again")
        run_table(table, tasks=["glue-cola"], stages=["interpolation"], progress=False)
        assert len(measured) == 3

    def test_are_measured_again_where_the_data_have_grown(self, small: TableRecipe) -> None:
        recipe = small.model_copy(update={"interpolation": None, "methods": {"lora": small.methods["lora"]}})
        run_table(recipe, tasks=["glue-cola"], progress=False)
        (cell,) = (Path(small.output) / "cells").glob("glue-cola.lora.*")
        assert json.loads(cell.read_text())["examples"] == {"test": 6}
        before = cell.stat().st_mtime_ns
        run_table(recipe, tasks=["glue-cola"], progress=False)
        assert cell.stat().st_mtime_ns == before
        with (Path(str(small.data)) / "glue_data" / "cola_dev.tsv").open("a") as file:
            file.write("grand\t1\n")
        run_table(recipe, tasks=["glue-cola"], progress=False)
        assert json.loads(cell.read_text())["examples"] == {"test": 7}

    def test_depend_on_backbone_precision_and_expert(
        self, small: TableRecipe, t5: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_table(small, stages=["experts"], tasks=["glue-cola"], progress=False)

        def paths(**changes: Any) -> list[Path]:
            run = _Run(small.model_copy(update=changes), Path(small.output), ["glue-cola"], False)
            return [run._cell("glue-cola", row) for row in (BARE, "lora")]

        before = paths()
        assert before[1].is_file()
        assert paths() == before
        assert not set(paths(precision="bf16")) & set(before)
        for fast, meant in ((True, "bf16"), (False, "fp32")):
            monkeypatch.setattr("pituning.training.precision.has_fast_bf16", lambda device, fast=fast: fast)
            assert paths(precision="auto") == paths(precision=meant), "not the word, but what it stands for"
        pool = ExpertPool(tmp_path / "experts")
        expert = pool.load("glue-cola-lora")
        pool.add(replace(expert, tensors={k: t + 0.1 for k, t in expert.tensors.items()}))
        assert [new == old for new, old in zip(paths(), before, strict=True)] == [True, False]
        monkeypatch.setattr(t5, "fingerprint", "another")
        assert paths()[0] != before[0]


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
