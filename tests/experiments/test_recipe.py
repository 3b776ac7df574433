"""A recipe is validated as a whole: every problem is reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pituning.errors import RecipeError
from pituning.example import Example
from pituning.experiments.pretrain_recipe import PretrainRecipe
from pituning.experiments.recipe import ARMS, Recipe, load_recipe
from pituning.experiments.table_recipe import TableRecipe
from pituning.tasks import Task

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_open_with_their_command(path: Path) -> None:
    recipe = load_recipe(path)
    verb = "pretrain" if isinstance(recipe, PretrainRecipe) else "run"
    assert path.read_text(encoding="utf-8").splitlines()[0] == f"# pituning {verb} {path.relative_to(ROOT)}"
    assert isinstance(recipe, TableRecipe | PretrainRecipe) or set(recipe.arms) <= set(ARMS)


def test_a_gallery_needs_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "gallery.yaml"
    text = "title: x\ntarget: sst2\npool: {folder: p, tasks: [cr]}\noutput: o\n"
    path.write_text(f"{text}gallery: 4\narms: [own]\ngallery_tasks: [trec6]\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "2 problem(s)" in str(caught.value)
    assert "gallery needs arm 'pi'" in str(caught.value)
    assert "'trec6' is none of the pool's tasks: cr" in str(caught.value)
    path.write_text(f"{text}gallery_tasks: [cr]\n")
    with pytest.raises(RecipeError, match="gallery_tasks needs gallery"):
        load_recipe(path)


def test_a_gallery_of_a_task_without_pictures_is_a_missing_input(tmp_path: Path) -> None:
    path = tmp_path / "gallery.yaml"
    path.write_text("title: x\ntarget: movie_quotes\npool: {folder: p, tasks: [word_tone]}\noutput: o\ngallery: 4\n")
    recipe = load_recipe(path)
    assert recipe.missing_inputs() == ["gallery: task 'movie_quotes' has no pictures"]


@pytest.mark.parametrize("line", ["draws: []", "training_seeds: []", "arms: []", "search: {learning_rates: []}"])
def test_lists_hold_something(tmp_path: Path, line: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(f"title: x\ntarget: sst2\npool: {{folder: p, tasks: [cr]}}\noutput: o\n{line}\n")
    with pytest.raises(RecipeError, match="at least 1 item"):
        load_recipe(path)


@pytest.mark.parametrize("line", ["draws: [0, 1, 0]", "training_seeds: [0, 0]", "arms: [own, own]"])
def test_nothing_counts_twice(tmp_path: Path, line: str) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(f"title: x\ntarget: sst2\npool: {{folder: p, tasks: [cr]}}\noutput: o\n{line}\n")
    with pytest.raises(RecipeError, match="is there more than once"):
        load_recipe(path)


def test_everything_that_a_run_would_miss_later_is_a_missing_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = ("no", "yes")
    examples = tuple(Example(str(n), (str(n),), str(n), choices[n % 2], choices) for n in range(6))
    untested = Task("movie_quotes", choices, {"train": examples})
    captions = Task("word_tone", (), {"test": examples, "train": ()}, metric="METEOR")
    tasks = {task.name: task for task in (untested, captions)}
    monkeypatch.setattr("pituning.experiments.recipe.load_task", tasks.__getitem__)
    monkeypatch.setattr("shutil.which", lambda name: None)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"title: x\ntarget: movie_quotes\npool: {{folder: {tmp_path}/p, tasks: [word_tone]}}\noutput: o\n")
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    shots, untested, java, untrained = sorted(recipe.missing_inputs())
    assert shots == "target 'movie_quotes': 16 shots per class asked for, but class 'no' has only 3 examples"
    assert (untested, untrained) == ("task 'movie_quotes': no split 'test'", "task 'word_tone': no split 'train'")
    assert java.startswith("task 'word_tone': METEOR is a Java program")
    (tmp_path / "p" / "word_tone").mkdir(parents=True)
    assert len(recipe.missing_inputs()) == 3, "an expert that is there is not scored"
    fitting = recipe.model_copy(update={"shots": 3})
    assert not any("shots" in m for m in fitting.missing_inputs())
    folds = fitting.model_copy(update={"search": recipe.search.model_copy(update={"folds": 7})})
    assert any("cannot make 7 folds of 6 examples" in m for m in folds.missing_inputs())


def test_every_problem_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(
        "title: x\ntarget: sst2\nshotz: 4\npool: {folder: p, tasks: [cr], epochs: 0}\noutput: o\nshots: 0\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "3 problem(s)" in message
    for part in ("shotz", "pool.epochs", "shots"):
        assert part in message


def test_unknown_names_come_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "names.yaml"
    path.write_text(
        "title: x\ntarget: sst3\npool: {folder: p, tasks: [cr, trecc6]}\noutput: o\nmethod: lorra\narms: [ownn]\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for part in ("'sst2'", "'trec6'", "'lora'", "'own'"):
        assert part in str(caught.value)


def test_target_must_not_be_in_the_pool(tmp_path: Path) -> None:
    path = tmp_path / "leak.yaml"
    path.write_text("title: x\ntarget: sst2\npool: {folder: p, tasks: [sst2]}\noutput: o\n")
    with pytest.raises(RecipeError, match="target 'sst2' is among the pool's tasks"):
        load_recipe(path)


def test_not_yaml_and_missing(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("title: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_digest_follows_what_changes_a_result(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "text" / "demo.yaml")
    assert isinstance(recipe, Recipe)
    assert recipe.digest() == recipe.model_copy(update={"draws": (7,), "title": "other"}).digest()
    assert recipe.digest() == recipe.model_copy(update={"gallery": 4, "gallery_tasks": ("cr",)}).digest()
    assert recipe.digest() != recipe.model_copy(update={"shots": 4}).digest()
    assert (
        len({recipe.digest(), recipe.digest("backbone"), recipe.digest("other"), recipe.digest("backbone", "pool")})
        == 4
    )
