"""What benchmarks of MiniLM on draws of a few shots per class have in common: their options, and what these open."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

import pituning as pt

LIMIT = 500
"""Test examples."""


def draw_options(about: str | None) -> argparse.ArgumentParser:
    """A parser with the pool, the targets, their draws, and how to compute."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--draws", nargs="+", type=int, default=[0])
    parser.add_argument("--shots", type=int, default=16, help="per class")
    parser.add_argument("--bf16-weights", action="store_true", help="round the frozen weights to bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def opened(options: argparse.Namespace) -> tuple[pt.Backbone, pt.ExpertPool]:
    """The backbone, on so many threads, and the pool."""
    torch.set_num_threads(options.threads)
    backbone = pt.load_backbone("minilm", dtype=torch.bfloat16 if options.bf16_weights else None)
    return backbone, pt.ExpertPool(options.pool)


def drawn(options: argparse.Namespace) -> Iterator[tuple[str, int, pt.Task]]:
    """(target, draw, task with its shots), draw after draw of one target after the other."""
    for target in options.targets:
        for draw in options.draws:
            yield target, draw, pt.load_task(target, data=options.data).few_shot(options.shots, draw)
