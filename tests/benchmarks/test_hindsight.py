"""What a rule between two arms would have come to, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.hindsight import LOSS, pairs, row
from benchmarks.transfer.suites import SUITES

SUITE = replace(SUITES["core"], seeds=(5, 6))


def cell(arm: str, task: str, seed: int, value: float, loss: float) -> dict[str, Any]:
    return {"arm": arm, "task": task, "shots": 16, "seed": seed, "value": value, "details": {LOSS: loss}}


def test_the_lower_loss_decides_beyond_a_margin() -> None:
    cells = [
        cell("pi", "cola", 5, 0.50, 0.70), cell("own-extra", "cola", 5, 0.60, 0.69),  # ahead by 0.01
        cell("pi", "cola", 6, 0.50, 0.70), cell("own-extra", "cola", 6, 0.40, 0.71),
        cell("pi", "trec6", 5, 0.80, 0.50), cell("own-extra", "trec6", 5, 0.90, 0.44),  # by 0.06
        cell("pi", "trec6", 0, 0.10, 0.50), cell("own-extra", "trec6", 0, 0.90, 0.10),  # no draw of the suite
        cell("pi", "qnli", 5, 0.10, 0.50), cell("own", "qnli", 5, 0.90, 0.10),  # without a partner
    ]  # fmt: skip
    found = pairs(SUITE, cells)
    assert set(found) == {("cola", 16, 5), ("cola", 16, 6), ("trec6", 16, 5)}
    assert row("core", "report", 16, found) == (
        "| core | report | 16 | 3 | 65.0 | 70.0 | 72.5 (2) | 70.0 (1) | 70.0 (1) | 65.0 (0) |"
    )
