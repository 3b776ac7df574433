"""How a message lists what is wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 8


def listed(problems: Iterable[str]) -> str:
    """One line for each problem, sorted, each once; the first eight, and how many more there are.

    >>> print("these tensors are wrong:" + listed(["b", "a", "b"]))
    these tensors are wrong:
      a
      b
    """
    ordered = sorted(set(problems))
    more = f"\n  … and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return "".join(f"\n  {p}" for p in ordered[:SHOWN]) + more
