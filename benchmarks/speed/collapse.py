"""Folding LoRA experts into one of a smaller rank: seconds, and the error that is reported, against PEFT's own way.

Run: python benchmarks/speed/collapse.py [--experts 4] [--modules 28] [--width 2048] [--rank 16] [--threads 2] [--peft]

Random experts of rank ``--rank`` on ``--modules`` square Linear layers of ``--width``; the result has rank ``--rank``, too.
Ours is QR of the stacked factors and a small SVD in float64, per module; with ``--peft`` the same merge is also done by
``add_weighted_adapter(combination_type="svd")``, once (minutes), and both errors are measured on the dense ΔW.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed.measuring import seconds
from pituning.experts import Expert, ExpertCard
from pituning.interpolation import Collapsed, build_mixture, collapse
from pituning.methods import config_dict

PREFIX = "base_model.model."
MODULE = f"{PREFIX}layers.0"


class Stack(nn.Module):
    """Square Linear layers, which nobody runs."""

    def __init__(self, modules: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(modules))


def random_expert(seed: int, modules: int, width: int, rank: int) -> Expert:
    """Factors of the size that training gives them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for n in range(modules):
        tensors[f"{PREFIX}layers.{n}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
        tensors[f"{PREFIX}layers.{n}.lora_B.weight"] = 0.05 * torch.randn(width, rank, generator=generator)
    config = config_dict(LoraConfig(r=rank, lora_alpha=rank, target_modules=[f"layers.{n}" for n in range(modules)]))
    return Expert(tensors, config, ExpertCard(f"expert {seed}"))


def pool(experts: int, modules: int, width: int, rank: int) -> tuple[list[Expert], list[float]]:
    """Random experts and weights that sum to one."""
    weights = torch.softmax(torch.randn(experts, generator=torch.Generator().manual_seed(0)), 0)
    return [random_expert(k, modules, width, rank) for k in range(experts)], weights.tolist()


def dense(expert: Expert, module: str) -> Tensor:
    """ΔW of a module, where its scaling is 1."""
    return expert.tensors[f"{module}.lora_B.weight"] @ expert.tensors[f"{module}.lora_A.weight"]


def folded(experts: list[Expert], weights: list[float], rank: int | None) -> Collapsed:
    """The experts' mixture as one expert: exactly, or to a rank."""
    mixture, config = build_mixture(experts, weights, granularity="model", train="none")
    return collapse(mixture, config, ExpertCard("folded"), rank=rank)


def weighted_sum(experts: list[Expert], weights: list[float], module: str) -> Tensor:
    """Σ w ΔW of a module, dense."""
    return torch.stack([w * dense(e, module) for w, e in zip(weights, experts, strict=True)]).sum(0)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """In the Frobenius norm."""
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def ours(experts: list[Expert], weights: list[float], rank: int, repeats: int) -> dict[str, Any]:
    """Median seconds from experts to the folded expert, and the reported and the true error of one module."""
    found = [seconds(lambda: folded(experts, weights, rank)) for _ in range(repeats)]
    last = folded(experts, weights, rank)
    true = relative_error(dense(last.expert, MODULE), weighted_sum(experts, weights, MODULE))
    return {"seconds": statistics.median(found), "reported error": last.errors[MODULE], "true error": true}


def loaded_in_peft(experts: list[Expert], modules: int, width: int) -> Any:
    """A PEFT model with every expert as an adapter, named by its number."""
    model: Any = get_peft_model(Stack(modules, width), LoraConfig(**_settings(experts[0])), adapter_name="0")
    for n in range(1, len(experts)):
        model.add_adapter(str(n), LoraConfig(**_settings(experts[n])))
    live = dict(model.named_parameters())
    with torch.no_grad():
        for n, expert in enumerate(experts):
            for key, tensor in expert.tensors.items():
                live[key.replace(".weight", f".{n}.weight")].copy_(tensor)
    return model


def merged_by_peft(model: Any, weights: list[float], combination: str, rank: int, name: str) -> None:
    """``add_weighted_adapter`` of all experts into an adapter of a new name; the rank is for ``svd`` alone."""
    names = [str(n) for n in range(len(weights))]
    options = {"svd_rank": rank} if combination == "svd" else {}
    model.add_weighted_adapter(names, weights, name, combination_type=combination, **options)


def pefts(experts: list[Expert], weights: list[float], rank: int, modules: int, width: int) -> dict[str, Any]:
    """The same by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded_in_peft(experts, modules, width)
        taken = seconds(lambda: merged_by_peft(model, weights, "svd", rank, "merged"))
    found = model.base_model.model.layers[0].get_delta_weight("merged")
    return {"seconds": taken, "true error": relative_error(found, weighted_sum(experts, weights, MODULE))}


def _settings(expert: Expert) -> dict[str, Any]:
    return {k: expert.config[k] for k in ("r", "lora_alpha", "target_modules")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"experts": 4, "modules": 28, "width": 2048, "rank": 16, "repeats": 5, "threads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peft", action="store_true", help="also run PEFT's svd combination")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experts, weights = pool(arguments.experts, arguments.modules, arguments.width, arguments.rank)
    results = {"ours": ours(experts, weights, arguments.rank, arguments.repeats)}
    if arguments.peft:
        results["peft svd"] = pefts(experts, weights, arguments.rank, arguments.modules, arguments.width)
    print(json.dumps({"shapes": vars(arguments), "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
