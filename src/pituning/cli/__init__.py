"""The command line: one module per verb, assembled here. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pituning.cli.analyse import analyse_app
from pituning.cli.convert import convert
from pituning.cli.demo import demo
from pituning.cli.embed import embed
from pituning.cli.eval import evaluate
from pituning.cli.export import export, verify
from pituning.cli.graph import graph
from pituning.cli.importing import import_adapter, pull, push
from pituning.cli.interpolate import interpolate
from pituning.cli.merge import merge
from pituning.cli.pool import pool_app
from pituning.cli.predict import predict
from pituning.cli.pretrain import pretrain
from pituning.cli.rank import rank
from pituning.cli.run import run
from pituning.cli.train import train
from pituning.cli.validate import validate
from pituning.cli.zeroshot import zeroshot
from pituning.version import __version__

# Other libraries read these when they are first imported; what the user has set counts.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(embed)
app.command()(rank)
app.command()(graph)
app.command()(interpolate)
app.command()(merge)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(zeroshot)
app.command("import")(import_adapter)
app.command()(export)
app.command()(verify)
app.command()(push)
app.command()(pull)
app.command()(run)
app.command()(validate)
app.command()(convert)
app.command()(pretrain)
app.command()(demo)
app.add_typer(analyse_app, name="analyse", help="Look at what lies between experts, and what each of them is worth.")
app.add_typer(pool_app, name="pool", help="Look after a pool: list, show, verify, audit and search its experts.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pituning {__version__}")
        raise typer.Exit


@app.callback()
def start(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and all warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Choose the fine-tuned experts that help a new task, and blend them into one.

    An expert is a small adapter for one task on a frozen model, the backbone; experts live in a folder, the pool.

    Start: pituning train sst2, then pituning interpolate cr --shots 16
    """
    context.obj = debug


def main() -> None:
    """Entry point of the ``pituning`` command."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    app(prog_name="pituning")
