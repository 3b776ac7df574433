"""`verify`: prove a saved expert again, from its files, its backbone, and the experts that it was made of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import PituningError
from pituning.experts.expert import Expert
from pituning.experts.export import PROBES
from pituning.experts.health import broken, without_effect
from pituning.experts.pool import ExpertPool
from pituning.interpolation.build import is_lora, lora_factors, without_product_form
from pituning.interpolation.operators import repeat_merge
from pituning.methods.attach import attached, restore_copied, strip
from pituning.problems import listed, tensor_problems

TOLERANCE = 1e-5
"""Largest allowed relative Frobenius difference between a merge and its repetition; float32 sums in another order."""


@dataclass(frozen=True)
class Check:
    """One proof: whether it came out, and what was found. ``ok`` is ``None`` for what could not be tried."""

    name: str
    ok: bool | None
    found: str


def verify(folder: str | Path, backbone: Backbone | None = None, pool: ExpertPool | None = None) -> list[Check]:
    """All proofs that an expert's folder allows.

    Args:
        folder: an expert's.
        backbone: without it, nothing is proven that needs a model.
        pool: holds the experts that a merge was made of; without it, a merge is not repeated.

    Returns:
        the checks, in order; after the first that fails because the folder cannot be read there are no more.
    """
    folder = Path(folder)
    try:
        expert = Expert.load(folder)
    except PituningError as error:
        return [Check("files", False, str(error))]
    size = sum(t.numel() for t in expert.tensors.values())
    checks = [Check("files", True, f"{len(expert.tensors)} tensors, {size:,} numbers; hashes and shapes as recorded")]
    problems = broken(expert)
    idle = without_effect(expert)
    said = f"no effect in {len(idle)} modules, such as {idle[0]}" if idle else "every module has an effect"
    checks.append(Check("health", not problems, "; ".join(problems) or said))
    if backbone is None:
        needed = "no backbone given"
        checks += [Check(name, None, needed) for name in ("backbone", "plain PEFT")]
    else:
        checks += [_on_backbone(expert, backbone), _in_peft(expert, folder, backbone)]
    checks.append(_repeated(expert, pool, backbone))
    return checks


def _on_backbone(expert: Expert, backbone: Backbone) -> Check:
    try:
        expert.verify(backbone)
    except PituningError as error:
        return Check("backbone", False, str(error))
    known = "its fingerprint is the card's" if expert.card.fingerprint else "the card names no fingerprint"
    return Check("backbone", True, f"every tensor fits {backbone.name}; {known}")


def _in_peft(expert: Expert, folder: Path, backbone: Backbone) -> Check:
    """PEFT's own loader holds the folder's tensors, bit by bit, and the model computes the same with them."""
    name = "plain PEFT"
    batch = backbone.collate(PROBES)
    try:
        with attached(backbone, expert.config, expert.tensors), torch.no_grad():
            expected = backbone.loss(batch)
    except PituningError as error:
        return Check(name, False, str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = _loaded(backbone, folder)
        except Exception as error:  # whatever PEFT's loader raises: it does not read this folder
            return Check(name, False, f"PEFT cannot load {folder} onto {backbone.name}: {error}")
        try:
            found = {
                k: t.detach().cpu() for k, t in get_peft_model_state_dict(loaded, save_embedding_layers=False).items()
            }
            backbone.model.eval()
            with torch.no_grad():
                losses = backbone.loss(batch)
        finally:
            restore_copied(backbone)
            loaded.unload()
            backbone.model.requires_grad_(False).eval()
    if problems := _differences(expert.tensors, found):
        return Check(name, False, f"PEFT holds other tensors than the folder:{listed(problems)}")
    if not torch.equal(losses, expected):
        return Check(name, False, f"the losses of the probes are {losses.tolist()}, expected {expected.tolist()}")
    return Check(name, True, f"{len(found)} keys and values equal, losses of {len(PROBES)} probes equal")


def _loaded(backbone: Backbone, folder: Path) -> PeftModel:
    """The folder as PEFT loads it; where it cannot, the bare backbone is back."""
    try:
        return PeftModel.from_pretrained(backbone.model, folder, autocast_adapter_dtype=False)
    except BaseException:
        strip(backbone)
        raise


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    problems = tensor_problems({k: tuple(t.shape) for k, t in expected.items()}, found)
    for key in expected.keys() & found.keys():
        if expected[key].shape == found[key].shape and not torch.equal(expected[key].to(found[key].dtype), found[key]):
            problems.append(f"tensor {key} {list(found[key].shape)} has other values")
    return problems


def _repeated(expert: Expert, pool: ExpertPool | None, backbone: Backbone | None) -> Check:
    """An untrained merge is made again from its experts and compared."""
    name, training = "lineage", expert.card.training
    if not expert.card.lineage:
        return Check(name, None, "not made of other experts")
    parents = [str(p["name"]) for p in expert.card.lineage]
    if "operator" not in training:
        return Check(name, None, f"trained, so it cannot be computed again from {', '.join(parents)}")
    if pool is None:
        return Check(name, None, f"no pool given that holds {', '.join(parents)}")
    try:
        again = repeat_merge(expert, [pool.load(n) for n in parents], backbone)
    except PituningError as error:
        return Check(name, False if pool.names() else None, str(error))
    if again is None:
        return Check(name, None, f"{training['operator']} needs more than the experts to be repeated")
    difference = effect_difference(expert, again)
    return Check(
        name,
        difference <= TOLERANCE,
        f"{training['operator']} of {', '.join(parents)}, made again, differs by {difference:.1e} relative",
    )


def effect_difference(left: Expert, right: Expert) -> float:
    """Largest relative difference over the modules: of ΔW and LoRA biases, of the tensors for other methods."""

    def dense(expert: Expert) -> dict[str, Tensor]:
        if not is_lora(expert) or without_product_form(expert):
            return {k: t.double() for k, t in expert.tensors.items()}
        factors = lora_factors(expert)
        deltas = {m: f.scaling * (f.b.double() @ f.a.double()) for m, f in factors.items()}
        biases = {f"{m} bias": f.scaling * f.bias.double() for m, f in factors.items() if f.bias is not None}
        return {**deltas, **biases}

    one, two = dense(left), dense(right)
    if one.keys() != two.keys() or any(one[k].shape != two[k].shape for k in one):
        return float("inf")
    return max(float((one[k] - two[k]).norm() / one[k].norm().clamp_min(1e-30)) for k in one)


def as_document(checks: list[Check]) -> list[dict[str, Any]]:
    """Checks as plain values."""
    return [{"check": c.name, "ok": c.ok, "found": c.found} for c in checks]
