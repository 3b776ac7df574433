"""From cells to a Parquet file, the figures of docs/transfer.md and two pictures. Nothing is computed that is not there."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.plots import signed
from benchmarks.transfer.arms import ARMS
from benchmarks.transfer.cells import REVISION, digest, read_parquet, write_parquet
from benchmarks.transfer.explanations import EXPLANATIONS, LEGEND, verdict
from benchmarks.transfer.intervals import Difference, Values, paired_difference, upper_bounds
from benchmarks.transfer.suites import Suite
from pituning.errors import PituningError

RIVALS = ("own-extra", "nearest-tuned")
HARM = 1.0
"""Points that π may cost a target; a bound below minus this is harm beyond doubt."""
POINTS = 100.0
"""Values are shares; tables have them times 100."""

FEWER = (
    "A count of cells in bold: that mean is over fewer draws than others', so compare the paired differences instead."
)

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Commands:
    """What reproduces the figures; folders as they were given.

    Attributes:
        where: options that say on what device and in what precision.
    """

    suite: str
    data: str
    work: str
    where: str = ""

    def run(self, more: str = "") -> str:
        """The command that computes cells."""
        run = f"python -m benchmarks.transfer run --suite {self.suite} --data {self.data} --work {self.work}"
        return f"{run}{self.where}{more}"

    def report(self) -> str:
        """The command that writes the page."""
        return f"python -m benchmarks.transfer report --suite {self.suite} --work {self.work}"

    def audit(self) -> str:
        """The command that looks for leaks."""
        return f"python -m benchmarks.transfer audit --suite {self.suite} --data {self.data} --work {self.work}"


@dataclass(frozen=True)
class Found:
    """The cells of one suite in one environment.

    Attributes:
        others: cells of the suite in other environments, which are left out, by environment.
    """

    suite: Suite
    cells: tuple[Cell, ...]
    environment: str
    others: Mapping[str, Sequence[Cell]]

    def missing(self) -> list[tuple[str, str, int, int]]:
        """(arm, task, shots, seed) of the suite that have no cell."""
        there = {(c["arm"], c["task"], c["shots"], c["seed"]) for c in self.cells}
        return [key for key in self.suite.plan() if key not in there]

    def values(self, arm: str, shots: int) -> Values:
        """target → seed → value, in points."""
        found: dict[str, dict[int, float]] = {}
        for cell in self.cells:
            if cell["arm"] == arm and cell["shots"] == shots:
                found.setdefault(cell["task"], {})[cell["seed"]] = POINTS * cell["value"]
        return found

    def of(self, arm: str, shots: int, targets: Iterable[str]) -> list[Cell]:
        """Cells of an arm on some targets."""
        wanted = set(targets)
        return [c for c in self.cells if c["arm"] == arm and c["shots"] == shots and c["task"] in wanted]


def gather(suite: Suite, cells: Sequence[Cell], environment: str | None = None) -> Found:
    """The cells that belong to a suite as it is now: same revision, settings and arms; of one environment.

    Args:
        environment: its digest; by default the one with the most cells.

    Raises:
        PituningError: if two cells claim to be the same, or there is no such environment.
    """
    settings = json.loads(json.dumps(suite.settings()))
    wanted = {
        (arm, shots): json.loads(json.dumps(ARMS[arm].identity(shots))) for arm in suite.arms for shots in suite.shots
    }
    by_environment: dict[str, list[Cell]] = {}
    for cell in cells:
        common, own = cell["identity"]["common"], cell["identity"]["cell"]
        fits = (
            common["revision"] == REVISION
            and own["task"] in suite.targets
            and own["shots"] in suite.shots
            and own["seed"] in suite.seeds
        )
        if fits and common["settings"] == settings and wanted.get((own["arm"]["name"], own["shots"])) == own["arm"]:
            by_environment.setdefault(digest(common), []).append(cell)
    if environment is None:
        environment = max(by_environment, key=lambda e: (len(by_environment[e]), e), default="")
    elif environment not in by_environment:
        known = ", ".join(by_environment) or "none"
        raise PituningError(f"no cells of suite {suite.name!r} in environment {environment!r}; there are {known}")
    chosen = by_environment.pop(environment, [])
    seen: set[tuple[Any, ...]] = set()
    for cell in chosen:
        key = (cell["arm"], cell["task"], cell["shots"], cell["seed"])
        if key in seen:
            raise PituningError(
                f"two cells are {'/'.join(map(str, key))}, of different data: remove the older from {environment}"
            )
        seen.add(key)
    return Found(suite, tuple(chosen), environment, by_environment)


def keep(found: Found, path: Path, *, forget: bool = False) -> Path:
    """Write the cells of all environments to a Parquet file; see :func:`benchmarks.transfer.cells.write_parquet`.

    Args:
        forget: drop cells of the file that are not among these.

    Raises:
        PituningError: if there are such cells and they are not to be forgotten; the file is as it was then.
    """
    cells = [*found.cells, *chain.from_iterable(found.others.values())]
    stay = {digest(cell["identity"]) for cell in cells}
    before = read_parquet(path) if path.is_file() else []
    lost = Counter(str(cell["arm"]) for cell in before if digest(cell["identity"]) not in stay)
    if lost and not forget:
        each = ", ".join(f"{arm} {count}" for arm, count in sorted(lost.items()))
        raise PituningError(
            f"{path} has {sum(lost.values())} cells that do not belong to suite {found.suite.name!r} as it is now, of another "
            f"revision, other settings or an arm's earlier defaults: {each}; `--forget` drops them"
        )

    def more(cell: Cell) -> dict[str, str]:
        role = found.suite.role(cell["task"])
        environment, key = digest(cell["identity"]["common"]), digest(cell["identity"])
        return {"suite": found.suite.name, "role": role, "environment": environment, "key": key}

    def order(cell: Cell) -> tuple[Any, ...]:
        return digest(cell["identity"]["common"]), cell["shots"], cell["task"], cell["seed"], cell["arm"]

    write_parquet(sorted(cells, key=order), path, more)
    return path


def block(
    found: Found, audit: Sequence[Mapping[str, Any]] | None, commands: Commands, pictures: Mapping[int, Sequence[str]]
) -> str:
    """The generated part of the page for one suite, in Markdown.

    Args:
        audit: rows of :func:`benchmarks.transfer.sources.audit`; ``None`` where it was not run.
        pictures: paths of the pictures by shots, as the page links them.
    """
    suite, missing = found.suite, found.missing()
    total = len(suite.plan())
    seeds = "1 seed" if len(suite.seeds) == 1 else f"{len(suite.seeds)} seeds"
    lines = [f"{suite.title}; {seeds}{_fewer(suite)}; at most {suite.test_limit} test examples.", ""]
    if not found.cells:
        lines += [f"**Nothing has been measured yet:** 0 of {total:,} cells.", "", f"`{commands.run()}`", ""]
        return "\n".join([*lines, *_audit_lines(suite, audit, commands)])
    if missing:
        lines += [
            f"**Partial: {total - len(missing):,} of {total:,} cells.** Missing:",
            "",
            *_missing_lines(suite, missing),
        ]
    else:
        lines += [f"Complete: all {total:,} cells."]
    common = found.cells[0]["identity"]["common"]
    commands = replace(commands, where=f" --device {common['device']} --precision {common['precision']}")
    lines += ["", *_provenance(found), "", f"Cells: `{commands.run()}` (one of them: `--tasks TASK --arms ARM --seeds SEED`);",
              f"this page: `{commands.report()}`.", "", *_audit_lines(suite, audit, commands)]  # fmt: skip
    for shots in suite.shots:
        lines += ["", *_shots_lines(found, shots, pictures.get(shots, ()), commands)]
    return "\n".join(lines)


def differences(found: Found, rival: str, shots: int, targets: Sequence[str]) -> dict[str, Difference]:
    """arm → its paired difference to a rival, for the arms that share a cell with it."""
    base = found.values(rival, shots)
    pairs = {
        arm: paired_difference(found.values(arm, shots), base, targets) for arm in found.suite.arms if arm != rival
    }
    return {arm: difference for arm, difference in pairs.items() if difference is not None}


def _fewer(suite: Suite) -> str:
    """Which arms have fewer seeds, and what is measured on development targets."""
    counts: dict[int, list[str]] = {}
    for arm in suite.arms:
        if (count := len(suite.seeds_of(arm, suite.report[0]))) < len(suite.seeds):
            counts.setdefault(count, []).append(f"`{arm}`")
    texts = [f"{count} of {', '.join(arms)}" for count, arms in sorted(counts.items(), reverse=True)]
    if suite.development and suite.on_development is not None:
        here = ", ".join(f"`{arm}`" for arm in suite.on_development)
        texts.append(f"on development targets one of {here}" if here else "nothing on development targets")
    return f" ({'; '.join(texts)})" if texts else ""


def _missing_lines(suite: Suite, missing: Sequence[tuple[str, str, int, int]]) -> list[str]:
    """Which cells there are not, arm by arm; what is missing altogether in a word."""
    lines: list[str] = []
    each, lacking = Counter(arm for arm, *_ in suite.plan()), Counter(arm for arm, *_ in missing)
    wholly = [arm for arm in suite.arms if lacking[arm] == each[arm] > 0]
    if wholly:
        lines.append(f"- all cells of {', '.join(f'`{arm}`' for arm in wholly)}")
    several, alike = len(suite.shots) > 1, dict[str, list[str]]()
    for arm in suite.arms:
        places: dict[tuple[str, int], list[int]] = {}
        for _, task, shots, seed in (key for key in missing if key[0] == arm and arm not in wholly):
            places.setdefault((task, shots), []).append(seed)
        if places:
            said = [
                f"{task}{f' ({shots} shots)' if several else ''} {' '.join(map(str, seeds))}"
                for (task, shots), seeds in places.items()
            ]
            alike.setdefault("; ".join(said), []).append(f"`{arm}`")
    return [*lines, *(f"- {', '.join(arms)}, seeds of: {said}" for said, arms in alike.items())]


def _provenance(found: Found) -> list[str]:
    common = found.cells[0]["identity"]["common"]
    versions = ", ".join(f"{name} {number}" for name, number in common["versions"].items())
    dates = sorted({cell["finished"] for cell in found.cells})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    codes = len({cell["code"] for cell in found.cells})
    pools = len({cell["pool"] for cell in found.cells})
    state = "one state of the code" if codes == 1 else f"**{codes} states of the code**"
    state += "" if pools == 1 else f"; **sources trained {pools} times**"
    lines = [
        f"Measured {when} on {common['device']} in {common['precision']}; {versions}; {state}; backbone "
        f"`{common['backbone']}`; environment `{found.environment}`."
    ]
    if found.others:
        left = ", ".join(f"{len(cells)} of `{name}`" for name, cells in found.others.items())
        lines.append(f"Cells of other environments (versions, device, precision, sources) are left out: {left}.")
    return lines


def _audit_lines(suite: Suite, audit: Sequence[Mapping[str, Any]] | None, commands: Commands) -> list[str]:
    if not suite.texts_tell:
        return [
            "Leakage: not audited by text; the texts about made pictures repeat; no picture is in two splits, but the tasks "
            "of a split share its pictures."
        ]
    if audit is None:
        return [f"**Leakage: not audited.** `{commands.audit()}`"]
    command = f"Leakage (`{commands.audit()}`)"
    if not audit:
        return [f"{command}: no source row is a near-duplicate of a target's example."]
    left = sum(row[f"left, {split}"] for row in audit for split in ("train", "test"))
    verdict = "none is left" if left == 0 else f"**{left} are left**"
    lines = [f"{command}: near-duplicates of a target's examples are left out of the sources' rows; {verdict}."]
    lines += ["", "| target | source | dropped, as in its train | as in its test | left |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['target']} | {row['source']} | {row['dropped, train']} | {row['dropped, test']} | "
        f"{row['left, train'] + row['left, test']} |"
        for row in audit
    ]
    return lines


def _shots_lines(found: Found, shots: int, pictures: Sequence[str], commands: Commands) -> list[str]:
    suite = found.suite
    more_shots = f", {shots} shots" if len(suite.shots) > 1 else ""
    title = f"#### {suite.name}: means over the {len(suite.report)} report targets{more_shots}"
    lines: list[str] = []
    if evidence := _evidence(found, shots):
        lines += [f"#### {suite.name}: what the gain over own-extra may come from{more_shots}", "", *evidence, ""]
    lines += [title, "", *_overall(found, shots)]
    if against := _pi_against_all(found, shots):
        lines += ["", f"#### {suite.name}: π as shipped less every other arm{more_shots}", "", *against]
    lines += ["", f"#### {suite.name}: report targets, values times 100{more_shots}", "", *_by_arm(found, shots)]
    lines += ["", *(f"![{Path(p).stem}]({p})" for p in pictures)]
    for task in suite.targets:
        if any(c["task"] == task and c["shots"] == shots for c in found.cells):
            more = f" --tasks {task}"
            heading = f"#### {suite.name}: {task} ({suite.role(task)} target){more_shots}"
            lines += ["", heading, "", f"`{commands.run(more)}`", "", *_by_target(found, shots, task)]
    return lines


def _overall(found: Found, shots: int) -> list[str]:
    suite = found.suite
    against = {rival: differences(found, rival, shots, suite.report) for rival in RIVALS}
    lines = [
        "| arm | mean | − own-extra | − nearest-tuned | worst target | won | s | cells |",
        "|---|---|---|---|---|---|---|---|",
    ]
    most = max((len(found.of(arm, shots, suite.report)) for arm in suite.arms), default=0)
    fewer = False
    for arm in suite.arms:
        cells = found.of(arm, shots, suite.report)
        if not cells:
            continue
        values = found.values(arm, shots)
        mean = statistics.fmean(statistics.fmean(values[t].values()) for t in suite.report if t in values)
        extra = against["own-extra"].get(arm)
        worst = f"{extra.worst} {signed(extra.by_target[extra.worst])}" if extra else ""
        won = _won(extra) if extra else ""
        against_rivals = " | ".join(shown(against[rival].get(arm)) for rival in RIVALS)
        label = f"{ARMS[arm].label} (`{arm}`)"
        seconds = statistics.fmean(c["seconds"] for c in cells)
        expected = sum(len(suite.seeds_of(arm, task)) for task in suite.report)
        count = str(len(cells)) if len(cells) >= expected else f"{len(cells)} of {expected}"
        if len(cells) < most:
            fewer, count = True, f"**{count}**"
        lines.append(f"| {label} | {mean:.1f} | {against_rivals} | {worst} | {won} | {seconds:.0f} | {count} |")
    return [*lines, "", FEWER] if fewer else lines


def _evidence(found: Found, shots: int) -> list[str]:
    """What each arm that stands for an explanation gains over the own expert with extra steps, and π on the same draws."""
    targets, ours, base = found.suite.report, found.values("pi", shots), found.values("own-extra", shots)
    rows: list[str] = []
    for explanation, arm in EXPLANATIONS:
        theirs = _shared(found.values(arm, shots), ours, base)
        ahead = paired_difference(ours, theirs, targets)
        gains = [paired_difference(values, base, targets) for values in (theirs, _shared(ours, theirs, base))]
        if ahead is not None:
            of = " of ".join(signed(gain.mean) for gain in gains if gain is not None)
            rows.append(
                f"| {explanation} | `{arm}` | {of} | {shown(ahead)} | {_won(ahead)} | {ahead.pairs} | {verdict(ahead)} |"
            )
    heads = "| in place of π | arm | gains | π is ahead by | ahead on | draws | the arm is |"
    return [heads, "|---|---|---|---|---|---|---|", *rows, "", LEGEND] if rows else []


def _shared(values: Values, *others: Values) -> Values:
    """Those values whose target and seed all the others have, too."""
    return {
        t: {s: v for s, v in by_seed.items() if all(s in other.get(t, ()) for other in others)}
        for t, by_seed in values.items()
    }


def _pi_against_all(found: Found, shots: int) -> list[str]:
    """What π is better by than each other arm over the report targets; the rivals come first."""
    suite = found.suite
    ours, others = found.values("pi", shots), [a for a in suite.arms if a not in ("pi", *RIVALS)]
    rows: list[str] = []
    for arm in (*RIVALS, *others):
        difference = paired_difference(ours, found.values(arm, shots), suite.report)
        if difference is not None:
            rows.append(f"| `pi` − `{arm}` | {shown(difference)} | {_won(difference)} | {difference.pairs} |")
    return ["| | difference | won | pairs |", "|---|---|---|---|", *rows, *_harm(found, shots)] if rows else []


def _harm(found: Found, shots: int) -> list[str]:
    """Whether π takes anything away from the own expert with extra steps, target by target."""
    suite = found.suite
    bounds = upper_bounds(found.values("pi", shots), found.values("own-extra", shots), suite.report)
    difference = differences(found, "own-extra", shots, suite.report).get("pi")
    if not bounds or difference is None:
        return []
    each = ", ".join(f"{t} {signed(difference.by_target[t])} (≤ {signed(bound)})" for t, bound in bounds.items())
    harmed = [t for t, bound in bounds.items() if bound < -HARM]
    verdict = (
        f"**wholly below −{HARM:g} point: {', '.join(harmed)}**" if harmed else f"no bound is below −{HARM:g} point"
    )
    if surely := [t for t, bound in bounds.items() if -HARM <= bound < 0]:
        verdict += f"; wholly below 0: {', '.join(surely)}"
    return ["", f"`pi` − `own-extra` by target, with its one-sided 95 % bound: {each}; {verdict}."]


def _by_arm(found: Found, shots: int) -> list[str]:
    """Means over the seeds, arms by report targets, and the mean over these."""
    suite = found.suite
    metrics = {c["task"]: c["metric"] for c in found.cells}
    targets = [t for t in suite.report if t in metrics]
    heads = [f"{t}, {metrics[t]}" for t in targets]
    lines = ["| arm | " + " | ".join([*heads, "mean"]) + " |", "|---" * (len(targets) + 2) + "|"]
    for arm in suite.arms:
        values = found.values(arm, shots)
        means = {t: statistics.fmean(values[t].values()) for t in targets if t in values}
        if means:
            cells = [f"{means[t]:.1f}" if t in means else "" for t in targets]
            lines.append(f"| `{arm}` | " + " | ".join([*cells, f"{statistics.fmean(means.values()):.1f}"]) + " |")
    return lines


def _by_target(found: Found, shots: int, task: str) -> list[str]:
    metric = next(c["metric"] for c in found.cells if c["task"] == task)
    lines = [f"| arm | {metric}, % | by seed | − own-extra | log-loss | s |", "|---|---|---|---|---|---|"]
    against = differences(found, "own-extra", shots, [task])
    for arm in found.suite.arms:
        cells = sorted(found.of(arm, shots, [task]), key=lambda c: int(c["seed"]))
        if cells:
            values = [POINTS * c["value"] for c in cells]
            each = " ".join(f"{v:.1f}" for v in values)
            loss = statistics.fmean(c["log_loss"] for c in cells)
            seconds = statistics.fmean(c["seconds"] for c in cells)
            mean, difference = statistics.fmean(values), shown(against.get(arm))
            lines.append(f"| `{arm}` | {mean:.1f} | {each} | {difference} | {loss:.3f} | {seconds:.0f} |")
    return lines


def _won(difference: Difference) -> str:
    """On how many of the targets the mean is above zero."""
    return f"{difference.won * len(difference.by_target):g} of {len(difference.by_target)}"


def shown(difference: Difference | None) -> str:
    """Mean and interval; of a single pair, which has no spread, the mean alone."""
    if difference is None:
        return ""
    if difference.pairs == 1:
        return signed(difference.mean)
    return f"{signed(difference.mean)} ({signed(difference.low)} to {signed(difference.high)})"
