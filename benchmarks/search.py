"""Searching a large pool: how long the index takes to build, to update and to load, and a query to answer.

Run: python benchmarks/search.py --experts 10000 --folder /tmp/search-pool

Writes synthetic experts (a card, a LoRA configuration, small tensors, a task embedding of 24 tensors × 256 values drawn around
40 centres) into the folder unless it holds so many already, then measures. `query` is the search by cards and compact
embeddings over all experts; `re-ranked` is the whole search, with the full embeddings of the best 100 read from disk and
compared exactly. `recall` is the share of the ten exactly nearest experts (over all of them) that the whole search finds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pituning.experts import ExpertCard, ExpertPool
from pituning.experts.expert import CARD_FILE, CONFIG_FILE, SCHEMA, TENSOR_FILE, file_hash
from pituning.similarity import TaskEmbedding
from pituning.similarity.index import INDEX_FILE, PoolIndex, open_index
from pituning.similarity.search import MetricBound, Wanted, compact_similarities, search_pool

METHODS, LICENCES = ("lora", "lora", "lora", "bottleneck"), ("apache-2.0", "mit", "cc-by-nc-4.0", "")
WANTED = Wanted("all-MiniLM-L6-v2", "lora", "apache-2.0", (MetricBound.parse("accuracy>=0.7"),))
TENSORS, VALUES, CENTRES = 24, 256, 40


def main() -> None:
    """Print the figures as a table, and as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--reranked-queries", type=int, default=20)
    arguments = parser.parse_args()
    pool = filled_pool(arguments.folder, arguments.experts)
    figures: dict[str, Any] = {"experts": len(pool), **index_seconds(pool)}
    figures["index_mb"] = (pool.folder / INDEX_FILE).stat().st_size / 1e6
    index = open_index(pool)
    names = drawn_names(index, arguments.queries)
    figures |= _percentiles("query", query_seconds(index, names))
    few = names[: arguments.reranked_queries]
    figures |= _percentiles("reranked", search_seconds(index, few))
    figures["recall_at_10"] = statistics.fmean(recalls(index, few))
    for name, value in figures.items():
        print(f"{name:<24}{value:>12,.3f}" if isinstance(value, float) else f"{name:<24}{value:>12,}")
    print(json.dumps(figures))


def filled_pool(folder: Path, experts: int) -> ExpertPool:
    """The pool in a folder, with so many synthetic experts: written unless they are there; without an index."""
    pool = ExpertPool(folder)
    if len(pool) != experts:
        _write(folder, experts)
    (pool.folder / INDEX_FILE).unlink(missing_ok=True)
    return pool


def index_seconds(pool: ExpertPool) -> dict[str, float]:
    """Seconds to build the index, to load it, and to load it after ten experts have changed."""
    found = {"build_s": _seconds(lambda: open_index(pool))}
    found["load_s"] = statistics.median(_seconds(lambda: open_index(pool)) for _ in range(3))
    for name in pool.names()[:10]:
        _touch(pool.folder / name)
    return {**found, "update_10_s": _seconds(lambda: open_index(pool))}


def drawn_names(index: PoolIndex, queries: int) -> list[str]:
    """Experts to ask for."""
    rows = np.random.default_rng(1).integers(len(index.entries), size=queries)
    return [index.entries[row].name for row in rows]


def query_seconds(index: PoolIndex, names: list[str]) -> list[float]:
    """Of the search by cards and compact embeddings, for each name."""
    return [_seconds(partial(_compact, index, name)) for name in names]


def search_seconds(index: PoolIndex, names: list[str]) -> list[float]:
    """Of the whole search, for each name."""
    return [_seconds(partial(search_pool, index, name, WANTED)) for name in names]


def _compact(index: PoolIndex, name: str) -> list[str]:
    """What a search does before it reads from disk: all cards, all compact embeddings, the best hundred."""
    query = [row for row, entry in enumerate(index.entries) if entry.name == name]
    holds = WANTED.test()
    rows = [row for row, entry in enumerate(index.entries) if entry.card is not None and holds(entry.card)]
    scores = compact_similarities(index, query, "shared")[rows]
    return [index.entries[rows[n]].name for n in np.argsort(-scores)[:100]]


def recalls(index: PoolIndex, names: list[str]) -> list[float]:
    """The share of the ten exactly nearest experts that the whole search finds, for each name."""
    stacked = []
    for entry in index.entries:
        tensors = TaskEmbedding.load(index.folder / entry.name, "shared").fisher.values()
        stacked.append(torch.cat([t / t.norm() / len(tensors) ** 0.5 for t in tensors]).numpy())
    matrix = np.stack(stacked)  # the inner product of two rows is their fisher-cosine
    shares = []
    for name in names:
        row = next(r for r, entry in enumerate(index.entries) if entry.name == name)
        same = (index.spaces["shared"] == index.spaces["shared"][row]) & (np.arange(len(matrix)) != row)
        exact = np.argsort(-np.where(same, matrix @ matrix[row], -np.inf))[:10]
        found = {hit.card.name for hit in search_pool(index, name).hits}
        shares.append(len(found & {index.entries[r].name for r in exact}) / 10)
    return shares


def _write(folder: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    centres = [_fisher(generator) for _ in range(CENTRES)]
    for number in range(count):
        expert = folder / f"expert-{number:05d}"
        expert.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"base_model.model.layer.{n}.lora_A.weight": torch.randn(2, 8, generator=generator) for n in range(4)
        }
        save_file(tensors, expert / TENSOR_FILE)
        (expert / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
        method = METHODS[number % 4]
        card = ExpertCard(
            expert.name, "sentence-transformers/all-MiniLM-L6-v2", "0123456789abcdef", f"task-{number % 1000}", method,
            shots=16, parameters=64, metrics={"accuracy": float(rng.uniform(0.5, 1)), "dev log-loss": float(rng.uniform())},
            licence=LICENCES[int(rng.integers(4))],
        )  # fmt: skip
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        record = {"schema": SCHEMA, **asdict(card), "sha256": file_hash(expert / TENSOR_FILE), "tensors": shapes}
        (expert / CARD_FILE).write_text(json.dumps(record))
        centre = centres[int(rng.integers(CENTRES))]
        noise = _fisher(generator)
        fisher = {key: 0.7 * value + 0.3 * noise[key] for key, value in centre.items()}
        TaskEmbedding(fisher, card.task, 64, "true", "shared", f"mean {method}", 1.0, 0.9).save(expert)


def _fisher(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {f"layer.{n}": torch.randn(VALUES, generator=generator) ** 4 for n in range(TENSORS)}


def _touch(expert: Path) -> None:
    record = json.loads((expert / CARD_FILE).read_text())
    record["metrics"]["accuracy"] = 1 - record["metrics"]["accuracy"] / 2
    (expert / CARD_FILE).write_text(json.dumps(record))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    milliseconds = [1000 * s for s in seconds]
    return {
        f"{name}_median_ms": statistics.median(milliseconds),
        f"{name}_p95_ms": float(np.percentile(milliseconds, 95)),
    }


if __name__ == "__main__":
    main()
