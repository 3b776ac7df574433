"""The other end of :func:`benchmarks.speed.measuring.in_process`: runs one function and prints what it returns."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.speed.measuring import NotApplicableError, Setting, resolve


def measured(function: str, setting: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Run a measurement here; its samples by figure.

    Raises:
        NotApplicableError: also where an optional package is missing.
    """
    try:
        samples = resolve(function)(Setting(**setting))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("benchmarks", "pituning"):
            raise
        raise NotApplicableError(f"the package {error.name!r} is not installed") from error
    return {name: asdict(sample) for name, sample in samples.items()}


def answer(function: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """What a function returned, or why it does not apply here."""
    try:
        return {"value": resolve(function)(*arguments)}
    except NotApplicableError as error:
        return {"not applicable": str(error)}


if __name__ == "__main__":
    print(json.dumps(answer(sys.argv[1], json.loads(sys.argv[2]))))
