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
    kind = str(expert.config.get("peft_type"))
    if kind not in _GATES or expert.config.get("use_dora"):
        return []
    endings, neutral = _GATES[kind]
    alive: dict[str, bool] = {}
    for key, tensor in expert.tensors.items():
        ending = next((e for e in endings if key.endswith(e)), None)
        if ending is not None:
            module = key.removesuffix(ending).rstrip(".")
            alive[module] = alive.get(module, False) or bool((tensor != neutral).any())
    return [module for module, does in alive.items() if not does]


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
    idle, touched = without_effect(expert), _modules(expert)
    if touched and set(idle) >= touched:
        problems.append(
            f"it has no effect: all of its {len(touched)} modules are as before training, {idle[0]} for one"
        )
    return problems


def require_sound(expert: Expert) -> None:
    """Raise if an expert is :func:`broken`.

    Raises:
        ExpertError: lists what is wrong.
    """
    if problems := broken(expert):
        raise ExpertError(f"expert {expert.name!r} is broken:{listed(problems)}")


def _modules(expert: Expert) -> set[str]:
    endings, _ = _GATES.get(str(expert.config.get("peft_type")), ((), 0.0))
    found = ((key, next((e for e in endings if key.endswith(e)), None)) for key in expert.tensors)
    return {key.removesuffix(ending).rstrip(".") for key, ending in found if ending is not None}
