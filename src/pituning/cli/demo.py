"""`pituning demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pituning.cli.output import Output
from pituning.cli.run import show_comparison
from pituning.cli.verb import verb


@verb
def demo(
    output: Output,
    folder: Annotated[
        Path, typer.Option("--output", metavar="FOLDER", help="For the report, the charts and the experts.")
    ] = Path("demo"),
    fast: Annotated[
        bool, typer.Option("--fast", help="With the experts that are part of the package, and fewer arms.")
    ] = False,
) -> None:
    """The whole method on pictures, with nothing to download: experts, task graph, blend, controls, and a report.

    Example: pituning demo

    Example, in a quarter of the time: pituning demo --fast --output demo-fast
    """
    with output.status("loading"):
        from pituning.experiments.demo import run_demo
    show_comparison(output, run_demo(folder, fast=fast, progress=not output.quiet))
