"""`pituning run`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pituning.cli.options import comma_separated
from pituning.cli.output import Output, table
from pituning.cli.verb import verb

if TYPE_CHECKING:
    from rich.console import Group

    from pituning.report.content import Metric


@verb
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    output: Output,
    folder: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="For results and report; default: what the recipe says."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1", help="Run these seeds, not those that the recipe lists.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Of a table's recipe: experts, fisher, interpolation; default: all."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Of a table's recipe: only these tasks; default: all.")
    ] = None,
) -> None:
    """Run an experiment from a recipe: train and blend experts, compare with honest controls, write a report.

    Example: pituning run recipes/text/sst2-16shot.yaml --seeds 0,1

    Example, one of the paper's tables: pituning run recipes/ofa/table1-base.yaml --stages experts --tasks refcoco
    """
    chosen = _numbers(seeds)
    if not recipe.is_file():
        raise FileNotFoundError(2, "no such recipe", str(recipe))
    with output.status("loading"):
        from pituning.experiments.pretrain_recipe import PretrainRecipe
        from pituning.experiments.recipe import load_recipe
        from pituning.experiments.runner import run_recipe
        from pituning.experiments.table_recipe import STAGES, TableRecipe
        from pituning.experiments.table_runner import run_table

        loaded = load_recipe(recipe)
    if isinstance(loaded, PretrainRecipe):
        raise typer.BadParameter(f"{recipe} pretrains a model: use `pituning pretrain {recipe}`")
    wanted = comma_separated("--stages", stages)
    if unknown := [s for s in wanted if s not in STAGES]:
        raise typer.BadParameter(f"--stages: there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    if isinstance(loaded, TableRecipe):
        if seeds:
            raise typer.BadParameter("--seeds: a table's recipe has one seed, its entry 'seed'")
        found = run_table(
            loaded, folder, stages=[s for s in STAGES if not wanted or s in wanted],
            tasks=comma_separated("--tasks", tasks), command=f"pituning run {recipe}", progress=not output.quiet,
        )  # fmt: skip
        output.result(found, *_table_rows(found), f"results: {(folder or Path(loaded.output)) / 'results.json'}")
        return
    if wanted or tasks:
        raise typer.BadParameter("--stages and --tasks are for the recipes of the paper's tables")
    results = run_recipe(recipe, folder, seeds=chosen, progress=not output.quiet)
    show_comparison(output, results)


def _table_rows(results: Mapping[str, Any]) -> list[Group]:
    """One table for each task: what was measured, and beside it what the paper reports, both in per cent."""
    shown = []
    for task in dict.fromkeys(row["task"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["task"] == task]
        columns = [column["name"] for column in rows[0]["columns"]]
        shown.append(
            table(
                f"{results['title']}: {task}, measured (published), per cent",
                ["", *(f"{c}#" for c in columns)],
                [[row["row"], *(_figures(c["measured"], c["published"]) for c in row["columns"])] for row in rows],
            )
        )
    return shown


def _figures(measured: float | None, published: float | None) -> str:
    left = "–" if measured is None else f"{100 * measured:.2f}"
    return left if published is None else f"{left} ({published:g})"


def _numbers(seeds: str | None) -> list[int] | None:
    try:
        return [int(part) for part in comma_separated("--seeds", seeds)] or None
    except ValueError as error:
        raise typer.BadParameter(f"--seeds expects whole numbers with commas between them, not {seeds!r}") from error


def show_comparison(output: Output, results: Mapping[str, Any]) -> None:
    """The arms' values, the differences between them, and where the report is."""
    output.result(results, *_tables(results), *filter(None, [results["summary"]]), f"report: {results['report']}")


def _tables(results: Mapping[str, Any]) -> list[Group]:
    from pituning.report.content import Metric

    metric = Metric(results.get("metric", "accuracy"))
    arms = [
        [arm["label"], metric.plain(statistics.fmean(arm["values"])), "  ".join(map(metric.plain, arm["values"]))]
        for arm in results["arms"]
    ]
    differences = [
        [d["name"], metric.signed(d["mean"]), _interval(metric, d.get("low"), d.get("high"))]
        for d in results.get("differences", ())
    ]
    unit = "per cent" if metric.unit else metric.name
    shown = [table(f"{results['title']}, {unit}", ["arm", "mean#", "seed by seed"], arms)]
    head = f"Differences in {metric.difference_unit}"
    return [*shown, table(head, ["", "mean#", "interval"], differences)] if differences else shown


def _interval(metric: Metric, low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{metric.signed(low)} to {metric.signed(high)}"
