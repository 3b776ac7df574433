"""`pituning merge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, SaveOptions
from pituning.cli.output import Output, table
from pituning.cli.verb import verb
from pituning.errors import ExpertError, PituningError, RefusedError

if TYPE_CHECKING:
    from rich.console import Group

    from pituning.experts import Expert
    from pituning.interpolation.operators import Merged
    from pituning.similarity import TaskEmbedding
    from pituning.tasks import Task

Operator = Literal["uniform_soup", "greedy_soup", "task_arithmetic", "concatenate", "ties", "dare", "fisher_merge"]
Combination = Literal["linear", "ties"]
_PANEL, _GREEDY, _SAVING = "Operator", "greedy_soup", "Saving"


@dataclass(frozen=True)
class OperatorOptions:
    """An operator and its settings; what is not given keeps the operator's default."""

    operator: Annotated[
        Operator,
        typer.Option(
            help="The mean of all experts, or of those that lower the loss; a weighted sum, or the same as stacked LoRA "
            "factors; sign election (TIES); random dropping (DARE); or the mean weighted by task embeddings.",
            rich_help_panel=_PANEL,
        ),
    ] = "uniform_soup"
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,…", help="One number for each expert, in the order of their names.", rich_help_panel=_PANEL
        ),
    ] = None
    scale: Annotated[
        float | None,
        typer.Option(metavar="X", help="Factor on the whole change: λ, 1 by default.", rich_help_panel=_PANEL),
    ] = None
    density: Annotated[
        float | None,
        typer.Option(metavar="X", help="ties: share of entries that stays, 0.2 by default.", rich_help_panel=_PANEL),
    ] = None
    drop: Annotated[
        float | None,
        typer.Option(metavar="X", help="dare: probability to drop, 0.9 by default.", rich_help_panel=_PANEL),
    ] = None
    drop_seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="dare: seed of what is dropped, 0 by default.", rich_help_panel=_PANEL),
    ] = None
    combine: Annotated[
        Combination | None,
        typer.Option(help="dare: how the thinned changes are combined; linear by default.", rich_help_panel=_PANEL),
    ] = None
    epsilon: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="fisher_merge: what is added to a tensor's Fisher, relative to its mean; 1e-6 by default.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="LoRA: largest rank of the result, by default the sum of the experts' ranks.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """The settings that were given, by the operator's names."""
        given = {
            "weights": None if self.weights is None else _numbers(self.weights),
            "scale": self.scale,
            "density": self.density,
            "drop": self.drop,
            "seed": self.drop_seed,
            "combine": self.combine,
            "epsilon": self.epsilon,
            "rank": self.rank,
        }
        return {name: value for name, value in given.items() if value is not None}


@verb
def merge(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME…", help="Experts: names in the pool, or folders.", show_default=False),
    ],
    choice: OperatorOptions,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="greedy_soup: the task whose log-loss is to fall.", rich_help_panel=_PANEL),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="greedy_soup: the split that the experts are scored on, train by default.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    save: Annotated[
        str | None,
        typer.Option("--save", "--name", metavar="NAME", help="Name in the pool.", rich_help_panel=_SAVING),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Save into this folder, not into the pool.", rich_help_panel=_SAVING),
    ] = None,
) -> None:
    """Merge experts into one without training, and save it into the pool.

    Example: pituning merge sst2 cr --operator ties --density 0.2 --name sst2-cr-ties
    """
    _require_fitting(choice.operator, task, split, source)
    settings = choice.settings()
    target = source.load(task) if task is not None else None
    experts = [pool.expert(name) for name in names]
    saving = SaveOptions(save, out)
    default = "-".join([*(e.name for e in experts), choice.operator])
    solved = {target.name} if target is not None else {e.card.task for e in experts}
    folder = saving.destination(
        pool, default, task=solved.pop() if len(solved) == 1 else "", method=experts[0].card.method, blended=True
    )
    with output.status(f"merging {', '.join(names)}"):
        from pituning.interpolation.operators import merge as merged_by
        from pituning.interpolation.operators import needs_initial

        if choice.operator == "fisher_merge":
            settings["embeddings"] = {e.name: _embedding(pool, n) for n, e in zip(names, experts, strict=True)}
        if target is not None:
            settings["score"] = _scorer(model, target, split or "train", experts)
        elif needs_initial(choice.operator, experts[0]):
            settings["initial"] = _initial(model, experts)
        found = merged_by(experts, choice.operator, **settings)
    expert = found.expert
    if target is not None:
        expert = expert.with_card(task=target.name, choices=target.choices, shots=target.shots, seed=target.seed)
    saving.write(expert, folder)
    rows = _members(experts, found)
    ranks = _ranks(expert)
    output.result(
        {
            "folder": folder,
            "name": folder.name,
            "operator": choice.operator,
            "training": dict(expert.card.training),
            "experts": rows,
            "parameters": expert.card.parameters,
            "ranks": ranks,
            "errors": dict(found.errors),
            "largest_error": max(found.errors.values()),
        },
        *_tables(rows, found),
        f"saved to {folder}",
    )


def _require_fitting(operator: str, task: str | None, split: str | None, source: DataOptions) -> None:
    if operator == _GREEDY and task is None:
        raise typer.BadParameter("greedy_soup scores the experts on a task: give --task TASK")
    if operator != _GREEDY and task is not None:
        raise typer.BadParameter(f"--task: {operator} looks at no data; only greedy_soup does")
    if task is None and (split is not None or source != DataOptions()):
        raise typer.BadParameter(
            f"{operator} looks at no data: leave out the options that describe a task's examples (dare's seed is --drop-seed)"
        )


def _numbers(values: str) -> list[float]:
    try:
        return [float(part) for part in values.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--weights expects numbers with commas between them, not {values!r}") from error


def _embedding(pool: PoolOptions, name: str) -> TaskEmbedding:
    """The embedding that lies beside an expert, made at the expert itself."""
    from pituning.experts import ExpertPool
    from pituning.similarity import TaskEmbedding

    inside = name in ExpertPool(pool.pool).names()
    try:
        return TaskEmbedding.load(pool.pool / name if inside else Path(name), "own")
    except ExpertError as error:
        raise PituningError(f"{error}: run `pituning embed {name} --reference own` first") from error


def _scorer(model: ModelOptions, task: Task, split: str, experts: Sequence[Expert]) -> Any:
    """An expert's mean log-loss on a split that none of the experts was trained on."""
    examples = task.split(split)
    if trained := [e.name for e in experts if split == "train" and e.card.task == task.name]:
        raise RefusedError(
            f"expert {trained[0]!r} was trained for {task.name}, so its loss on the train split is not held out: choose "
            "another --split, or leave the expert out"
        )
    from pituning.methods import attached
    from pituning.training.evaluation import mean_log_loss

    backbone = model.load()
    for expert in experts:
        expert.require_backbone(backbone)

    def score(expert: Expert) -> float:
        with attached(backbone, expert.config, expert.tensors):
            return mean_log_loss(backbone, examples)

    return score


def _initial(model: ModelOptions, experts: Sequence[Expert]) -> dict[str, Any]:
    """The common start of the experts, which only the backbone can give."""
    from pituning.experts.expert import initial_of

    backbone = model.load()
    for expert in experts:
        expert.require_backbone(backbone)
    return {key: tensor.cpu() for key, tensor in initial_of(backbone, experts[0]).items()}


def _members(experts: Sequence[Expert], found: Merged) -> list[dict[str, Any]]:
    weights = {parent["name"]: parent["weight"] for parent in found.expert.card.lineage}
    losses = found.expert.card.training.get("log_losses", {})
    return [
        {
            "name": e.name,
            "weight": weights.get(e.name, 0.0),
            "rank": max(_ranks(e).values(), default=None),
            "log_loss": losses.get(e.name),
        }
        for e in experts
    ]


def _ranks(expert: Expert) -> dict[str, int]:
    """LoRA's rank by module; empty for other methods."""
    end = ".lora_A.weight"
    return {key.removesuffix(end): len(tensor) for key, tensor in expert.tensors.items() if key.endswith(end)}


def _tables(rows: Sequence[dict[str, Any]], found: Merged) -> list[Group]:
    columns = {"expert": "name", "weight#": "weight", "rank#": "rank", "log-loss#": "log_loss"}
    shown = {title: key for title, key in columns.items() if any(row[key] is not None for row in rows)}
    members = [[f"{row[k]:.4f}" if isinstance(row[k], float) else str(row[k]) for k in shown.values()] for row in rows]
    card, ranks = found.expert.card, sorted(set(_ranks(found.expert).values()))
    worst = max(found.errors, key=lambda module: found.errors[module])
    error = f"{found.errors[worst]:.4f} (in {worst.removeprefix('base_model.model.')})" if found.errors[worst] else "0"
    facts = [
        ("operator", str(card.training["operator"])),
        ("parameters", f"{card.parameters:,}"),
        ("rank", f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))),
        ("largest error of a module", error),
        ("log-loss", f"{card.training['soup_log_loss']:.4f}" if "soup_log_loss" in card.training else ""),
    ]
    return [
        table("Merged from", list(shown), members),
        table("Result", ["", ""], [[fact, value] for fact, value in facts if value]),
    ]
