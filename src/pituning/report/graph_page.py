"""The page of a pool's task graph: the network and the clustered heat map, with the experts' cards; and its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from pituning.report import tables
from pituning.report.graph_content import LABELLED, Drawing, card_rows, draw
from pituning.report.graph_figures import heat_map_figure, neighbours, network_figure
from pituning.report.graph_images import write_graph_images
from pituning.similarity.graph import GraphEdge, PoolGraph

_STYLE = """<style>
#card { border-top: 1px solid var(--line); margin-top: 14px; padding-top: 12px; } #card h3 { margin: 0 0 6px; }
#card button, #find { font: inherit; font-size: .92rem; border: 1px solid var(--line); border-radius: 6px; background: white;
  color: var(--ink); padding: 2px 9px; margin: 0 6px 6px 0; }
#card button { cursor: pointer; } #find { width: 22em; max-width: 100%; padding: 5px 9px; }
</style>"""


def write_graph_page(found: PoolGraph, edges: Sequence[GraphEdge], title: str, folder: Path) -> list[Path]:
    """Write ``graph.html``, ``graph.png`` and ``heatmap.png`` into a folder that exists, and return their paths.

    The page is complete in itself and is written first, so it is there even where matplotlib is missing.

    Raises:
        PituningError: if matplotlib (an optional extra, for the PNG files) is not installed.
    """
    drawing = draw(found, edges)
    page = folder / "graph.html"
    page.write_text(render_graph(drawing, title), encoding="utf-8")
    return [page, *write_graph_images(drawing, folder)]


def render_graph(drawing: Drawing, title: str) -> str:
    """The page's HTML."""
    found = drawing.found
    sections = [_network(drawing), _heat_map(drawing), *_left_out(found)]
    facts = {
        "experts": len(found.graph.names),
        "similarity": found.graph.kind,
        "edges": len(drawing.edges),
        "left out": len(found.left_out) or None,
    }
    template = Template(files("pituning.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        plotly=get_plotlyjs(),
        headline=_STYLE + tables.facts(facts),
        sections="\n".join(f"<section>\n<h2>{heading}</h2>\n{body}\n</section>" for heading, body in sections),
    )


def _network(drawing: Drawing) -> tuple[str, str]:
    names = drawing.found.graph.names
    note = (
        "Similar tasks tend to lie near each other; a wider, bolder line is a stronger similarity. A node is one expert, its "
        "colour the kind of its task, or its method where its card does not tell. Point at a node for its card, click it for "
        "its nearest; drag to move, double-click to see all again."
    )
    if len(names) > LABELLED:
        note += " Zoom in (mouse wheel) to see all names of what is in view."
    options = "".join(f'<option value="{escape(name)}">' for name in names)
    find = (
        f'<p><input id="find" list="names" placeholder="find an expert by name" aria-label="find an expert by name">'
        f'<datalist id="names">{options}</datalist></p>'
    )
    script = files("pituning.report").joinpath("graph.js").read_text(encoding="utf-8")
    chart = _chart(network_figure(drawing), "network", "graph.png", zoom=len(names) > LABELLED)
    # "</script>" inside a name would end the script.
    document = json.dumps(_document(drawing), allow_nan=False).replace("<", "\\u003c")
    body = (
        f'<p class="note">{note}</p>\n{find}\n{chart}\n'
        '<div id="card"><p class="note">Click an expert to see its card.</p></div>\n'
        f'<script type="application/json" id="graph-data">{document}</script>\n<script>{script}</script>'
    )
    return "Task graph", body


def _document(drawing: Drawing) -> dict[str, Any]:
    """What the page's script needs."""
    graph, layout = drawing.found.graph, drawing.layout
    matrix = np.array(graph.matrix)
    nodes = [
        {
            "name": name,
            "label": escape(drawing.labels[n]),
            "x": round(float(layout.positions[n, 0]), 2),
            "y": round(float(layout.positions[n, 1]), 2),
            "fitting": n in drawing.fitting,
            "card": card_rows(drawing.found.cards[n]),
            "neighbours": neighbours(matrix, n),
        }
        for n, name in enumerate(graph.names)
    ]
    return {"nodes": nodes, "labelled": LABELLED}


def _heat_map(drawing: Drawing) -> tuple[str, str]:
    note = (
        "All pairs, in the order of a hierarchical clustering (average linkage), so that groups of similar tasks show as "
        "squares along the diagonal. The colours span the similarities of different tasks."
    )
    if len(drawing.found.graph.names) > LABELLED:
        note += " Drag a frame to zoom in and see more names; double-click to see all again."
    return "Similarities", f'<p class="note">{note}</p>\n{_chart(heat_map_figure(drawing), "heatmap", "heatmap.png")}'


def _left_out(found: PoolGraph) -> list[tuple[str, str]]:
    sections = []
    if found.left_out:
        items = "".join(f"<li><b>{escape(name)}</b>: {escape(why)}</li>" for name, why in found.left_out.items())
        sections.append(("Left out", f'<p class="note">These experts are not in the graph.</p><ul>{items}</ul>'))
    if found.skipped:
        items = "".join(f"<li><code>{escape(key)}</code></li>" for key in found.skipped)
        note = "No similarity uses these tensors: their Fisher is zero throughout in at least one task."
        sections.append(("Skipped tensors", f'<p class="note">{note}</p><details><summary>{len(found.skipped)}</summary>'
                         f"<ul>{items}</ul></details>"))  # fmt: skip
    return sections


def _chart(figure: go.Figure, name: str, picture: str, zoom: bool = False) -> str:
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{name}",
        config={"displaylogo": False, "responsive": True, "scrollZoom": zoom},
    )
    instead = f'<noscript><img src="{picture}" alt="the same chart as a picture"></noscript>'
    return f'<div class="scroll"><div class="chart">{drawn}{instead}</div></div>'
