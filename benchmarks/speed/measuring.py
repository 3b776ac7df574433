"""Interleaved repetitions, medians with intervals, peak memory, and functions in processes of their own."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

T = TypeVar("T")
ROOT = Path(__file__).parents[2]


class NotApplicableError(Exception):
    """What was asked for cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        quick: tiny shapes and few repetitions, to see whether it runs at all.
        folder: for scratch files; kept only if the caller named it.
        gigabytes: size of the TSV.
        probe: the script whose time stands beside the reference's figures.
        demo: whether `pituning demo` is run.
    """

    quick: bool = False
    device: str = "cpu"
    threads: int = 1
    folder: str = tempfile.gettempdir()
    gigabytes: float = 4.0
    probe: str = "../shared/tools/speed_probe.py"
    demo: bool = False

    def pick(self, full: T, quick: T) -> T:
        """The first, or the second in a quick run."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Sample:
    """A figure: a median, the 95 % bootstrap interval of it, and the number of repetitions behind it."""

    value: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """
        >>> Sample.of([3.0, 1.0, 2.0]).value
        2.0
        """
        return cls(*median_interval(values), len(values))

    @classmethod
    def once(cls, value: float) -> Self:
        """A figure that was measured, or counted, once."""
        return cls(float(value), float(value), float(value), 1)

    @classmethod
    def ratio(cls, left: Sequence[float], right: Sequence[float]) -> Self:
        """Median of the ratios of the same repetition."""
        return cls(*ratio(left, right), len(left))

    @classmethod
    def rate(cls, amount: float, seconds: Sequence[float]) -> Self:
        """Amount per second."""
        return cls.of([amount / s for s in seconds])


def median_interval(values: Sequence[float] | np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    found = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).choice(found, (2000, len(found)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(found)), float(low), float(high)


def ratio(left: Sequence[float], right: Sequence[float]) -> tuple[float, float, float]:
    """:func:`median_interval` of the ratios of the same repetition."""
    return median_interval(np.array(left) / np.array(right))


def interleaved(cases: Mapping[str, Callable[[], T]], repeats: int, warm_up: int = 1) -> dict[str, list[T]]:
    """What each case returns, ``repeats`` times: in every repetition each runs once, in a shuffled order."""
    found: dict[str, list[T]] = {name: [] for name in cases}
    order = list(cases)
    for repeat in range(-warm_up, repeats):
        random.Random(repeat).shuffle(order)
        for name in order:
            value = cases[name]()
            if repeat >= 0:
                found[name].append(value)
    return found


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of one call, with all that it has started on a GPU."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was told; nothing on the CPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def peak_mb(device: str = "cpu") -> float:
    """The most megabytes that this process has held at once, or its tensors on a GPU.

    Not ``ru_maxrss`` where there is ``/proc``: that of a child begins with its parent's.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 1024)


def peak_above_now(work: Callable[[], object], device: str = "cpu") -> float:
    """Megabytes by which the process, or its tensors on a GPU, grow at most; on the CPU sampled every millisecond."""
    if device != "cpu":
        import torch

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    import psutil  # type: ignore[import-untyped]

    process, done = psutil.Process(), threading.Event()
    before = peak = int(process.memory_info().rss)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return (peak - before) / 2**20


class ChildFailedError(Exception):
    """A function failed in the process of its own; the message is its last words."""


def in_process(function: str, *arguments: Any, threads: int = 1, limit: float | None = None) -> Any:
    """What a function of this package returns in a fresh process, such as ``"steps:peak"``.

    Args:
        arguments: and what is returned must be JSON.
        limit: seconds.

    Raises:
        NotApplicableError: where the function raised it.
        ChildFailedError: where the process failed, was killed or took too long.
    """
    command = [sys.executable, "-m", "benchmarks.speed.child", function, json.dumps(arguments)]
    inner = os.getsid(0) == os.getpid()  # a child's own children end with it
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=not inner,
    ) as child:
        try:
            output, errors = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise ChildFailedError(f"took longer than {limit:g} s") from None
        finally:
            if child.poll() is None:
                child.kill() if inner else os.killpg(child.pid, signal.SIGKILL)
    if child.returncode < 0:
        raise ChildFailedError(f"killed by {signal.Signals(-child.returncode).name}")
    if child.returncode:
        last = (errors.strip() or "no message").splitlines()[-1]
        raise ChildFailedError(last)
    answer = json.loads(output.splitlines()[-1])
    if "not applicable" in answer:
        raise NotApplicableError(answer["not applicable"])
    return answer["value"]


def resolve(function: str) -> Callable[..., Any]:
    """The function that ``"module:name"`` stands for, in this package."""
    module, name = function.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"benchmarks.speed.{module}"), name)
    return found
