"""`verb`: what all commands have in common: options in groups, and errors as one line."""

from __future__ import annotations

import functools
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

import typer

from pituning.errors import PituningError


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command for Typer.

    A parameter whose type is a dataclass stands for a *group* of options: every field of the dataclass is an option (or
    argument) of the command, and the function receives the dataclass. A mistake of the user's ends the command with one
    line on standard error and exit code 1, an interruption with 130.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters += _members(groups[parameter.name])
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=kind, annotation=hints[parameter.name]))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        debug = bool(values.pop("context").obj)
        with _errors_as_one_line(debug):
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
            function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _members(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)

    def parameter(field: Field[Any]) -> inspect.Parameter:
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        return inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )

    return [parameter(field) for field in fields(group)]


@contextmanager
def _errors_as_one_line(debug: bool) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", module=r"pituning\.")
            yield
    except BrokenPipeError:  # the reader of a pipe (`| head`) has seen enough; Typer ends quietly
        raise
    except (PituningError, OSError) as error:
        if debug:
            traceback.print_exc()
        _print_error(_one_line(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        _print_error("interrupted")
        raise typer.Exit(130) from error


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _print_error(message: str) -> None:
    typer.echo(typer.style("error:", fg=typer.colors.RED, bold=True) + f" {message}", err=True)
