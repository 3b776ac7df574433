"""`rank_experts`: which experts of a pool will help a target task, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pituning.backbones.base import Backbone
from pituning.data.overlap import Overlap, find_overlaps
from pituning.errors import ExpertError, PituningError, unknown_name
from pituning.experts.expert import Expert, ExpertCard, read_card
from pituning.experts.pool import ExpertPool
from pituning.interpolation.build import is_lora
from pituning.similarity.embedding import REFERENCES
from pituning.similarity.measures import AVERAGED, FISHER_KINDS, MEASURES, Comparison
from pituning.tasks.task import Task, load_task

DEFAULT_KIND = "calibrated-score"
DEFAULT_K = 3
DEFAULT_K_OF_LORA = 5
"""LoRA blends reach out further than a mean (docs/transfer.md), so that more experts do not thin each other out."""


@dataclass(frozen=True)
class Ranking:
    """Experts in falling order of similarity to a target task.

    Attributes:
        experts: the experts, most similar first.
        similarities: their similarities; larger = more helpful.
    """

    target: str
    kind: str
    experts: tuple[Expert, ...]
    similarities: tuple[float, ...]

    def top(self, k: int | None = None) -> list[Expert]:
        """The k most similar experts (all, if there are fewer); by default five of LoRA, and three of other methods."""
        if k is not None and k < 1:
            raise PituningError(f"k must be at least 1, not {k}")
        return list(self.experts[: k or default_k(self.experts)])

    def above(self, threshold: float) -> list[Expert]:
        """The experts at least as similar as the threshold."""
        return [e for e, s in zip(self.experts, self.similarities, strict=True) if s >= threshold]

    def __str__(self) -> str:
        width = max((len(e.name) for e in self.experts), default=0)
        rows = (f"  {e.name:<{width}}  {s:+.4f}" for e, s in zip(self.experts, self.similarities, strict=True))
        return "\n".join([f"experts for {self.target} by {self.kind}, larger = more helpful", *rows])


def default_k(experts: Sequence[Expert]) -> int:
    """How many experts are blended where nothing is said."""
    return DEFAULT_K_OF_LORA if experts and is_lora(experts[0]) else DEFAULT_K


def rank_experts(
    backbone: Backbone,
    task: Task,
    pool: ExpertPool,
    own: Expert | None = None,
    *,
    kind: str = DEFAULT_KIND,
    reference: str = "shared",
    data: str | Path | None = None,
    exclude: Sequence[str] = (),
    average_of: Sequence[str] = AVERAGED,
) -> Ranking:
    """Rank a pool's experts for a target task.

    Args:
        own: the target's own expert; needed by ``weights``, and by the Fisher kinds at the ``own`` reference point.
        kind: ``calibrated-score`` (log-loss of each expert on the target's training examples, after a temperature and one bias
            per answer), ``score`` (the same as it is), ``tuned-score`` (that of a short warm start, on examples that it was not
            tuned on), ``gradient`` (how steeply that loss falls from the common start towards each expert), ``fisher``,
            ``fisher-cosine``, ``fisher-paper`` (Fisher task embeddings), ``weights`` (data-free) or ``average`` (of the ranks
            by the kinds in ``average_of``).
        reference: for the Fisher kinds, where the tasks are embedded: all at one ``shared`` expert, or each at its
            ``own`` (the paper). The shared one is the mean of all of the pool's experts of the method, the target's own and
            the excluded ones among them: the place of comparison has seen their examples, though they are no candidates.
        data: folder with the data of the pool's tasks, for embeddings that are not stored yet.
        exclude: names of experts to leave out. Experts of the target task itself, ``own``, and whatever was blended from
            one of these, directly or by way of other blends in the pool, are always left out.

    Raises:
        UnknownNameError: for another kind.
        PituningError: if the kind needs an own expert and there is none, or the pool is empty.
        ExpertError: if a similarity is not a finite number.
        BackboneMismatchError: if an expert belongs to another backbone.
        RefusedError: for ``weights`` and ``gradient``, if an expert did not start where the others did.
    """
    if kind not in MEASURES:
        raise unknown_name("similarity", kind, MEASURES)
    if reference not in REFERENCES:
        raise unknown_name("reference point", reference, REFERENCES)
    method = own.card.method if own is not None else None
    experts = pool.load_all(backbone, exclude)
    seen = _seen([*(e.card for e in experts), *_readable_cards(pool, exclude)], task.name, own)
    experts = [e for e in experts if e.name not in seen and (method is None or e.card.method == method)]
    if not experts:
        raise PituningError(
            f"pool {pool.folder} holds no expert for another task that could be ranked for {task.name!r}"
        )
    comparison = Comparison(backbone, task, pool, experts, own, reference, data, average_of)
    values = MEASURES[kind](comparison)
    order = sorted(range(len(experts)), key=lambda i: (-values[i], experts[i].name))
    label = f"{kind} ({reference})" if kind in FISHER_KINDS else kind
    if kind == "average":
        label = f"average of {', '.join(dict.fromkeys(average_of))}"
    return Ranking(task.name, label, tuple(experts[i] for i in order), tuple(values[i] for i in order))


def _seen(cards: Sequence[ExpertCard], task: str, own: Expert | None) -> set[str]:
    """Names of the experts that have seen the task's examples: its own ones, and every blend of one that has."""
    seen = {card.name for card in cards if card.task == task} | ({own.name} if own is not None else set())
    while more := {c.name for c in cards if c.name not in seen and seen & {str(p["name"]) for p in c.lineage}}:
        seen |= more
    return seen


def _readable_cards(pool: ExpertPool, names: Sequence[str]) -> list[ExpertCard]:
    """The cards of the pool's experts of these names; a broken one may be left out by its name, and so has none."""
    cards = []
    for name in pool.names():
        if name in names:
            try:
                cards.append(read_card(pool.folder / name))
            except ExpertError:
                continue
    return cards


def audit_pool(pool: ExpertPool, task: Task, data: str | Path | None = None) -> dict[str, list[Overlap] | str]:
    """Near-duplicates between a task (all its splits) and the training set of every expert in a pool.

    Returns:
        per expert the overlaps found, or the reason why its task's data could not be read.
    """
    mine = [e for split in task.splits.values() for e in split]
    report: dict[str, list[Overlap] | str] = {}
    for name in pool.names():
        try:
            expert = pool.load(name)
            if expert.card.task != task.name:
                report[name] = find_overlaps(mine, load_task(expert.card.task, data=data).split("train"))
        except PituningError as error:
            report[name] = str(error)
    return report
