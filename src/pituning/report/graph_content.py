"""What the page and the pictures of a pool's task graph share: kinds, colours, positions, labels and cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pituning.experts.expert import ExpertCard
from pituning.report.content import Graph, Numbers
from pituning.report.layout import LINE_HEIGHT, LONGEST_LABEL, GraphLayout, lay_out, shortened
from pituning.report.style import FAINT, LINES
from pituning.similarity.graph import GraphEdge, PoolGraph

LABELLED = 40
"""Up to so many nodes every label is shown."""
OTHER_KIND = "other"
_COLOURED = 6


@dataclass(frozen=True)
class Drawing:
    """A task graph laid out.

    Attributes:
        layout: positions in pixels; its own edges and labels are not drawn.
        labels: of the nodes, cut to fit.
        edges: the drawn edges, the most similar first.
        strengths: of the edges, 0 (weakest drawn) to 1.
        kinds: of every node, what its colour stands for.
        colours: kind → colour, the most frequent kind first.
        radius: of the nodes, in pixels.
        fitting: the nodes whose labels are shown.
    """

    found: PoolGraph
    layout: GraphLayout
    labels: tuple[str, ...]
    edges: tuple[GraphEdge, ...]
    strengths: tuple[float, ...]
    kinds: tuple[str, ...]
    colours: dict[str, str]
    radius: float
    fitting: frozenset[int]


def draw(found: PoolGraph, edges: Sequence[GraphEdge]) -> Drawing:
    """Lay a pool's graph out; the same graph always gets the same picture."""
    graph = found.graph
    matrix = np.array(graph.matrix, dtype=np.float64)
    labelled = len(graph.names) <= LABELLED
    layout = lay_out(Graph(graph.kind, graph.names, matrix, target=""), labelled=labelled)
    values = np.array([edge.similarity for edge in edges])
    span = float(np.ptp(values)) if len(values) else 0.0
    strengths = (values - values.min()) / span if span else np.ones(len(values))
    kinds, colours = _colours([kind_of(card) for card in found.cards])
    radius = 11.0 if labelled else 6.0
    fitting = frozenset(range(len(graph.names))) if labelled else _fitting(layout, edges, radius)
    labels = tuple(shortened(name, LONGEST_LABEL) for name in graph.names)
    return Drawing(found, layout, labels, tuple(edges), tuple(map(float, strengths)), kinds, colours, radius, fitting)


def kind_of(card: ExpertCard) -> str:
    """The kind of the expert's task where its card tells, else the expert's method."""
    return str(card.training.get("task_kind") or card.method or "unknown")


def card_rows(card: ExpertCard) -> list[tuple[str, str]]:
    """What is known of an expert, as names and values."""
    shots = "all examples" if card.shots is None else f"{card.shots}, seed {card.seed}"
    rows = [
        ("task", card.task), ("method", card.method), ("backbone", card.backbone), ("shots", shots),
        ("parameters", f"{card.parameters:,}" if card.parameters else ""), ("licence", card.licence),
    ]  # fmt: skip
    rows += [(name, f"{value:.4f}") for name, value in card.metrics.items()]
    rows += [("blended from", f"{parent['name']}, weight {parent['weight']:.3f}") for parent in card.lineage]
    return [(name, value) for name, value in rows if value]


def off_diagonal(matrix: Numbers) -> tuple[float, float]:
    """Smallest and largest similarity of two different tasks, at least 0.01 apart."""
    values = matrix[~np.eye(len(matrix), dtype=bool)]
    low = float(values.min())
    return low, max(float(values.max()), low + 0.01)


def _colours(kinds: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """One colour each for the six most frequent kinds, grey for all others together."""
    frequent = [kind for kind, _ in sorted(Counter(kinds).items(), key=lambda item: (-item[1], item[0]))]
    coloured = dict(zip(frequent[:_COLOURED], LINES, strict=False))
    if len(frequent) > _COLOURED:
        coloured[OTHER_KIND] = FAINT
    return tuple(kind if kind in coloured else OTHER_KIND for kind in kinds), coloured


def _fitting(layout: GraphLayout, edges: Sequence[GraphEdge], radius: float) -> frozenset[int]:
    """Nodes whose labels cover no other label and no node, those with most edges first."""
    degrees = Counter(node for edge in edges for node in (edge.left, edge.right))
    halves = np.array([[len(label) * 3.5 + 3, LINE_HEIGHT / 2] for label in layout.labels])
    centres = layout.positions - [0, radius + LINE_HEIGHT / 2]
    fitting: list[int] = []
    for node in sorted(range(len(centres)), key=lambda n: (-degrees[n], n)):
        others = np.delete(np.arange(len(centres)), node)
        on_nodes = np.abs(layout.positions[others] - centres[node]) < halves[node] + radius * 0.8
        on_labels = np.abs(centres[fitting] - centres[node]) < halves[fitting] + halves[node]
        inside = halves[node, 0] <= centres[node, 0] <= layout.width - halves[node, 0]
        if inside and not on_nodes.all(axis=1).any() and not on_labels.all(axis=1).any():
            fitting.append(node)
    return frozenset(fitting)
