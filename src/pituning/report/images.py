"""The page's three charts as PNG files, for a README or a slide; drawn by matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pituning.errors import PituningError
from pituning.report.content import Content, Graph, Weights
from pituning.report.layout import NODE_RADIUS, ellipsis, lay_out, without_common_prefix
from pituning.report.style import (
    DIVERGING,
    FAINT,
    GRID,
    INK,
    NODE,
    OTHER,
    PI,
    arm_colour,
    arm_value,
    axis_title,
    ceiling_side,
    colour_range,
    dot_opacity,
    edge_opacity,
    edge_width,
    lanes,
    short_groups,
    value_range,
    wrapped,
)

NAMES = ("results.png", "graph.png", "weights.png")
_DOTS_PER_INCH = 160


def write_images(content: Content, folder: Path) -> list[Path]:
    """Write ``results.png`` and, where the results hold them, ``graph.png`` and ``weights.png``.

    Raises:
        PituningError: matplotlib is not installed.
    """
    with drawing():
        drawn = {"results.png": _results(content)}
        if content.graph:
            drawn["graph.png"] = _graph(content.graph)
        if content.weights:
            drawn["weights.png"] = _weights(content.weights)
        for name, figure in drawn.items():
            save(figure, folder / name)
    return [folder / name for name in drawn]


@contextmanager
def drawing() -> Iterator[None]:
    """The look of all pictures, for the length of the block.

    Raises:
        PituningError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise PituningError(
            "pictures (PNG, SVG) need matplotlib, which is not installed: pip install 'pituning[demo]'."
        ) from error
    # Dollar signs in names are names, not formulas; the same picture has the same bytes.
    settings = {"text.parse_math": False, "font.size": 10, "svg.hashsalt": "pituning"}
    with mpl.rc_context({**settings, "text.color": INK, "axes.labelcolor": INK}):
        yield


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, as the path's ending says."""
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=_DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.15, metadata=metadata)


def new_figure(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure with one axis, or an array of them below each other, on the Agg canvas.

    It bypasses pyplot, so a notebook's own backend stays as it is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, sharex=True)
    for axis in figure.axes:
        axis.tick_params(length=0, colors=INK)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes


def _results(content: Content) -> Any:
    metric, count = content.metric, len(content.arms)
    figure, axis = new_figure(8.0, 0.9 + 0.42 * count)
    for row, arm in zip(range(count, 0, -1), content.arms, strict=True):
        colour, mean = arm_colour(arm, content), arm.mean * metric.scale
        heights = [row + offset for offset in lanes(len(arm.values))]
        axis.scatter(
            [v * metric.scale for v in arm.values], heights, s=34, color=colour, alpha=dot_opacity(arm), linewidths=0
        )
        if len(arm.values) > 1:
            axis.vlines(mean, row - 0.34, row + 0.34, color=colour, linewidth=2.6)
        axis.text(
            1.02,
            row,
            arm_value(arm, metric),
            transform=axis.get_yaxis_transform(),
            va="center_baseline",
            color=INK if colour == OTHER else colour,
        )
    if content.ceiling:
        label, value = content.ceiling
        axis.vlines(value * metric.scale, 0.4, count + 0.6, color=INK, linewidth=1.2, linestyle="dashed")
        text = f"{label}: {metric.plain(value)}"
        axis.text(value * metric.scale, count + 0.68, text, ha=ceiling_side(content), va="bottom")
    axis.set_yticks(range(count, 0, -1), ["\n".join(wrapped(arm.label)) for arm in content.arms])
    axis.set_ylim(0.4, count + 0.6)
    axis.set_xlim(value_range(content))
    axis.set_xlabel(axis_title(metric))
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    axis.set_title(content.title, loc="left", fontweight="bold", pad=26 if content.ceiling else 10)
    return figure


def _graph(graph: Graph) -> Any:
    from matplotlib.patheffects import withStroke

    layout = lay_out(graph)
    # Canvas pixels at 100 per inch; a point is 1/72 inch.
    point = 0.72
    figure, axis = new_figure(layout.width / 100, layout.height / 100)
    axis.set_position((0, 0, 1, 1))
    for edge in layout.edges:
        ends = layout.positions[[edge.left, edge.right]]
        opacity = edge_opacity(edge.strength)
        axis.plot(ends[:, 0], ends[:, 1], color="#475569", alpha=opacity, linewidth=point * edge_width(edge.strength))
    colours = [PI if name == graph.target else NODE for name in graph.names]
    axis.scatter(
        layout.positions[:, 0],
        layout.positions[:, 1],
        s=(2 * NODE_RADIUS * point) ** 2,
        c=colours,
        zorder=3,
        edgecolors="white",
        linewidths=1.4,
    )
    for (x, y), label, name in zip(layout.positions, layout.labels, graph.names, strict=True):
        target = name == graph.target
        axis.text(
            x,
            y - NODE_RADIUS - 2,
            label,
            ha="center",
            va="top",
            zorder=4,
            color=PI if target else INK,
            fontweight="bold" if target else "normal",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axis.set(xlim=(0, layout.width), ylim=(0, layout.height), xticks=[], yticks=[])
    return figure


def _weights(weights: Weights) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    groups, (middle, reach) = short_groups(weights), colour_range(weights)
    count, experts = len(groups), len(weights.experts)
    numbers = count <= 40 and experts <= 12
    row = 0.28 if count <= 40 else max(16.0 / count, 0.05)
    width = max(4.5, min(1.1 * experts, 12.0))
    figure, axis = new_figure(width + 1.0, 0.6 + row * count)
    scale = LinearSegmentedColormap.from_list("weights", DIVERGING)
    drawn = axis.pcolormesh(
        weights.values,
        cmap=scale,
        vmin=middle - reach,
        vmax=middle + reach,
        edgecolors="white",
        linewidth=1.5 if count <= 40 else 0,
    )
    if numbers:
        for i, j in np.ndindex(count, experts):
            axis.text(j + 0.5, i + 0.5, f"{weights.values[i, j]:.3f}", ha="center", va="center_baseline", fontsize=9)
    every = max(1, int(np.ceil(0.15 / row)))
    axis.set_yticks(np.arange(0, count, every) + 0.5, groups[::every], fontsize=9)
    if prefix := without_common_prefix(weights.groups)[0]:
        axis.set_ylabel(f"{prefix}…", fontsize=9)
    names = [ellipsis(name, 24) for name in weights.experts]
    # Inches: a character is about 0.085 wide, and the colour bar takes a tenth of the figure.
    crowded = 0.085 * max(map(len, names)) > 0.9 * width / experts
    axis.set_xticks(np.arange(experts) + 0.5, names, rotation=45 if crowded else 0, ha="left" if crowded else "center")
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.invert_yaxis()
    bar = figure.colorbar(drawn, ax=axis, fraction=0.04, pad=0.03, label="weight")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=FAINT)
    return figure
