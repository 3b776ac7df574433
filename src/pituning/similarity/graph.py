"""The task graph: tasks as nodes, similarities between them as weighted edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, RefusedError, unknown_name
from pituning.experts.expert import Expert, ExpertCard, initial_of, read_card
from pituning.experts.pool import ExpertPool
from pituning.interpolation.build import is_lora
from pituning.methods.bitfit import PEFT_TYPE as BITFIT
from pituning.problems import listed
from pituning.similarity.embedding import REFERENCES, TaskEmbedding
from pituning.similarity.measures import (
    FISHER_KINDS,
    fisher_similarity,
    require_comparable,
    weight_similarity,
    zero_tensors,
)

GRAPH_KINDS = (*FISHER_KINDS, "weights")
NEAREST = 3
_MOST_FOR_OPTIMAL_ORDER = 500


class GraphEdge(NamedTuple):
    """Two nodes by their places in the graph's names, ``left < right``, and their similarity."""

    left: int
    right: int
    similarity: float


@dataclass(frozen=True)
class TaskGraph:
    """Names and the symmetric matrix of similarities between them."""

    kind: str
    names: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]

    def edges(self, *, nearest: int | None = None, threshold: float | None = None) -> list[GraphEdge]:
        """The pairs worth drawing, the most similar first.

        Args:
            nearest: of every node, the edges to so many most similar others; 3 where neither is given.
            threshold: only edges at least that similar.
        """
        matrix = np.array(self.matrix, dtype=np.float64)
        count = len(matrix)
        kept = ~np.eye(count, dtype=bool)
        if nearest is not None or threshold is None:
            others = np.where(kept, matrix, -np.inf)
            order = np.argsort(-others, axis=1, kind="stable")[:, : min(nearest or NEAREST, count - 1)]
            kept[:] = False
            np.put_along_axis(kept, order, True, axis=1)
        if threshold is not None:
            kept &= matrix >= threshold
        pairs = np.argwhere(np.triu(kept | kept.T, 1))
        edges = [GraphEdge(int(i), int(j), float(matrix[i, j])) for i, j in pairs]
        return sorted(edges, key=lambda e: (-e.similarity, e.left, e.right))

    def clustered(self) -> tuple[int, ...]:
        """The nodes in the order of a hierarchical clustering's leaves, so that similar ones stand side by side.

        Average linkage on the distance max − similarity; up to 500 nodes, the order of the leaves is that which keeps
        neighbours closest (Bar-Joseph et al., 2001).
        """
        from scipy.cluster.hierarchy import leaves_list, linkage
        from scipy.spatial.distance import squareform

        matrix = np.array(self.matrix, dtype=np.float64)
        distances = matrix.max() - (matrix + matrix.T) / 2
        np.fill_diagonal(distances, 0.0)
        optimal = len(matrix) <= _MOST_FOR_OPTIMAL_ORDER
        tree = linkage(squareform(distances, checks=False), "average", optimal_ordering=optimal)
        return tuple(int(leaf) for leaf in leaves_list(tree))


@dataclass(frozen=True)
class PoolGraph:
    """The task graph of a pool.

    Attributes:
        graph: its names are those of the experts in the pool.
        cards: the experts' cards, in the order of the names.
        left_out: experts that are not in the graph → why.
        skipped: tensors that no similarity uses, because their Fisher is zero throughout in one of the tasks.
    """

    graph: TaskGraph
    cards: tuple[ExpertCard, ...]
    left_out: Mapping[str, str]
    skipped: tuple[str, ...] = ()


def task_graph(embeddings: Mapping[str, TaskEmbedding], kind: str = "fisher-cosine") -> TaskGraph:
    """Similarities between all pairs of task embeddings, over the tensors whose Fisher is non-zero in every task.

    Raises:
        ExpertError: if two embeddings are of different tensors or reference points.
    """
    names = tuple(embeddings)
    skipped = idle_tensors(embeddings)
    if all(set(e.fisher) <= set(skipped) for e in embeddings.values()):
        raise ExpertError("every tensor's Fisher is zero throughout in one of the tasks: there is nothing to compare")
    used = [replace(e, fisher={k: f for k, f in e.fisher.items() if k not in skipped}) for e in embeddings.values()]
    matrix = _cosine_matrix(used) if kind == "fisher-cosine" else _pairwise(used, kind)
    return TaskGraph(kind, names, tuple(tuple(map(float, row)) for row in matrix))


def idle_tensors(embeddings: Mapping[str, TaskEmbedding]) -> tuple[str, ...]:
    """Names of the tensors whose Fisher is zero throughout in at least one of the tasks."""
    return tuple(sorted({key for embedding in embeddings.values() for key in zero_tensors(embedding)}))


def pool_graph(
    pool: ExpertPool,
    kind: str = "fisher-cosine",
    reference: str = "shared",
    *,
    method: str | None = None,
    names: Sequence[str] = (),
    backbone: Backbone | None = None,
) -> PoolGraph:
    """The task graph of a pool's experts: from their stored embeddings, or from their weights.

    An expert that is broken or, for the Fisher kinds, has no stored embedding is left out, and the result says so.

    Args:
        kind: ``fisher-cosine``, ``fisher``, ``fisher-paper`` or ``weights``.
        reference: the reference point of the embeddings, ``"own"`` or ``"shared"``.
        method: only experts of this method.
        names: only these experts.
        backbone: where ``weights`` takes the common initialisation from; LoRA and BitFit need none.

    Raises:
        UnknownNameError: for another kind, reference point or expert.
        RefusedError: if the experts are of several methods or backbones, or ``weights`` needs a backbone.
        ExpertError: if fewer than two experts can be compared, or two embeddings are of different reference points.
    """
    if kind not in GRAPH_KINDS:
        raise unknown_name("similarity", kind, GRAPH_KINDS)
    if reference not in REFERENCES:
        raise unknown_name("reference point", reference, REFERENCES)
    known = pool.names()
    if unknown := [name for name in names if name not in known]:
        raise unknown_name("expert", unknown[0], known, f"The pool is {pool.folder}.")
    cards, left_out = _cards(pool, names or known, method)
    skipped: tuple[str, ...] = ()
    if kind == "weights":
        experts = {name: expert for name in cards if (expert := _load(pool, name, left_out))}
        _require_two(pool, experts, left_out)
        initial = _initial(next(iter(experts.values())), backbone)
        graph = _weight_graph(experts, initial)
    else:
        embeddings = {name: e for name in cards if (e := _embedding(pool, name, reference, left_out))}
        _require_two(pool, embeddings, left_out)
        skipped = idle_tensors(embeddings)
        graph = replace(task_graph(embeddings, kind), kind=f"{kind} ({reference})")
    return PoolGraph(graph, tuple(cards[name] for name in graph.names), left_out, skipped)


def _cards(pool: ExpertPool, names: Sequence[str], method: str | None) -> tuple[dict[str, ExpertCard], dict[str, str]]:
    """The cards of the experts of one method on one backbone, and what is wrong with those that are broken."""
    cards: dict[str, ExpertCard] = {}
    broken: dict[str, str] = {}
    for name in names:
        try:
            cards[name] = read_card(pool.folder / name)
        except ExpertError as error:
            broken[name] = str(error)
    if method is not None:
        cards = {name: card for name, card in cards.items() if card.method == method}
    methods = sorted({card.method for card in cards.values()})
    if len(methods) > 1:
        raise RefusedError(f"pool {pool.folder} holds experts of {' and '.join(methods)}: choose with --method")
    backbones = {card.fingerprint: name for name, card in cards.items() if card.fingerprint}
    if len(backbones) > 1:
        shown = listed(f"{cards[name].backbone} ({fingerprint}): {name} …" for fingerprint, name in backbones.items())
        raise RefusedError(
            f"experts of different backbones cannot be compared; pool {pool.folder} has, one expert of each:{shown}\n"
            "name those of one backbone with --experts"
        )
    return cards, broken


def _load(pool: ExpertPool, name: str, left_out: dict[str, str]) -> Expert | None:
    try:
        return Expert.load(pool.folder / name).with_card(name=name)
    except ExpertError as error:
        left_out[name] = str(error)
        return None


def _embedding(pool: ExpertPool, name: str, reference: str, left_out: dict[str, str]) -> TaskEmbedding | None:
    try:
        embedding = TaskEmbedding.load(pool.folder / name, reference)
    except ExpertError as error:
        left_out[name] = f"{error}: `pituning embed {name} --reference {reference} --pool {pool.folder}` makes one"
        return None
    return embedding


def _require_two(pool: ExpertPool, found: Mapping[str, object], left_out: Mapping[str, str]) -> None:
    if len(found) < 2:
        why = ":" + listed(f"{name}: {reason}" for name, reason in left_out.items()) if left_out else ""
        raise ExpertError(
            f"a task graph needs two experts, and pool {pool.folder} has {len(found)} that can be compared{why}"
        )


def _initial(expert: Expert, backbone: Backbone | None) -> Mapping[str, Tensor] | None:
    if is_lora(expert):
        return None
    if expert.config.get("peft_type") == BITFIT:
        return {key: torch.zeros_like(tensor) for key, tensor in expert.tensors.items()}
    if backbone is None:
        raise RefusedError(
            f"similarity 'weights' compares what {expert.card.method!r} experts changed since their common start, which the "
            f"backbone {expert.card.backbone!r} gives: name it with --backbone, or use a Fisher kind"
        )
    expert.require_backbone(backbone)
    return initial_of(backbone, expert)


def _weight_graph(experts: Mapping[str, Expert], initial: Mapping[str, Tensor] | None) -> TaskGraph:
    values = list(experts.values())
    matrix = np.eye(len(values))
    for i, j in combinations(range(len(values)), 2):
        matrix[i, j] = matrix[j, i] = weight_similarity(values[i], values[j], initial)
    return TaskGraph("weights", tuple(experts), tuple(tuple(map(float, row)) for row in matrix))


def _pairwise(embeddings: Sequence[TaskEmbedding], kind: str) -> NDArray[np.float64]:
    matrix = np.eye(len(embeddings))
    for i, j in combinations(range(len(embeddings)), 2):
        matrix[i, j] = matrix[j, i] = fisher_similarity(embeddings[i], embeddings[j], kind)
    return matrix


def _cosine_matrix(embeddings: Sequence[TaskEmbedding]) -> NDArray[np.float64]:
    """Mean over tensors of the cosines; all pairs of a tensor in one product."""
    for embedding in embeddings[1:]:
        require_comparable(embeddings[0], embedding)
    keys = list(embeddings[0].fisher)
    total = torch.zeros(len(embeddings), len(embeddings), dtype=torch.float64)
    for key in keys:
        rows = torch.stack([e.fisher[key].flatten().double() for e in embeddings])
        rows = rows / rows.norm(dim=1, keepdim=True)
        total += rows @ rows.T
    matrix = (total / len(keys)).numpy()
    np.fill_diagonal(matrix, 1.0)
    return matrix
