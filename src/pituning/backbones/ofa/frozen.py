"""What a reference checkpoint's "frozen" backbone really is: LoRA's products taken out, and what training has changed.

loralib adds B A / r to a saved weight or not, depending on whether evaluation or training ran last. A BatchNorm's running
statistics move in every training of the reference, frozen or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pituning.backbones.ofa.names import FairseqParts, fairseq_name
from pituning.errors import PituningError, RefusedError
from pituning.problems import listed

LoraWeights = Literal["merged", "unmerged"]
NOISE = 16
"""Roundings, in units of float32's precision relative to a weight's norm, that merging and taking apart leave; loralib does
both at every validation."""
HALF_NOISE = 3
"""The same for an entry in half precision, in units in its last place. Relative to the norm they would hide real changes."""
LEFT = 0.05
"""Part of the product that the rest may hold; roundings hold none of a product that is larger than they are."""

_STATISTICS = (".running_mean", ".running_var")


@dataclass(frozen=True)
class Change:
    """A tensor of the backbone that is not the base's.

    Attributes:
        name: ours.
        largest: largest absolute difference of an entry.
    """

    name: str
    largest: float

    @property
    def is_statistic(self) -> bool:
        """Whether it is a running mean or variance of a BatchNorm."""
        return self.name.endswith(_STATISTICS)


@dataclass(frozen=True)
class Factors:
    """One expert's LoRA factors for one projection.

    Attributes:
        module: the projection, in our names.
        number: of the expert among interpolated ones; ``None`` for a single one.
        a, b: ``[r, in]`` and ``[out, r]``.
    """

    module: str
    number: int | None
    a: Tensor
    b: Tensor


def take_out_products(
    parts: FairseqParts, factors: Sequence[Factors], base: Mapping[str, Tensor] | None, said: LoraWeights | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The backbone with each projection as it was without LoRA, and the file's names of those that held the product.

    Args:
        base: the frozen backbone, in our names, where there is one to compare with.
        said: what the user says, where nothing can be compared.

    Raises:
        RefusedError: names each weight that is neither the base's nor the base's plus the product.
    """
    if base is None and said is None:
        raise RefusedError(
            "loralib saves its projections with the product merged in or not, depending on whether validation ran last, and "
            "the file does not say which; give the base checkpoint, from which it can be told (--base), or say so "
            "(--lora-weights merged or unmerged)"
        )
    frozen: dict[str, Tensor] = {}
    first: dict[str, Factors] = {}
    merged, problems = [], []
    for pair in factors:
        saved, bias, name = _saved(parts, pair)
        state, weight = _without_product(saved, pair, None if base is None else base.get(f"{pair.module}.weight"), said)
        if base is not None and f"{pair.module}.weight" not in base:
            problems.append(f"{name}: the base has no {pair.module}.weight")
        elif weight is None:
            problems.append(f"{name}: {state}")
        else:
            merged += [name] * (state == "merged")
            first.setdefault(pair.module, pair)
            theirs = frozen.setdefault(f"{pair.module}.weight", weight)
            same = {
                "weight": weight is theirs or _same(weight, pair, theirs, first[pair.module]),
                "bias": torch.equal(frozen.setdefault(f"{pair.module}.bias", bias), bias),
            }
            for part in (p for p, equal in same.items() if not equal):
                problems.append(f"{name}: its {part} is not that of expert 0, so they had different backbones")
    if problems:
        raise RefusedError("the projections under LoRA cannot be told apart from its products:" + listed(problems))
    return {**parts.backbone, **frozen}, tuple(merged)


def changes_of(backbone: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> tuple[Change, ...]:
    """Where two backbones differ; the counters of BatchNorm have no effect and do not count.

    A checkpoint in half precision is compared with the base rounded to it.

    Raises:
        PituningError: if they do not have the same tensors.
    """
    problems = [f"the base lacks {k}" for k in backbone if k not in base]
    problems += [f"the checkpoint lacks {k}" for k in base if k not in backbone]
    shared = [k for k in backbone if k in base]
    problems += [
        f"{k} is {list(backbone[k].shape)}, in the base {list(base[k].shape)}"
        for k in shared
        if backbone[k].shape != base[k].shape
    ]
    if problems:
        raise PituningError("the checkpoint is of another model than the base:" + listed(problems))
    changes = []
    for name in shared:
        if name.endswith(".num_batches_tracked"):
            continue
        own, theirs = backbone[name], base[name].to(backbone[name].dtype)
        if not torch.equal(own, theirs):
            changes.append(Change(name, float((own.double() - theirs.double()).abs().max())))
    return tuple(changes)


def _saved(parts: FairseqParts, pair: Factors) -> tuple[Tensor, Tensor, str]:
    """A projection's saved weight and bias, and the weight's name in the file."""
    stem = fairseq_name(f"{pair.module}.weight").removesuffix(".weight")
    if pair.number is not None:
        name = f"{stem}.{pair.number}"
        return parts.expert[f"{name}.weight"], parts.expert[f"{name}.bias"], f"{name}.weight"
    missing = [f"{stem}.{p}" for p in ("weight", "bias") if f"{pair.module}.{p}" not in parts.backbone]
    if missing:
        raise PituningError(f"the checkpoint lacks {', '.join(missing)}, to which its LoRA factors belong")
    return parts.backbone[f"{pair.module}.weight"], parts.backbone[f"{pair.module}.bias"], f"{stem}.weight"


def _without_product(
    saved: Tensor, pair: Factors, base: Tensor | None, said: LoraWeights | None
) -> tuple[str, Tensor | None]:
    """Whether ``saved`` holds the product, and the frozen weight; or what is wrong, and ``None``."""
    product = pair.b.double() @ pair.a.double() / len(pair.a)
    if saved.shape != product.shape or (base is not None and base.shape != saved.shape):
        shapes = ", ".join(str(list(t.shape)) for t in (saved, product, base) if t is not None)
        return f"the saved weight, the product and the base have shapes {shapes}", None
    if base is None:
        return ("unmerged", saved) if said == "unmerged" else ("merged", (saved.double() - product).to(saved.dtype))
    allowed = _rounding(base, pair, saved.dtype)
    difference = saved.double() - base.double()
    rests = {"unmerged": difference, "merged": difference - product}
    norms = {name: float(rest.norm()) for name, rest in rests.items()}
    problems = {name: _beyond_rounding(rest, product, allowed, saved.dtype) for name, rest in rests.items()}
    state = min(rests, key=lambda name: (bool(problems[name]), norms[name]))
    if problems[state]:
        closer = min(norms, key=norms.__getitem__)
        return (
            f"differs from the base by {norms['unmerged']:.3g}, and by {norms['merged']:.3g} with the product taken out "
            f"(norms; {problems[closer]}), so this is not the base that it was trained on"
        ), None
    if said is not None and problems[said]:
        return f"is {state}, as the base shows, not {said}", None
    return state, base


def _is_half(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).bits < 32


def _rounding(weight: Tensor, pair: Factors, dtype: torch.dtype) -> Tensor:
    """What rounding leaves at most: in half precision of each entry, else one number, the norm of all.

    In half precision the factors are rounded, too, and an entry of the product is a sum that may cancel.
    """
    kind = torch.finfo(dtype)
    if _is_half(dtype):
        own, b, a = (t.double().abs().clamp(min=kind.tiny) for t in (weight, pair.b, pair.a))
        allowed = (own + b @ a / len(a)) * (HALF_NOISE * kind.eps)
    else:
        allowed = torch.tensor(NOISE * kind.eps * float(weight.double().norm()))
    return allowed


def _fits(rest: Tensor, allowed: Tensor, dtype: torch.dtype) -> bool:
    return bool((rest.abs() <= allowed).all()) if _is_half(dtype) else bool(rest.norm() <= allowed)


def _same(one: Tensor, pair: Factors, other: Tensor, others: Factors) -> bool:
    """Whether two experts had the same weight, before rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    allowed = torch.maximum(_rounding(one, pair, one.dtype), _rounding(other, others, one.dtype))
    return _fits(one.double() - other.double(), allowed, one.dtype)


def _beyond_rounding(rest: Tensor, product: Tensor, allowed: Tensor, dtype: torch.dtype) -> str:
    """Why a difference is more than rounding; empty where it is not."""
    if not _fits(rest, allowed, dtype):
        entries = f", and {HALF_NOISE} units in each entry's last place" * _is_half(dtype)
        return f"rounding stays below {float(allowed.norm()):.3g}{entries}"
    if product.norm() <= allowed.norm() / (HALF_NOISE if _is_half(dtype) else 1):
        return ""  # rounding may have swallowed the product
    left = float((rest * product).sum() / product.square().sum())
    return "" if abs(left) < LEFT else f"it holds {left:.2g} times the product, which no rounding does"
