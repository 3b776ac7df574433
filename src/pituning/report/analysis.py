"""The charts of `pituning analyse`, as PNG and SVG files; drawn by matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pituning.analysis.connectivity import Connectivity
from pituning.analysis.leave_one_out import LeaveOneOut
from pituning.analysis.plane import Plane
from pituning.analysis.trajectory import Trajectory
from pituning.report.content import Metric, Numbers
from pituning.report.images import drawing, new_figure, save
from pituning.report.layout import ellipsis
from pituning.report.style import FAINT, GRID, INK, LINES, OTHER, OWN, PI, axis_title, wrapped

# From low to high loss, dark to pale, so that white marks stand out where it matters.
_LOSS = ("#1e3a5f", "#35618f", "#6d93c4", "#a9c1e3", "#dbe5f4", "#f7f1ea", "#f3cfae")
_LONGEST_NAME = 26

Analysis = Connectivity | Plane | LeaveOneOut | Trajectory


def write_pictures(result: Analysis, folder: Path, name: str) -> list[Path]:
    """Draw an analysis as ``name.png`` and ``name.svg``, and return their paths.

    Raises:
        PituningError: matplotlib is not installed.
    """
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with drawing():
        figure = _draw(result)
        for path in paths:
            save(figure, path)
    return paths


def _draw(result: Analysis) -> Any:
    if isinstance(result, Connectivity):
        return _connectivity(result)
    if isinstance(result, Plane):
        return _plane(result)
    return _leave_one_out(result) if isinstance(result, LeaveOneOut) else _trajectory(result)


def _connectivity(path: Connectivity) -> Any:
    metric = Metric(path.metric)
    figure, (upper, lower) = new_figure(7.0, 5.2, rows=2)
    ends = [path.log_loss[0], path.log_loss[-1]]
    upper.plot([0, 1], ends, color=FAINT, linestyle="dashed", linewidth=1.2)
    upper.plot(path.t, path.log_loss, color=PI, marker="o", markersize=4.5, linewidth=1.8)
    upper.set_ylabel("log-loss, nats")
    lower.plot(path.t, [v * metric.scale for v in path.values], color=OWN, marker="o", markersize=4.5, linewidth=1.8)
    lower.set_ylabel(axis_title(metric))
    if path.barrier > 0:
        chord = ends[0] + path.barrier_at * (ends[1] - ends[0])
        upper.vlines(path.barrier_at, chord, chord + path.barrier, color=INK, linewidth=1.4)
        text = f"barrier {path.barrier:.4f} ± {path.barrier_error:.4f} nats at t = {path.barrier_at:.2f}"
    else:
        text = "no barrier: nowhere above the straight line between the ends (dashed)"
    upper.set_title(f"{text}\n{_measured(path)}", loc="left", fontsize=10)
    left, right = (ellipsis(name, _LONGEST_NAME) for name in path.experts)
    lower.set_xticks([0, 0.25, 0.5, 0.75, 1], [f"0\n{left}", "0.25", "0.5", "0.75", f"1\n{right}"])
    lower.set_xlabel("t")
    for axis in (upper, lower):
        axis.grid(color=GRID)
        axis.set_axisbelow(True)
        axis.margins(y=0.12)
    figure.align_ylabels()
    return figure


def _plane(plane: Plane) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    figure, axis = new_figure(7.2, 6.0)
    losses = np.ma.masked_invalid(np.array(plane.log_loss, dtype=np.float64))
    levels = _levels(losses, plane.corner_log_loss)
    colours = LinearSegmentedColormap.from_list("loss", _LOSS)
    drawn = axis.contourf(plane.x, plane.y, losses, levels=levels, cmap=colours, extend="max")
    axis.contour(plane.x, plane.y, losses, levels=levels, colors="white", linewidths=0.5, alpha=0.6)
    corners = np.array(plane.corners)
    axis.fill(corners[:, 0], corners[:, 1], fill=False, edgecolor=INK, linewidth=1.0, linestyle="dashed")
    axis.scatter(corners[:, 0], corners[:, 1], s=70, color=PI, edgecolors="white", linewidths=1.4, zorder=3)
    row, column = plane.best
    axis.scatter(
        plane.x[column], plane.y[row], s=130, marker="*", color="white", edgecolors=INK, zorder=4, clip_on=False
    )
    for name, loss, place, above in zip(
        plane.experts, plane.corner_log_loss, plane.corners, (False, False, True), strict=True
    ):
        share = (place[0] - plane.x[0]) / (plane.x[-1] - plane.x[0])
        side, inwards = ("left", -16) if share < 0.3 else ("right", 16) if share > 0.7 else ("center", 0)
        axis.annotate(
            f"{ellipsis(name, _LONGEST_NAME)}  {loss:.3f}", place, (inwards, 16 if above else -16),
            textcoords="offset points", ha=side, va="center",
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )  # fmt: skip
    axis.set_aspect("equal")
    axis.set_xlabel("distance between the experts' tensors (Frobenius norm)")
    lowest = plane.log_loss[row][column]
    weights = ", ".join(map(_minus, plane.weights[row][column]))
    where = "the grid, at its edge" if _on_edge(plane) else "the grid"
    title = f"★ lowest on {where}: {lowest:.3f} nats, at weights {weights}\n{_measured(plane)}"
    axis.set_title(title, loc="left", fontsize=10)
    bar = figure.colorbar(drawn, ax=axis, fraction=0.045, pad=0.03, label="log-loss, nats")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK)
    return figure


def _on_edge(plane: Plane) -> bool:
    row, column = plane.best
    return row in (0, len(plane.y) - 1) or column in (0, len(plane.x) - 1)


def _levels(losses: Any, corners: Sequence[float]) -> Numbers:
    """Round bounds of the colours; what lies far above the experts themselves shares the last one."""
    from matplotlib.ticker import MaxNLocator

    low = float(min(losses.min(), *corners))
    high = max(float(np.percentile(losses.compressed(), 85)), *corners)
    return np.asarray(MaxNLocator(14).tick_values(low, max(high, low + 0.01)), dtype=np.float64)


def _leave_one_out(result: LeaveOneOut) -> Any:
    members = sorted(result.without, key=lambda m: -m.difference)
    rows = range(len(members), 0, -1)
    figure, axis = new_figure(7.0, 1.1 + 0.5 * len(members))
    axis.axvline(0, color=INK, linewidth=1.2)
    for row, member in zip(rows, members, strict=True):
        reach = 1.96 * member.error
        colour = OTHER if abs(member.difference) <= reach else PI if member.difference > 0 else OWN
        axis.hlines(row, member.difference - reach, member.difference + reach, color=colour, linewidth=2.4)
        axis.scatter(member.difference, row, s=52, marker="D", color=colour, zorder=3)
        axis.text(
            1.02,
            row,
            f"{_signed(member.difference)} ± {member.error:.4f}",
            transform=axis.get_yaxis_transform(),
            va="center_baseline",
        )
    labels = ["\n".join([*wrapped(m.name), f"weight {_minus(m.weight)}"]) for m in members]
    axis.set_yticks(list(rows), labels)
    axis.set_ylim(0.4, len(members) + 0.6)
    axis.set_xlabel("log-loss without it − with it, nats (line: 95 % interval; right of zero: it helps)")
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    axis.set_title(f"all together: log-loss {result.log_loss:.4f}\n{_measured(result)}", loc="left", fontsize=10)
    return figure


def _trajectory(trajectory: Trajectory) -> Any:
    weights = np.array(trajectory.weights)
    figure, axis = new_figure(7.0, 4.0)
    for k in range(len(trajectory.experts)):
        values, colour = weights[:, :, k], LINES[k % len(LINES)]
        axis.fill_between(trajectory.steps, values.min(1), values.max(1), color=colour, alpha=0.13, linewidth=0)
        axis.plot(trajectory.steps, values.mean(1), color=colour, linewidth=2)
    low, high = axis.get_ylim()
    ends = weights[-1].mean(0)
    for k, (name, height) in enumerate(zip(trajectory.experts, _apart(ends, 0.055 * (high - low)), strict=True)):
        axis.annotate(
            f"{ellipsis(name, _LONGEST_NAME)} {_minus(ends[k])}", (1.01, height), color=LINES[k % len(LINES)],
            xycoords=axis.get_yaxis_transform(), va="center", annotation_clip=False,
        )  # fmt: skip
    axis.margins(x=0)
    axis.locator_params(axis="x", integer=True)
    axis.set_xlabel("step")
    axis.set_ylabel("weight")
    axis.grid(color=GRID)
    axis.set_axisbelow(True)
    groups = len(trajectory.groups)
    spread = f"mean of {groups} groups, shaded from the smallest to the largest" if groups > 1 else "one group"
    axis.set_title(f"weights over training on {trajectory.task}\n{spread}", loc="left", fontsize=10)
    return figure


def _apart(values: Numbers, gap: float) -> Numbers:
    """Heights near the values, in their order, at least ``gap`` from each other."""
    order = np.argsort(values)
    placed = values.astype(np.float64).copy()
    for lower, upper in pairwise(order):
        placed[upper] = max(placed[upper], placed[lower] + gap)
    shifted: Numbers = placed - (placed - values).mean()
    return shifted


def _minus(weight: float) -> str:
    return f"{weight:.3f}".replace("-", "−")


def _signed(difference: float) -> str:
    text = f"{difference:+.4f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def _measured(result: Connectivity | Plane | LeaveOneOut) -> str:
    return f"{result.task}, {result.split}: {result.examples:,} examples"
