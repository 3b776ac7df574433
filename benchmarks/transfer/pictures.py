"""Two pictures of a suite: differences with their intervals, and a heat map of targets by arms; in the style of the reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import Row, heat_map, intervals, signed
from benchmarks.transfer.arms import ARMS
from benchmarks.transfer.report import Found, differences, shown
from pituning.report.images import drawing, save
from pituning.report.style import OTHER, OWN, PI

RIVAL = "own-extra"


def write_pictures(found: Found, shots: int, folder: Path) -> list[Path]:
    """Write ``transfer-SUITE-differences.png`` and ``transfer-SUITE-targets.png`` where there is something to show."""
    stem = f"transfer-{found.suite.name}" + (f"-{shots}" if len(found.suite.shots) > 1 else "")
    drawn: dict[str, Any] = {}
    with drawing():
        if differences(found, RIVAL, shots, found.suite.report):
            drawn["differences"] = _differences(found, shots)
        if differences(found, RIVAL, shots, found.suite.targets):
            drawn["targets"] = _targets(found, shots)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            save(figure, folder / f"{stem}-{name}.png")
    return [folder / f"{stem}-{name}.png" for name in drawn]


def _differences(found: Found, shots: int) -> Any:
    """Each arm's mean difference to own + extra steps over the report targets, with its interval; the targets as dots.

    An arm that has not been measured on all of these has no interval there, and its label says so.
    """
    rows, targets = {}, found.suite.report
    for arm, difference in differences(found, RIVAL, shots, targets).items():
        whole = len(difference.by_target) == len(targets)
        sure = whole and (difference.low > 0 or difference.high < 0)
        colour = PI if arm.startswith("pi") and sure else OWN if sure else OTHER
        dots, mean = list(difference.by_target.values()), difference.mean
        name, ends, text = ARMS[arm].label, (difference.low, difference.high), shown(difference)
        if not whole:
            name = f"{name} ({len(dots)} of {len(targets)} targets)"
        if not whole or difference.pairs == 1:  # no interval
            ends, text = (mean, mean), signed(mean)
        rows[name] = Row(mean, *ends, dots, colour, text)
    label = "difference to own + the same extra steps, points; dots are targets"
    return intervals(rows, label=label, title=_title(found, "report targets", shots), lines={0.0: "-"})


def _targets(found: Found, shots: int) -> Any:
    """Targets as rows, arms as columns: mean difference to own + extra steps."""
    suite = found.suite
    against = differences(found, RIVAL, shots, suite.targets)
    targets = [
        t for role in (suite.report, suite.development) for t in role if any(t in d.by_target for d in against.values())
    ]
    values = np.array([[d.by_target.get(t, np.nan) for d in against.values()] for t in targets])
    labels = [t if suite.role(t) == "report" else f"{t} (development)" for t in targets]
    label = "points against own + extra steps"
    return heat_map(values, labels, list(against), label=label, title=_title(found, "all targets", shots))


def _title(found: Found, what: str, shots: int) -> str:
    suite = found.suite
    title = f"{suite.name}, {what}" + (f", {shots} shots" if len(suite.shots) > 1 else "")
    return title + (" (partial)" if found.missing() else "")
