"""`pituning analyse`: connect, plane, leave-one-out, weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pituning.cli.interpolate import Granularity, TrainMode
from pituning.cli.options import DataOptions, ModelOptions, PoolOptions
from pituning.cli.output import Output, plain_values, table
from pituning.cli.verb import verb

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pituning.experts import Expert
    from pituning.report.analysis import Analysis
    from pituning.tasks import Task

analyse_app = typer.Typer(no_args_is_help=True)

_EXPERT_HELP = "A name in the pool, or a folder."
ExpertA = Annotated[str, typer.Argument(metavar="A", help=_EXPERT_HELP, show_default=False)]
ExpertB = Annotated[str, typer.Argument(metavar="B", help=_EXPERT_HELP, show_default=False)]
ExpertC = Annotated[str, typer.Argument(metavar="C", help=_EXPERT_HELP, show_default=False)]
_PANEL = "Analysis"


@dataclass(frozen=True)
class TargetOptions:
    """The task, and where the result goes."""

    task: Annotated[
        str,
        typer.Option(metavar="TASK", help="A built-in task such as sst2, or the name of your own.", show_default=False),
    ]
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="For the numbers (.json) and the chart (.png, .svg).")
    ] = Path("analysis")

    def write(
        self, output: Output, result: Analysis, name: str, extra: Mapping[str, Any], *shown: RenderableType
    ) -> None:
        """Write ``name.json``, ``name.png`` and ``name.svg``, and say so; the numbers first, for where nothing can draw."""
        from pituning.report.analysis import write_pictures

        self.out.mkdir(parents=True, exist_ok=True)
        numbers = self.out / f"{name}.json"
        document = plain_values({**extra, **asdict(result)})
        numbers.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        pictures = write_pictures(result, self.out, name)
        output.result(
            {**document, "files": [numbers, *pictures]}, *shown, f"saved to {', '.join(map(str, [numbers, *pictures]))}"
        )


@dataclass(frozen=True)
class MeasureOptions:
    """On which examples the log-loss is measured."""

    split: Annotated[
        str, typer.Option(metavar="NAME", help="Which split: dev, test, train …", rich_help_panel=_PANEL)
    ] = "dev"
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="At most so many examples, always the same ones.", rich_help_panel=_PANEL
        ),
    ] = None

    def check(self, task: Task) -> None:
        """Raise before anything is loaded if the split is empty."""
        task.split(self.split, self.limit)


@analyse_app.command("connect")
@verb
def connect(
    a: ExpertA,
    b: ExpertB,
    target: TargetOptions,
    measure: MeasureOptions,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    points: Annotated[
        int, typer.Option(metavar="N", min=3, help="Points on the path, both ends included.", rich_help_panel=_PANEL)
    ] = 11,
) -> None:
    """Measure the log-loss along the straight path between two experts, and the barrier on it.

    Example: pituning analyse connect pocket_gear word_tone --task movie_quotes --split test -o analysis
    """
    task = source.load(target.task)
    measure.check(task)
    with output.status(f"loading {model.backbone}"):
        from pituning.analysis import connectivity

        experts = pool.expert(a), pool.expert(b)
        backbone = model.load()
    with output.status(f"measuring {points} points"):
        found = connectivity(backbone, task, *experts, points, measure.split, measure.limit)
    rows = [
        [f"{t:.2f}", f"{loss:.4f}", f"{value:.4f}", "← lowest" if i == found.best else ""]
        for i, (t, loss, value) in enumerate(zip(found.t, found.log_loss, found.values, strict=True))
    ]
    barrier = (
        f"barrier {found.barrier:.4f} ± {found.barrier_error:.4f} nats at t = {found.barrier_at:.2f}"
        if found.barrier > 0
        else "no barrier: the log-loss is nowhere above the straight line between its ends"
    )
    title = f"From {a} (t = 0) to {b} (t = 1) on {task.name}/{found.split}, {found.examples:,} examples"
    shown = table(title, ["t#", "log-loss#", f"{found.metric}#", ""], rows)
    target.write(output, found, "connect", {"backbone": model.backbone}, shown, barrier)


@analyse_app.command("plane")
@verb
def plane(
    a: ExpertA,
    b: ExpertB,
    c: ExpertC,
    target: TargetOptions,
    measure: MeasureOptions,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    resolution: Annotated[
        int, typer.Option(metavar="N", min=2, help="Measure N × N points.", rich_help_panel=_PANEL)
    ] = 15,
    margin: Annotated[
        float,
        typer.Option(
            metavar="SHARE", min=0.0, help="How far to go beyond the triangle of the experts.", rich_help_panel=_PANEL
        ),
    ] = 0.3,
) -> None:
    """Measure the log-loss over the plane through three experts.

    Example: pituning analyse plane pocket_gear word_tone noun_field --task movie_quotes --split test --limit 200 -o analysis
    """
    task = source.load(target.task)
    measure.check(task)
    with output.status(f"loading {model.backbone}"):
        from pituning.analysis import plane as measured_plane

        experts = pool.expert(a), pool.expert(b), pool.expert(c)
        backbone = model.load()
    found = measured_plane(
        backbone, task, *experts, resolution, measure.split, measure.limit, margin=margin, progress=not output.quiet
    )
    row, column = found.best
    rows = [
        [name, f"{x:.3f}", f"{y:.3f}", f"{loss:.4f}"]
        for name, (x, y), loss in zip(found.experts, found.corners, found.corner_log_loss, strict=True)
    ]
    best = ["lowest on the grid", f"{found.x[column]:.3f}", f"{found.y[row]:.3f}", f"{found.log_loss[row][column]:.4f}"]
    weights = ", ".join(
        f"{name} {weight:+.3f}" for name, weight in zip(found.experts, found.weights[row][column], strict=True)
    )
    title = f"Plane on {task.name}/{found.split}, {found.examples:,} examples, {resolution} × {resolution} points"
    target.write(
        output, found, "plane", {"backbone": model.backbone},
        table(title, ["", "x#", "y#", "log-loss#"], [*rows, best]), f"weights there: {weights}",
    )  # fmt: skip


@analyse_app.command("leave-one-out")
@verb
def leave_one_out(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME…",
            help="One interpolation, whose experts are then looked for in the pool, or the experts of a blend.",
            show_default=False,
        ),
    ],
    target: TargetOptions,
    measure: MeasureOptions,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W…",
            help="Weights of the experts; by default equal, and of an interpolation those that it learned (its mean over "
            "groups).",
            rich_help_panel=_PANEL,
        ),
    ] = None,
) -> None:
    """Measure what each expert of a blend is worth: the log-loss without it, the others' weights scaled up.

    The blend is of the experts as they lie in the pool; what an interpolation trained of them is not in it.

    Example: pituning analyse leave-one-out movie_quotes-pi --task movie_quotes --split test -o analysis
    """
    numbers = _numbers(weights)
    task = source.load(target.task)
    measure.check(task)
    with output.status(f"loading {model.backbone}"):
        from pituning.analysis import leave_one_out as measured

        saved = pool.expert(names[0]) if len(names) == 1 else None
        experts, learned = _members(pool, saved) if saved is not None else ([pool.expert(n) for n in names], None)
        backbone = model.load()
    with output.status(f"leaving out each of {len(experts)} experts"):
        from pituning.training.evaluation import evaluate

        found = measured(backbone, task, experts, numbers or learned, measure.split, measure.limit)
        whole = evaluate(backbone, saved, task, measure.split, measure.limit) if saved is not None else None
    rows = [
        [m.name, f"{m.weight:.3f}", f"{m.log_loss:.4f}", f"{m.difference:+.4f}", f"{m.error:.4f}", f"{m.value:.4f}"]
        for m in found.without
    ]
    title = f"Blend of {len(experts)} experts on {task.name}/{found.split}, {found.examples:,} examples"
    columns = ["without", "weight#", "log-loss#", "difference#", "standard error#", f"{found.metric}#"]
    shown = [f"all together: log-loss {found.log_loss:.4f}, {found.metric} {found.value:.4f}"]
    extra: dict[str, Any] = {"backbone": model.backbone}
    if whole is not None:
        extra |= {"interpolation": names[0], "interpolation_log_loss": whole.metrics["log-loss"]}
        shown.append(f"{names[0]} itself, with what it trained: log-loss {whole.metrics['log-loss']:.4f}")
    target.write(output, found, "leave-one-out", extra, table(title, columns, rows), *shown)


@analyse_app.command("weights")
@verb
def weights(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME…", help="The experts to blend, at least two.", show_default=False)
    ],
    target: TargetOptions,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps.", rich_help_panel=_PANEL)] = 100,
    learning_rate: Annotated[
        float, typer.Option(metavar="RATE", min=0.0, help="Of the experts' tensors.", rich_help_panel=_PANEL)
    ] = 3e-4,
    alpha_learning_rate: Annotated[
        float, typer.Option(metavar="RATE", min=0.0, help="Of the weights.", rich_help_panel=_PANEL)
    ] = 1e-2,
    train_mode: Annotated[
        TrainMode, typer.Option(help="What is trained beside the weights.", rich_help_panel=_PANEL)
    ] = "experts",
    granularity: Annotated[Granularity, typer.Option(help="What has a weight of its own.", rich_help_panel=_PANEL)] = (
        "module"
    ),
) -> None:
    """Train a blend of experts on a task from equal weights, and draw how the weights move. Nothing is saved into the pool.

    Example: pituning analyse weights pocket_gear word_tone noun_field --task movie_quotes --shots 16 -o analysis
    """
    task = source.load(target.task)
    with output.status(f"loading {model.backbone}"):
        from pituning.analysis import Trajectory
        from pituning.training.blend import blend
        from pituning.training.trainer import TrainSettings

        experts = [pool.expert(name) for name in names]
        backbone = model.load()
    settings = TrainSettings(
        learning_rate=learning_rate,
        alpha_learning_rate=alpha_learning_rate,
        steps=steps,
        schedule="constant_with_warmup",
    )
    found = blend(
        backbone, task, experts, settings=settings, train=train_mode, granularity=granularity, seed=source.seed,
        progress=not output.quiet,
    )  # fmt: skip
    moves = Trajectory.of(found)
    mean = moves.mean()
    rows = [
        [name, f"{first:.3f}", f"{last:.3f}"]
        for name, first, last in zip(moves.experts, mean[0].tolist(), mean[-1].tolist(), strict=True)
    ]
    title = f"Mean weights on {task.name}, {len(moves.groups)} groups"
    target.write(
        output, moves, "weights", {"backbone": model.backbone, "settings": asdict(settings)},
        table(title, ["expert", "before#", f"after {moves.steps[-1]} steps#"], rows),
    )  # fmt: skip


def _members(pool: PoolOptions, interpolation: Expert) -> tuple[list[Expert], list[float]]:
    """The experts that an interpolation was blended from, out of the pool, with their learned weights."""
    from pituning.analysis import lineage_weights

    learned = lineage_weights(interpolation)
    return [pool.expert(name) for name in learned], list(learned.values())


def _numbers(weights: str | None) -> list[float] | None:
    try:
        return [float(part) for part in weights.split(",")] if weights is not None else None
    except ValueError as error:
        raise typer.BadParameter(f"--weights expects numbers with commas between them, not {weights!r}") from error
