"""Colours, widths and wordings that the charts of the page and the PNG files share."""

from __future__ import annotations

from textwrap import wrap

import numpy as np

from pituning.report.content import Arm, Content, Difference, Metric, Weights
from pituning.report.layout import ellipsis, without_common_prefix

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
PI, OWN, OTHER = "#c2410c", "#1d4ed8", "#7b8794"
# Pale enough at both ends for dark numbers to be read on it.
DIVERGING = ["#6d93f0", "#bccdf8", "#ffffff", "#f8cdb4", "#ee8a5c"]
# Told apart by readers with any colour vision. After Okabe & Ito, 2008, without its yellow.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", INK)
# From low to high, pale to dark.
SEQUENTIAL = ["#f5f7fa", "#bccdf8", "#6d93f0", "#2f55b8", "#1e2f5e"]
LONGEST_GROUP = 46
NODE = "#5b7ba8"


def arm_colour(arm: Arm, content: Content) -> str:
    """π in one colour, the best own arm in another, all others grey."""
    return PI if arm == content.pi else OWN if arm == content.best_own else OTHER


def arm_value(arm: Arm, metric: Metric) -> str:
    """Mean, and the standard deviation where there is more than one seed."""
    deviation = "" if arm.deviation is None else f" ± {metric.plain(arm.deviation)}"
    return metric.plain(arm.mean) + deviation


def difference_value(difference: Difference, metric: Metric) -> str:
    """Mean difference with its interval, if it has one."""
    if difference.interval is None:
        return metric.signed(difference.mean)
    low, high = difference.interval
    return f"{metric.signed(difference.mean)} ({metric.signed(low)} to {metric.signed(high)})"


def axis_title(metric: Metric) -> str:
    """The metric with its unit."""
    return f"{metric.name}, {metric.unit}" if metric.unit else metric.name


def dot_opacity(arm: Arm) -> float:
    """Paler beside the bar of a mean, full where the dot is the only mark."""
    return 0.55 if len(arm.values) > 1 else 1.0


def value_range(content: Content) -> tuple[float, float]:
    """Ends of the arms' axis, with room around the values and the ceiling."""
    values = [value for arm in content.arms for value in arm.values]
    values += [content.ceiling[1]] if content.ceiling else []
    scaled = [value * content.metric.scale for value in values]
    room = 0.05 * (max(scaled) - min(scaled)) or 0.02 * content.metric.scale
    return min(scaled) - room, max(scaled) + room


def ceiling_side(content: Content) -> str:
    """Which side of its text the ceiling's line is on, such that the text stays inside the chart."""
    if content.ceiling is None:
        return "center"
    low, high = value_range(content)
    position = (content.ceiling[1] * content.metric.scale - low) / (high - low)
    return "right" if position > 0.65 else "left" if position < 0.35 else "center"


def lanes(count: int) -> list[float]:
    """Heights around a row that keep seeds of equal value apart."""
    return [0.0] if count == 1 else [float(x) for x in np.linspace(0.24, -0.24, count)]


def edge_width(strength: float) -> float:
    """Width in pixels of an edge."""
    return 1.0 + 5.0 * strength


def edge_opacity(strength: float) -> float:
    """Opacity of an edge."""
    return 0.25 + 0.55 * strength


def short_groups(weights: Weights) -> list[str]:
    """Group names without what all of them share, cut on the left where too long."""
    names = without_common_prefix(weights.groups)[1]
    return [name if len(name) <= LONGEST_GROUP else "…" + name[1 - LONGEST_GROUP :] for name in names]


def colour_range(weights: Weights) -> tuple[float, float]:
    """Middle of the colour scale (the equal share where all groups have one sum, else zero) and its reach either way."""
    middle = 0.0 if weights.total is None else weights.total / len(weights.experts)
    return middle, max(float(np.abs(weights.values - middle).max()), 0.01)


def wrapped(text: str, width: int = 30) -> list[str]:
    """A label as at most two lines."""
    lines = wrap(text, width, break_on_hyphens=False) or [""]
    return lines if len(lines) <= 2 else [lines[0], ellipsis(" ".join(lines[1:]), width)]
