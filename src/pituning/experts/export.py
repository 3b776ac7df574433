"""An expert folded into its backbone: an ordinary transformers model, proven to compute what backbone and expert compute."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, RefusedError
from pituning.example import Example
from pituning.experts.expert import Expert, atomic_folder
from pituning.methods.attach import attached, peft_config
from pituning.problems import listed

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest allowed relative difference of the losses of the probes, by the backbone's dtype: folding rounds once more."""

PROBES = tuple(
    Example(id=f"probe/{n}", texts=(text,), prompt=text, target=target, choices=("yes", "no"))
    for n, (text, target) in enumerate(
        (
            ("is this the merged model?", "yes"),
            ("the quick brown fox jumps over the lazy dog", "no"),
            ("1 + 1 = 3", "no"),
        )
    )
)


@dataclass(frozen=True)
class Exported:
    """A merged model's folder, and the largest relative difference of the probes' losses to backbone and expert."""

    folder: Path
    difference: float


def export_merged(
    backbone: Backbone, expert: Expert, folder: str | Path, probes: Sequence[Example] = PROBES
) -> Exported:
    """Write backbone and expert as one model that transformers alone loads.

    Needs the memory of a second copy of the backbone.

    Of an encoder the proof takes the label texts' embeddings from the bare backbone, as the expert was trained. Loaded as a
    backbone, the merged encoder encodes the label texts itself, so that its answers are not those of backbone and expert; its
    embeddings of inputs are.

    Args:
        folder: a new folder.
        probes: examples on which the merged model's losses must be those of the backbone with the expert.

    Raises:
        RefusedError: for methods that no weight of the base can stand for (prefix, soft prompt, bottleneck), and for an
            adapted weight that the model uses in a second place.
        ExpertError: if the merged model computes something else, or the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise ExpertError(f"{folder} exists; a merged model is written to a new folder")
    expert.require_backbone(backbone)
    expected = _losses(backbone, probes, expert)
    merged = _merged(backbone, expert)
    twin = copy.copy(backbone)
    twin.model = merged.eval().requires_grad_(False)
    found = _losses(twin, probes)
    difference = float(((found - expected).abs() / expected.abs().clamp_min(1e-3)).max())
    allowed = TOLERANCE[next(p.dtype for p in merged.parameters() if p.is_floating_point())]
    if not difference <= allowed:
        raise ExpertError(
            f"the merged model is not backbone and expert {expert.name!r}: the losses of the probes differ by {difference:.2g} "
            f"relative, and at most {allowed:g} is rounding; nothing was written"
        )
    state = {k: t.detach().clone() for k, t in merged.state_dict().items()}
    with atomic_folder(folder) as target:
        merged.save_pretrained(target)
        backbone.tokenizer.save_pretrained(target)
        _require_equal(state, type(merged), target)
    return Exported(folder, difference)


def _merged(backbone: Backbone, expert: Expert) -> Any:
    """A copy of the backbone's model with the expert folded in."""
    model = copy.deepcopy(backbone.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        peft_model = get_peft_model(model, peft_config(expert.config), autocast_adapter_dtype=False)
    with attached(backbone, expert.config, expert.tensors) as site, torch.no_grad():
        live = dict(peft_model.named_parameters())
        for key, name in site.live_names.items():
            live[f"base_model.model.{name}"].copy_(expert.tensors[key])
    _require_untied(peft_model, expert)
    try:
        return peft_model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise RefusedError(
            f"expert {expert.name!r} of method {expert.card.method!r} cannot be folded into the backbone: {error}"
        ) from error


def _require_untied(peft_model: nn.Module, expert: Expert) -> None:
    """A weight with two names would change in both places."""
    names: dict[int, list[str]] = {}
    for name, parameter in peft_model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removeprefix("base_model.model."))
    problems = []
    for name, layer in peft_model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for part, parameter in layer.get_base_layer().named_parameters():
                here = f"{name.removeprefix('base_model.model.')}.{part}"
                others = {n.replace(".base_layer", "") for n in names[id(parameter)]} - {here}
                if others:
                    problems.append(f"{here} {list(parameter.shape)} is also {', '.join(sorted(others))}")
    if problems:
        raise RefusedError(
            f"expert {expert.name!r} adapts weights that the model uses in more than one place; folding it in would change "
            f"the others, too:{listed(problems)}"
        )


def _losses(backbone: Backbone, probes: Sequence[Example], expert: Expert | None = None) -> Tensor:
    batch = backbone.collate(probes)
    with torch.no_grad():
        if expert is None:
            return backbone.loss(batch).double()
        with attached(backbone, expert.config, expert.tensors):
            return backbone.loss(batch).double()


def _require_equal(state: dict[str, Tensor], model_type: Any, folder: Path) -> None:
    """Proof that what was written is what was tested."""
    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    found = model_type.from_pretrained(folder, dtype=dtype).state_dict()
    problems = [f"{k} is missing" for k in state.keys() - found.keys()]
    problems += [f"{k} differs" for k in state.keys() & found.keys() if not torch.equal(state[k].cpu(), found[k])]
    if problems:
        raise ExpertError(f"the written model does not load as it was:{listed(problems)}")
