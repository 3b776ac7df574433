"""The report as one HTML file that works offline: tables as HTML, charts as plotly figures, plotly.js embedded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from pituning.report import plots, tables
from pituning.report.content import Arm, Content, read_content
from pituning.report.gallery import galleries_html, read_gallery
from pituning.report.images import NAMES, write_images
from pituning.report.layout import without_common_prefix

Section = tuple[str, str]

PAGE = "report.html"


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write ``report.html`` and the charts as PNG files into ``folder``, and return the path of the page.

    ``results`` is a plain, JSON-able mapping. ``title``, ``target`` and ``arms`` are required; what is absent leaves
    its section out of the page. PNG files of an earlier report in the same folder are replaced or removed. The page is
    written before the PNG files, so it is there even where matplotlib is missing.

    Raises:
        PituningError: a required part is missing, a number is not finite, a table has the wrong shape, or matplotlib
            (an optional extra, for the PNG files) is not installed.
    """
    content = read_content(results)
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    page = folder / PAGE
    page.write_text(render(results, content), encoding="utf-8")
    write_images(content, folder)
    return page


def render(results: Mapping[str, Any], content: Content) -> str:
    """The page's HTML, given a results mapping and what :func:`read_content` made of it."""
    parts: list[Callable[[Mapping[str, Any], Content], Section | None]] = [
        _results, _differences, _gallery, _ranking, _graph, _weights, _candidates, _audit, _origin,
    ]  # fmt: skip
    sections = [section for part in parts if (section := part(results, content))]
    template = Template(files("pituning.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(content.title),
        plotly=get_plotlyjs(),
        headline=_headline(results, content),
        sections="\n".join(f"<section>\n<h2>{title}</h2>\n{body}\n</section>" for title, body in sections),
    )


def _headline(results: Mapping[str, Any], content: Content) -> str:
    facts = {
        "target": content.target,
        "backbone": results.get("backbone"),
        "method": results.get("method"),
        "shots": results.get("shots"),
        "metric": content.metric.name,
        "seeds": "one seed" if content.seeds == 1 else content.seeds,
        "date": results.get("date"),
    }
    summary = results.get("summary")
    lead = f'<p class="summary">{escape(str(summary))}</p>' if summary else ""
    return f"{tables.facts(facts)}\n{lead}\n{_cards(content)}"


def _cards(content: Content) -> str:
    cards = [
        _card(style, arm.label, arm.mean, content)
        for style, arm in (("pi", content.pi), ("own", content.best_own))
        if arm
    ]
    if content.ceiling:
        cards.append(_card("", *content.ceiling, content))
    return f'<div class="cards">{"".join(cards)}</div>' if len(cards) > 1 else ""


def _card(style: str, label: str, value: float, content: Content) -> str:
    metric = content.metric
    return f'<div class="card {style}"><b>{metric.plain(value)} {metric.unit}</b>{escape(label)}</div>'


def _results(_: Mapping[str, Any], content: Content) -> Section:
    name = content.metric.name
    metric = escape(name[0].upper() + name[1:])
    if content.seeds == 1:
        explained = f"{metric} on {escape(content.target)}, one seed: no deviation or interval can be given."
    else:
        explained = (
            f"{metric} on {escape(content.target)}. A dot is one of {content.seeds} seeds, the bar is their mean, "
            "± the standard deviation over seeds."
        )
    marks = [f"{_mark('pi', content.pi)} is highlighted" if content.pi else ""]
    marks += [f"{_mark('own', content.best_own)} is the best arm that uses no other expert" if content.best_own else ""]
    legend = "; ".join(mark for mark in marks if mark)
    note = f'<p class="note">{explained}{f" {legend}." if legend else ""}</p>'
    chart = _chart(plots.arms_figure(content), "results", "results.png")
    return "Results", f"{note}\n{chart}\n{tables.arms_table(content)}"


def _mark(style: str, arm: Arm | None) -> str:
    return f'<b style="color: var(--{style})">{escape(arm.label)}</b>' if arm else ""


def _differences(results: Mapping[str, Any], content: Content) -> Section | None:
    if not content.differences:
        return None
    unit = escape(content.metric.difference_unit)
    if any(difference.interval for difference in content.differences):
        kind = escape(str(results.get("interval") or "interval"))
        note = f"Paired differences, {unit}. The line is the {kind}; it is grey where it holds zero. Dots are seeds."
    else:
        note = f"Paired differences, {unit}. No interval was computed{' from one seed' if content.seeds == 1 else ''}."
    chart = _chart(plots.differences_figure(content), "differences")
    return "Differences", f'<p class="note">{note}</p>\n{chart}\n{tables.differences_table(content)}'


def _gallery(results: Mapping[str, Any], _: Content) -> Section | None:
    galleries = [read_gallery(record) for record in results.get("gallery") or ()]
    return ("Gallery", galleries_html(galleries)) if galleries else None


def _ranking(_: Mapping[str, Any], content: Content) -> Section | None:
    ranking = content.ranking
    if ranking is None:
        return None
    kind = escape(ranking.default)
    note = f"The experts of the pool, those predicted to help most first, by similarity ({kind}); larger helps more."
    chart = _chart(plots.ranking_figure(ranking, content.metric), "ranking") if len(ranking.experts) > 1 else ""
    return "Predicted helpers", f'<p class="note">{note}</p>\n{chart}\n{tables.ranking_table(ranking, content.metric)}'


def _graph(_: Mapping[str, Any], content: Content) -> Section | None:
    graph = content.graph
    if graph is None:
        return None
    note = (
        f"Similar tasks ({escape(graph.kind)}) tend to lie near each other; a wider, bolder line is a stronger "
        "similarity. Only the strongest lines of each task are drawn. "
        f'<b style="color: var(--pi)">{escape(graph.target)}</b> is the target.'
    )
    return "Task graph", f'<p class="note">{note}</p>\n{_chart(plots.graph_figure(graph), "graph", "graph.png")}'


def _weights(_: Mapping[str, Any], content: Content) -> Section | None:
    weights = content.weights
    if weights is None:
        return None
    share = "zero" if weights.total is None else f"an equal share ({weights.total:.3g}/{len(weights.experts)})"
    prefix = without_common_prefix(weights.groups)[0]
    note = f"Weight of each expert in each part of the backbone; a cell without colour is {share}."
    note += f" All names begin with <code>{escape(prefix)}</code>" if prefix else ""
    note += f"<br>{escape(weights.note)}" if weights.note else ""
    return "Weights", f'<p class="note">{note}</p>\n{_chart(plots.weights_figure(weights), "weights", "weights.png")}'


def _candidates(results: Mapping[str, Any], _: Content) -> Section | None:
    candidates = results.get("candidates")
    if not candidates:
        return None
    note = '<p class="note">What was compared on the shots, smallest log-loss first.</p>'
    return "Candidates", note + tables.candidates_table(candidates)


def _audit(results: Mapping[str, Any], content: Content) -> Section | None:
    audit = results.get("audit")
    if not audit:
        return None
    overlaps = audit.get("overlaps") or ()
    if audit.get("pictures"):
        note = _picture_audit(audit, escape(content.target))
        return "Leak audit", f"<p>{note}</p>" + (tables.overlaps_table(overlaps) if overlaps else "")
    sets = f"{int(audit['checked']):,} data sets were" if int(audit["checked"]) != 1 else "1 data set was"
    found = f"{len(overlaps):,} near-duplicate{'s' if len(overlaps) != 1 else ''}" if overlaps else "no near-duplicates"
    note = f"{sets} compared with {escape(content.target)} sentence by sentence: {found} found."
    return "Leak audit", f"<p>{note}</p>" + (tables.overlaps_table(overlaps) if overlaps else "")


def _picture_audit(audit: Mapping[str, Any], target: str) -> str:
    training, test, shots, test_seen, shots_seen = (
        int(audit["pictures"][key]) for key in ("training", "test", "shots", "test_seen", "shots_seen")
    )
    note = (
        f"The {training:,} training pictures of the pool's tasks were compared with those of {target}, pixel by pixel: "
        f"{test_seen or 'none'} of its {test:,} test pictures {'are' if test_seen > 1 else 'is'} among them."
    )
    if audit.get("disjoint_scenes"):
        note += " Scenes of training and test are disjoint by construction."
    note += (
        f" Tasks share training pictures, as those on COCO do: {shots_seen:,} of the {shots:,} shots show one of them."
    )
    leaks = len(audit.get("overlaps") or ())
    return f"{note} The same text about the same picture was found {f'{leaks:,} times' if leaks else 'nowhere'}."


def _origin(results: Mapping[str, Any], _: Content) -> Section | None:
    parts = []
    if command := results.get("command"):
        parts.append(f"<pre>{escape(str(command))}</pre>")
    if (seconds := results.get("seconds")) is not None:
        parts.append(f'<p class="note">It took {duration(float(seconds))}.</p>')
    if versions := results.get("versions"):
        parts.append(tables.facts(versions))
    return ("How this was made", "\n".join(parts)) if parts else None


def duration(seconds: float) -> str:
    """
    >>> duration(312.0), duration(4.2), duration(7325)
    ('5 min 12 s', '4 s', '2 h 2 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _chart(figure: go.Figure, name: str, picture: str = "") -> str:
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{name}",
        config={"displayModeBar": False, "responsive": True, "scrollZoom": False},
    )
    instead = f'<noscript><img src="{picture}" alt="the same chart as a picture"></noscript>' if picture else ""
    return f'<div class="scroll"><div class="chart">{drawn}{instead}</div></div>'
