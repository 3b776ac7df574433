"""The exact Fisher diagonal against plain passes and against the one-example loop, at three shapes."""

from __future__ import annotations

from argparse import Namespace

from benchmarks.speed.fisher import build, largest_error, peak, timings
from benchmarks.speed.measuring import Sample, Setting

METHODS = {"LoRA": "lora", "bottleneck": "bottleneck"}


def usual(setting: Setting) -> dict[str, Sample]:
    """MiniLM's shape, batches of 32 × 32 tokens: the passes themselves cost the time."""
    return _measured(setting, examples=128, tokens=32, hidden=384, layers=6)


def short(setting: Setting) -> dict[str, Sample]:
    """MiniLM's shape and short texts, batches of 32 × 12 tokens."""
    return _measured(setting, examples=128, tokens=12, hidden=384, layers=6)


def small(setting: Setting) -> dict[str, Sample]:
    """Four layers of width 128, batches of 32 × 16 tokens: what each pass costs besides counts."""
    return _measured(setting, examples=64, tokens=16, hidden=128, layers=4)


def _measured(setting: Setting, **shape: int) -> dict[str, Sample]:
    if setting.quick:
        shape = {"examples": 8, "tokens": 4, "hidden": 32, "layers": 1}
    batch, repeats = setting.pick(32, 4), setting.pick(10, 2)
    arguments = Namespace(batch=batch, threads=setting.threads, device=setting.device, **shape)
    samples = {}
    for name, method in METHODS.items():
        built = build(method, arguments)
        times = timings(*built, batch, repeats)
        samples[f"{name}, time / plain passes"] = Sample.ratio(times["fisher"], times["plain"])
        samples[f"{name}, loop / Fisher"] = Sample.ratio(times["loop"], times["fisher"])
        held = {case: peak(method, case, arguments) for case in ("fisher", "plain")}
        samples[f"{name}, memory / plain passes"] = Sample.once(held["fisher"] / held["plain"])
        samples[f"{name}, relative error"] = Sample.once(largest_error(*built, batch))
    return samples
