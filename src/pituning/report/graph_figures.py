"""The charts of the page of a pool's task graph, as plotly figures; every name from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pituning.experts.expert import ExpertCard
from pituning.report.content import Numbers
from pituning.report.graph_content import Drawing, card_rows, off_diagonal
from pituning.report.layout import GraphLayout, ellipsis, shortened
from pituning.report.plots import new_figure
from pituning.report.style import INK, PI, SEQUENTIAL, edge_opacity, edge_width

_LEVELS = 5
_LONGEST_NAME = 24
# A pale rim keeps labels legible over edges.
_RIM = ", ".join(f"{x}px {y}px 0 white" for x in (-2, -1, 0, 1, 2) for y in (-2, -1, 0, 1, 2) if abs(x) + abs(y) <= 3)


def network_figure(drawing: Drawing) -> go.Figure:
    """Nodes coloured by kind with their cards on hover, edges wider and darker where more similar.

    The last three traces are what the page's script sets: the labels, the edges of a chosen expert, and its ring.
    """
    layout, names = drawing.layout, drawing.found.graph.names
    figure = new_figure(height=int(layout.height) + 50)
    _edges(figure, drawing)
    for kind, colour in drawing.colours.items():
        nodes = [n for n, k in enumerate(drawing.kinds) if k == kind]
        figure.add_scatter(
            x=layout.positions[nodes, 0],
            y=layout.positions[nodes, 1],
            mode="markers",
            marker={"size": 2 * drawing.radius, "color": colour, "line": {"color": "white", "width": 1.5}},
            customdata=nodes,
            hovertext=[_hover(names[n], drawing.found.cards[n]) for n in nodes],
            hoverinfo="text",
            name=f"{escape(ellipsis(kind, 30))} ({len(nodes)})",
            showlegend=True,
        )
    _labels(figure, drawing)
    figure.add_scatter(x=[], y=[], mode="lines", line={"color": PI, "width": 2.5}, hoverinfo="skip", showlegend=False)
    ring = {"size": 2 * drawing.radius + 9, "symbol": "circle-open", "color": PI, "line": {"width": 3}}
    figure.add_scatter(x=[], y=[], mode="markers", marker=ring, hoverinfo="skip", showlegend=False)
    figure.update_xaxes(range=[0, layout.width], visible=False)
    figure.update_yaxes(range=[0, layout.height], visible=False)
    figure.update_layout(
        margin={"l": 0, "r": 0, "t": 50, "b": 0},
        dragmode="pan",
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "itemsizing": "constant"},
    )
    return figure


def heat_map_figure(drawing: Drawing) -> go.Figure:
    """All similarities, in the order of the clustering's leaves; numbers in the cells up to twelve tasks."""
    graph = drawing.found.graph
    order = list(graph.clustered())
    names = [escape(graph.names[n]) for n in order]
    matrix = np.array(graph.matrix)[np.ix_(order, order)]
    low, high = off_diagonal(matrix)
    row = float(np.clip(900 / len(names), 4.5, 44))
    short = {name: escape(shortened(graph.names[n], _LONGEST_NAME)) for name, n in zip(names, order, strict=True)}
    longest = max(map(len, short.values())) * 7
    steep = longest > 820 / len(names)
    figure = new_figure(height=int(row * len(names) + (longest if steep else 30) + 30))
    figure.add_heatmap(
        z=matrix,
        x=names,
        y=names,
        zmin=low,
        zmax=high,
        colorscale=SEQUENTIAL,
        texttemplate="%{z:.3f}" if len(names) <= 12 else None,
        textfont={"size": 13},
        xgap=2 if row >= 20 else 0,
        ygap=2 if row >= 20 else 0,
        hovertemplate="%{y}<br>%{x}<br>%{z:.4f}<extra></extra>",
        colorbar={"thickness": 14, "outlinewidth": 0, "title": {"text": "similarity", "font": {"size": 13}}},
    )
    axis: dict[str, Any] = {"type": "category", "labelalias": short, "showgrid": False, "ticks": "", "automargin": True}
    axis |= {"tickfont": {"size": 13 if row >= 20 else 11}}
    if row >= 14:
        axis["dtick"] = 1
    figure.update_xaxes(side="top", tickangle=-60 if steep else 0, **axis)
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=6, **axis)
    figure.update_layout(margin={"l": 10, "r": 10, "t": 20, "b": 10}, dragmode="zoom")
    return figure


def _edges(figure: go.Figure, drawing: Drawing) -> None:
    """A trace for each of five strengths, weakest below, and unseen marks in the middles that tell the similarity."""
    levels = np.minimum((np.array(drawing.strengths) * _LEVELS).astype(int), _LEVELS - 1)
    thin = 1.0 if drawing.radius > 8 else 0.6
    for level in range(_LEVELS):
        edges = [e for e, at in zip(drawing.edges, levels, strict=True) if at == level]
        strength = (level + 0.5) / _LEVELS
        x, y = _lines(drawing.layout, [(e.left, e.right) for e in edges])
        colour = f"rgba(71, 85, 105, {thin * edge_opacity(strength):.2f})"
        line = {"width": thin * edge_width(strength), "color": colour}
        figure.add_scatter(x=x, y=y, mode="lines", hoverinfo="skip", line=line, showlegend=False)
    middles = np.array([drawing.layout.positions[[e.left, e.right]].mean(axis=0) for e in drawing.edges]).reshape(-1, 2)
    names = drawing.found.graph.names
    figure.add_scatter(
        x=middles[:, 0],
        y=middles[:, 1],
        mode="markers",
        marker={"size": 10, "opacity": 0},
        hovertext=[f"{escape(names[e.left])} – {escape(names[e.right])}: {e.similarity:.4f}" for e in drawing.edges],
        hoverinfo="text",
        showlegend=False,
    )


def _lines(layout: GraphLayout, pairs: Iterable[tuple[int, int]]) -> tuple[list[float | None], list[float | None]]:
    """Coordinates of line segments with gaps between them."""
    x: list[float | None] = []
    y: list[float | None] = []
    for left, right in pairs:
        x += [*layout.positions[[left, right], 0].tolist(), None]
        y += [*layout.positions[[left, right], 1].tolist(), None]
    return x, y


def _labels(figure: go.Figure, drawing: Drawing) -> None:
    """The names below the nodes; unseen marks keep them at one distance whatever the zoom."""
    layout = drawing.layout
    figure.add_scatter(
        x=layout.positions[:, 0],
        y=layout.positions[:, 1],
        mode="markers+text",
        marker={"size": 2 * drawing.radius, "opacity": 0},
        text=[escape(label) if n in drawing.fitting else "" for n, label in enumerate(drawing.labels)],
        textposition="bottom center",
        textfont={"size": 13 if drawing.radius > 8 else 11, "color": INK, "shadow": _RIM},
        hoverinfo="skip",
        showlegend=False,
    )


def _hover(name: str, card: ExpertCard) -> str:
    rows = "<br>".join(f"{escape(key)}: {escape(ellipsis(value, 60))}" for key, value in card_rows(card))
    return f"<b>{escape(name)}</b><br>{rows}"


def neighbours(matrix: Numbers, node: int, count: int = 5) -> list[tuple[int, float]]:
    """The most similar other nodes of one, with their similarities."""
    order = np.argsort(-matrix[node], kind="stable")
    return [(int(other), float(matrix[node, other])) for other in order if other != node][:count]
