"""What a command prints: its result on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

_PANEL = "Output"


@dataclass(frozen=True)
class Output:
    """How a command reports; a group of options."""

    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of tables.", rich_help_panel=_PANEL)
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no progress and no notes.", rich_help_panel=_PANEL)
    ] = False

    def result(self, document: Mapping[str, Any], *shown: RenderableType) -> None:
        """Print the result: the document with ``--json``, otherwise the tables and lines."""
        if self.as_json:
            typer.echo(json.dumps(plain_values(document), indent=2, ensure_ascii=False, allow_nan=False))
            return
        console = Console(markup=False, highlight=False, emoji=False)
        for item in shown:
            console.print(item, soft_wrap=isinstance(item, str))

    def status(self, text: str) -> AbstractContextManager[object]:
        """Context that shows a spinner with a text on standard error."""
        return nullcontext() if self.quiet else Console(stderr=True, markup=False).status(f"{text} …")

    def bar(self) -> Progress:
        """A progress bar on standard error, for ``with``."""
        from pituning.training.progress import progress_bar

        bar = progress_bar()
        bar.disable = self.quiet
        return bar

    def note(self, text: str) -> None:
        """Print a line on standard error."""
        if not self.quiet:
            typer.echo(text, err=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Group:
    """A table under its title; a column whose name ends in ``#`` holds numbers and is set to the right.

    Where all columns are nameless there is no header.
    """
    built = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(c.strip("#") for c in columns))
    for index, column in enumerate(columns):
        right = column.endswith("#")
        built.add_column(
            column.removesuffix("#"), justify="right" if right else "left", overflow="fold", no_wrap=index == 0
        )
    for row in rows:
        built.add_row(*row)
    return Group(Text(title, style="bold"), built, "")


def plain_values(value: Any) -> Any:
    """A document that JSON can hold: it has no NaN and no infinity, both become null, and paths become text."""
    if isinstance(value, Mapping):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
