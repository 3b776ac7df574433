"""Experts that load and yet cannot be right: no effect, not finite, or twice the same."""

from __future__ import annotations

import torch

from pituning.errors import ExpertError
from pituning.experts.expert import Expert, tensor_hash
from pituning.problems import listed

# For each method, the part of a tensor's name that says where zeros (ones for IA3) take away a module's whole effect.
_GATES = {
    "LORA": (("lora_B.weight", "lora_B.bias", "lora_embedding_B"), 0.0),
    "BITFIT": (("bitfit_bias",), 0.0),
    "BOTTLENECK": (("bottleneck_up.weight", "bottleneck_up.bias"), 0.0),
    "IA3": (("ia3_l",), 1.0),
}


def without_effect(expert: Expert) -> list[str]:
    """Names of the modules in which an expert does nothing, such as those with a LoRA B that is all zero."""
    return [module for module, does in _effects(expert).items() if not does]


def broken(expert: Expert) -> list[str]:
    """What shows that an expert cannot do what it was trained for; empty if nothing does.

    Reported are values that are NaN or infinite, tensors that are as they were before training, and an expert that changes
    nothing at all: what remains of a folder whose keys were lost when it was saved or converted.
    """
    problems = []
    for key, tensor in expert.tensors.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            problems.append(f"tensor {key} {list(tensor.shape)} holds {bad} values that are NaN or infinite")
    if not expert.tensors:
        problems.append("it holds no tensors")
    if expert.card.init_hash and expert.card.init_hash == tensor_hash(expert.tensors):
        problems.append("its tensors are those of the common start: it was never trained")
    effects = _effects(expert)
    if effects and not any(effects.values()):
        one = next(iter(effects))
        problems.append(f"it has no effect: all of its {len(effects)} modules are as before training, {one} for one")
    return problems


def require_sound(expert: Expert) -> None:
    """Raise if an expert is :func:`broken`.

    Raises:
        ExpertError: lists what is wrong.
    """
    if problems := broken(expert):
        raise ExpertError(f"expert {expert.name!r} is broken:{listed(problems)}")


def _effects(expert: Expert) -> dict[str, bool]:
    """Whether an expert does anything in each of its modules; empty for methods of which the tensors do not tell."""
    kind = str(expert.config.get("peft_type"))
    if kind not in _GATES or expert.config.get("use_dora"):
        return {}
    endings, neutral = _GATES[kind]
    found: dict[str, bool] = {}
    for key, tensor in expert.tensors.items():
        ending = next((e for e in endings if key.endswith(e)), None)
        if ending is not None:
            module = key.removesuffix(ending).rstrip(".")
            found[module] = found.get(module, False) or bool((tensor != neutral).any())
    return found
