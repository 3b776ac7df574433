"""The demo: the whole method on what is part of the package, `ofa-nano`, emoji scenes and, if need be, trained experts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pituning.backbones.base import PACKAGED
from pituning.errors import RecipeError
from pituning.experiments.recipe import Recipe, load_recipe
from pituning.experiments.runner import run_recipe

FOLDER = PACKAGED["ofa-nano"].parent
RECIPE = FOLDER / "demo.yaml"
EXPERTS = FOLDER / "experts"
"""The experts that the demo's recipe trains, as its pool of them was trained for the package."""

FAST = {"arms": ("zero-shot", "own", "nearest-tuned", "pi"), "test_limit": 150, "gallery": 8}
FAST_SEARCH = {"steps": 20}
FAST_INTERPOLATION = {"alternatives": False}
"""What ``fast`` changes in the recipe, besides the training of the pool: less of everything."""


def demo_recipe(output: str | Path = "demo", *, fast: bool = False) -> Recipe:
    """The demo's recipe, with its results and its pool in a folder.

    Args:
        fast: fewer arms, steps, candidates and pictures, and a pool of its own, since it is not trained there.
    """
    recipe = load_recipe(RECIPE)
    assert isinstance(recipe, Recipe)
    folder = Path(output)
    pool = recipe.pool.model_copy(update={"folder": str(folder / ("packaged-experts" if fast else "experts"))})
    recipe = recipe.model_copy(update={"output": str(folder), "pool": pool})
    if not fast:
        return recipe
    search = recipe.search.model_copy(update=FAST_SEARCH)
    interpolation = recipe.interpolation.model_copy(update=FAST_INTERPOLATION)
    return recipe.model_copy(update={**FAST, "search": search, "interpolation": interpolation})


def run_demo(output: str | Path = "demo", *, fast: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train a pool of experts (or copy the packaged one), predict who helps, interpolate, compare, and write a report.

    A run that was interrupted goes on where it stopped.

    Args:
        output: folder for ``report.html``, ``results.json``, charts, experts and cells.
        fast: with the packaged experts, fewer arms, steps and candidates.

    Returns:
        what :func:`pituning.run_recipe` returns.

    Raises:
        RecipeError: if the package has no experts for ``fast``.
    """
    recipe = demo_recipe(output, fast=fast)
    if fast:
        _copy_experts(recipe)
    return run_recipe(recipe, command="pituning demo" + " --fast" * fast, progress=progress)


def _copy_experts(recipe: Recipe) -> None:
    """A copy, since a pool keeps what is found out about its experts beside them."""
    pool = Path(recipe.pool.folder)
    for name in recipe.pool.tasks:
        if not (EXPERTS / name).is_dir():
            raise RecipeError(f"the package has no expert for {name!r}; `pituning demo` without --fast trains it")
        if not (pool / name).exists():
            shutil.copytree(EXPERTS / name, pool / name)
