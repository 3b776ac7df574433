"""What benchmarks of MiniLM on draws of a few shots per class have in common: their options, and what these open."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import pituning as pt
from benchmarks.rounding import bf16_products
from pituning.errors import PituningError

LIMIT = 500
"""Test examples."""


def draw_options(about: str | None) -> argparse.ArgumentParser:
    """A parser with the pool, the targets, their draws, and how to compute."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--draws", nargs="+", type=int, default=[0])
    parser.add_argument("--shots", type=positive, default=16, help="per class")
    parser.add_argument("--bf16-weights", action="store_true", help="round the frozen weights to bfloat16")
    parser.add_argument("--threads", type=positive, default=1)
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, not {text}")
    return number


def run(main: Callable[[], None]) -> None:
    """Run a script; a mistake of its caller's is a line and exit status 2."""
    try:
        main()
    except PituningError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def opened(options: argparse.Namespace) -> tuple[pt.Backbone, pt.ExpertPool]:
    """The backbone, on so many threads, and the pool; for the rest of the script bfloat16 is not slow on any processor.

    Raises:
        PituningError: if the pool is empty.
    """
    pool = pt.ExpertPool(options.pool)
    if not pool.names():
        raise PituningError(f"pool {options.pool} holds no experts")
    torch.set_num_threads(options.threads)
    backbone = pt.load_backbone("minilm", dtype=torch.bfloat16 if options.bf16_weights else None)
    if options.bf16_weights:
        bf16_products(backbone.device).__enter__()
    return backbone, pool


def drawn(options: argparse.Namespace) -> Iterator[tuple[str, int, pt.Task]]:
    """(target, draw, task with its shots), draw after draw of one target after the other.

    All are drawn before the first one is given: a wrong name must not cost an hour.
    """
    tasks = {target: pt.load_task(target, data=options.data) for target in options.targets}
    draws = [(t, draw, task.few_shot(options.shots, draw)) for t, task in tasks.items() for draw in options.draws]
    yield from draws
