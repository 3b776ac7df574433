"""What the benchmarks' pictures share; in the style of the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pituning.report.images import new_figure
from pituning.report.style import DIVERGING, FAINT, GRID, INK


@dataclass(frozen=True)
class Row:
    """A row of :func:`intervals`."""

    mean: float
    low: float
    high: float
    dots: Sequence[float]
    colour: str
    text: str


def heat_map(
    values: npt.NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], *, label: str, title: str
) -> Any:
    """A figure of differences ``[rows, columns]`` around zero, each written into its field; NaN leaves one empty.

    The colours end at what nine of ten differences are within: a single huge one does not bleach the others.
    """
    from matplotlib.colors import LinearSegmentedColormap

    reach = max(float(np.nanquantile(np.abs(values), 0.9)), 0.1)
    beyond = float(np.nanmax(np.abs(values))) > reach
    figure, axis = new_figure(1.6 + 0.42 * len(columns), 0.9 + 0.32 * len(rows))
    drawn = axis.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=LinearSegmentedColormap.from_list("differences", DIVERGING),
        vmin=-reach,
        vmax=reach,
        edgecolors="white",
        linewidth=1.5,
    )
    for (i, j), value in np.ndenumerate(values):
        text = "" if np.isnan(value) else signed(float(value))
        axis.text(j + 0.5, i + 0.5, text, ha="center", va="center_baseline", fontsize=7)
    axis.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=9)
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=55, ha="left", fontsize=9)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.invert_yaxis()
    bar = figure.colorbar(drawn, ax=axis, fraction=0.03, pad=0.02, label=label, extend="both" if beyond else "neither")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=FAINT)
    axis.set_title(title, loc="left", fontweight="bold", pad=10)
    return figure


def intervals(rows: Mapping[str, Row], *, label: str, title: str, lines: Mapping[float, str]) -> Any:
    """A figure of a mean with its interval per row, the values behind it as dots, and the figures at the right.

    Args:
        lines: place → line style of upright lines.
    """
    count = len(rows)
    figure, axis = new_figure(8.0, 1.2 + 0.3 * count)
    for place, style in lines.items():
        axis.axvline(place, color=INK, linewidth=1.2, linestyle=style)
    for y, row in zip(range(count, 0, -1), rows.values(), strict=True):
        axis.hlines(y, row.low, row.high, color=row.colour, linewidth=2.4)
        axis.scatter(row.dots, [y - 0.2] * len(row.dots), s=10, color=FAINT, linewidths=0)
        axis.scatter([row.mean], [y], s=44, marker="D", color=row.colour, linewidths=0, zorder=3)
        axis.text(1.02, y, row.text, transform=axis.get_yaxis_transform(), va="center_baseline", color=INK, fontsize=9)
    axis.set_yticks(range(count, 0, -1), list(rows), fontsize=9)
    axis.set_ylim(0.4, count + 0.6)
    axis.set_xlabel(label)
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    axis.set_title(title, loc="left", fontweight="bold", pad=10)
    return figure


def signed(value: float) -> str:
    """
    >>> signed(1.25), signed(-0.5), signed(-0.01)
    ('+1.2', '−0.5', '0.0')
    """
    text = f"{value:+.1f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")
