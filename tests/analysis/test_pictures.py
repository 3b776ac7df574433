"""The pictures of the analyses, from plain and from awkward results."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pituning.analysis import Connectivity, LeaveOneOut, LeftOut, Plane, Trajectory
from pituning.report.analysis import Analysis, write_pictures

NAMES = ("a $1$ & <b>", "a-name-that-goes-on-and-on-and-on-for-sixty-characters-or-so", "c")
GRID = tuple(tuple(0.5 + 0.1 * (i - j) ** 2 for j in range(4)) for i in range(4))
PLANE = Plane(
    "task", "test", NAMES, ((0.0, 0.0), (2.0, 0.0), (1.0, 1.5)), (0.5, 0.6, 0.7),
    (-1.0, 0.0, 1.0, 2.0), (-1.0, 0.0, 1.0, 2.0), GRID, (((0.2, 0.9, -0.1),) * 4,) * 4, 10,
)  # fmt: skip
PATH = Connectivity(
    "task", "test", NAMES[:2], "accuracy", (0.0, 0.5, 1.0), (0.5, 0.8, 0.6), (0.7, 0.5, 0.6), 0.25, 0.5, 0.01, 10
)
LEFT_OUT = LeaveOneOut(
    "task", "dev", "accuracy", 0.5, 0.7, tuple(LeftOut(n, -0.2, 0.6, 0.7, 0.1, 0.01) for n in NAMES), 10
)
MOVES = Trajectory(
    "task", NAMES, ("g", "h"), (0, 1, 2), (((0.4, 0.3, 0.3), (0.3, 0.3, 0.4)),) * 2 + (((0.1, 0.1, 0.8),) * 2,)
)
INFINITE = replace(PLANE, log_loss=((math.inf, *GRID[0][1:]), (math.nan, *GRID[1][1:]), *GRID[2:]))
BELOW = replace(PATH, log_loss=(0.5, 0.4, 0.6), barrier=0.0, barrier_at=0.0, metric="CIDEr-D")
FLAT = replace(PLANE, log_loss=((0.5,) * 4,) * 4, corner_log_loss=(0.5,) * 3)
STILL = Trajectory("task", NAMES[:2], ("model",), (0, 1), (((0.5, 0.5),),) * 2)


@pytest.mark.parametrize(
    "result",
    [
        PATH,
        replace(PATH, log_loss=(0.5, 0.4, 0.6), barrier=0.0, barrier_at=0.0, metric="CIDEr-D"),
        PLANE,
        INFINITE,
        FLAT,
        LEFT_OUT,
        MOVES,
        STILL,
    ],
    ids=["path", "no-barrier", "plane", "infinite", "flat", "left-out", "moves", "still"],
)
def test_png_and_svg_are_written(result: Analysis, tmp_path: Path) -> None:
    png, svg = write_pictures(result, tmp_path, "picture")
    assert svg.read_text().startswith("<?xml")
    with Image.open(png) as picture:
        assert 300 < min(picture.size) < max(picture.size) < 3000
        assert len(set(picture.convert("L").resize((100, 100)).tobytes())) > 10


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write_pictures(PLANE, tmp_path, "picture")]
    assert [path.read_bytes() for path in write_pictures(PLANE, tmp_path, "picture")] == first


def test_the_lowest_point_is_a_defined_one() -> None:
    assert INFINITE.best == (1, 1)
    assert PLANE.best == (0, 0)
