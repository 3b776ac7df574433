"""What the gain of π over the own expert with extra steps may come from, each beside the arm that is nearest to it."""

from __future__ import annotations

from benchmarks.transfer.intervals import Difference

EXPLANATIONS = (
    ("the own expert, rescaled", "own-rescaled"),
    ("all weights of the backbone, tuned", "full"),
    ("experts as they are, untuned", "soup"),
    ("weights for frozen experts", "pi-weights"),
    ("as many weights to tune, from random experts of the same size", "pi-noise"),
    ("the least similar experts", "pi-dissimilar"),
    ("as many experts drawn at random", "pi-random"),
    ("a single expert, with everything else of π", "pi-k1"),
    ("a single expert, tuned", "nearest-tuned"),
    ("the mean of the nearest, tuned", "soup-tuned"),
    ("one expert trained on the nearest tasks' data, tuned", "multitask-tuned"),
    ("the blend, no further out than a mean", "pi-mean"),
    ("the blend, with equal weights", "pi-uniform"),
)
"""What may explain the gain, and an arm."""

ALIKE = 1.0
"""Points within which two arms are called as good."""


LEGEND = (
    "*Gains* are points over `own-extra` on the draws that the arm and π share, and what π gains on these. *Behind*: the "
    "bootstrap interval is above 0, and so is that of Student's t over the targets' means, or π is ahead on every target; "
    f"*probably*: the bootstrap's alone. *As good*: within {ALIKE:g} point. What is behind may still explain a part."
)


def verdict(ahead: Difference) -> str:
    """What π − arm says of the arm.

    The bootstrap is somewhat too narrow with few targets, so that it is not enough for a plain "behind".
    """
    if ahead.low >= -ALIKE and ahead.high <= ALIKE:
        return "as good"
    if ahead.low > 0:
        return "behind" if ahead.students[0] > 0 or ahead.won == 1 else "probably behind"
    return "ahead" if ahead.high < 0 else "not told apart"
