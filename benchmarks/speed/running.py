"""Run measurements one after the other, each in a process of its own; what fails is recorded and the rest goes on."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

from benchmarks.speed.measuring import (
    ChildFailedError,
    NotApplicableError,
    Sample,
    Setting,
    in_process,
)
from benchmarks.speed.records import Outcome
from benchmarks.speed.registry import Measurement

_QUOTED = re.compile(r"""(['"])(?:~|[A-Za-z]:)?[/\\][^'"]*[/\\]""")
_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"/\\:,;()]+[/\\])+")
REASON = 300  # characters kept of a reason


def run(
    chosen: Sequence[Measurement], setting: Setting, limit: float | None, say: Callable[[str], None]
) -> Iterator[tuple[Measurement, Outcome]]:
    """Each measurement with what became of it, as soon as it is there.

    Args:
        limit: seconds for one measurement.
        say: called with the name of each before it begins.
    """
    for one in chosen:
        say(one.name)
        yield one, outcome(one, setting, limit)


def outcome(one: Measurement, setting: Setting, limit: float | None = None) -> Outcome:
    """Measure in a fresh process."""
    if setting.device not in one.devices:
        return Outcome("not applicable", reason="no GPU" if setting.device == "cpu" else "does not use the GPU")
    start = time.monotonic()
    try:
        answer = in_process("child:measured", one.function, asdict(setting), threads=setting.threads, limit=limit)
        samples = {name: Sample(**sample) for name, sample in answer.items()}
        problem = complaint(one, samples, setting.quick)
    except NotApplicableError as error:
        return Outcome("not applicable", reason=without_paths(str(error)))
    except ChildFailedError as error:
        problem, samples = str(error), {}
    taken = round(time.monotonic() - start, 1)
    if problem:
        return Outcome("failed", reason=without_paths(problem), seconds=taken)
    return Outcome("measured", samples, seconds=taken)


def complaint(one: Measurement, samples: Mapping[str, Sample], quick: bool) -> str:
    """What is wrong with the samples of a measurement; empty if nothing is. A quick run may leave figures out."""
    wanted = {f.name for f in one.figures}
    if extra := samples.keys() - wanted:
        return f"figures that the registry does not know: {', '.join(sorted(extra))}"
    if (missing := wanted - samples.keys()) and not quick:
        return f"figures that were not returned: {', '.join(sorted(missing))}"
    if broken := [n for n, s in samples.items() if not all(map(math.isfinite, (s.value, s.low, s.high)))]:
        return f"figures that are no numbers: {', '.join(broken)}"
    return ""


def without_paths(message: str) -> str:
    """A message fit to be kept: of paths only the last part, and not longer than :data:`REASON`.

    >>> without_paths("no such file: '/home/someone/data/a.tsv'")
    "no such file: 'a.tsv'"
    """
    short = _PATH.sub("", _QUOTED.sub(r"\1", " ".join(message.split())))
    return short if len(short) <= REASON else short[: REASON - 1] + "…"
