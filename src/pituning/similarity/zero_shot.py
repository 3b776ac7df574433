"""The paper's zero-shot setting: the most similar expert is used as it is; nothing is trained on the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pituning.backbones.base import Backbone
from pituning.errors import RefusedError
from pituning.experts.expert import Expert
from pituning.experts.pool import ExpertPool
from pituning.similarity.select import Ranking, rank_experts
from pituning.tasks.task import Task
from pituning.training.evaluation import AnswerBy, Evaluation, evaluate

ZERO_SHOT_KIND = "fisher"


@dataclass(frozen=True)
class ZeroShot:
    """What the most similar expert and the bare backbone reach on a target.

    Attributes:
        ranking: how the expert was chosen.
        expert, backbone: results of the chosen expert and of no expert at all.
    """

    ranking: Ranking
    expert: Evaluation
    backbone: Evaluation

    @property
    def chosen(self) -> Expert:
        """The most similar expert."""
        return self.ranking.experts[0]

    @property
    def gain(self) -> float:
        """Difference of the task's own metric to that of the bare backbone."""
        return self.expert.value - self.backbone.value


def zero_shot(
    backbone: Backbone,
    task: Task,
    pool: ExpertPool,
    *,
    kind: str = ZERO_SHOT_KIND,
    method: str | None = None,
    split: str = "test",
    limit: int | None = None,
    by: AnswerBy = "score",
    data: str | Path | None = None,
) -> ZeroShot:
    """Use the most similar expert of a pool on a task without training.

    Some labelled examples of the target are still needed, to see which expert is the most similar: those of its ``train``
    split (the paper does not say how many it used). They only choose; no tensor learns from them. Fisher embeddings are
    taken at the reference point that the pool shares, because the target has no expert of its own.

    Args:
        kind: ``fisher`` and its variants, ``calibrated-score`` or ``score``; ``weights`` would need an own expert.
        method: only experts of this method; needed where the pool holds several.
        split, limit, by: of the evaluation, as in :func:`pituning.evaluate`.
        data: folder with the data of the pool's tasks, for embeddings that are not stored yet.

    Raises:
        RefusedError: if the pool holds experts of several methods and none is chosen; otherwise as
            :func:`pituning.rank_experts` and :func:`pituning.evaluate`.

    Source: Wu et al., "π-Tuning", ICML 2023, Table 3 (zero-shot).
    """
    ranking = most_similar(backbone, task, pool, kind=kind, method=method, data=data)
    found = evaluate(backbone, ranking.experts[0], task, split, limit, by=by)
    return ZeroShot(ranking, found, evaluate(backbone, None, task, split, limit, by=by))


def most_similar(
    backbone: Backbone,
    task: Task,
    pool: ExpertPool,
    *,
    kind: str = ZERO_SHOT_KIND,
    method: str | None = None,
    data: str | Path | None = None,
) -> Ranking:
    """The experts of a pool by their similarity to a task that has no expert of its own; arguments of :func:`zero_shot`."""
    methods = {name: pool.load(name).card.method for name in pool.names()}
    if method is None and len(set(methods.values())) > 1:
        raise RefusedError(
            f"pool {pool.folder} holds experts of {' and '.join(sorted(set(methods.values())))}: choose a method"
        )
    exclude = [name for name, found in methods.items() if method not in (None, found)]
    return rank_experts(backbone, task, pool, kind=kind, reference="shared", data=data, exclude=exclude)
