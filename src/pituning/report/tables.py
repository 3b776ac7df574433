"""The tables of the page as HTML; they need no JavaScript. Every string from outside is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pituning.report.content import Content, Metric, Ranking, finite_or_none
from pituning.report.style import difference_value

Cell = tuple[str, str]
_ABSENT: Cell = ("–", "number")


def arms_table(content: Content) -> str:
    """One row per arm; deviation and log-loss are columns only where some arm has them."""
    deviations = any(arm.deviation is not None for arm in content.arms)
    losses = any(arm.log_loss is not None for arm in content.arms)
    several = content.seeds > 1
    metric = content.metric
    described = any(arm.description for arm in content.arms)
    header = [("arm", ""), *([("description", "")] if described else [])]
    header += [(f"mean {unit(metric)}" if several else unit(metric), "number")]
    header += [("std. dev.", "number")] if deviations else []
    header += [("per seed", "number")] if several else []
    header += [("mean log-loss" if several else "log-loss", "number")] if losses else []
    rows, classes = [], []
    for arm in content.arms:
        row = [(arm.label, "name"), *([(arm.description, "")] if described else [])]
        row.append((metric.plain(arm.mean), "number strong"))
        if deviations:
            row.append(_ABSENT if arm.deviation is None else (metric.plain(arm.deviation), "number"))
        if several:
            row.append((_per_seed(map(metric.plain, arm.values)), "number seeds"))
        if losses:
            row.append(_number(arm.log_loss, 3))
        rows.append(row)
        classes.append("pi" if arm == content.pi else "own" if arm == content.best_own else "")
    return _table(header, rows, classes)


def differences_table(content: Content) -> str:
    """One row per paired difference."""
    several = any(len(difference.values) > 1 for difference in content.differences)
    header = [("difference", ""), (content.metric.difference_unit, "number")]
    header += [("per seed", "number")] if several else []
    rows = [
        [(difference.name, "name"), (difference_value(difference, content.metric), "number strong")]
        + ([(_per_seed(map(content.metric.signed, difference.values)), "number seeds")] if several else [])
        for difference in content.differences
    ]
    return _table(header, rows)


def ranking_table(ranking: Ranking, metric: Metric) -> str:
    """Experts by the default similarity, with the measured gain and how well each similarity foretold it."""
    gains = any(expert.gain is not None for expert in ranking.experts)
    header = [("expert", ""), *((kind, "number") for kind in ranking.kinds)]
    header += [(f"gain, {metric.difference_unit}", "number")] if gains else []
    rows = []
    for expert in ranking.experts:
        row = [(expert.name, "name")]
        for kind in ranking.kinds:
            text, style = _number(expert.values.get(kind), 3)
            row.append((text, f"{style} strong" if kind == ranking.default else style))
        if gains:
            row.append(_ABSENT if expert.gain is None else (metric.signed(expert.gain), "number"))
        rows.append(row)
    classes = [""] * len(rows)
    agreements = [ranking.agreement(kind) for kind in ranking.kinds]
    if any(agreement is not None for agreement in agreements):
        measured = sum(expert.gain is not None for expert in ranking.experts)
        rows.append(
            [
                (f"rank correlation with gain ({measured} experts)", "name"),
                *(_number(a, 2) for a in agreements),
                ("", ""),
            ]
        )
        classes.append("foot")
    return _table(header, rows, classes)


def candidates_table(candidates: Sequence[Mapping[str, Any]]) -> str:
    """The interpolations that were compared, the smallest loss first, the chosen one marked."""
    losses = [finite_or_none(candidate.get("loss")) for candidate in candidates]
    order = sorted(range(len(candidates)), key=lambda i: math.inf if (loss := losses[i]) is None else loss)
    rows = [
        [
            (str(candidates[i]["name"]), "name"),
            _number(finite_or_none(candidates[i].get("scale", 1.0)), 1),
            _number(losses[i], 3),
            ("✓ chosen" if candidates[i].get("chosen") else "", ""),
        ]
        for i in order
    ]
    classes = ["pi" if candidates[i].get("chosen") else "" for i in order]
    return _table([("candidate", ""), ("scale", "number"), ("log-loss", "number"), ("", "")], rows, classes)


def overlaps_table(overlaps: Sequence[Mapping[str, Any]], longest: int = 50) -> str:
    """The most similar pairs of sentences, ``longest`` rows at most."""
    rows = [
        [
            (str(overlap["left"]), "name"),
            (str(overlap["left_text"]), ""),
            (str(overlap["right"]), "name"),
            (str(overlap["right_text"]), ""),
            _number(finite_or_none(overlap.get("similarity")), 2),
        ]
        for overlap in overlaps[:longest]
    ]
    header = [("example", ""), ("text", ""), ("near-duplicate", ""), ("text", ""), ("similarity", "number")]
    more = len(overlaps) - longest
    return _table(header, rows) + (f'<p class="note">… and {more:,} more.</p>' if more > 0 else "")


def facts(items: Mapping[str, Any]) -> str:
    """Named values side by side; those that are None are left out."""
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in items.items()
        if value is not None
    )
    return f'<dl class="facts">{pairs}</dl>'


def unit(metric: Metric) -> str:
    """The metric's name with its unit, short enough for a column."""
    return f"{metric.name} {metric.unit}".strip()


def _per_seed(values: Iterable[str], per_line: int = 5) -> str:
    numbers = list(values)
    lines = (numbers[i : i + per_line] for i in range(0, len(numbers), per_line))
    return "\n".join("  ".join(line) for line in lines)


def _number(value: float | None, decimals: int) -> Cell:
    if value is None:
        return _ABSENT
    return (f"{value:.{decimals}f}".replace("-", "−") if math.isfinite(value) else "not finite", "number")


def _table(header: Sequence[Cell], rows: Sequence[Sequence[Cell]], classes: Sequence[str] = ()) -> str:
    head = _cells("th", header)
    body = "".join(
        f'<tr class="{style}">{_cells("td", row)}</tr>'
        for row, style in zip(rows, classes or [""] * len(rows), strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(tag: str, cells: Sequence[Cell]) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    return "".join(f'<{tag}{scope} class="{style}">{escape(text)}</{tag}>' for text, style in cells)
