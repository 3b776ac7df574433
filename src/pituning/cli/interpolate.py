"""`pituning interpolate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, SaveOptions, TaskName, comma_separated
from pituning.cli.output import Output, table
from pituning.cli.rank import RankingOptions, ranking_document, ranking_table
from pituning.cli.verb import verb

if TYPE_CHECKING:
    from rich.console import Group

    from pituning.training.blend import Interpolation

TrainMode = Literal["experts", "shared", "weights", "none"]
Granularity = Literal["model", "layer", "attention", "module", "tensor"]
IncludeOwn = Literal["auto", "yes", "no"]
_OWN: dict[str, bool | str] = {"auto": "auto", "yes": True, "no": False}
_PANEL = "Interpolation"


@verb
def interpolate(
    task: TaskName,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    choice: RankingOptions,
    saving: SaveOptions,
    output: Output,
    top: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Blend so many of the highest ranked experts.", rich_help_panel=_PANEL),
    ] = 3,
    experts: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Blend these experts, not the highest ranked.", rich_help_panel=_PANEL),
    ] = None,
    include_own: Annotated[
        IncludeOwn,
        typer.Option(
            help="Whether the own expert (--own) is blended in; auto lets cross-fitting decide.", rich_help_panel=_PANEL
        ),
    ] = "auto",
    train_mode: Annotated[
        TrainMode,
        typer.Option(
            help="What is trained: the weights and all experts (the paper), the weights and one shared difference "
            "(less memory), the weights alone, or nothing.",
            rich_help_panel=_PANEL,
        ),
    ] = "experts",
    init: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Starting weights: score, uniform, similarity, or numbers such as 0.5,0.3,0.2.",
            rich_help_panel=_PANEL,
        ),
    ] = "score",
    granularity: Annotated[
        Granularity,
        typer.Option(
            help="What has a weight of its own: every adapted module; or every attention block, all of its projections "
            "together, and every other module; or whole layers; …",
            rich_help_panel=_PANEL,
        ),
    ] = ("module"),
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="LoRA: largest rank of the result; by default the exact one, the sum of the experts' ranks.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
) -> None:
    """Blend the experts that help most into one expert for a task, and save it into the pool.

    Several ways to use the experts are compared by cross-fitting. The best is kept, even if it is the own expert.

    Example: pituning interpolate sst2 --shots 16 --own sst2-16shot-seed0
    """
    weights = _starting_weights(init)
    names = comma_separated("--experts", experts)
    if include_own == "yes" and choice.own is None:
        raise typer.BadParameter("--include-own yes needs --own EXPERT")
    target = source.load(task)
    with output.status(f"loading {model.backbone}"):
        from pituning.training.interpolate import interpolate as blend

        experts_pool = pool.open()
        own = choice.own_expert(pool, target, output)
        backbone = model.load()
    with output.status(f"comparing experts with {task}"):
        ranking = choice.rank(backbone, target, experts_pool, own, data=source.data, among=names)
    chosen = ranking.top(len(names) or top)
    if names and not isinstance(weights, str):  # given weights are in the order of the given names
        chosen = [expert for name in names for expert in chosen if expert.name == name]
    folder = saving.destination(pool, f"{task}-pi", task=task, method=chosen[0].card.method, blended=True)
    with output.status(f"blending {', '.join(e.name for e in chosen)}: comparing candidates by cross-fitting"):
        found = blend(
            backbone, target, chosen, own, train=train_mode, granularity=granularity, init=weights,
            similarities=ranking.similarities[: len(chosen)], include_own=_OWN[include_own], seed=source.seed,
            rank=rank, name=folder.name,
        )  # fmt: skip
    saving.write(found.expert, folder)
    output.result(
        {
            "folder": folder,
            "name": folder.name,
            "task": task,
            "weights": found.mean_weights(),
            "candidates": [asdict(c) for c in found.candidates],
            "ranking": {"kind": ranking.kind, "experts": ranking_document(ranking)},
            "largest_fold_error": max(found.errors.values(), default=0.0),
        },
        ranking_table(ranking),
        *_tables(found),
        f"saved to {folder}",
    )


def _tables(found: Interpolation) -> list[Group]:
    candidates = [
        ["→" if c.chosen else "", c.name, f"{c.loss:.4f}", f"{c.learning_rate:g}", str(c.steps)]
        for c in found.candidates
    ]
    weights = [[name, f"{weight:.3f}"] for name, weight in found.mean_weights().items()]
    return [
        table("Candidates", ["", "candidate", "cross-fitted log-loss#", "learning rate#", "steps#"], candidates),
        table("Blended from", ["expert", "mean weight#"], weights),
    ]


def _starting_weights(init: str) -> str | Sequence[float]:
    if not init[:1].isdigit() and not init.startswith("."):
        return init
    try:
        return [float(part) for part in init.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--init expects a word or numbers with commas between them, not {init!r}") from error
