"""The charts of the page, as plotly figures with fixed heights; every name from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from pituning.report.content import Content, Difference, Graph, Metric, Ranking, Weights
from pituning.report.layout import NODE_RADIUS, GraphLayout, ellipsis, lay_out
from pituning.report.style import (
    DIVERGING,
    FAINT,
    GRID,
    INK,
    NODE,
    OTHER,
    OWN,
    PI,
    arm_colour,
    arm_value,
    axis_title,
    ceiling_side,
    colour_range,
    difference_value,
    dot_opacity,
    edge_opacity,
    edge_width,
    lanes,
    short_groups,
    value_range,
    wrapped,
)

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def arms_figure(content: Content) -> go.Figure:
    """Every seed's value as a dot in its own lane, the mean as a bar, the ceiling as a dashed line."""
    metric, rows = content.metric, range(len(content.arms), 0, -1)
    figure = new_figure(height=60 + 46 * len(content.arms) + (24 if content.ceiling else 0))
    for row, arm in zip(rows, content.arms, strict=True):
        colour = arm_colour(arm, content)
        figure.add_scatter(
            x=[value * metric.scale for value in arm.values],
            y=[row + offset for offset in lanes(len(arm.values))],
            mode="markers",
            marker={"size": 9, "color": colour, "opacity": dot_opacity(arm)},
            hovertext=[f"seed {i}: {metric.plain(value)} {metric.unit}" for i, value in enumerate(arm.values, 1)],
            hoverinfo="text",
        )
        mean = arm.mean * metric.scale
        if len(arm.values) > 1:
            figure.add_shape(
                type="line", x0=mean, x1=mean, y0=row - 0.34, y1=row + 0.34, line={"color": colour, "width": 3.5}
            )
        _value_at_right(figure, row, arm_value(arm, metric), colour)
    if content.ceiling:
        figure.update_layout(margin_t=32)
        label, value = content.ceiling
        figure.add_shape(
            type="line",
            x0=value * metric.scale,
            x1=value * metric.scale,
            y0=0.4,
            y1=len(content.arms) + 0.6,
            line={"color": INK, "width": 1.5, "dash": "dash"},
        )
        figure.add_annotation(
            x=value * metric.scale,
            y=len(content.arms) + 0.6,
            text=f"{escape(label)}: {metric.plain(value)}",
            showarrow=False,
            yanchor="bottom",
            xanchor=ceiling_side(content),
            font={"size": 13, "color": INK},
        )
    _rows(figure, rows, [arm.label for arm in content.arms])
    figure.update_xaxes(title_text=escape(axis_title(metric)), range=value_range(content))
    return figure


def differences_figure(content: Content) -> go.Figure:
    """Paired differences with their intervals around a zero line."""
    metric, rows = content.metric, range(len(content.differences), 0, -1)
    figure = new_figure(height=60 + 44 * len(content.differences))
    figure.add_vline(x=0, line={"color": INK, "width": 1.5})
    for row, difference in zip(rows, content.differences, strict=True):
        colour = _difference_colour(difference)
        if difference.interval:
            low, high = (bound * metric.scale for bound in difference.interval)
            figure.add_shape(type="line", x0=low, x1=high, y0=row, y1=row, line={"color": colour, "width": 3})
        figure.add_scatter(
            x=[value * metric.scale for value in difference.values if len(difference.values) > 1],
            y=[row - 0.24] * len(difference.values),
            mode="markers",
            marker={"size": 6, "color": FAINT, "opacity": 0.7},
            hovertext=[f"seed {i}: {metric.signed(value)}" for i, value in enumerate(difference.values, 1)],
            hoverinfo="text",
        )
        figure.add_scatter(
            x=[difference.mean * metric.scale],
            y=[row],
            mode="markers",
            marker={"size": 12, "color": colour, "symbol": "diamond"},
            hovertext=[difference_value(difference, metric)],
            hoverinfo="text",
        )
        _value_at_right(figure, row, difference_value(difference, metric), colour)
    _rows(figure, rows, [difference.name for difference in content.differences])
    figure.update_xaxes(title_text=f"difference, {escape(metric.difference_unit)}")
    return figure


def ranking_figure(ranking: Ranking, metric: Metric) -> go.Figure:
    """The default similarity of every expert and, beside it, the measured gain where there is one."""
    from plotly.subplots import make_subplots

    gains = [None if e.gain is None else e.gain * metric.scale for e in ranking.experts]
    columns = 2 if any(gain is not None for gain in gains) else 1
    figure = make_subplots(rows=1, cols=columns, shared_yaxes=True, horizontal_spacing=0.06)
    _style(figure, height=60 + 30 * len(ranking.experts))
    rows = list(range(len(ranking.experts), 0, -1))
    for column, (values, title, colour) in enumerate(
        [
            ([e.values.get(ranking.default) for e in ranking.experts], f"similarity: {ranking.default}", OWN),
            (gains, f"measured gain, {metric.difference_unit}", PI),
        ][:columns],
        start=1,
    ):
        figure.add_scatter(
            x=values,
            y=rows,
            mode="markers",
            marker={"size": 11, "color": colour},
            row=1,
            col=column,
            hovertemplate="%{x:.3f}<extra></extra>",
        )
        figure.update_xaxes(title_text=escape(title), row=1, col=column)
    if columns == 2:
        figure.add_vline(x=0, line={"color": INK, "width": 1}, row=1, col=2)
    _rows(figure, rows, [expert.name for expert in ranking.experts])
    return figure


def graph_figure(graph: Graph) -> go.Figure:
    """The task graph: each task's strongest edges, wider and darker where more similar."""
    layout = lay_out(graph)
    figure = new_figure(height=int(layout.height))
    for edge in layout.edges:
        ends = layout.positions[[edge.left, edge.right]]
        figure.add_scatter(
            x=ends[:, 0],
            y=ends[:, 1],
            mode="lines",
            hoverinfo="skip",
            line={"width": edge_width(edge.strength), "color": f"rgba(71, 85, 105, {edge_opacity(edge.strength):.2f})"},
        )
    middles = np.array([layout.positions[[e.left, e.right]].mean(axis=0) for e in layout.edges]).reshape(-1, 2)
    pairs = [
        f"{escape(graph.names[e.left])} – {escape(graph.names[e.right])}: {e.similarity:.3f}" for e in layout.edges
    ]
    figure.add_scatter(
        x=middles[:, 0],
        y=middles[:, 1],
        mode="markers",
        marker={"size": 14, "opacity": 0},
        hovertext=pairs,
        hoverinfo="text",
    )
    figure.add_scatter(
        x=layout.positions[:, 0],
        y=layout.positions[:, 1],
        mode="markers",
        marker={
            "size": 2 * NODE_RADIUS,
            "color": [PI if name == graph.target else NODE for name in graph.names],
            "line": {"color": "white", "width": 2},
        },
        hovertext=[escape(name) for name in graph.names],
        hoverinfo="text",
    )
    _node_labels(figure, graph, layout)
    figure.update_xaxes(range=[0, layout.width], visible=False)
    figure.update_yaxes(range=[0, layout.height], visible=False)
    figure.update_layout(margin={"l": 0, "r": 0, "t": 0, "b": 0})
    return figure


def weights_figure(weights: Weights) -> go.Figure:
    """Heat map of the weights, groups as rows and experts as columns, numbers in the cells up to 40 rows."""
    groups = short_groups(weights)
    numbers = len(groups) <= 40
    row_height = 26.0 if numbers else max(1600.0 / len(groups), 4.0)
    middle, reach = colour_range(weights)
    names = [escape(ellipsis(name, 24)) for name in weights.experts]
    steep = max(len(name) for name in weights.experts) * 8 > 700 / len(names)
    figure = new_figure(height=int(60 + row_height * len(groups) + (150 if steep else 0)))
    figure.add_heatmap(
        z=weights.values,
        x=list(range(len(names))),
        y=list(range(len(groups))),
        xgap=2,
        ygap=2 if numbers else 0,
        zmin=middle - reach,
        zmax=middle + reach,
        colorscale=DIVERGING,
        text=[[f"{value:.3f}" for value in row] for row in weights.values],
        textfont={"color": INK, "size": 13},
        texttemplate="%{text}" if numbers and len(names) <= 12 else None,
        customdata=[[f"{escape(group)}<br>{escape(name)}" for name in weights.experts] for group in weights.groups],
        hovertemplate="%{customdata}: %{z:.4f}<extra></extra>",
        colorbar={
            "thickness": 14,
            "outlinewidth": 0,
            "tickformat": ".3~f",
            "title": {"text": "weight", "font": {"size": 13}},
        },
    )
    every = max(1, int(np.ceil(14 / row_height)))
    figure.update_yaxes(
        tickvals=list(range(0, len(groups), every)),
        ticktext=[escape(group) for group in groups[::every]],
        range=[len(groups) - 0.5, -0.5],
        showgrid=False,
        automargin=True,
        ticks="",
        ticklabelstandoff=8,
    )
    figure.update_xaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        side="top",
        tickangle=-60 if steep else 0,
        showgrid=False,
        ticks="",
        automargin=True,
    )
    figure.update_layout(margin={"l": 10, "r": 10, "t": 40, "b": 10})
    return figure


def _difference_colour(difference: Difference) -> str:
    if difference.interval is None or difference.interval[0] <= 0 <= difference.interval[1]:
        return OTHER
    return PI


def _node_labels(figure: go.Figure, graph: Graph, layout: GraphLayout) -> None:
    for (x, y), label, name in zip(layout.positions, layout.labels, graph.names, strict=True):
        target = name == graph.target
        figure.add_annotation(
            x=x,
            y=y - NODE_RADIUS - 1,
            text=f"<b>{escape(label)}</b>" if target else escape(label),
            showarrow=False,
            yanchor="top",
            borderpad=0,
            bgcolor="rgba(255, 255, 255, 0.8)",
            font={"size": 13, "color": PI if target else INK},
        )


def _value_at_right(figure: go.Figure, row: int, text: str, colour: str) -> None:
    figure.add_annotation(
        x=1.01,
        xref="paper",
        y=row,
        text=escape(text),
        showarrow=False,
        xanchor="left",
        font={"color": INK if colour == OTHER else colour, "size": 13},
    )
    figure.update_layout(margin_r=max(figure.layout.margin.r, 24 + 8 * len(text)))


def _rows(figure: go.Figure, rows: Iterable[int], labels: Sequence[str]) -> None:
    lines = [wrapped(label) for label in labels]
    figure.update_yaxes(
        tickvals=list(rows),
        ticktext=["<br>".join(map(escape, line)) for line in lines],
        range=[0.4, len(labels) + 0.6],
        showgrid=False,
        automargin=True,
        ticklabelstandoff=10,
    )


def new_figure(height: int) -> go.Figure:
    """An empty figure of the page's look, ``height`` pixels high."""
    figure = go.Figure()
    _style(figure, height)
    return figure


def _style(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        height=height,
        showlegend=False,
        dragmode=False,
        plot_bgcolor="white",
        paper_bgcolor="white",
        margin={"l": 10, "r": 20, "t": 8, "b": 48},
        font={"family": _FONT, "size": 14, "color": INK},
        hoverlabel={"bgcolor": "white", "bordercolor": FAINT, "font": {"color": INK}},
        template="none",
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True, title_font={"size": 14}, title_standoff=10)
    figure.update_yaxes(zeroline=False)
