"""`pituning zeroshot`."""

from __future__ import annotations

from typing import Annotated

import typer

from pituning.cli.eval import By, Limit, Split
from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, TaskName
from pituning.cli.output import Output, table
from pituning.cli.rank import ranking_document, ranking_table
from pituning.cli.verb import verb


@verb
def zeroshot(
    task: TaskName,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    kind: Annotated[
        str, typer.Option(help="Similarity that chooses the expert: fisher, fisher-cosine, fisher-paper or score.")
    ] = "fisher",
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only experts of this method; needed where the pool holds several."),
    ] = None,
    split: Split = "test",
    limit: Limit = None,
    by: By = "score",
) -> None:
    """Use the most similar expert of the pool on a task as it is, without training anything (the paper's zero-shot).

    The task's training examples only choose the expert; --shots says how many of them.

    Example: pituning zeroshot glue-rte --shots 16 --pool experts --backbone ofa-large
    """
    target = source.load(task)
    target.split(split, limit)
    with output.status(f"loading {model.backbone}"):
        from pituning.similarity.zero_shot import zero_shot

        experts = pool.open()
        backbone = model.load()
    with output.status(f"looking for the expert that is most similar to {task}"):
        found = zero_shot(
            backbone, target, experts, kind=kind, method=method, split=split, limit=limit, by=by, data=source.data
        )
    metric = found.expert.metric
    rows = [
        ["no expert", f"{found.backbone.value:.4f}", f"{found.backbone.metrics['log-loss']:.4f}"],
        [f"{found.chosen.name} as it is", f"{found.expert.value:.4f}", f"{found.expert.metrics['log-loss']:.4f}"],
    ]
    output.result(
        {
            "task": task,
            "split": split,
            "examples": len(found.expert.predictions),
            "kind": found.ranking.kind,
            "ranking": ranking_document(found.ranking),
            "chosen": found.chosen.name,
            "metric": metric,
            "backbone": dict(found.backbone.metrics),
            "expert": dict(found.expert.metrics),
            "gain": found.gain,
        },
        ranking_table(found.ranking),
        table(
            f"{task}/{split}, {len(found.expert.predictions):,} examples, nothing trained on it",
            ["", f"{metric}#", "log-loss#"],
            rows,
        ),
    )
