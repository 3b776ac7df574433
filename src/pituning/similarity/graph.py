"""The task graph: tasks as nodes, similarities between their embeddings as weighted edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pituning.similarity.embedding import TaskEmbedding
from pituning.similarity.measures import fisher_similarity, zero_tensors


@dataclass(frozen=True)
class TaskGraph:
    """Names and the symmetric matrix of similarities between them."""

    kind: str
    names: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]


def task_graph(embeddings: Mapping[str, TaskEmbedding], kind: str = "fisher-cosine") -> TaskGraph:
    """Similarities between all pairs of task embeddings, over the tensors whose Fisher is non-zero in every task."""
    names = tuple(embeddings)
    idle = {key for embedding in embeddings.values() for key in zero_tensors(embedding)}
    embeddings = {
        name: replace(e, fisher={k: f for k, f in e.fisher.items() if k not in idle}) for name, e in embeddings.items()
    }
    rows = tuple(
        tuple(1.0 if a == b else fisher_similarity(embeddings[a], embeddings[b], kind) for b in names) for a in names
    )
    return TaskGraph(kind, names, rows)
