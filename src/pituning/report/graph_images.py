"""The task graph of a pool and its heat map as PNG files; drawn by matplotlib, which is an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pituning.report.graph_content import Drawing, off_diagonal
from pituning.report.images import drawing as picture_style
from pituning.report.images import new_figure, save
from pituning.report.layout import ellipsis, shortened
from pituning.report.style import INK, SEQUENTIAL, edge_opacity, edge_width

# Canvas pixels at 100 per inch; a point is 1/72 inch.
_POINT = 0.72


def write_graph_images(drawing: Drawing, folder: Path) -> list[Path]:
    """Write ``graph.png`` and ``heatmap.png``.

    Raises:
        PituningError: matplotlib is not installed.
    """
    with picture_style():
        drawn = {"graph.png": _network(drawing), "heatmap.png": _heat_map(drawing)}
        for name, figure in drawn.items():
            save(figure, folder / name)
    return [folder / name for name in drawn]


def _network(drawing: Drawing) -> Any:
    from matplotlib.patheffects import withStroke

    layout, many = drawing.layout, drawing.radius < 8
    figure, axis = new_figure(layout.width / 100, layout.height / 100)
    axis.set_position((0, 0, 1, 1))
    thin = 0.6 if many else 1.0
    for edge, strength in zip(drawing.edges[::-1], drawing.strengths[::-1], strict=True):
        ends = layout.positions[[edge.left, edge.right]]
        width, opacity = thin * _POINT * edge_width(strength), thin * edge_opacity(strength)
        axis.plot(ends[:, 0], ends[:, 1], color="#475569", alpha=opacity, linewidth=width, solid_capstyle="butt")
    for kind, colour in drawing.colours.items():
        nodes = [n for n, k in enumerate(drawing.kinds) if k == kind]
        place = layout.positions[nodes]
        axis.scatter(
            place[:, 0], place[:, 1], s=(2 * drawing.radius * _POINT) ** 2, color=colour, zorder=3,
            edgecolors="white", linewidths=0.8 if many else 1.4, label=f"{ellipsis(kind, 30)} ({len(nodes)})",
        )  # fmt: skip
    for node in drawing.fitting:
        x, y = layout.positions[node]
        axis.text(
            x, y - drawing.radius - 2, drawing.labels[node], ha="center", va="top", zorder=4,
            fontsize=7.5 if many else 10, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
    axis.set(xlim=(0, layout.width), ylim=(0, layout.height), xticks=[], yticks=[])
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, handletextpad=0.3, borderaxespad=0.2,
        labelcolor=INK,
    )  # fmt: skip
    return figure


def _heat_map(drawing: Drawing) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    graph = drawing.found.graph
    order = list(graph.clustered())
    matrix = np.array(graph.matrix)[np.ix_(order, order)]
    names = [shortened(graph.names[n], 24) for n in order]
    count = len(names)
    low, high = off_diagonal(matrix)
    side = float(np.clip(0.5 * count, 3.0, 14.0))
    size = float(np.clip(72 * 0.75 * side / count, 3.5, 10))
    figure, axis = new_figure(side + 1.2, side)
    scale = LinearSegmentedColormap.from_list("similarity", SEQUENTIAL)
    drawn = axis.pcolormesh(
        matrix, cmap=scale, vmin=low, vmax=high, edgecolors="white", linewidth=1.5 if count <= 40 else 0
    )
    if count <= 12:
        for i, j in np.ndindex(count, count):
            dark = matrix[i, j] > low + 0.65 * (high - low)
            axis.text(
                j + 0.5, i + 0.5, f"{matrix[i, j]:.2f}", ha="center", va="center_baseline", fontsize=9,
                color="white" if dark else INK,
            )  # fmt: skip
    axis.set_xticks(np.arange(count) + 0.5, names, fontsize=size, rotation=90)
    axis.set_yticks(np.arange(count) + 0.5, names, fontsize=size)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, pad=2)
    axis.invert_yaxis()
    bar = figure.colorbar(drawn, ax=axis, fraction=0.03, pad=0.02, label=f"similarity: {graph.kind}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK)
    return figure
