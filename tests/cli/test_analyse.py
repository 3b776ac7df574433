"""`pituning analyse`: numbers, pictures and where they are, on two or three random experts."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pituning import evaluate, load_task
from pituning.experts import ExpertPool
from tests.cli.test_cli import error, run, run_json


@pytest.fixture
def setup(data: Path, bert: Path, pool: ExpertPool, tmp_path: Path) -> list[Any]:
    """What every verb is told: task, data, backbone, pool and folder."""
    where = ["--data", data, "--backbone", bert, "--pool", pool.folder, "--out", tmp_path / "out"]
    return ["--task", "movie_quotes", *where]


def assert_written(folder: Path, name: str, printed: dict[str, Any]) -> None:
    """The file holds what was printed, and the two pictures are there."""
    files = [folder / f"{name}.{ending}" for ending in ("json", "png", "svg")]
    assert printed.pop("files") == [str(path) for path in files]
    assert json.loads(files[0].read_text()) == printed
    with Image.open(files[1]) as picture:
        assert min(picture.size) > 300
    assert files[2].read_text().startswith("<?xml")


def third(pool: ExpertPool, backbone_of: Any, random_expert: Any) -> None:
    pool.add(random_expert(backbone_of("encoder"), "lora", 2, name="third"))


def test_connect(setup: list[Any], pool: ExpertPool, data: Path, tmp_path: Path, backbone_of: Any) -> None:
    verb = ["analyse", "connect", "word_tone", "pocket_gear", *setup, "--split", "test", "--points", 3]
    found = run_json(*verb)
    assert_written(tmp_path / "out", "connect", found)
    assert (found["task"], found["experts"], found["t"]) == ("movie_quotes", ["word_tone", "pocket_gear"], [0, 0.5, 1])
    ends = [
        evaluate(backbone_of("encoder"), pool.load(name), load_task("movie_quotes", data=data))
        for name in ("word_tone", "pocket_gear")
    ]
    for index, alone in zip((0, -1), ends, strict=True):
        assert found["log_loss"][index] == pytest.approx(alone.metrics["log-loss"], rel=1e-6)
        assert found["values"][index] == alone.value
    shown = run(*verb).stdout
    assert "barrier" in shown
    assert f"saved to {tmp_path / 'out' / 'connect.json'}" in shown


def test_plane(setup: list[Any], pool: ExpertPool, tmp_path: Path, backbone_of: Any, random_expert: Any) -> None:
    third(pool, backbone_of, random_expert)
    verb = ["analyse", "plane", "word_tone", "pocket_gear", "third", *setup, "--split", "test", "--resolution", 3]
    found = run_json(*verb, "--limit", 4)
    assert_written(tmp_path / "out", "plane", found)
    assert found["examples"] == 4
    assert [len(row) for row in found["log_loss"]] == [3, 3, 3]
    assert found["corners"][0] == [0, 0]
    assert "lowest on the grid" in run(*verb).stdout
    assert "lie on one line" in error("analyse", "plane", "third", "word_tone", "third", *setup, "--split", "test")


def test_leave_one_out_of_named_experts_and_of_an_interpolation(
    setup: list[Any], pool: ExpertPool, tmp_path: Path, backbone_of: Any, random_expert: Any
) -> None:
    third(pool, backbone_of, random_expert)
    names, verb = ["word_tone", "pocket_gear", "third"], ["analyse", "leave-one-out"]
    found = run_json(*verb, *names, *setup, "--split", "test", "--weights", "0.9,-0.4,0.5")
    assert_written(tmp_path / "out", "leave-one-out", found)
    assert [m["name"] for m in found["without"]] == names
    assert [m["weight"] for m in found["without"]] == pytest.approx([0.9, -0.4, 0.5])
    lineage = tuple({"name": n, "weight": w} for n, w in zip(names, (0.9, -0.4, 0.5), strict=True))
    pool.add(random_expert(backbone_of("encoder"), "lora", 3, name="pi").with_card(lineage=lineage))
    learned = run_json(*verb, "pi", *setup, "--split", "test")
    assert learned["without"] == found["without"]
    assert learned["interpolation"] == "pi"
    assert "pi itself, with what it trained" in run(*verb, "pi", *setup, "--split", "test").stdout
    assert "'third' was not blended from others" in error(*verb, "third", *setup, "--split", "test")


def test_leave_one_out_needs_the_experts_of_the_interpolation(
    setup: list[Any], pool: ExpertPool, backbone_of: Any, random_expert: Any
) -> None:
    lineage = ({"name": "word_tone", "weight": 0.5}, {"name": "gone", "weight": 0.5})
    pool.add(random_expert(backbone_of("encoder"), "lora", 3, name="pi").with_card(lineage=lineage))
    assert "'gone'" in error("analyse", "leave-one-out", "pi", *setup, "--split", "test")


def test_weights(setup: list[Any], pool: ExpertPool, tmp_path: Path) -> None:
    verb = ["analyse", "weights", "word_tone", "pocket_gear", *setup, "--steps", 3, "--granularity", "layer"]
    before = pool.names()
    found = run_json(*verb)
    assert_written(tmp_path / "out", "weights", found)
    assert found["steps"] == [0, 1, 2, 3]
    assert len(found["groups"]) == len(found["weights"][0]) == 2
    assert [weight for row in found["weights"][0] for weight in row] == pytest.approx([0.5] * 4)
    assert found["weights"][3] != found["weights"][0]
    assert found["settings"]["alpha_learning_rate"] == 1e-2
    assert "after 3 steps" in run(*verb).stdout
    assert pool.names() == before


def test_mistakes_are_found_before_the_backbone_is_loaded(setup: list[Any]) -> None:
    pair = ["analyse", "connect", "word_tone", "pocket_gear"]
    assert "no examples in split 'dev'; it has train (16), test (8)" in error(*pair, *setup)
    assert "'wrd_tone'" in error("analyse", "connect", "wrd_tone", "pocket_gear", *setup, "--split", "test")
    assert (
        "numbers with commas"
        in run("analyse", "leave-one-out", "word_tone", "pocket_gear", *setup, "--weights", "a,b", code=2).output
    )


def test_without_matplotlib_the_numbers_are_written_and_the_error_says_what_to_install(
    setup: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    pair = ["analyse", "connect", "word_tone", "pocket_gear", *setup, "--split", "test", "--points", 3]
    assert "pip install 'pituning[demo]'" in error(*pair)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["connect.json"]
