"""Fold an interpolation into one ordinary expert, exactly, or to a smaller rank with the error reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pituning.errors import RefusedError
from pituning.experts.expert import Expert, ExpertCard
from pituning.interpolation.build import PREFIX, group_name, lora_config
from pituning.interpolation.mixture import Mixture, ProductMixture, lora_tensors
from pituning.problems import listed, tensor_problems


@dataclass(frozen=True)
class Collapsed:
    """A collapsed expert and, per module, the relative Frobenius error of its ΔW (0 where the fold is exact)."""

    expert: Expert
    errors: Mapping[str, float]


@torch.no_grad()
def collapse(
    mixture: Mixture,
    config: Mapping[str, Any],
    card: ExpertCard,
    rank: int | None = None,
    max_error: float | None = None,
) -> Collapsed:
    """Fold a mixture into one expert, whose tensors are on the CPU.

    Args:
        mixture: from :func:`pituning.interpolation.build_mixture`, trained or not.
        config: the configuration that came with it.
        rank: for LoRA, the largest rank of the result; ``None`` keeps the exact rank Σ r_k. Smaller ranks are the best
            approximation of every ΔW in the Frobenius norm (Eckart–Young), by QR of the factors and a small SVD.
        max_error: for LoRA, the smallest rank of each module whose relative Frobenius error is not larger than this.

    Raises:
        RefusedError: if a rank or an error is asked for in a method that has none, or a tensor of the result is not finite.
    """
    tensors = {k: t.detach().to("cpu", copy=True) for k, t in mixture().items()}
    require_finite(tensors, f"the fold into expert {card.name!r}")
    errors = dict.fromkeys(_modules(tensors), 0.0)
    settings = dict(config)
    if rank is not None or max_error is not None:
        if not isinstance(mixture, ProductMixture):
            raise RefusedError("rank applies to LoRA experts only; other methods collapse to their own shape exactly")
        if rank is not None and rank < 1:
            raise RefusedError(f"rank must be at least 1, not {rank}")
        if max_error is not None and not 0 <= max_error < 1:
            raise RefusedError(f"max_error must be at least 0 and below 1, not {max_error}")
        small = {}
        for module, factor in mixture.factors().items():
            a, b, errors[module] = truncate(factor.a, factor.b, rank, max_error)
            small[module] = replace(factor, a=a, b=b)
        tensors = {k: t.detach().to("cpu", copy=True) for k, t in lora_tensors(small).items()}
        require_finite(tensors, f"the fold into expert {card.name!r}")
        settings = lora_config({name: len(f.a) for name, f in small.items()}, mixture.has_bias, config)
    size = sum(t.numel() for t in tensors.values())
    return Collapsed(Expert(tensors, settings, replace(card, parameters=size)), errors)


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise unless all values of a result are finite.

    Raises:
        RefusedError: names every tensor that is not.
    """
    if problems := tensor_problems({k: tuple(t.shape) for k, t in tensors.items()}, tensors):
        raise RefusedError(
            f"{what} has no finite result; look for weights too large for its precision, or for training that diverged:"
            f"{listed(problems)}"
        )


def truncate(
    a: Tensor, b: Tensor, rank: int | None = None, max_error: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """Best factors of B A of a smaller rank, and their relative Frobenius error, without forming B A.

    Args:
        a: ``[R, in]``; b: ``[out, R]``.
        rank: the largest rank allowed; ``None`` does not limit it.
        max_error: take the smallest rank, but at least 1, that keeps the error at or below this.

    Returns:
        A ``[r, in]``, B ``[out, r]`` with r ≤ min(rank, R, in, out), and ‖BA − B'A'‖/‖BA‖.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    kept = len(s) if rank is None else min(rank, len(s))
    total = float(s.norm())
    if max_error is not None and total:
        left = s.square().flip(0).cumsum(0).flip(0).sqrt() / total  # the error of keeping 0, 1, 2 … of them
        kept = min(kept, max(1, int((left > max_error).sum())))
    root = s[:kept].sqrt()
    error = float(s[kept:].norm()) / total if total else 0.0
    return ((root[:, None] * vt[:kept]) @ qa.T).to(a), ((qb @ u[:, :kept]) * root).to(b), error


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(PREFIX + group_name(k, "module") for k in tensors))
