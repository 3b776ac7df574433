"""`pituning embed`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pituning.cli.options import DataOptions, ModelOptions, PoolOptions
from pituning.cli.output import Output, table
from pituning.cli.rank import Reference
from pituning.cli.verb import verb
from pituning.errors import PituningError

if TYPE_CHECKING:
    from pituning.backbones.base import Backbone
    from pituning.similarity import TaskEmbedding


@verb
def embed(
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    expert: Annotated[
        str | None,
        typer.Argument(metavar="EXPERT", help="A name in the pool, or a folder; nothing for the whole pool."),
    ] = None,
    reference: Annotated[
        Reference,
        typer.Option(help="Embed all tasks at one expert shared by the pool, or each at its own (as in the paper)."),
    ] = "shared",
    refresh: Annotated[bool, typer.Option("--refresh", help="Compute again what is stored already.")] = False,
) -> None:
    """Compute what matters to a task (its Fisher task embedding) and store it beside its expert, for `pituning rank`.

    Example, one expert: pituning embed sst2

    Example, the whole pool: pituning embed --pool experts
    """
    source.require_files()
    if expert is None and source.own_files:
        raise typer.BadParameter("--train-file is the data of one expert: name it")
    names = [expert] if expert is not None else pool.open().names()
    with output.status(f"loading {model.backbone}"):
        backbone = model.load()
    found: dict[str, TaskEmbedding] = {}
    problems: dict[str, str] = {}
    with output.bar() as bar:
        for name in bar.track(names, description="embedding"):
            try:
                found[name] = _embed(backbone, pool, name, reference, source, refresh)
            except PituningError as error:
                if expert is not None:
                    raise
                problems[name] = str(error)
    output.result(
        {
            "pool": pool.pool,
            "reference": reference,
            "embeddings": [
                {"name": n, "task": e.task, "samples": e.samples, "mean_loss": e.mean_loss, "split_half": e.split_half}
                for n, e in found.items()
            ],
            "problems": problems,
        },
        table(
            f"Task embeddings at the {reference} reference point",
            ["expert", "task", "examples#", "log-loss#", "agreement of halves#"],
            [[n, e.task, str(e.samples), f"{e.mean_loss:.4f}", f"{e.split_half:.3f}"] for n, e in found.items()],
        ),
    )
    if problems:
        listed = "".join(f"\n  {name}: {problem}" for name, problem in problems.items())
        raise PituningError(f"{len(problems)} of {len(names)} experts could not be embedded:{listed}")


def _embed(
    backbone: Backbone, pool: PoolOptions, name: str, reference: Reference, source: DataOptions, refresh: bool
) -> TaskEmbedding:
    from pituning.experts import ExpertPool
    from pituning.similarity import embed_task
    from pituning.similarity.embedding import pool_embedding, shared_reference

    experts = ExpertPool(pool.pool)
    inside = name in experts.names()
    if inside and not source.own_files and source.shots is None:
        return pool_embedding(backbone, experts, name, reference, data=source.data, refresh=refresh)
    expert = pool.expert(name)
    task = source.load(expert.card.task)
    at = expert if reference == "own" else shared_reference(experts, expert.card.method)
    embedding = embed_task(backbone, at, task, reference=reference)
    embedding.save(experts.folder / name if inside else Path(name))
    return embedding
