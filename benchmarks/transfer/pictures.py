"""Two pictures of a suite: differences with their intervals, and a heat map of targets by arms; in the style of the reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import heat_map, signed
from benchmarks.transfer.arms import ARMS
from benchmarks.transfer.report import Found, differences
from pituning.report.images import drawing, new_figure, save
from pituning.report.style import FAINT, GRID, INK, OTHER, OWN, PI

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
    """Each arm's mean difference to own + extra steps over the report targets, with its interval; the targets as dots."""
    against = differences(found, RIVAL, shots, found.suite.report)
    count = len(against)
    figure, axis = new_figure(8.0, 1.2 + 0.3 * count)
    axis.axvline(0, color=INK, linewidth=1.2)
    for row, (arm, difference) in zip(range(count, 0, -1), against.items(), strict=True):
        sure = difference.low > 0 or difference.high < 0
        colour = PI if arm.startswith("pi") and sure else OWN if sure else OTHER
        axis.hlines(row, difference.low, difference.high, color=colour, linewidth=2.4)
        axis.scatter(
            list(difference.by_target.values()),
            [row - 0.2] * len(difference.by_target),
            s=10,
            color=FAINT,
            linewidths=0,
        )
        axis.scatter([difference.mean], [row], s=44, marker="D", color=colour, linewidths=0, zorder=3)
        text = f"{signed(difference.mean)} ({signed(difference.low)} to {signed(difference.high)})"
        axis.text(1.02, row, text, transform=axis.get_yaxis_transform(), va="center_baseline", color=INK, fontsize=9)
    axis.set_yticks(range(count, 0, -1), [ARMS[arm].label for arm in against], fontsize=9)
    axis.set_ylim(0.4, count + 0.6)
    axis.set_xlabel("difference to own + the same extra steps, points; dots are targets")
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    axis.set_title(_title(found, "report targets", shots), loc="left", fontweight="bold", pad=10)
    return figure


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
