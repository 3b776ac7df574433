"""`pituning export` and `pituning verify`: what leaves the pool, and the proof of what lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pituning.cli.options import ModelOptions, OptionalModelOptions, PoolOptions
from pituning.cli.output import Output, table
from pituning.cli.verb import verb

ExpertPlace = Annotated[
    str, typer.Argument(metavar="EXPERT", help="A name in the pool, or a folder.", show_default=False)
]


@verb
def export(
    expert: ExpertPlace,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the merged model.")],
    model: ModelOptions,
    pool: PoolOptions,
    output: Output,
) -> None:
    """Fold an expert into its backbone and write an ordinary transformers model.

    The merged model is loaded again and must give the losses of backbone and expert; methods that no weight of the base can
    stand for (bottleneck, prefix, prompt) are refused. The expert's own folder is a PEFT adapter already.

    An encoder's answers are compared with the texts of the labels, which are encoded without the expert, in this proof, too.
    Loaded as a backbone, the merged encoder encodes those texts itself, so that its answers are not those of backbone and
    expert; its embeddings of inputs are.

    Example: pituning export sst2-pi --out merged-model
    """
    with output.status(f"loading {model.backbone}"):
        from pituning.experts.export import export_merged

        found = pool.expert(expert)
        backbone = model.load()
    with output.status(f"folding {found.name} into {model.backbone}"):
        done = export_merged(backbone, found, out)
    output.result(
        {"folder": done.folder, "expert": found.name, "largest_relative_difference": done.difference},
        f"saved to {done.folder}; the losses of the probes differ by at most {done.difference:.1e} relative",
    )


@verb
def verify(
    expert: ExpertPlace,
    pool: PoolOptions,
    output: Output,
    model: OptionalModelOptions,
) -> None:
    """Prove an expert again: files, health, fit, plain PEFT's loading, and the repetition of an untrained merge.

    Exit code 1 if a proof fails. Without --backbone, nothing that needs a model is tried; experts that a merge was made of
    are looked for in the pool.

    Example: pituning verify sst2-pi --backbone minilm
    """
    with output.status(f"verifying {expert}"):
        from pituning.experts import ExpertPool
        from pituning.interpolation.verify import as_document
        from pituning.interpolation.verify import verify as prove

        experts = ExpertPool(pool.pool)
        known = expert in experts.names()
        folder = experts.folder / expert if known or not Path(expert).is_dir() else Path(expert)
        checks = prove(folder, model.load(), experts if len(experts) else None)
    states = {True: "ok", False: "FAILED", None: "not tried"}
    failed = sum(c.ok is False for c in checks)
    output.result(
        {"expert": expert, "failed": failed, "checks": as_document(checks)},
        table(f"Expert {expert}", ["proof", "", "found"], [[c.name, states[c.ok], c.found] for c in checks]),
    )
    if failed:
        raise typer.Exit(1)
