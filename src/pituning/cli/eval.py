"""`pituning eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, TaskName
from pituning.cli.output import Output, table
from pituning.cli.verb import verb


@verb
def evaluate(
    task: TaskName,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    expert: Annotated[
        str | None,
        typer.Argument(metavar="EXPERT", help="A name in the pool, or a folder; nothing for the bare backbone."),
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Which split: train, dev or test.")] = "test",
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most so many examples, always the same ones.")
    ] = None,
) -> None:
    """Measure how well an expert solves a task; without an expert, how well the bare backbone does.

    Example: pituning eval sst2 sst2-16shot-seed0
    """
    target = source.load(task)
    examples = target.split(split, limit)
    with output.status(f"loading {model.backbone}"):
        from pituning.training.evaluation import evaluate as measure

        chosen = pool.expert(expert) if expert is not None else None
        backbone = model.load()
    with output.status(f"evaluating on {len(examples):,} examples"):
        found = measure(backbone, chosen, target, split, limit)
    output.result(
        {
            "task": task,
            "split": split,
            "expert": expert,
            "backbone": model.backbone,
            "examples": len(found.predictions),
            "metric": found.metric,
            "metrics": dict(found.metrics),
        },
        table(
            f"{found.expert} on {task}/{split}, {len(found.predictions):,} examples",
            ["metric", "value#"],
            [[name, f"{value:.4f}"] for name, value in found.metrics.items()],
        ),
    )
