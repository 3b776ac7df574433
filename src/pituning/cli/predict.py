"""`pituning predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pituning.cli.eval import By, Limit, Split
from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, TaskName
from pituning.cli.output import Output, table
from pituning.cli.verb import verb


@verb
def predict(
    task: TaskName,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON file to write.", show_default=False)],
    expert: Annotated[
        str | None,
        typer.Argument(metavar="EXPERT", help="A name in the pool, or a folder; nothing for the bare backbone."),
    ] = None,
    split: Split = "test",
    limit: Limit = None,
    by: By = "score",
) -> None:
    """Answer the examples of a split and write the answers, for an evaluation server or for a look at them.

    The file is a list of objects; of VQA each has question_id and answer, of captions image_id and caption, as the servers
    want them. Where the data have no such id, the example's own stands in its place.

    Example: pituning predict vqa vqa-pi --data vqa_data --split test --backbone ofa-base --out answers.json
    """
    target = source.load(task)
    examples = target.split(split, limit)
    with output.status(f"loading {model.backbone}"):
        from pituning.experiments.cells import write_json
        from pituning.training.evaluation import predict as answer

        chosen = pool.expert(expert) if expert is not None else None
        backbone = model.load()
    with output.status(f"answering {len(examples):,} examples"):
        found = answer(backbone, chosen, target, split, limit, by=by)
    item, given = target.submission
    rows: list[dict[str, Any]] = [{item: _identifier(e.key or e.id), given: a} for e, a in found]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows, indent=0)
    output.result(
        {"task": task, "split": split, "expert": expert, "answers": len(rows), "file": out},
        table(
            f"The first of {len(rows):,} answers",
            [item, "asked", "answer"],
            [[str(row[item]), e.prompt, str(row[given])] for row, (e, _) in list(zip(rows, found, strict=True))[:8]],
        ),
        f"written to {out}",
    )


def _identifier(key: str) -> int | str:
    """Servers expect whole numbers where the ids are such."""
    return int(key) if key.isascii() and key.isdigit() else key
