"""The command line of the speed page; see ``python -m benchmarks.speed --help``."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import benchmarks.speed
from benchmarks.pages import fill
from benchmarks.speed.machine import cores, facts, has_gpu
from benchmarks.speed.measuring import ROOT, Setting
from benchmarks.speed.page import block, shown_bar, shown_sample, tally, verdict
from benchmarks.speed.records import HISTORY, Outcome, Record, claim, read, write
from benchmarks.speed.registry import MEASUREMENTS, Measurement, measurement
from benchmarks.speed.running import run
from pituning.errors import PituningError

PAGE = ROOT / "docs" / "speed.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 1 where a measurement failed, 2 for a mistake of the caller's."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options) if options.verb == "run" else _report(options)
    except PituningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    chosen = [measurement(name) for name in options.only] if options.only else list(MEASUREMENTS)
    gpu = has_gpu()
    if options.device == "cuda" and not gpu:
        raise PituningError("--device cuda, but torch finds no GPU here")
    devices = [options.device] if options.device else ["cpu", *["cuda"] * gpu]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.work.resolve() if options.work else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(
            options.quick,
            "cpu",
            options.threads,
            str(folder),
            options.tsv_gigabytes,
            str(options.probe.resolve()),
            options.demo,
        )
        statuses = [_record(options, chosen, replace(setting, device=device), gpu) for device in devices]
    return max(statuses)


def _record(options: argparse.Namespace, chosen: Sequence[Measurement], setting: Setting, gpu: bool) -> int:
    """Measure on one device; 1 where something failed."""
    device = setting.device
    if device == "cuda" or gpu:  # what is for the other device has a record of its own
        chosen = [m for m in chosen if device in m.devices]
    if not chosen:
        return 0
    record = Record(
        date.today().isoformat(),
        device,
        _command(options, device),
        facts(device, options.threads),
        {"tsv_gigabytes": setting.gigabytes},
        {},
        options.quick,
    )
    history = options.history or (None if options.quick else HISTORY)
    path = claim(history, record.date, device) if history else None
    if path:
        write(record, path)
    outcomes: dict[str, Outcome] = {}
    for one, outcome in run(chosen, setting, 60 * options.limit, lambda name: print(f"{name} …", flush=True)):
        outcomes[one.name] = outcome
        print("\n".join(_lines(one, outcome)), flush=True)
        if path:
            write(replace(record, outcomes=outcomes), path)
    if not options.quick:
        counts = tally(outcomes)
        print(f"{device}: bars " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    if path:
        print(f"{path.name}")
    return int(any(o.status == "failed" for o in outcomes.values()))


def _report(options: argparse.Namespace) -> int:
    records = read(options.history or HISTORY)
    page = options.page
    page.write_text(fill(page.read_text(encoding="utf-8"), "speed", block(records)), encoding="utf-8")
    print(f"{page.name}: {len(records)} records")
    return 0


def _lines(one: Measurement, outcome: Outcome) -> list[str]:
    if outcome.status != "measured":
        return [f"  {outcome.status}: {outcome.reason}"]
    lines = []
    for figure in one.figures:
        if sample := outcome.samples.get(figure.name):
            said = f"{shown_bar(figure.bar, figure.unit)} {verdict(figure.bar, sample).replace('*', '')}".strip()
            lines.append(f"  {figure.name:<52} {shown_sample(sample, figure.unit):<32} {said}".rstrip())
    return [*lines, f"  ({outcome.seconds:g} s)"]


def _command(options: argparse.Namespace, device: str) -> str:
    """What repeats the run, without folders."""
    words = ["python -m benchmarks.speed run", f"--device {device}", f"--threads {options.threads}"]
    words += [f"--only {' '.join(options.only)}"] if options.only else []
    words += [f"--tsv-gigabytes {options.tsv_gigabytes:g}"]
    words += ["--quick"] * options.quick + ["--demo"] * options.demo
    return " ".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=benchmarks.speed.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run", help="measure")
    names = ", ".join(m.name for m in MEASUREMENTS)
    one.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {names}")
    one.add_argument("--quick", action="store_true", help="tiny shapes; kept only where --history says")
    one.add_argument("--device", choices=("cpu", "cuda"), help="default: the CPU, then the GPU where there is one")
    one.add_argument("--threads", type=int, default=cores(), help="of the CPU (default: its cores)")
    one.add_argument("--limit", type=float, default=120.0, metavar="MINUTES", help="for one measurement (default 120)")
    one.add_argument(
        "--work", type=Path, metavar="FOLDER", help="for scratch files, on the disk to be measured; the pool stays"
    )
    one.add_argument("--tsv-gigabytes", type=float, default=Setting.gigabytes, help="default %(default)g")
    one.add_argument("--probe", type=Path, default=Path(Setting.probe), help="speed_probe.py (default: %(default)s)")
    one.add_argument("--demo", action="store_true", help="also run `pituning demo`, with --fast and without")
    two = verbs.add_parser("report", help="write the page")
    two.add_argument("--page", type=Path, default=PAGE)
    for verb in (one, two):
        verb.add_argument(
            "--history", type=Path, metavar="FOLDER", help="of records (default: benchmarks/speed/history)"
        )
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child ends, too
    sys.exit(main())
