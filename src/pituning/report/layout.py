"""Where the nodes of a task graph go, which edges are drawn, and how names are shortened to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from pituning.report.content import Graph, Numbers

NODE_RADIUS = 11.0
LINE_HEIGHT = 18.0
_CHARACTER_WIDTH = 7.4
LONGEST_LABEL = 22
_MARGIN = 14.0
_EDGES, _TARGET_EDGES = 2, 4


@dataclass(frozen=True)
class Edge:
    """One drawn pair of tasks; ``strength`` runs from 0 (weakest drawn) to 1 (strongest)."""

    left: int
    right: int
    similarity: float
    strength: float


@dataclass(frozen=True)
class GraphLayout:
    """Positions ``[task, 2]`` in pixels of a canvas of ``width`` × ``height``, y upwards; labels sit below nodes."""

    positions: Numbers
    labels: tuple[str, ...]
    edges: tuple[Edge, ...]
    width: float
    height: float


def lay_out(graph: Graph, width: float = 1000.0, labelled: bool = True) -> GraphLayout:
    """Place similar tasks near each other such that no node covers another and, if ``labelled``, no label does.

    Stress majorisation (SMACOF, de Leeuw 1977) from classical multidimensional scaling, then boxes of node and label
    are pushed apart. The same graph always gets the same picture.
    """
    count = len(graph.names)
    height = float(np.clip(300 + 20 * count, 340, 1600 if labelled else 900))
    labels = tuple(ellipsis(name, LONGEST_LABEL) for name in graph.names)
    strength = _strengths(graph.matrix)
    points = _stress_layout(_distances(strength))
    boxes = np.array([[max(2.4 * NODE_RADIUS, len(label) * _CHARACTER_WIDTH) + 10, 0.0] for label in labels])
    boxes[:, 1] = 2 * NODE_RADIUS + LINE_HEIGHT + 12
    if not labelled:
        boxes[:] = 4 * NODE_RADIUS, 2.6 * NODE_RADIUS
    positions = _push_apart(_fit(points, boxes, width, height), boxes, width, height)
    # The box's centre lies half a line below the centre of the node.
    positions[:, 1] += LINE_HEIGHT / 2 * labelled
    return GraphLayout(positions, labels, _strongest_edges(graph, strength), width, height)


def ellipsis(text: str, longest: int) -> str:
    """
    >>> ellipsis("tweet_sentiment", 10)
    'tweet_sen…'
    """
    return text if len(text) <= longest else text[: longest - 1] + "…"


def shortened(text: str, longest: int) -> str:
    """Cut in the middle, since names of one pool often differ at their ends only.

    >>> shortened("tweet_sentiment-14", 12)
    'tweet_…nt-14'
    """
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[: longest - 1 - tail]}…{text[-tail:]}"


def without_common_prefix(names: Sequence[str]) -> tuple[str, list[str]]:
    """Dotted prefix that all names share, and what is left of each name.

    >>> without_common_prefix(["encoder.layer.0.query", "encoder.layer.1.query"])
    ('encoder.layer.', ['0.query', '1.query'])
    """
    if len(names) < 2:
        return "", list(names)
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = takewhile(lambda level: len(set(level)) == 1, levels)
    prefix = "".join(f"{level[0]}." for level in shared)
    return prefix, [name[len(prefix) :] for name in names]


def _strengths(matrix: Numbers) -> Numbers:
    """Mean of both directions, scaled to 0..1 over the pairs; an unknown similarity counts as the weakest."""
    both = np.stack([matrix, matrix.T])
    known = np.isfinite(both)
    sums, counts = np.where(known, both, 0.0).sum(axis=0), known.sum(axis=0)
    mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    np.fill_diagonal(mean, np.nan)
    pairs = mean[np.isfinite(mean)]
    low, high = (pairs.min(), pairs.max()) if pairs.size else (0.0, 0.0)
    if high - low < 1e-12:
        return np.where(np.isfinite(mean), 1.0, 0.0)
    return np.nan_to_num((mean - low) / (high - low), nan=0.0)


def _distances(strength: Numbers) -> Numbers:
    """Half the value and half the rank decide, so that one outlier does not press all other tasks together.

    From 0.4 to 1: a wider span puts three tasks on one line.
    """
    count = len(strength)
    upper = np.triu_indices(count, 1)
    ranks = np.zeros_like(strength)
    ranks[upper] = np.argsort(np.argsort(strength[upper], kind="stable"), kind="stable") / max(len(upper[0]) - 1, 1)
    return np.asarray(1.0 - 0.3 * (strength + ranks + ranks.T), dtype=np.float64)


def _strongest_edges(graph: Graph, strength: Numbers) -> tuple[Edge, ...]:
    count = len(graph.names)
    chosen: set[tuple[int, int]] = set()
    for node, name in enumerate(graph.names):
        others = [other for other in range(count) if other != node and _known(graph.matrix, node, other)]
        others.sort(key=lambda other: (-strength[node, other], other))
        kept = others[: _TARGET_EDGES if name == graph.target else _EDGES]
        chosen.update((min(node, other), max(node, other)) for other in kept)
    weakest = min((strength[pair] for pair in chosen), default=0.0)
    span = max((strength[pair] for pair in chosen), default=1.0) - weakest
    edges = [
        Edge(
            *pair,
            similarity=float(np.nanmean([graph.matrix[pair], graph.matrix.T[pair]])),
            strength=float((strength[pair] - weakest) / span) if span > 0 else 1.0,
        )
        for pair in chosen
    ]
    return tuple(sorted(edges, key=lambda edge: (edge.strength, edge.left, edge.right)))


def _known(matrix: Numbers, i: int, j: int) -> bool:
    return bool(np.isfinite(matrix[i, j]) or np.isfinite(matrix[j, i]))


def _stress_layout(distances: Numbers, steps: int = 300) -> Numbers:
    distances = distances.copy()
    np.fill_diagonal(distances, 0.0)
    count = len(distances)
    centring = np.eye(count) - 1.0 / count
    values, vectors = np.linalg.eigh(-0.5 * centring @ distances**2 @ centring)
    top = np.argsort(values)[::-1][:2]
    points: Numbers = vectors[:, top] * np.sqrt(np.maximum(values[top], 0.0))
    # A circle, however small, separates tasks that scaling puts on one spot.
    turn = 2 * np.pi * np.arange(count) / count
    points = points + 0.02 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    for _ in range(steps):
        offsets = points[:, None] - points[None]
        lengths = np.linalg.norm(offsets, axis=-1)
        ratio = np.where(lengths > 1e-9, distances / np.maximum(lengths, 1e-9), 0.0)
        points = (ratio[..., None] * offsets).sum(axis=1) / count
    _, _, axes = np.linalg.svd(points - points.mean(axis=0))
    axes *= np.sign(axes[np.arange(2), np.argmax(np.abs(axes), axis=1)])[:, None]
    return np.asarray((points - points.mean(axis=0)) @ axes.T, dtype=np.float64)


def _fit(points: Numbers, boxes: Numbers, width: float, height: float) -> Numbers:
    low, high = points.min(axis=0), points.max(axis=0)
    room = np.array([width, height]) - boxes.max(axis=0) - 2 * _MARGIN
    span = np.where(high - low > 1e-9, high - low, 1.0)
    # Filling the canvas may stretch one axis up to 1.6 times the other; more would belie the distances.
    scale = np.minimum(room / span, 1.6 * (room / span).min())
    return np.asarray((points - (low + high) / 2) * scale + np.array([width, height]) / 2, dtype=np.float64)


def _push_apart(points: Numbers, boxes: Numbers, width: float, height: float, rounds: int = 600) -> Numbers:
    points = points.copy()
    low = boxes / 2 + _MARGIN
    high = np.array([width, height]) - low
    reach = (boxes[:, None] + boxes) / 2
    for _ in range(rounds):
        apart = np.abs(points[:, None] - points) >= reach
        pairs = np.argwhere(np.triu(~apart.any(axis=-1), 1))
        for i, j in pairs:
            offset = points[j] - points[i]
            overlap = reach[i, j] - np.abs(offset)
            if (overlap <= 0).any():
                continue
            axis = int(np.argmin(overlap))
            push = (overlap[axis] / 2 + 0.5) * (1.0 if offset[axis] >= 0 else -1.0)
            points[i, axis] -= push
            points[j, axis] += push
        points = np.clip(points, low, high)
        if not len(pairs):
            break
    return points
