"""`pituning interpolate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, SaveOptions, TaskName, comma_separated
from pituning.cli.output import Output, table
from pituning.cli.rank import (
    RankingOptions,
    SelectionOptions,
    ranking_document,
    ranking_table,
    selection_document,
    selection_tables,
)
from pituning.cli.verb import verb
from pituning.errors import PituningError

if TYPE_CHECKING:
    from rich.console import Group

    from pituning.training.blend import Interpolation

TrainMode = Literal["experts", "shared", "weights", "none", "merge-then-tune"]
Granularity = Literal["model", "encoder-decoder", "layer", "attention", "module", "tensor"]
Coefficients = Literal["softmax", "linear", "sigmoid"]
Optimizer = Literal["adamw", "cma"]
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
    selection: SelectionOptions,
    saving: SaveOptions,
    output: Output,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C", help="Blend these experts, or with --select some of them.", rich_help_panel=_PANEL
        ),
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
            help="What is trained: one expert that starts at the blend, the weights and all experts (the paper), the weights "
            "and one shared difference, the weights alone, or nothing.",
            rich_help_panel=_PANEL,
        ),
    ] = "merge-then-tune",
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
    coefficients: Annotated[
        Coefficients,
        typer.Option(
            help="What a weight may be: shares of one (the paper), any signed number, or each between 0 and 1.",
            rich_help_panel=_PANEL,
        ),
    ] = "softmax",
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Of softmax and sigmoid weights.", rich_help_panel=_PANEL)
    ] = 1.0,
    scale: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="What softmax weights sum to: a number (1 is the paper's), or auto: for LoRA, what 32 or more examples say.",
            rich_help_panel=_PANEL,
        ),
    ] = "auto",
    optimizer: Annotated[
        Optimizer,
        typer.Option(
            help="How the weights are learned: by gradients, or without them by CMA-ES (with --train-mode weights).",
            rich_help_panel=_PANEL,
        ),
    ] = "adamw",
    weights_to_start: Annotated[
        float,
        typer.Option(
            metavar="X", min=0, help="Penalty on the weights' squared distance to their start.", rich_help_panel=_PANEL
        ),
    ] = 0.0,
    weights_spread: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Reward for the entropy of softmax weights; below 0 a penalty on it.",
            rich_help_panel=_PANEL,
        ),
    ] = 0.0,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="LoRA: largest rank of the result; by default the exact one, the sum of the experts' ranks.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            help="LoRA: the smallest rank of each module that keeps the relative error of its ΔW at or below this.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
) -> None:
    """Blend the experts that help most into one expert for a task, and save it into the pool.

    Several ways to use the experts are compared by cross-fitting. The best is kept, even if it is the own expert.

    Example: pituning interpolate sst2 --shots 16 --own sst2-16shot-seed0
    """
    weights = _starting_weights(init)
    reach = _scale(scale)
    names = comma_separated("--experts", experts)
    if include_own == "yes" and choice.own is None:
        raise typer.BadParameter("--include-own yes needs --own EXPERT")
    looked_at = selection.select in ("greedy", "auto")  # the others' choice is not to be questioned
    selection.require_effect("top-k", checked=looked_at)
    target = source.load(task)
    with output.status(f"loading {model.backbone}"):
        from pituning.training.crossfit import Search
        from pituning.training.interpolate import interpolate as blend
        from pituning.training.starts import ALPHA_LEARNING_RATE

        experts_pool = pool.open()
        own = choice.own_expert(pool, target, output)
        backbone = model.load()
    with output.status(f"comparing experts with {task}"):
        ranking = choice.rank(backbone, target, experts_pool, own, data=source.data, among=names)
    checked = target if looked_at else None
    with output.status("selecting experts"):
        most = len(names) if selection.select is None else None
        selected = selection.choose(ranking, backbone, checked, most=most or None)
    chosen = list(selected.experts)
    if not chosen:
        raise PituningError(
            f"{selected.reason}. Nothing is blended; --select top-k takes the highest ranked experts all the same"
        )
    if (
        names and selection.select is None and not isinstance(weights, str)
    ):  # given weights are in the order of the given names
        chosen = [expert for name in names for expert in chosen if expert.name == name]
    similarity = dict(zip((e.name for e in ranking.experts), ranking.similarities, strict=True))
    folder = saving.destination(pool, f"{task}-pi", task=task, method=chosen[0].card.method, blended=True)
    with output.status(f"blending {', '.join(e.name for e in chosen)}: comparing candidates by cross-fitting"):
        found = blend(
            backbone, target, chosen, own, train=train_mode, granularity=granularity, init=weights,
            similarities=[similarity[e.name] for e in chosen], include_own=_OWN[include_own], seed=source.seed,
            coefficients=coefficients, temperature=temperature, scale=reach, rank=rank, max_error=max_error, name=folder.name,
            search=Search(
                alpha_learning_rate=ALPHA_LEARNING_RATE if optimizer == "adamw" else 0.0, optimizer=optimizer,
                weights_to_start=weights_to_start, weights_spread=weights_spread,
            ),
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
            "selection": selection_document(selected),
            "largest_fold_error": max(found.errors.values(), default=0.0),
        },
        ranking_table(ranking),
        *selection_tables(selected),
        *_tables(found),
        f"saved to {folder}",
    )


def _tables(found: Interpolation) -> list[Group]:
    candidates = [
        ["→" if c.chosen else "", c.name, f"{c.scale:.3g}", f"{c.loss:.4f}", f"{c.learning_rate:g}", str(c.steps)]
        for c in found.candidates
    ]
    weights = [[name, f"{weight:.3f}"] for name, weight in found.mean_weights().items()]
    return [
        table(
            "Candidates", ["", "candidate", "scale#", "cross-fitted log-loss#", "learning rate#", "steps#"], candidates
        ),
        table("Blended from", ["expert", "mean weight#"], weights),
    ]


def _scale(scale: str) -> float | str:
    if scale == "auto":
        return scale
    try:
        return float(scale)
    except ValueError as error:
        raise typer.BadParameter(f"--scale expects auto or a number, not {scale!r}") from error


def _starting_weights(init: str) -> str | Sequence[float]:
    if not init[:1].isdigit() and not init.startswith((".", "-")):
        return init
    try:
        return [float(part) for part in init.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--init expects a word or numbers with commas between them, not {init!r}") from error
