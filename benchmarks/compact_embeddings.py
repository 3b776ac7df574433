"""How far the compact embeddings rank a pool as the full ones do.

Run: python benchmarks/compact_embeddings.py --pool experts --reference own

Every expert of the pool with a stored embedding is the target once; the others are ranked by `compact_similarity` and by
`fisher-cosine`. Printed: Kendall's τ, how many of the three most similar are among the first six of the compact ranking, and
τ of block means, 256 of which have the same size.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from scipy.stats import kendalltau

import pituning as pt
from pituning.similarity import TaskEmbedding, compact
from pituning.similarity.compact import anchor_of
from pituning.similarity.measures import compact_agreement, fisher_similarity


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--reference", default="own", choices=("own", "shared"))
    arguments = parser.parse_args()
    pool = pt.ExpertPool(arguments.pool)
    embeddings = [TaskEmbedding.load(pool.folder / name, arguments.reference) for name in pool.names()]
    print(
        json.dumps(
            {
                "reference": arguments.reference,
                "experts": len(embeddings),
                "tensors": len(embeddings[0].fisher),
                "entries": sum(f.numel() for f in embeddings[0].fisher.values()),
                "bytes": embeddings[0].compact().nbytes,
                "kendall_tau": round(compact_agreement(embeddings), 3),
                "top 3 in the first 6": round(_recall(embeddings, 3, 6), 3),
                "kendall_tau_of_block_means": {n: round(_block_means(embeddings, n), 3) for n in (256, 4096, 16384)},
            }
        )
    )


def _block_means(embeddings: list[TaskEmbedding], numbers: int) -> float:
    """τ of what there was before: the means of consecutive entries, float32."""
    short = []
    for embedding in embeddings:
        parts = []
        for name in sorted(embedding.fisher):
            flat = embedding.fisher[name].double().flatten().numpy()
            blocks = np.array_split(flat, min(len(flat), max(1, numbers // len(embedding.fisher))))
            means = np.array([block.mean() for block in blocks])
            parts.append(means / (np.linalg.norm(means) or 1))
        short.append(np.concatenate(parts))
    values = []
    for i, target in enumerate(embeddings):
        others = [j for j in range(len(embeddings)) if j != i]
        full = [fisher_similarity(target, embeddings[j], "fisher-cosine") for j in others]
        values.append(float(kendalltau(full, [float(short[i] @ short[j]) for j in others]).statistic))
    return float(np.mean(values))


def _recall(embeddings: list[TaskEmbedding], best: int, first: int) -> float:
    anchor = anchor_of(e.fisher for e in embeddings[: compact.ANCHORED])
    short = [e.compact(anchor) for e in embeddings]
    found = []
    for i, target in enumerate(embeddings):
        others = [j for j in range(len(embeddings)) if j != i]
        full = sorted(others, key=lambda j: -fisher_similarity(target, embeddings[j], "fisher-cosine"))
        brief = sorted(others, key=lambda j: -compact.compact_similarity(short[i], short[j]))
        found.append(len(set(full[:best]) & set(brief[:first])) / best)
    return float(np.mean(found))


if __name__ == "__main__":
    main()
