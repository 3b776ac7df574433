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
from pituning.interpolation.mixture import Mixture, ProductMixture


@dataclass(frozen=True)
class Collapsed:
    """A collapsed expert and, per module, the relative Frobenius error of its ΔW (0 where the fold is exact)."""

    expert: Expert
    errors: Mapping[str, float]


@torch.no_grad()
def collapse(mixture: Mixture, config: Mapping[str, Any], card: ExpertCard, rank: int | None = None) -> Collapsed:
    """Fold a mixture into one expert.

    Args:
        mixture: from :func:`pituning.interpolation.build_mixture`, trained or not.
        config: the configuration that came with it.
        rank: for LoRA, the largest rank of the result; ``None`` keeps the exact rank Σ r_k. Smaller ranks are the best
            approximation of every ΔW in the Frobenius norm (Eckart–Young), by QR of the factors and a small SVD.

    Raises:
        RefusedError: if a rank is asked for in a method that has none.
    """
    tensors = {k: t.detach().clone() for k, t in mixture().items()}
    errors = dict.fromkeys(_modules(tensors), 0.0)
    settings = dict(config)
    if rank is not None:
        if not isinstance(mixture, ProductMixture):
            raise RefusedError("rank applies to LoRA experts only; other methods collapse to their own shape exactly")
        if rank < 1:
            raise RefusedError(f"rank must be at least 1, not {rank}")
        ranks = {}
        for module, (a, b) in mixture.factors().items():
            small_a, small_b, errors[module] = truncate(a, b, rank)
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = small_a, small_b
            ranks[module] = small_a.shape[0]
        settings = lora_config(ranks, config)
    size = sum(t.numel() for t in tensors.values())
    return Collapsed(Expert(tensors, settings, replace(card, parameters=size)), errors)


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best rank-``rank`` factors of B A and their relative Frobenius error, without forming B A.

    Args:
        a: ``[R, in]``; b: ``[out, R]``.

    Returns:
        A ``[r, in]``, B ``[out, r]`` with r = min(rank, R, in, out), and ‖BA − B'A'‖/‖BA‖.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    total = float(s.norm())
    error = float(s[kept:].norm()) / total if total else 0.0
    return ((root[:, None] * vt[:kept]) @ qa.T).to(a), ((qb @ u[:, :kept]) * root).to(b), error


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(PREFIX + group_name(k, "module") for k in tensors))
