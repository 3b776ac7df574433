"""What is wrong with a set of tensors, and how a message lists it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

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


def tensor_problems(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> list[str]:
    """Every tensor that is missing, extra, misshaped or not finite, with its shapes; to be :func:`listed`."""
    problems = [f"missing tensor {key} {list(expected[key])}" for key in expected if key not in found]
    problems += [f"extra tensor {key} {list(found[key].shape)}" for key in found if key not in expected]
    for key in expected.keys() & found.keys():
        if tuple(found[key].shape) != expected[key]:
            problems.append(f"tensor {key} has shape {list(found[key].shape)}, expected {list(expected[key])}")
        elif not torch.isfinite(found[key]).all():
            bad = int((~torch.isfinite(found[key])).sum())
            problems.append(f"tensor {key} {list(expected[key])} holds {bad} values that are NaN or infinite")
    return problems
