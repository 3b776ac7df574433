"""The command line of the transfer benchmark; see ``python -m benchmarks.transfer --help``."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import benchmarks.transfer
from benchmarks.pages import fill
from benchmarks.rounding import bf16_products
from benchmarks.transfer.cells import Cells
from benchmarks.transfer.pictures import write_pictures
from benchmarks.transfer.report import Commands, block, gather, keep
from benchmarks.transfer.running import Part, load_tasks, prepared, run
from benchmarks.transfer.sources import audit, source_rows
from benchmarks.transfer.suites import SUITES, Suite, suite_named
from pituning.backbones import Backbone, load_backbone
from pituning.errors import PituningError
from pituning.experiments.cells import write_json
from pituning.training.precision import PRECISIONS, has_fast_bf16, precision

PAGE = Path("docs/transfer.md")
FIGURES = Path("benchmarks/figures/transfer")
ROUNDED = "bf16-weights"
"""A precision: the frozen weights rounded to bfloat16 and computed in it, without autocast; an expert is held and trained in
float32, and rounded where it runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 1 where a cell failed or something leaks, 2 for a mistake of the caller's."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    suite = suite_named(options.suite)
    if options.backbone:
        suite = replace(suite, backbone=options.backbone, made_by="")
    verbs: dict[str, Callable[[Suite, argparse.Namespace], int]] = {"run": _run, "report": _report, "audit": _audit}
    try:
        return verbs[options.verb](suite, options)
    except PituningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(suite: Suite, options: argparse.Namespace) -> int:
    end: float = time.monotonic() + 60 * options.budget

    def out_of_time() -> bool:
        return time.monotonic() >= end

    def say(line: str) -> None:
        print(line, flush=True)

    part = Part(*(tuple(chosen) if chosen else None for chosen in (options.tasks, options.arms, options.seeds)))
    part.wanted(suite)  # a wrong name must not cost an hour
    backbone = _backbone(suite, options)
    tasks = load_tasks(suite, options.data)
    if options.precision == ROUNDED and not has_fast_bf16(backbone.device):
        say(
            f"--precision {ROUNDED}: this processor has no instructions for bfloat16, so products are in float32, rounded"
        )
    gc.collect()
    gc.freeze()  # every `Trainer` collects garbage, and has neither libraries nor data to go through then
    with bf16_products(backbone.device) if options.precision == ROUNDED else precision(backbone, options.precision):
        kept = options.figures / f"{suite.name}.parquet"
        bench = prepared(suite, backbone, tasks, options.work, out_of_time=out_of_time, say=say, kept=kept)
        if bench is None:
            say("stopped while training the sources, because the time was up")
            return 0
        tally = run(bench, part, out_of_time=out_of_time, say=say)
    say(str(tally))
    return 1 if tally.failed else 0


def _backbone(suite: Suite, options: argparse.Namespace) -> Backbone:
    if suite.made_by and not Path(suite.backbone).is_dir():
        raise PituningError(
            f"suite {suite.name!r} wants the backbone {suite.backbone}, which is not there: {suite.made_by} makes it and says "
            "how (or give another one as --backbone)"
        )
    if options.precision != ROUNDED:
        return load_backbone(suite.backbone, device=options.device)
    return load_backbone(suite.backbone, device=options.device, dtype=torch.bfloat16)


def _report(suite: Suite, options: argparse.Namespace) -> int:
    kept = options.figures / f"{suite.name}.parquet"
    found = gather(suite, Cells(options.work / "cells", kept).all(), options.environment)
    print(keep(found, kept, forget=options.forget))
    checked = options.figures / f"audit-{suite.name}.json"
    rows = json.loads(checked.read_text(encoding="utf-8")) if checked.is_file() else None
    page = options.page
    images = {shots: write_pictures(found, shots, page.parent / "images") for shots in suite.shots}
    links = {shots: [p.relative_to(page.parent).as_posix() for p in paths] for shots, paths in images.items()}
    text = block(found, rows, _commands(suite, options), links)
    page.write_text(fill(page.read_text(encoding="utf-8"), suite.name, text), encoding="utf-8")
    missing = len(found.missing())
    print(f"{page}: {len(found.cells)} cells, " + (f"PARTIAL, {missing} are missing" if missing else "complete"))
    return 0


def _audit(suite: Suite, options: argparse.Namespace) -> int:
    tasks = load_tasks(suite, options.data)
    rows = audit(suite, tasks, source_rows(suite, tasks, options.work / "sources"))
    for row in rows:
        print(json.dumps(row))
    write_json(options.figures / f"audit-{suite.name}.json", rows)
    left = sum(row[key] for row in rows for key in row if key.startswith("left"))
    if not suite.texts_tell:
        print(f"suite {suite.name!r} is not audited by text: the texts about made pictures repeat, the pictures do not")
    else:
        dropped = sum(row[key] for row in rows for key in row if key.startswith("dropped"))
        print(f"{dropped} near-duplicates left out of the sources' rows, {left} left in")
    return 1 if left else 0


def _commands(suite: Suite, options: argparse.Namespace) -> Commands:
    """Folders as they were given; an absolute one is nobody else's."""
    data, work = (
        str(p) if not p.is_absolute() else name for p, name in ((options.data, "DATA"), (options.work, "WORK"))
    )
    return Commands(suite.name, data, work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer",
        description=benchmarks.transfer.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, about in (("run", "compute cells"), ("report", "write the page"), ("audit", "look for leaks")):
        one = verbs.add_parser(verb, help=about)
        one.add_argument("--suite", default="core", choices=list(SUITES))
        one.add_argument("--data", type=Path, default=Path("../shared/data/text"), help="folder of the language tasks")
        one.add_argument("--work", type=Path, required=True, help="for experts, cells and shared pieces")
        one.add_argument(
            "--figures", type=Path, default=FIGURES, help="cells of other work folders, one Parquet file a suite"
        )
        one.add_argument("--backbone", help="instead of the suite's, such as a folder")
        one.add_argument("--threads", type=int, default=1)
        if verb == "run":
            one.add_argument("--tasks", nargs="+", help="targets; also `development` or `report`")
            one.add_argument("--arms", nargs="+")
            one.add_argument("--seeds", nargs="+", type=int)
            one.add_argument("--device", default="cpu")
            one.add_argument("--precision", default="auto", choices=(*PRECISIONS, ROUNDED))
            one.add_argument("--budget", type=float, default=float("inf"), help="minutes; no cell is begun after them")
        if verb == "report":
            one.add_argument("--page", type=Path, default=PAGE)
            one.add_argument(
                "--forget", action="store_true", help="drop kept cells that do not belong to the suite as it is now"
            )
            one.add_argument("--environment", help="which cells, where there are several environments (default: most)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
