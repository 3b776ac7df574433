"""`pituning convert`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pituning.cli.output import Output, table
from pituning.cli.verb import verb

Target = Literal["auto", "backbone", "expert"]
Precision = Literal["float32", "float16", "bfloat16"]
LoraWeights = Literal["merged", "unmerged"]

_EXPERT = "Experts"
_TOKENIZER = {True: "written", False: "none: load_backbone needs one, give --tokenizer"}


@verb
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A fairseq .pt file, or a folder in the Hugging Face format.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.", show_default=False)
    ],
    output: Output,
    to: Annotated[Target, typer.Option(help="What to make of it; auto: an expert where the file holds one.")] = "auto",
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema",
            help="Take the averaged weights, or those of the last step; by default averaged ones where there are any.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Vocabulary for a backbone: encoder.json, vocab.bpe and dict.txt, or vocab.json and …",
        ),
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Of a backbone's weights; experts are float32.")] = "float32",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load what was written and compare a forward pass, bit by bit.")
    ] = True,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The backbone that an expert was trained on: a folder or a file.",
            rich_help_panel=_EXPERT,
        ),
    ] = None,
    lora_weights: Annotated[
        LoraWeights | None,
        typer.Option(
            help="Whether the file's weights hold LoRA's product already; --base makes it unnecessary.",
            rich_help_panel=_EXPERT,
            show_default=False,
        ),
    ] = None,
    keep_backbone: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write the file's own backbone there, as training has left it, and tie the expert to that.",
            rich_help_panel=_EXPERT,
        ),
    ] = None,
    ignore_batchnorm: Annotated[
        bool,
        typer.Option(
            "--ignore-batchnorm",
            help="Tie the expert to --base although BatchNorm statistics moved in training; says what that changes.",
            rich_help_panel=_EXPERT,
        ),
    ] = False,
    parts: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write the experts that an interpolation blends there, too.", rich_help_panel=_EXPERT
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The expert's task; by default the training's.", rich_help_panel=_EXPERT),
    ] = None,
) -> None:
    """Make a backbone or an expert of an original OFA checkpoint. Nothing in the file is run.

    A checkpoint with adapters, LoRA or prefixes becomes an expert; an interpolation becomes the one expert that it computes.

    Example: pituning convert ofa_base.pt ofa-base --tokenizer OFA/utils/BPE

    Example, an expert: pituning convert refcoco_adapter.pt experts/refcoco --base ofa-base
    """
    with output.status("starting"):
        from pituning.cli.conversion import Request, convert_checkpoint

    request = Request(
        source, out, to=to, ema=ema, tokenizer=tokenizer, dtype=dtype, check=check, base=base, lora_weights=lora_weights,
        keep_backbone=keep_backbone, ignore_batchnorm=ignore_batchnorm, parts=parts, task=task,
    )  # fmt: skip
    with output.bar() as bar:
        progress = bar.add_task("converting", total=None)
        document = convert_checkpoint(
            request, lambda text, done, steps: bar.update(progress, description=text, completed=done, total=steps)
        )
    notes = [f"note: {text}" for text in document["notes"]]
    rows = [[fact, value] for fact, value in _facts(document) if value]
    title = f"{document['kind']} {out.name}, from {source.name}"
    output.result(document, table(title, ["", ""], rows), *notes, f"saved to {out}")


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    check, changes, weights = document["check"], document.get("changes") or {}, document.get("weights") or []
    kinds = [("BatchNorm statistics", changes.get("batchnorm")), ("weights", changes.get("other"))]
    return [
        ("method", document.get("method", "")),
        ("task", document.get("task", "")),
        ("blended", f"{len(weights)} experts, weights {_numbers(weights)} on average" if len(weights) > 1 else ""),
        ("parameters", f"{document['parameters']:,} in {document['tensors']} tensors"),
        ("size", f"{_megabytes(document['bytes'])}, {document['dtype']}"),
        ("weights", {True: "averaged (EMA)", False: "of the last step"}.get(document["ema"], "")),
        (
            "LoRA",
            f"its product was in {document['merged']} weights, and is taken out" if document.get("merged") else "",
        ),
        ("backbone", f"{document.get('backbone', '')} {document['fingerprint']}".strip()),
        ("kept backbone", str(document.get("keep_backbone") or "")),
        ("changed by training", " and ".join(f"{count} {kind}" for kind, count in kinds if count)),
        ("tokenizer", _TOKENIZER.get(document["tokenizer"], "")),
        ("self-check", "skipped" if check is None else f"passed: {check['logits']:,} logits, equal and finite"),
    ]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.3f}" for v in values)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
