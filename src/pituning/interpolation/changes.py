"""What experts change, dense or as factors, and the way back to one expert without approximation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pituning.errors import RefusedError
from pituning.experts.expert import Expert, tensor_hash
from pituning.interpolation.build import (
    MEANING,
    PREFIX,
    ZEROS,
    common_start,
    group_name,
    is_lora,
    lora_config,
    lora_factors,
    on_cpu,
)
from pituning.interpolation.collapse import require_finite, truncate
from pituning.interpolation.mixture import LowRank, lora_tensors
from pituning.problems import listed


@dataclass(frozen=True)
class Built:
    """Tensors and configuration of a merged expert, and per module the relative error of its truncation."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    errors: Mapping[str, float]


@torch.no_grad()
def linear(
    experts: Sequence[Expert],
    coefficients: Sequence[float],
    rank: int | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Built:
    """φ_0 + Σ_k c_k (φ_k − φ_0) without approximation: LoRA stacks its factors, other methods add their tensors.

    One expert at coefficient 1 comes back bit by bit, whatever its method.

    Args:
        coefficients: c ``[K]``; where they sum to one, φ_0 cancels and is not needed.
        rank: for LoRA, the largest rank of the result.

    Raises:
        RefusedError: if all coefficients are zero, φ_0 is needed and not known, or the method has no rank.
    """
    _require_rank(experts, rank)
    experts = on_cpu(experts)
    used = [(e, c) for e, c in zip(experts, coefficients, strict=True) if c]
    if not used:
        raise RefusedError(f"all weights of {names(experts)} are zero, so nothing is left to merge")
    if len(used) == 1 and used[0][1] == 1 and rank is None:
        return parameter_space(used[0][0], used[0][0].tensors)
    if is_lora(experts[0]):
        return _stacked(used, rank)
    _require_parameter_space(experts)
    total = sum(c for _, c in used)
    cancels = abs(total - 1) < 1e-12
    start = {} if cancels else _start(experts, initial)
    dtype, tensors = common_dtype(experts), {}
    for key in experts[0].tensors:
        mixed = torch.stack([c * e.tensors[key].double() for e, c in used]).sum(0)
        tensors[key] = (mixed if cancels else mixed + (1 - total) * start[key]).to(dtype)
    return parameter_space(experts[0], tensors)


@torch.no_grad()
def elementwise(
    experts: Sequence[Expert],
    merged: Callable[[str, Tensor], Tensor],
    rank: int | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Built:
    """Merge what the experts change, entry by entry, in float64.

    Args:
        merged: from the name of a module (LoRA: its ΔW; ``….bias`` for a LoRA bias) or tensor, and the experts' changes
            ``[K, …]``, to one change ``[…]``.
        rank: for LoRA, the largest rank of the result, by default the sum of the experts' ranks in the module.
        initial: φ_0, for methods without a natural one.

    Raises:
        RefusedError: as :func:`linear`.
    """
    _require_rank(experts, rank)
    experts = on_cpu(experts)
    if is_lora(experts[0]):
        return _dense(experts, merged, rank)
    _require_parameter_space(experts)
    start, dtype = _start(experts, initial), common_dtype(experts)
    tensors = {
        key: (s + merged(key, torch.stack([e.tensors[key].double() - s for e in experts]))).to(dtype)
        for key, s in start.items()
    }
    return parameter_space(experts[0], tensors)


def parameter_space(template: Expert, tensors: Mapping[str, Tensor]) -> Built:
    """Tensors that an expert's own configuration carries, exact as they are."""
    modules = dict.fromkeys(PREFIX + group_name(key, "module") for key in tensors)
    return Built(dict(tensors), dict(template.config), dict.fromkeys(modules, 0.0))


def factors_of(experts: Sequence[Expert]) -> list[dict[str, LowRank]]:
    """The LoRA factors of each expert by module.

    Raises:
        RefusedError: if the ΔW of a module differ in shape.
    """
    found = [lora_factors(expert) for expert in experts]
    first: dict[str, tuple[str, list[int]]] = {}
    for expert, factors in zip(experts, found, strict=True):
        for module, f in factors.items():
            shape = [len(f.b), f.a.shape[1]]
            other, expected = first.setdefault(module, (expert.name, shape))
            if shape != expected:
                raise RefusedError(
                    f"experts {other!r} and {expert.name!r} cannot be merged: ΔW of {module} is {expected} in the first and "
                    f"{shape} in the second"
                )
    return found


def has_natural_start(expert: Expert) -> bool:
    """Whether the expert's method has a φ_0 by itself, the tensors that change nothing."""
    return is_lora(expert) or expert.config.get("peft_type") in ZEROS


def common_dtype(experts: Sequence[Expert]) -> torch.dtype:
    """The widest of the experts' types, float32 at least: a merge of half-precision experts is not rounded to half."""
    return reduce(torch.promote_types, (t.dtype for e in experts for t in e.tensors.values()), torch.float32)


def names(experts: Sequence[Expert]) -> str:
    """The experts' names for a message."""
    return ("expert " if len(experts) == 1 else "experts ") + ", ".join(repr(e.name) for e in experts)


def _stacked(used: Sequence[tuple[Expert, float]], rank: int | None) -> Built:
    """Σ c_k ΔW_k as [A_1; …; A_K] and [c_1 s_1 B_1, …, c_K s_K B_K]."""
    experts = [e for e, _ in used]
    factors = factors_of(experts)
    merged, errors = {}, {}
    for module in _modules(factors):
        held = [(f[module], c * f[module].scaling) for f, (_, c) in zip(factors, used, strict=True) if module in f]
        a = torch.cat([f.a.double() for f, _ in held])
        b = torch.cat([c * f.b.double() for f, c in held], dim=1)
        biases = [c * f.bias.double() for f, c in held if f.bias is not None]
        errors[module] = 0.0
        if rank is not None:
            require_finite({f"A of {module}": a, f"B of {module}": b}, f"the merge of {names(experts)}")
            a, b, errors[module] = truncate(a, b, rank)
        merged[module] = LowRank(a, b, 1.0, torch.stack(biases).sum(0) if biases else None)
    return _lora(experts, merged, errors)


def _dense(experts: Sequence[Expert], merged: Callable[[str, Tensor], Tensor], rank: int | None) -> Built:
    factors = factors_of(experts)
    found, errors = {}, {}
    for module in _modules(factors):
        held = [f.get(module) for f in factors]
        like = next(f for f in held if f is not None)
        zeros = torch.zeros(len(like.b), like.a.shape[1], dtype=torch.float64)
        changes = [zeros if f is None else f.scaling * (f.b.double() @ f.a.double()) for f in held]
        largest = sum(len(f.a) for f in held if f is not None) if rank is None else rank
        delta = merged(module, torch.stack(changes))
        require_finite({f"ΔW of {module}": delta}, f"the merge of {names(experts)}")
        a, b, errors[module] = _factored(delta, largest)
        bias = None
        if any(f is not None and f.bias is not None for f in held):
            shifts = [zeros[:, 0] if f is None or f.bias is None else f.scaling * f.bias.double() for f in held]
            bias = merged(f"{module}.bias", torch.stack(shifts))
        found[module] = LowRank(a, b, 1.0, bias)
    return _lora(experts, found, errors)


def _factored(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A and B of a dense ΔW ``[out, in]`` by truncated SVD, and the relative error."""
    small = torch.eye(min(delta.shape), dtype=delta.dtype)
    return truncate(delta, small, rank) if len(delta) == len(small) else truncate(small, delta, rank)


def _lora(experts: Sequence[Expert], factors: Mapping[str, LowRank], errors: Mapping[str, float]) -> Built:
    """Factors of scaling 1 as a LoRA expert; PEFT has a bias on all modules or on none."""
    dtype, biased = common_dtype(experts), any(f.bias is not None for f in factors.values())
    typed = {}
    for module, f in factors.items():
        bias = f.b.new_zeros(len(f.b)) if f.bias is None else f.bias
        typed[module] = replace(f, a=f.a.to(dtype), b=f.b.to(dtype), bias=bias.to(dtype) if biased else None)
    config = lora_config({n: len(f.a) for n, f in typed.items()}, biased, experts[0].config)
    return Built(lora_tensors(typed), config, dict(errors))


def _modules(factors: Iterable[Mapping[str, LowRank]]) -> list[str]:
    return list(dict.fromkeys(module for f in factors for module in f))


def _start(experts: Sequence[Expert], initial: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """φ_0 in float64: the method's natural one, or the given one, proven to be that of every expert."""
    natural = has_natural_start(experts[0])
    start = common_start(experts, None) if natural else _given_start(experts, initial)
    return {key: start[key].double().to(experts[0].tensors[key].device) for key in experts[0].tensors}


def _given_start(experts: Sequence[Expert], initial: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    if initial is None:
        raise RefusedError(
            f"{names(experts)} are of method {experts[0].card.method!r}, which does not start at zero, so what they change is "
            "unknown without their common start φ_0: pass initial=…, from pituning.experts.expert.initial_of"
        )
    expected, found = ({k: list(t.shape) for k, t in m.items()} for m in (experts[0].tensors, initial))
    if wrong := [k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)]:
        none = "no such tensor"
        rows = (f"{k}: expected {expected.get(k, none)}, found {found.get(k, none)}" for k in wrong)
        raise RefusedError(f"initial is not the start of {names(experts)}:{listed(rows)}")
    given = tensor_hash(initial)
    for expert in experts:
        if expert.card.init_hash != given:
            raise RefusedError(
                f"expert {expert.name!r} was trained from {expert.card.init_hash or 'an unknown start'}, not from the given "
                f"{given}, so what it changed is unknown: leave it out, or use an operator without initial, such as "
                "uniform_soup"
            )
    return initial


def _require_rank(experts: Sequence[Expert], rank: int | None) -> None:
    if rank is None:
        return
    if not is_lora(experts[0]):
        raise RefusedError(f"rank applies to LoRA experts only; {experts[0].name!r} is of {experts[0].card.method!r}")
    if rank < 1:
        raise RefusedError(f"rank must be at least 1, not {rank}")


def _require_parameter_space(experts: Sequence[Expert]) -> None:
    kind = experts[0].config.get("peft_type")
    if kind not in MEANING:
        raise RefusedError(
            f"{names(experts)} are of method {kind!r}, whose tensors mean nothing each on its own, so they cannot be scaled, "
            f"trimmed or averaged; LORA and {', '.join(MEANING)} can"
        )
