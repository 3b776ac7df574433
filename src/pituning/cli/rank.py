"""`pituning rank`, and the choice of experts that `pituning interpolate` shares with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, TaskName, comma_separated
from pituning.cli.output import Output, table
from pituning.cli.verb import verb
from pituning.errors import RefusedError, unknown_name

if TYPE_CHECKING:
    from rich.console import Group

    from pituning.backbones.base import Backbone
    from pituning.experts import Expert, ExpertPool
    from pituning.similarity import Ranking
    from pituning.similarity.selection import Selection
    from pituning.tasks import Task

Reference = Literal["shared", "own"]
Way = Literal["top-k", "threshold", "greedy", "diverse", "auto"]
SoupWeights = Literal["uniform", "score"]
_PANEL = "Choice of experts"


@dataclass(frozen=True)
class RankingOptions:
    """How the experts of a pool are compared with a task."""

    kind: Annotated[
        str,
        typer.Option(
            help="Similarity: calibrated-score (how well each expert tells the answers to the task's training examples "
            "apart), score (the same without calibration), tuned-score (of a short warm start, cross-fitted), gradient (how "
            "steeply their loss falls towards each expert), "
            "fisher, fisher-cosine, fisher-paper (task embeddings), weights (no data "
            "needed) or average (of the ranks by several).",
            rich_help_panel=_PANEL,
        ),
    ] = "calibrated-score"  # as DEFAULT_KIND, which must not be imported for a help page
    average_of: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="The similarities that --kind average averages; score,gradient by default.",
            rich_help_panel=_PANEL,
        ),
    ] = None
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
            help="Only experts of this method, as their cards name it (lora, bottleneck, ln_tuning …); needed where the pool "
            "holds several.",
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
        from pituning.similarity import rank_experts
        from pituning.similarity.measures import AVERAGED

        averaged = comma_separated("--average-of", self.average_of)
        if averaged and self.kind != "average":
            raise typer.BadParameter(f"--average-of needs --kind average, not --kind {self.kind}")
        names = list(among) or pool.names()
        candidates = [e for e in (pool.load(name) for name in names) if e.card.task != task.name]
        methods = sorted({e.card.method for e in candidates})
        if self.method is not None and candidates and not among and self.method not in methods:
            raise unknown_name(
                "method", self.method, methods, f"These are the methods of the experts in {pool.folder}."
            )
        method = self.method or (own.card.method if own is not None else None)
        if method is None and len(methods) > 1:
            raise RefusedError(f"pool {pool.folder} holds experts of {' and '.join(methods)}: choose with --method")
        wanted = {e.name for e in candidates if method is None or e.card.method == method}
        if among and len(wanted) < len(among):
            left_out = ", ".join(name for name in among if name not in wanted)
            raise RefusedError(f"{left_out}: trained on task {task.name!r} itself, or of another method than {method}")
        exclude = [name for name in pool.names() if name not in wanted]
        found = rank_experts(
            backbone, task, pool, own, kind=self.kind, reference=self.reference, data=data, exclude=exclude,
            average_of=averaged or AVERAGED,
        )  # fmt: skip
        if among and (seen := [name for name in among if name not in {e.name for e in found.experts}]):
            raise RefusedError(
                f"{', '.join(seen)}: blended from an expert that was trained on task {task.name!r} itself; leave it out"
            )
        return found


@dataclass(frozen=True)
class SelectionOptions:
    """How many of the ranked experts are used, and which."""

    select: Annotated[
        Way | None,
        typer.Option(
            help="top-k; threshold; greedy (whichever lowers the soup's log-loss on the task's examples most, until none "
            "does); diverse (similar to the task, not to one another); auto (the best number of the highest ranked).",
            rich_help_panel=_PANEL,
        ),
    ] = None
    top: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="So many of the highest ranked experts, by default 5 of LoRA and 3 of other methods; for greedy and auto "
            "the most.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(metavar="X", help="The lowest similarity, with --select threshold.", rich_help_panel=_PANEL),
    ] = None
    diversity: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="With --select diverse: 0 looks at the similarity alone, 1 at the difference alone; by default 0.5.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    soup: Annotated[
        SoupWeights | None,
        typer.Option(
            help="Weights of the soups where a selection compares some on the task's examples; by default uniform.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def choose(
        self,
        ranking: Ranking,
        backbone: Backbone,
        task: Task | None,
        own: Expert | None = None,
        most: int | None = None,
    ) -> Selection:
        """Choose from a ranking, by default the highest ranked; with a task the choice is checked on its examples.

        Raises:
            typer.BadParameter: if an option was given that has no effect on this selection.
        """
        from pituning.similarity.selection import select

        self.require_effect("top-k", checked=task is not None)
        return select(
            ranking, self.select or "top-k", k=self.top or most, threshold=self.threshold, diversity=self.diversity,
            soup=self.soup, backbone=backbone, task=task, own=own,
        )  # fmt: skip

    def require_effect(self, otherwise: Way | None, *, checked: bool) -> None:
        """Refuse options that would not be looked at.

        Args:
            otherwise: how experts are selected without --select; ``None``: not at all.
            checked: whether a selection is checked on the task's examples.

        Raises:
            typer.BadParameter: names the option and the selections that it belongs to.
        """
        how = self.select or otherwise
        compares = how in ("greedy", "auto") or (how is not None and checked)
        options = {
            "--top": (self.top, how not in ("threshold", None), "--select top-k, greedy, diverse or auto"),
            "--threshold": (self.threshold, how == "threshold", "--select threshold"),
            "--diversity": (self.diversity, how == "diverse", "--select diverse"),
            "--soup": (self.soup, compares, "a selection that compares soups, such as --select greedy or auto"),
        }
        for option, (value, of_use, where) in options.items():
            if value is not None and not of_use:
                chosen = f"with --select {self.select}" if self.select else "without --select"
                raise typer.BadParameter(f"{option} {value} has no effect {chosen}: it belongs to {where}")


@verb
def rank(
    task: TaskName,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    ranking: RankingOptions,
    selection: SelectionOptions,
    output: Output,
) -> None:
    """Predict which experts of the pool will help a task, the most helpful first.

    Experts for the task itself are left out: they have seen its examples. With --select it also says which of them to use,
    and whether they beat the bare backbone (and --own) on examples held out from the choice.

    Example: pituning rank sst2 --shots 16 --select greedy
    """
    selection.require_effect(None, checked=True)
    target = source.load(task)
    with output.status(f"loading {model.backbone}"):
        experts = pool.open()
        own = ranking.own_expert(pool, target, output)
        backbone = model.load()
    with output.status(f"comparing experts with {task}"):
        found = ranking.rank(backbone, target, experts, own, data=source.data)
    document = {"task": task, "pool": pool.pool, "kind": found.kind, "experts": ranking_document(found)}
    shown: list[Group | str] = [ranking_table(found)]
    if selection.select is not None:
        with output.status(f"selecting by {selection.select}"):
            chosen = selection.choose(found, backbone, target, own)
        document["selection"] = selection_document(chosen)
        shown += [*selection_tables(chosen), chosen.reason]
    output.result(document, *shown)


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


def selection_document(selection: Selection) -> dict[str, Any]:
    """A selection as plain values."""
    return {
        "how": selection.how,
        "experts": [e.name for e in selection.experts],
        "helps": selection.helps,
        "reason": selection.reason,
        "soups": [asdict(soup) for soup in selection.soups],
        "arms": [{"name": arm.name, "loss": arm.loss} for arm in selection.arms],
    }


def selection_tables(selection: Selection) -> list[Group]:
    """What a selection chose and what it compared, as tables."""
    chosen = [[str(n + 1), e.name, e.card.task] for n, e in enumerate(selection.experts)]
    arms = [[arm.name, f"{arm.loss:.4f}"] for arm in selection.arms]
    tables = [table(f"Selected by {selection.how}", ["#", "expert", "task"], chosen)] if chosen else []
    return tables + ([table("Checked on held-out folds", ["", "cross-fitted log-loss#"], arms)] if arms else [])
