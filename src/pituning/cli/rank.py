"""`pituning rank`, and the choice of experts that `pituning interpolate` shares with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, TaskName
from pituning.cli.output import Output, table
from pituning.cli.verb import verb
from pituning.errors import RefusedError

if TYPE_CHECKING:
    from rich.console import Group

    from pituning.backbones.base import Backbone
    from pituning.experts import Expert, ExpertPool
    from pituning.similarity import Ranking
    from pituning.tasks import Task

Reference = Literal["shared", "own"]
_PANEL = "Choice of experts"


@dataclass(frozen=True)
class RankingOptions:
    """How the experts of a pool are compared with a task."""

    kind: Annotated[
        str,
        typer.Option(
            help="Similarity: score (how well each expert predicts the task's training examples), fisher, "
            "fisher-cosine, fisher-paper (task embeddings) or weights (no data needed).",
            rich_help_panel=_PANEL,
        ),
    ] = "score"
    reference: Annotated[
        Reference,
        typer.Option(
            help="Where tasks are embedded: all at one shared expert, or each at its own.", rich_help_panel=_PANEL
        ),
    ] = "shared"
    own: Annotated[
        str | None,
        typer.Option(
            metavar="EXPERT",
            help="The task's own expert: a name in the pool, or a folder.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            help="Only experts of this method (lora, bottleneck …); needed where the pool holds several.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def own_expert(self, pool: PoolOptions, task: Task, output: Output) -> Expert | None:
        """The task's own expert, where one was named.

        Raises:
            RefusedError: if it is an expert for another task.
        """
        if self.own is None:
            return None
        own = pool.expert(self.own)
        if own.card.task != task.name:
            raise RefusedError(f"--own {self.own} is an expert for task {own.card.task!r}, not for {task.name!r}")
        if (own.card.shots, own.card.seed) != (task.shots, task.seed):
            drawn = "all examples" if own.card.shots is None else f"{own.card.shots} shots, seed {own.card.seed}"
            output.note(f"note: {self.own} was trained on {drawn}; --shots and --seed say something else here")
        return own

    def rank(
        self,
        backbone: Backbone,
        task: Task,
        pool: ExpertPool,
        own: Expert | None,
        *,
        data: Path | None = None,
        among: Sequence[str] = (),
    ) -> Ranking:
        """Rank the pool's experts of one method, or of those only the named ones."""
        from pituning.methods import make_config
        from pituning.similarity import rank_experts

        if self.method is not None:
            make_config(self.method, backbone)
        names = list(among) or pool.names()
        candidates = [e for e in (pool.load(name) for name in names) if e.card.task != task.name]
        methods = sorted({e.card.method for e in candidates})
        method = self.method or (own.card.method if own is not None else None)
        if method is None and len(methods) > 1:
            raise RefusedError(f"pool {pool.folder} holds experts of {' and '.join(methods)}: choose with --method")
        wanted = {e.name for e in candidates if method is None or e.card.method == method}
        if among and len(wanted) < len(among):
            left_out = ", ".join(name for name in among if name not in wanted)
            raise RefusedError(f"{left_out}: trained on task {task.name!r} itself, or of another method than {method}")
        exclude = [name for name in pool.names() if name not in wanted]
        return rank_experts(
            backbone, task, pool, own, kind=self.kind, reference=self.reference, data=data, exclude=exclude
        )


@verb
def rank(
    task: TaskName,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    ranking: RankingOptions,
    output: Output,
) -> None:
    """Predict which experts of the pool will help a task, the most helpful first.

    Experts for the task itself are left out: they have seen its examples.

    Example: pituning rank sst2 --shots 16
    """
    target = source.load(task)
    with output.status(f"loading {model.backbone}"):
        experts = pool.open()
        own = ranking.own_expert(pool, target, output)
        backbone = model.load()
    with output.status(f"comparing experts with {task}"):
        found = ranking.rank(backbone, target, experts, own, data=source.data)
    output.result(
        {"task": task, "pool": pool.pool, "kind": found.kind, "experts": ranking_document(found)}, ranking_table(found)
    )


def ranking_document(ranking: Ranking) -> list[dict[str, Any]]:
    """A ranking as plain values."""
    return [
        {"name": expert.name, "task": expert.card.task, "similarity": similarity}
        for expert, similarity in zip(ranking.experts, ranking.similarities, strict=True)
    ]


def ranking_table(ranking: Ranking) -> Group:
    """A ranking as a table."""
    rows = [[e.name, e.card.task, f"{s:+.4f}"] for e, s in zip(ranking.experts, ranking.similarities, strict=True)]
    return table(
        f"Experts for {ranking.target} by {ranking.kind}, larger = more helpful",
        ["expert", "task", "similarity#"],
        rows,
    )
