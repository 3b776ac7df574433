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
from pituning.backbones.ofa.problems import listed
from pituning.errors import PituningError, RefusedError

LoraWeights = Literal["merged", "unmerged"]
NOISE = 16
"""Roundings, in units of the stored dtype's precision relative to a weight's norm, that merging and taking apart leave;
loralib does both at every validation."""

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
            for part, tensor in (("weight", weight), ("bias", bias)):
                if not _same(frozen.setdefault(f"{pair.module}.{part}", tensor), tensor):
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
    noise = NOISE * torch.finfo(saved.dtype).eps * float(base.double().norm())
    difference = saved.double() - base.double()
    rests = {"unmerged": float(difference.norm()), "merged": float((difference - product).norm())}
    state = min(rests, key=rests.__getitem__)
    if not rests[state] <= noise:
        return (
            f"differs from the base by {rests['unmerged']:.3g}, and by {rests['merged']:.3g} with the product taken out "
            f"(norms; rounding stays below {noise:.3g}), so this is not the base that it was trained on"
        ), None
    if said is not None and state != said and rests[said] > noise:
        return f"is {state}, as the base shows, not {said}", None
    return state, base


def _same(one: Tensor, other: Tensor) -> bool:
    noise = NOISE * torch.finfo(one.dtype).eps * float(one.double().norm())
    return one is other or (one.shape == other.shape and float((one.double() - other.double()).norm()) <= noise)
