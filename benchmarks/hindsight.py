"""Should `interpolate` also compare with the own expert trained for longer? What that would have come to in measured cells.

    python benchmarks/hindsight.py core t5 table1 drawings

From the cells in `benchmarks/figures/transfer`: for each suite and either kind of targets the mean, over the targets of the
means over their draws, of π, of own with extra steps, and of own with extra steps where its cross-fitted log-loss on the shots
is lower by more than so many nats per example, else π; and in how many draws it is. Report targets are shown to say what such a
rule would give or cost, and not to choose one on.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.draws import run
from benchmarks.transfer.cells import read_parquet
from benchmarks.transfer.suites import Suite, suite_named

FIGURES = Path(__file__).parent / "figures" / "transfer"
MARGINS = (0.0, 0.02, 0.05, 0.1)
LOSS = "cross-fitted log-loss"

Draw = tuple[str, int, int]  # task, shots, seed


def main() -> None:
    """A row for each suite, kind of targets and number of shots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+")
    names = parser.parse_args().suites
    rules = " | ".join(f"{margin:g} lower" for margin in MARGINS)
    print(f"| suite | targets | shots | draws | π | own-extra | {rules} |")
    print("|---" * (6 + len(MARGINS)) + "|")
    for suite in map(suite_named, names):
        found = pairs(suite, read_parquet(FIGURES / f"{suite.name}.parquet"))
        for role in ("report", "development"):
            for shots in suite.shots:
                part = {d: pair for d, pair in found.items() if suite.role(d[0]) == role and d[1] == shots}
                if part:
                    print(row(suite.name, role, shots, part))


def pairs(suite: Suite, cells: Sequence[Mapping[str, Any]]) -> dict[Draw, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(π, own with extra steps) of every planned draw that has both."""
    arms: dict[str, dict[Draw, Mapping[str, Any]]] = {"pi": {}, "own-extra": {}}
    for cell in cells:
        if cell["arm"] in arms and cell["seed"] in suite.seeds:
            arms[cell["arm"]][cell["task"], cell["shots"], cell["seed"]] = cell
    pi, own = arms["pi"], arms["own-extra"]
    return {draw: (pi[draw], own[draw]) for draw in pi if draw in own}


def row(name: str, role: str, shots: int, found: Mapping[Draw, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """The means in per cent, and by how many draws each rule takes the own expert."""
    values: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    taken = dict.fromkeys(MARGINS, 0)
    for (task, _, _), (pi, own) in found.items():
        values["pi"][task].append(pi["value"])
        values["own-extra"][task].append(own["value"])
        ahead = pi["details"][LOSS] - own["details"][LOSS]
        for margin in MARGINS:
            taken[margin] += ahead > margin
            values[margin][task].append((own if ahead > margin else pi)["value"])
    means = {rule: 100 * mean(map(mean, by_task.values())) for rule, by_task in values.items()}
    rules = " | ".join(f"{means[margin]:.1f} ({taken[margin]})" for margin in MARGINS)
    return f"| {name} | {role} | {shots} | {len(found)} | {means['pi']:.1f} | {means['own-extra']:.1f} | {rules} |"


if __name__ == "__main__":
    run(main)
