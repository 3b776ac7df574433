"""The generated part of docs/speed.md, from records. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.speed.measuring import Sample
from benchmarks.speed.records import Outcome, Record, complete
from benchmarks.speed.registry import MEASUREMENTS, Bar, Figure, Measurement

HISTORY = 5  # records shown
NONE = Outcome("not applicable")
TITLES = {"cpu": "CPU", "cuda": "GPU"}


@dataclass(frozen=True)
class Shown:
    """One measurement on one device: its newest outcome on the newest record's machine."""

    measurement: Measurement
    outcome: Outcome
    record: str

    def sample(self, figure: Figure) -> Sample | None:
        """The figure, where it was measured."""
        return self.outcome.samples.get(figure.name)


def block(records: Sequence[Record], measurements: Sequence[Measurement] = MEASUREMENTS) -> str:
    """Bars, then every measurement with its figures and its history, by device; in Markdown."""
    lines: list[str] = []
    for device, title in TITLES.items():
        found = complete(records, device)
        usable = [m for m in measurements if device in m.devices]
        lines += [f"## {title}", ""]
        if not found:
            lines += ["**Nothing has been measured yet.**", ""]
        else:
            lines += [*_machine(found[-1]), ""]
        newest = [_newest(m, found) for m in usable]
        lines += [*_bars(newest), ""]
        for shown in newest:
            lines += [*_section(shown, device, found), ""]
        if found:
            lines += [*_sources(found[-HISTORY:]), ""]
    return "\n".join(lines).rstrip() + "\n"


def verdict(bar: Bar | None, sample: Sample | None) -> str:
    """What stands in the last column of a table of bars."""
    if bar is None:
        return ""
    if sample is None:
        return "not measured"
    return "met" if bar.met(sample.value) else "**not met**"


def tally(outcomes: Mapping[str, Outcome], measurements: Sequence[Measurement] = MEASUREMENTS) -> dict[str, int]:
    """How many bars of these measurements are met, not met and not measured."""
    found = {"met": 0, "not met": 0, "not measured": 0}
    for one in measurements:
        for figure in one.figures:
            if figure.bar and one.name in outcomes:
                found[verdict(figure.bar, outcomes[one.name].samples.get(figure.name)).strip("*")] += 1
    return found


def number(value: float) -> str:
    """Three significant digits, or two of what is tiny.

    >>> number(12345.6), number(1.204), number(0.00512), number(1.3e-7), number(100.0), number(0)
    ('12,346', '1.20', '0.00512', '1.3e-7', '100', '0')
    """
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.2g}" if abs(value) < 1e-3 else f"{value:#.3g}"
    return text.replace("e-0", "e-").rstrip(".")


def with_unit(value: str, unit: str) -> str:
    """
    >>> with_unit("1.20", "×"), with_unit("3", "MB"), with_unit("1", "")
    ('1.20 ×', '3 MB', '1')
    """
    return f"{value} {unit}".rstrip()


def shown_sample(sample: Sample, unit: str) -> str:
    """A median with its unit, and where there were repetitions, its interval.

    >>> shown_sample(Sample(1.204, 1.1, 1.3, 30), "×"), shown_sample(Sample.once(3), "MB")
    ('1.20 × [1.10, 1.30]', '3.00 MB')
    """
    text = with_unit(number(sample.value), unit)
    return text if sample.repeats == 1 else f"{text} [{number(sample.low)}, {number(sample.high)}]"


def shown_bar(bar: Bar | None, unit: str) -> str:
    """
    >>> shown_bar(Bar("≥", 2000), "rows/s"), shown_bar(Bar("≤", 1e-5), ""), shown_bar(None, "ms")
    ('≥ 2,000 rows/s', '≤ 1e-5', '')
    """
    return f"{bar.sign} {with_unit(f'{bar.limit:,g}'.replace('e-0', 'e-'), unit)}" if bar else ""


def command(measurement: Measurement, device: str) -> str:
    """What measures this alone."""
    return f"python -m benchmarks.speed run --only {measurement.name} --device {device}"


def _newest(measurement: Measurement, found: Sequence[Record]) -> Shown:
    """From the newest record in which it was measured or failed, among those of the newest record's machine."""
    alike = [r for r in reversed(found) if r.same_machine(found[-1]) and measurement.name in r.outcomes]
    for record in [r for r in alike if r.outcomes[measurement.name].status != "not applicable"] or alike:
        return Shown(measurement, record.outcomes[measurement.name], record.name)
    return Shown(measurement, NONE, "")


def _bars(newest: Sequence[Shown]) -> Iterator[str]:
    rows, counts = [], dict.fromkeys(("met", "not met", "not measured"), 0)
    for shown in newest:
        for figure in shown.measurement.figures:
            if figure.bar:
                sample = shown.sample(figure)
                value = shown_sample(sample, figure.unit) if sample else shown.outcome.reason
                said = verdict(figure.bar, sample)
                counts[said.strip("*")] += 1
                rows.append((shown.measurement.name, figure.name, value, shown_bar(figure.bar, figure.unit), said))
    if rows:
        yield f"Bars: {', '.join(f'{n} {what}' for what, n in counts.items() if n)}."
        yield ""
        yield from table(("measurement", "figure", "measured", "bar", ""), rows)


def _section(shown: Shown, device: str, found: Sequence[Record]) -> Iterator[str]:
    one, outcome = shown.measurement, shown.outcome
    yield f"### {one.name} ({TITLES[device]})"
    yield ""
    yield f"{one.about}."
    yield ""
    yield f"`{command(one, device)}`" + (f"; `{shown.record}`" if shown.record else "")
    if outcome.status != "measured":
        yield ""
        said = "**Failed**" if outcome.status == "failed" else "Not measured"
        yield f"{said}{f': {outcome.reason}' if outcome.reason else ''}."
    landmarks = device == "cpu"  # none was recorded on a GPU
    rows = [_row(figure, shown.sample(figure), landmarks) for figure in one.figures]
    if any(any(row[1:]) for row in rows):
        yield ""
        yield from table(("figure", "measured", "n", "bar", "", "recorded before"), rows)
    if one.source and landmarks:
        yield ""
        yield f"Recorded before: {one.source}."
    yield from _history(one, found)


def _row(figure: Figure, sample: Sample | None, landmarks: bool) -> tuple[str, ...]:
    value, repeats = (shown_sample(sample, figure.unit), str(sample.repeats)) if sample else ("", "")
    said = verdict(figure.bar, sample) if sample else ""
    recorded = figure.recorded if landmarks else ""
    return figure.name, value, repeats, shown_bar(figure.bar, figure.unit), said, recorded


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table without the columns in which every row is empty.

    >>> list(table(("a", "b"), [("1", ""), ("|", "")]))
    ['| a |', '|---|', '| 1 |', '| \\\\| |']
    """
    kept = [n for n in range(len(head)) if any(row[n] for row in rows)]
    yield _line([head[n] for n in kept])
    yield "|" + "---|" * len(kept)
    for row in rows:
        yield _line([row[n].replace("|", "\\|") for n in kept])


def _line(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _history(one: Measurement, found: Sequence[Record]) -> Iterator[str]:
    """Medians of the last records that have the measurement, where there are several."""
    past = [r for r in found if one.name in r.outcomes and r.outcomes[one.name].status == "measured"][-HISTORY:]
    if len(past) < 2:
        return
    rows = []
    for figure in one.figures:
        samples = [r.outcomes[one.name].samples.get(figure.name) for r in past]
        rows.append([figure.name, *(with_unit(number(s.value), figure.unit) if s else "" for s in samples)])
    yield ""
    yield from table(["history", *(r.name for r in past)], rows)


def _machine(record: Record) -> Iterator[str]:
    yield f"Newest record: `{record.name}`, {describe(record)}."
    yield ""
    yield f"`{record.command}`"


def describe(record: Record) -> str:
    """A record's machine and versions in a line."""
    machine = record.machine
    parts = [machine["gpu"]] if "gpu" in machine else []
    parts += [machine["processor"] or "unknown processor", f"{machine['cores']} cores, {machine['threads']} threads"]
    if flags := [f for f in machine["flags"] if f.startswith(("avx512", "amx"))]:
        parts.append(" ".join(flags))
    parts += [f"{name} {number}" for name, number in machine["versions"].items() if number]
    parts += [f"code `{machine['code']}`"] if machine["code"] else []
    return ", ".join([*parts, f"load {machine['load_before']:g} before"])


def _sources(found: Sequence[Record]) -> Iterator[str]:
    yield "Records:"
    yield ""
    for record in reversed(found):
        size = f"; TSV of {record.options['tsv_gigabytes']:g} GB" if "tsv" in record.outcomes else ""
        yield f"- `{record.name}`: {describe(record)}{size}"
