"""How far the compact embeddings rank a pool as the full ones do, and how many numbers would do.

Run: python benchmarks/compact_embeddings.py --pool experts --reference own

Every expert of the pool with a stored embedding is the target once; the others are ranked by `compact_similarity` and by
`fisher-cosine`. Printed: Kendall's τ, how many of the three most similar are among the first six of the compact ranking, and
τ for more numbers than a compact embedding has.
"""

from __future__ import annotations

import argparse
import json
from unittest import mock

import numpy as np

import pituning as pt
from pituning.similarity import TaskEmbedding, compact
from pituning.similarity.measures import compact_agreement, fisher_similarity


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--reference", default="own", choices=("own", "shared"))
    arguments = parser.parse_args()
    pool = pt.ExpertPool(arguments.pool)
    embeddings = [TaskEmbedding.load(pool.folder / name, arguments.reference) for name in pool.names()]
    agreement = {}
    for numbers in (256, 1024, 4096, 16384):
        with mock.patch.object(compact, "NUMBERS", numbers):
            agreement[numbers] = round(compact_agreement(embeddings), 3)
    print(
        json.dumps(
            {
                "reference": arguments.reference,
                "experts": len(embeddings),
                "tensors": len(embeddings[0].fisher),
                "entries": sum(f.numel() for f in embeddings[0].fisher.values()),
                "numbers": len(embeddings[0].compact()),
                "kendall_tau": agreement[256],
                "top 3 in the first 6": round(_recall(embeddings, 3, 6), 3),
                "kendall_tau_by_numbers": agreement,
            }
        )
    )


def _recall(embeddings: list[TaskEmbedding], best: int, first: int) -> float:
    short = [e.compact() for e in embeddings]
    found = []
    for i, target in enumerate(embeddings):
        others = [j for j in range(len(embeddings)) if j != i]
        full = sorted(others, key=lambda j: -fisher_similarity(target, embeddings[j], "fisher-cosine"))
        brief = sorted(others, key=lambda j: -compact.compact_similarity(short[i], short[j]))
        found.append(len(set(full[:best]) & set(brief[:first])) / best)
    return float(np.mean(found))


if __name__ == "__main__":
    main()
