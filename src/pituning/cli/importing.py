"""`pituning import`, `pituning push`, `pituning pull`: experts from elsewhere, and to elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pituning.cli.options import ModelOptions, PoolOptions
from pituning.cli.output import Output, table
from pituning.cli.verb import verb

ExpertName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the expert.", show_default=False)]


@verb
def import_adapter(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A PEFT adapter folder, or a hub repository.", show_default=False)
    ],
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the expert in the pool.")] = None,
    task: Annotated[str, typer.Option(metavar="TASK", help="What it was trained for, if you know.")] = "",
    licence: Annotated[
        str, typer.Option("--licence", "--license", metavar="NAME", help="Terms of use, such as apache-2.0.")
    ] = "",
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.")] = None,
    drop_heads: Annotated[
        bool, typer.Option("--drop-heads", help="Leave out a head or other whole modules that were saved beside it.")
    ] = False,
    any_base: Annotated[bool, typer.Option("--any-base", help="Import even if it names another base model.")] = False,
) -> None:
    """Take any PEFT adapter into the pool, and prove that each of its tensors finds its place.

    Names that differ from the backbone's are matched one to one; a head, a missing, extra or misshaped tensor, NaN, or an
    adapter without effect is refused by name.

    Example: pituning import someone/roberta-sst2-lora --backbone roberta-base --task sst2
    """
    with output.status(f"loading {model.backbone}"):
        from pituning.experts import ExpertPool
        from pituning.experts.importing import import_expert, import_notes
        from pituning.experts.sharing import require_new

        backbone = model.load()
    with output.status(f"importing {source}"):
        expert = import_expert(
            source,
            backbone,
            name=name,
            task=task,
            licence=licence,
            revision=revision,
            drop_heads=drop_heads,
            any_base=any_base,
        )
        require_new(ExpertPool(pool.pool), expert.name)
        folder = ExpertPool(pool.pool).add(expert)
    notes = import_notes(expert)
    facts = [
        ("method", expert.card.method),
        ("parameters", f"{expert.card.parameters:,} in {len(expert.tensors)} tensors"),
    ]
    facts += [("changed", notes)] if notes else []
    output.result(
        {"folder": folder, "name": expert.name, "parameters": expert.card.parameters, "changed": notes or None},
        table(f"Expert {expert.name}", ["", ""], [list(f) for f in facts]),
        f"saved to {folder}",
    )


@verb
def push(
    name: ExpertName,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A hub repository (owner/name), or a folder.", show_default=False)
    ],
    pool: PoolOptions,
    output: Output,
    private: Annotated[bool, typer.Option("--private", help="Make a new hub repository private.")] = False,
) -> None:
    """Copy an expert and its task embedding into a repository of experts.

    Example: pituning push sst2 me/my-experts
    """
    with output.status(f"pushing {name}"):
        from pituning.experts.sharing import push as send

        place = send(pool.open(), name, target, private=private)
    output.result({"name": name, "place": place}, f"{name} is now at {place}")


@verb
def pull(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A hub repository (owner/name), or a folder.", show_default=False)
    ],
    name: ExpertName,
    pool: PoolOptions,
    output: Output,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Copy an expert out of a repository of experts into the pool, and check it against its card.

    Example: pituning pull me/my-experts sst2
    """
    with output.status(f"pulling {name}"):
        from pituning.experts import ExpertPool
        from pituning.experts.sharing import pull as fetch

        expert = fetch(source, ExpertPool(pool.pool), name, revision=revision)
    folder = Path(pool.pool) / name
    output.result({"name": name, "folder": folder, "parameters": expert.card.parameters}, f"saved to {folder}")
