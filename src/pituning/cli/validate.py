"""`pituning validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pituning.cli.output import Output
from pituning.cli.verb import verb


@verb
def validate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    output: Output,
    without_inputs: Annotated[
        bool,
        typer.Option("--without-inputs", help="Check the recipe alone, not whether its data and backbone are here."),
    ] = False,
) -> None:
    """Check a recipe as a whole before anything runs: every mistake and every missing file at once; exit code 1 if any.

    Example: pituning validate recipes/ofa/table1-base.yaml
    """
    from pituning.errors import RecipeError

    problems: list[str] = []
    missing: list[str] = []
    title = ""
    with output.status(f"reading {recipe}"):
        from pituning.experiments.recipe import load_recipe

        try:
            loaded = load_recipe(recipe)
            title = loaded.title
            missing = [] if without_inputs else loaded.missing_inputs()
        except RecipeError as error:
            head, _, lines = str(error).partition("\n")
            problems = [line.strip() for line in lines.splitlines()] or [head]
    state = (
        f"{recipe}: {len(problems)} mistake(s), {len(missing)} missing input(s)"
        if problems or missing
        else f"{recipe} is valid: {title}"
    )
    output.result(
        {"recipe": recipe, "title": title, "problems": problems, "missing": missing},
        *(f"mistake: {p}" for p in problems),
        *(f"missing: {m}" for m in missing),
        state,
    )
    if problems or missing:
        raise typer.Exit(1)
