"""`pituning pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pituning.cli.output import Output, table
from pituning.cli.verb import verb


@verb
def pretrain(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    output: Output,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FOLDER", help="For checkpoints, log and model; default: what the recipe says."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Stop at this step and keep a checkpoint; --resume goes on to the end."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, or cuda.")] = "cpu",
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Processes that draw pictures; default: what the recipe says."),
    ] = None,
) -> None:
    """Train a small OFA from nothing on emoji scenes: grounding, captions, questions, names and infilling at once.

    Example: pituning pretrain recipes/ofa-nano.yaml

    Example, the model that it wrote: pituning eval refemoji --backbone runs/ofa-nano/model
    """
    if not recipe.is_file():
        raise FileNotFoundError(2, "no such recipe", str(recipe))
    with output.status("loading"):
        from pituning.experiments.pretrain_recipe import PretrainRecipe
        from pituning.experiments.pretraining import MODEL_FOLDER
        from pituning.experiments.pretraining import pretrain as run
        from pituning.experiments.recipe import load_recipe

        loaded = load_recipe(recipe)
    if not isinstance(loaded, PretrainRecipe):
        raise typer.BadParameter(f"{recipe} pretrains nothing: use `pituning run {recipe}`")
    if workers is not None:
        loaded = loaded.model_copy(update={"workers": workers})
    record = run(loaded, folder, resume=resume, steps=steps, device=device, progress=not output.quiet)
    model = (folder or Path(loaded.output)) / MODEL_FOLDER
    output.result(
        {"model": model, **record},
        table(
            f"{loaded.title}: {record['steps']:,} steps in {record['seconds']:,} s",
            ["task", "loss, nats per token#"],
            [[kind, f"{loss:.3f}"] for kind, loss in record["losses"].items()],
        ),
        f"model: {model}",
    )
