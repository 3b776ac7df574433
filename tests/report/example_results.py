"""A results mapping as the experiment runner makes it, with random numbers of a fixed seed."""

from __future__ import annotations

from typing import Any

import numpy as np

ARMS = [
    ("zero-shot", "no expert", "the backbone alone", 0.70),
    ("own", "own expert", "trained on the shots alone", 0.751),
    ("own-extra", "own + extra steps", "the same, with the steps that π spends", 0.757),
    ("soup", "uniform soup", "all experts with equal weights, not trained", 0.772),
    ("nearest", "nearest expert", "the expert ranked first, as it is", 0.779),
    ("nearest-tuned", "nearest expert, fine-tuned", "the expert ranked first, then trained on the shots", 0.791),
    ("random", "random experts, interpolated", "π with experts drawn by lot", 0.762),
    ("pi", "π (this tool)", "chosen experts and the own, interpolated", 0.803),
]
TASKS = ["sst2", "cr", "movie_reviews", "tweet_sentiment", "subjectivity", "question_type", "agnews"]


def example_results(seeds: int = 5) -> dict[str, Any]:
    """Every part that a report can show."""
    random = np.random.default_rng(7)
    arms = [
        {
            "name": name,
            "label": label,
            "description": description,
            "values": [round(level + random.normal(0, 0.014), 4) for _ in range(seeds)],
            "log_loss": [round(1.3 - level + random.normal(0, 0.02), 4) for _ in range(seeds)],
        }
        for name, label, description, level in ARMS
    ]
    pi = np.array(arms[-1]["values"])
    differences = []
    for arm in arms[1:-1]:
        values = pi - np.array(arm["values"])
        differences.append({"name": f"π − {arm['label']}", "mean": float(values.mean()), "values": values.tolist()})
        if seeds > 1:
            reach = 2.776 * float(values.std(ddof=1)) / np.sqrt(seeds)
            differences[-1] |= {"low": float(values.mean() - reach), "high": float(values.mean() + reach)}
    points = random.normal(size=(len(TASKS), 3)) * [1.0, 0.6, 0.3]
    matrix = np.exp(-0.35 * np.linalg.norm(points[:, None] - points[None], axis=-1))
    groups = [f"encoder.layer.{layer}.attention.self.{part}" for layer in range(6) for part in ("query", "value")]
    weights = random.dirichlet([14, 9, 6], size=len(groups))
    return {
        "title": "sst2, 16 shots per class",
        "target": "sst2",
        "metric": "accuracy",
        "backbone": "minilm",
        "method": "lora",
        "shots": 16,
        "command": "pituning run recipes/text/sst2-16shot.yaml",
        "versions": {"pituning": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "seconds": 312.0,
        "date": "2026-11-23",
        "summary": "π beats the own expert by 5.0 points"
        + (" (95 % interval 2.5 to 7.5)." if seeds > 1 else " on one seed; one seed says little."),
        "interval": "95 % interval over seeds",
        "arms": arms,
        "differences": differences,
        "ceiling": {"label": "expert trained on all 6,920 examples", "value": 0.86},
        "ranking": {
            "kinds": ["fisher-cosine", "score", "weights"],
            "default": "score",
            "experts": [
                {
                    "name": name,
                    "values": {
                        "fisher-cosine": round(float(matrix[0, i]), 4),
                        "score": round(-0.4 - 0.06 * i, 4),
                        "weights": None if name == "agnews" else round(0.3 - 0.02 * i, 4),
                    },
                    "gain": None if name == "agnews" else round(0.05 - 0.013 * i + random.normal(0, 0.008), 4),
                }
                for i, name in enumerate(TASKS)
                if i
            ],
        },
        "graph": {"kind": "fisher-cosine", "names": TASKS, "matrix": matrix.tolist(), "target": "sst2"},
        "weights": {
            "experts": ["cr", "movie_reviews", "tweet_sentiment"],
            "groups": groups,
            "values": weights.tolist(),
            "note": "Softmax over the experts, one set of weights per module.",
        },
        "candidates": [
            {"name": "own expert", "loss": 0.561, "chosen": False},
            {"name": "interpolation of cr, tweet_sentiment", "loss": 0.47, "chosen": True},
            {"name": "cr alone", "loss": 0.493, "chosen": False},
        ],
        "audit": {
            "checked": 6,
            "overlaps": [
                {
                    "left": "sst2/test-17",
                    "right": "movie_reviews/train-411",
                    "left_text": "a warm , funny , engaging film .",
                    "right_text": "A warm, funny and engaging film, said my neighbour.",
                    "similarity": 0.8,
                }
            ],
        },
    }


def minimal_results() -> dict[str, Any]:
    """The three required parts."""
    return {"title": "cr, 8 shots", "target": "cr", "arms": [{"name": "own", "label": "own", "values": [0.81]}]}
