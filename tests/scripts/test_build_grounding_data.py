"""Grounding tasks from NLVR's drawings; where the data are not here, only what needs no data is tested."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pituning.example import Example
from pituning.tasks import grounding_from_files

REPOSITORY = Path(__file__).parents[2]
NLVR = REPOSITORY.parent / "shared" / "data" / "nlvr"
needs_data = pytest.mark.skipif(not NLVR.is_dir(), reason=f"the drawings are not here: no folder {NLVR}")
RGB = {"yellow": (255, 255, 0), "blue": (0, 153, 255), "black": (0, 0, 0)}
COUNTS = {"train": 6, "test": 4}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    name = "build_grounding_data"
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawings(script: ModuleType) -> Any:
    return script.read_drawings(NLVR)


@pytest.fixture(scope="module")
def tasks(script: ModuleType, drawings: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every task of a handful of drawings: name → split → examples."""
    files = script.build(drawings[:400], tmp_path_factory.mktemp("nlvr"), counts=COUNTS)
    return {name: grounding_from_files(name, splits).splits for name, splits in files.items()}


def pixels(example: Example) -> np.ndarray:
    with Image.open(example.image) as image:  # type: ignore[arg-type]
        return np.asarray(image.convert("RGB")).astype(int)


def close_to(pixels: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(pixels - np.array(RGB[colour])).max(-1) < 60


@needs_data
class TestTasks:
    def test_sizes_and_names(self, tasks: Any) -> None:
        assert set(tasks) == {"nlvr_size", "nlvr_colour", "nlvr_box", "nlvr_order", "nlvr_colour_box"}
        assert {(k, len(v)) for splits in tasks.values() for k, v in splits.items()} == {("train", 6), ("test", 4)}

    def test_no_picture_is_used_twice(self, tasks: Any) -> None:
        examples = [e for splits in tasks.values() for split in splits.values() for e in split]
        assert len({pixels(e).tobytes() for e in examples}) == len(examples)

    def test_drawings_made_for_one_sentence_stay_together(self, tasks: Any) -> None:
        seen: dict[str, tuple[str, str]] = {}
        for name, splits in tasks.items():
            for split, examples in splits.items():
                for example in examples:
                    group = "-".join(Path(example.image).stem.split("-")[:2])
                    assert seen.setdefault(group, (name, split)) == (name, split)

    @pytest.mark.parametrize("name", ["nlvr_colour", "nlvr_colour_box"])
    def test_the_box_holds_the_colour_that_the_text_names(self, tasks: Any, name: str) -> None:
        for example in (*tasks[name]["train"], *tasks[name]["test"]):
            x0, y0, x1, y1 = (int(c) for c in example.box)
            colour = next(c for c in RGB if c in example.texts[0])
            inside = close_to(pixels(example)[y0:y1, x0:x1], colour)
            assert inside.mean() > 0.3, "a triangle covers half of its box, less its blurred edges"

    def test_the_side_is_that_of_the_picture(self, tasks: Any) -> None:
        for name in ("nlvr_box", "nlvr_order", "nlvr_colour_box"):
            for example in tasks[name]["train"]:
                centre = (example.box[0] + example.box[2]) / 2
                side = ("left", "middle", "right")[int(centre // 75)]
                assert example.texts[0].endswith(f"in the {side} box")

    def test_two_runs_write_the_same_and_another_seed_something_else(
        self, script: ModuleType, drawings: Any, tmp_path: Path
    ) -> None:
        def written(folder: Path, seed: int) -> dict[Path, bytes]:
            script.build(drawings[:400], folder, counts=COUNTS, seed=seed)
            return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

        first = written(tmp_path / "a", 0)
        assert first == written(tmp_path / "b", 0)
        assert first != written(tmp_path / "c", 1)
        rows = [json.loads(line) for line in first[Path("nlvr_box/train.jsonl")].decode().splitlines()]
        assert all(set(row) == {"image", "text", "x0", "y0", "x1", "y1"} for row in rows)


@needs_data
def test_every_object_stands_where_its_box_says(script: ModuleType, drawings: Any) -> None:
    """Of both permutations: the colour at the centre of mass of every object's box."""
    for drawing in drawings[::20]:
        for thing in drawing.things:
            x, y = thing.centre
            row = int(y + (0.15 * (thing.box[3] - thing.box[1]) if thing.shape == "triangle" else 0))
            assert close_to(drawing.pixels[row, int(x)].astype(int), thing.colour), (drawing.name, thing)


@needs_data
def test_every_expression_fits_one_object_alone(script: ModuleType, drawings: Any) -> None:
    """Counted anew from the words of the expression."""
    words = ("colour", "size", "shape")
    for drawing in drawings[:200]:
        for references in script.TASKS.values():
            for text, thing in references(drawing):
                said = text.split()
                fits = [
                    t for t in drawing.things
                    if all(getattr(t, w) in said for w in words if any(getattr(o, w) in said for o in drawing.things))
                    and ("box" not in said or t.side == said[-2])
                ]  # fmt: skip
                for word, axis, best in (
                    ("leftmost", 0, min),
                    ("rightmost", 0, max),
                    ("highest", 1, min),
                    ("lowest", 1, max),
                ):
                    if word in said:
                        outermost = best(t.centre[axis] for t in fits)
                        fits = [t for t in fits if abs(t.centre[axis] - outermost) < 4]
                assert fits == [thing], (drawing.name, text)


def test_it_refuses_to_write_into_the_repository(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="is in the repository"):
        script.build([], REPOSITORY / "data")


def test_it_says_what_is_missing(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 0 drawings are left for 6 examples of nlvr_size/train: ask for fewer"):
        script.build([], tmp_path, counts=COUNTS)
