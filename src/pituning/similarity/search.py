"""Finding experts in a large pool: by what their cards say, and by likeness to a task or to another expert."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, PituningError, UnknownNameError, unknown_name
from pituning.experts.expert import ExpertCard
from pituning.similarity.compact import compact_cosines
from pituning.similarity.index import EMBEDDING_FILES, Entry, PoolIndex

RERANKED = 100
_BOUND = re.compile(
    r"(?P<name>[^<>=]+)(?P<sign>>=|<=|>|<)\s*(?P<value>-?[0-9]*\.?[0-9]+(e-?[0-9]+)?)\s*", re.IGNORECASE
)
_HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class MetricBound:
    """A bound on one of the metrics that a card holds.

    >>> MetricBound.parse("accuracy>=0.8")
    MetricBound(name='accuracy', sign='>=', value=0.8)
    """

    name: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> MetricBound:
        """Read ``NAME>=X``; the signs are ``>=``, ``<=``, ``>`` and ``<``.

        Raises:
            PituningError: if it is none.
        """
        match = _BOUND.fullmatch(text)
        if match is None or not match["name"].strip():
            raise PituningError(f"a bound on a metric looks like accuracy>=0.8 or 'dev log-loss<0.5', not {text!r}")
        return cls(match["name"].strip(), match["sign"], float(match["value"]))

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether there is such a metric, and within the bound."""
        return self.name in metrics and _HOLDS[self.sign](metrics[self.name], self.value)


@dataclass(frozen=True)
class Wanted:
    """What an expert's card has to say; what is None or empty is not asked for.

    Attributes:
        backbone: the backbone's id, the last part of it, a short name such as ``minilm``, or its fingerprint.
        licence: in capitals or not.
    """

    backbone: str | None = None
    method: str | None = None
    licence: str | None = None
    metrics: tuple[MetricBound, ...] = ()

    def matches(self, card: ExpertCard) -> bool:
        """Whether a card says all that."""
        return self.test()(card)

    def test(self) -> Callable[[ExpertCard], bool]:
        """:meth:`matches`, prepared for many cards."""
        method, backbone, metrics = self.method, self.backbone, self.metrics
        licence = None if self.licence is None else self.licence.lower()
        full = None if backbone is None else Backbone.hub_names.get(backbone, backbone)

        def holds(card: ExpertCard) -> bool:
            return (
                (method is None or card.method == method)
                and (licence is None or card.licence.lower() == licence)
                and (full is None or full in (card.backbone, card.backbone.rpartition("/")[2], card.fingerprint))
                and all(bound.holds(card.metrics) for bound in metrics)
            )

        return holds


@dataclass(frozen=True)
class Hit:
    """An expert that was found; without ``like`` it has no similarity."""

    card: ExpertCard
    similarity: float | None = None


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        hits: the experts, most similar first.
        like: names of the experts with which the others were compared.
        matching: how many cards say what is wanted, those of ``like`` not counted.
        incomparable: how many of those have no embedding that could be compared with the query's.
        problems: experts that are broken or could not be compared exactly → why.
    """

    hits: tuple[Hit, ...]
    like: tuple[str, ...]
    matching: int
    incomparable: int
    problems: Mapping[str, str]


def search_pool(
    index: PoolIndex, like: str | None = None, wanted: Wanted | None = None, *, top: int = 10, reference: str = "shared"
) -> Found:
    """The experts whose cards say what is wanted, those most like a task or an expert first.

    All are compared by their compact embeddings, then the best 100 by ``fisher-cosine`` of the full ones, read from their
    folders. Without ``like`` the order is that of the first metric asked for, the best first, or else of the names.

    Args:
        like: an expert of the pool, or a task: then the nearest of the task's experts counts.
        top: at most so many.
        reference: at which reference point the tasks were embedded, ``"own"`` or ``"shared"``.

    Raises:
        UnknownNameError: for a task, expert, method, backbone, licence, metric or reference point that is nowhere in the pool.
        ExpertError: if no expert of the query has an embedding there, or a broken one.
    """
    wanted = wanted or Wanted()
    if reference not in EMBEDDING_FILES:
        raise unknown_name("reference point", reference, EMBEDDING_FILES)
    _require_known(wanted, [entry.card for entry in index.entries if entry.card is not None])
    query = _query(index, like, reference) if like is not None else []
    holds, left_out = wanted.test(), set(query)
    rows = [
        row
        for row, entry in enumerate(index.entries)
        if entry.card is not None and holds(entry.card) and row not in left_out
    ]
    if like is None:
        cards = [card for row in rows if (card := index.entries[row].card) is not None]
        hits = [Hit(card) for card in sorted(cards, key=lambda card: _by_metric(card, wanted))]
        return Found(tuple(hits[:top]), (), len(rows), 0, index.problems)
    scores = compact_similarities(index, query, reference)[rows]
    order = np.argsort(-scores, kind="stable")[: max(RERANKED, top)]
    best = [index.entries[rows[n]] for n in order if np.isfinite(scores[n])]
    hits, problems = _rerank(index, [index.entries[row] for row in query], best, reference)
    names = tuple(index.entries[row].name for row in query)
    incomparable = int(np.isneginf(scores).sum())
    return Found(tuple(hits[:top]), names, len(rows), incomparable, {**index.problems, **problems})


def compact_similarities(index: PoolIndex, query: Sequence[int], reference: str) -> NDArray[np.float64]:
    """Compact similarity of every entry to the nearest of some entries, given by their rows; −∞ where none compares."""
    scores = np.full(len(index.entries), -np.inf)
    vectors, spaces = index.vectors[reference], index.spaces[reference]
    for row in query:
        values = np.where(spaces == spaces[row], compact_cosines(vectors, vectors[row]), -np.inf)
        scores = np.maximum(scores, values)
    return scores


def _query(index: PoolIndex, like: str, reference: str) -> list[int]:
    """Rows of the expert of that name, or else of the experts for the task of that name, that have an embedding."""
    rows = [row for row, entry in enumerate(index.entries) if entry.name == like]
    rows = rows or [row for row, e in enumerate(index.entries) if e.card is not None and e.card.task == like]
    if not rows:
        raise _unknown(index, like)
    embedded = [row for row in rows if index.spaces[reference][row]]
    if not embedded:
        first = index.entries[rows[0]]
        raise ExpertError(
            f"expert {first.name!r} has no task embedding at the {reference} reference point that could be compared"
            + (f": {first.problem}" if first.problem else "")
            + f"; `pituning embed {first.name} --reference {reference} --pool {index.folder}` makes one"
        )
    return embedded


def _unknown(index: PoolIndex, like: str) -> UnknownNameError:
    """Unlike :func:`unknown_name` this does not list all that there is: thousands."""
    known = {entry.name for entry in index.entries}
    known |= {entry.card.task for entry in index.entries if entry.card is not None}
    near = difflib.get_close_matches(like, known, n=3, cutoff=0.5)
    guess = f" did you mean {' or '.join(map(repr, near))}?" if near else ""
    return UnknownNameError(
        f"pool {index.folder} has no expert {like!r}, and none for a task of that name:{guess} "
        f"`pituning pool list --pool {index.folder}` shows what there is"
    )


def _require_known(wanted: Wanted, cards: Sequence[ExpertCard]) -> None:
    """Raise for a word that no card has: a search for it could only be empty."""
    asked: list[tuple[str, str | None, set[str], Callable[[ExpertCard], bool]]] = [
        ("method", wanted.method, {c.method for c in cards}, Wanted(method=wanted.method).test()),
        ("licence", wanted.licence, {c.licence for c in cards}, Wanted(licence=wanted.licence).test()),
        ("backbone", wanted.backbone, {c.backbone for c in cards}, Wanted(backbone=wanted.backbone).test()),
    ]
    for kind, word, known, matches in asked:
        if word is not None and not any(map(matches, cards)):
            raise unknown_name(kind, word, known - {""})
    for bound in wanted.metrics:
        if not any(bound.name in card.metrics for card in cards):
            raise unknown_name("metric", bound.name, {name for card in cards for name in card.metrics})


def _by_metric(card: ExpertCard, wanted: Wanted) -> tuple[float, str]:
    if not wanted.metrics:
        return 0.0, card.name
    bound = wanted.metrics[0]
    value = card.metrics[bound.name]
    return (-value if bound.sign.startswith(">") else value), card.name


def _rerank(
    index: PoolIndex, query: Sequence[Entry], best: Sequence[Entry], reference: str
) -> tuple[list[Hit], dict[str, str]]:
    """The candidates by exact similarity to the nearest of the query's experts, and those that could not be read."""
    from pituning.similarity.embedding import FlatFisher

    targets = [(e.spaces[reference], FlatFisher.load(index.folder / e.name, reference)) for e in query]
    hits: list[Hit] = []
    problems: dict[str, str] = {}
    for entry in best:
        assert entry.card is not None
        try:
            candidate = FlatFisher.load(index.folder / entry.name, reference)
            values = [target.cosine(candidate) for space, target in targets if space == entry.spaces[reference]]
        except ExpertError as error:
            problems[entry.name] = str(error)
            continue
        hits.append(Hit(entry.card, max(values)))
    return sorted(hits, key=lambda hit: (-(hit.similarity or 0.0), hit.card.name)), problems
