"""`pituning eval`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, TaskName
from pituning.cli.output import Output, table
from pituning.cli.verb import verb

Split = Annotated[str, typer.Option(metavar="NAME", help="Which split: train, dev, test, testA …")]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="At most so many examples, always the same ones.")]
By = Annotated[
    Literal["score", "beam"],
    typer.Option(help="Closed answers: compare the probabilities of all of them, or search for the best by beam."),
]


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
    split: Split = "test",
    limit: Limit = None,
    by: By = "score",
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further metric, such as METEOR or SPICE (Java); once for each."),
    ] = None,
) -> None:
    """Measure how well an expert solves a task; without an expert, how well the bare backbone does.

    Example: pituning eval sst2 sst2-16shot-seed0

    Example: pituning eval refcoco refcoco --data refcoco_data --split testA --backbone ofa-base
    """
    target = source.load(task)
    examples = target.split(split, limit)
    with output.status(f"loading {model.backbone}"):
        from pituning.training.evaluation import evaluate as measure

        chosen = pool.expert(expert) if expert is not None else None
        backbone = model.load()
    with output.status(f"evaluating on {len(examples):,} examples"):
        found = measure(backbone, chosen, target, split, limit, by=by, metrics=metric or ())
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
