"""Folding LoRA experts into one: how long, how exact, and against PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import count

from benchmarks.speed.collapse import (
    MODULE,
    dense,
    folded,
    loaded_in_peft,
    merged_by_peft,
    pool,
    relative_error,
    weighted_sum,
)
from benchmarks.speed.measuring import Sample, Setting, interleaved, seconds


def collapsing(setting: Setting) -> dict[str, Sample]:
    """Four experts, exactly (to rank Σ r) and to the rank of one."""
    rank = setting.pick(16, 2)
    experts, weights = pool(4, setting.pick(28, 2), setting.pick(2048, 16), rank)
    cases = {r: partial(seconds, partial(folded, experts, weights, r)) for r in (None, rank)}
    times = interleaved({str(r): case for r, case in cases.items()}, setting.pick(30, 2))
    exact, small = folded(experts, weights, None), folded(experts, weights, rank)
    wanted = weighted_sum(experts, weights, MODULE)
    true = relative_error(dense(small.expert, MODULE), wanted)
    return {
        "exactly, seconds": Sample.of(times["None"]),
        "exactly, relative error": Sample.once(relative_error(dense(exact.expert, MODULE), wanted)),
        "to one expert's rank, seconds": Sample.of(times[str(rank)]),
        "to one expert's rank, |reported − true error|": Sample.once(abs(small.errors[MODULE] - true)),
    }


def against_peft(setting: Setting) -> dict[str, Sample]:
    """The same merges by both, on fewer modules, because PEFT's takes a minute and a half on all of them."""
    modules, width, rank = setting.pick((2, 2048, 16), (1, 16, 2))
    experts, weights = pool(4, modules, width, rank)
    samples: dict[str, Sample] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of its configuration
        model = loaded_in_peft(experts, modules, width)
        numbers = count()
        for name, combination, kept in (("exactly", "cat", None), ("to one expert's rank", "svd", rank)):

            def by_peft(combination: str = combination) -> None:
                merged_by_peft(model, weights, combination, rank, f"merged{next(numbers)}")

            ours = partial(folded, experts, weights, kept)
            cases = {"ours": partial(seconds, ours), "PEFT": partial(seconds, by_peft)}
            times = interleaved(cases, setting.pick(5, 2))
            samples |= {f"{name}, {who}, seconds": Sample.of(times[who]) for who in cases}
            samples[f"{name}, PEFT / ours"] = Sample.ratio(times["PEFT"], times["ours"])
    return samples
