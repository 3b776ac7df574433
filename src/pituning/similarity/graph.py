"""The task graph: tasks as nodes, similarities between their embeddings as weighted edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pituning.similarity.embedding import TaskEmbedding
from pituning.similarity.measures import fisher_similarity


@dataclass(frozen=True)
class TaskGraph:
    """Names and the symmetric matrix of similarities between them."""

    kind: str
    names: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]


def task_graph(embeddings: Mapping[str, TaskEmbedding], kind: str = "fisher-cosine") -> TaskGraph:
    """Similarities between all pairs of task embeddings."""
    names = tuple(embeddings)
    rows = tuple(
        tuple(1.0 if a == b else fisher_similarity(embeddings[a], embeddings[b], kind) for b in names) for a in names
    )
    return TaskGraph(kind, names, rows)
