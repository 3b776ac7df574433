"""The one family of errors that pituning raises for a user's mistake or a broken file.

A message says what was expected, what was found, where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PituningError(Exception):
    """Base of every error that a caller of pituning may want to catch."""


class UnknownNameError(PituningError):
    """A task, method, backbone or similarity of that name does not exist."""


class DataError(PituningError):
    """A data file or split cannot be used; the message names the file and the line."""


class ExpertError(PituningError):
    """An expert cannot be loaded, saved or applied; the message names the tensor and the shapes."""


class BackboneMismatchError(ExpertError):
    """An expert was trained on another backbone."""


class RefusedError(PituningError):
    """The operation has no exact meaning for these inputs, so it is not carried out."""


class MissingDependencyError(PituningError):
    """Something optional is not installed; the message says what, and how to get it."""


class RecipeError(PituningError):
    """A recipe file is not valid; the message lists every problem at once."""


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """Build the error for a name that does not exist, with the nearest names that do.

    >>> str(unknown_name("task", "sst3", ["sst2", "cr"]))
    "unknown task 'sst3': did you mean 'sst2'? Known: cr, sst2."
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    guess = f" did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    message = f"unknown {kind} {name!r}:{guess} Known: {', '.join(names) or 'none'}."
    return UnknownNameError(f"{message} {hint}".rstrip())
