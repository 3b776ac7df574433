"""Put an expert's layers on a backbone for the length of a ``with`` block, and prove that its tensors fit."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from torch import Tensor, nn

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError
from pituning.problems import listed, tensor_problems

_PREFIX = "base_model.model."
_ADAPTER = "default"
_REFUSED = {
    "ADALORA": "its ranks are allocated by calls in the middle of its own training loop; use lora with a rank_pattern",
    "POLY": "it needs a task's number in every call",
    "SHADOW": "it runs a second model beside the backbone",
    "XLORA": "it is a mixture of experts on disk, not one expert's tensors; use pituning's interpolation",
    "ADAPTION_PROMPT": "it is no tuner that goes in and comes out by layers; use prefix",
}


@dataclass(frozen=True)
class Attached:
    """An expert sitting in a backbone.

    Attributes:
        parameters: the expert's live parameters under PEFT's file key names.
        live_names: from file key name to the parameter's name inside ``backbone.model``.
    """

    backbone: Backbone
    peft_model: PeftModel
    parameters: dict[str, nn.Parameter]
    live_names: dict[str, str]


@contextmanager
def attached(
    backbone: Backbone, config: PeftConfig | Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> Iterator[Attached]:
    """Attach an expert to a backbone; on leaving the block the bare backbone is back, unchanged.

    Args:
        backbone: must not carry an expert already.
        config: the PEFT configuration, or its dictionary form as in ``adapter_config.json``.
        tensors: the expert's tensors under PEFT's file key names; ``None`` leaves the initial values, which are a
            function of (backbone, configuration) only, so that all experts of a pool share their coordinates.

    Any method of PEFT that puts layers into the model will do, if what PEFT saves of it is what is trained.

    Raises:
        ExpertError: if a tensor is missing, extra, of another shape, or not finite; every one is named. Also for methods
            without layers of their own, and for those that train the backbone's tensors or save others than they train.
    """
    backbone.require_free()
    config = peft_config(config)
    _require_layers(config, backbone)
    base = {id(p) for p in backbone.model.parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # transformers 5.23 deprecates an attribute that PEFT 0.21 still asks for on every get_peft_model.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        if method_type(config) == "LN_TUNING":  # PEFT looks for a norm's in_features, which LN tuning does not use
            warnings.filterwarnings("ignore", message="Unsupported layer type", category=UserWarning)
        torch.manual_seed(_init_seed(backbone, config))
        try:
            peft_model = get_peft_model(backbone.model, config, autocast_adapter_dtype=False)
        except (ValueError, TypeError, NotImplementedError) as error:
            strip(backbone)
            raise ExpertError(
                f"method {method_type(config)} cannot be put on backbone {backbone.name!r}: {error}"
            ) from error
    try:
        backbone.model.eval()
        live = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        _require_own(config, live, base)
        # PEFT warns of biases in factors that it takes for broken ones, unless the state is given
        saved = get_peft_model_state_dict(peft_model, peft_model.state_dict(), _ADAPTER, save_embedding_layers=False)
        keys = _file_keys(live, saved)
        parameters = {keys[name]: p for name, p in live.items()}
        _require_saved(config, parameters, saved)
        if tensors is not None:
            check_tensors({k: tuple(p.shape) for k, p in parameters.items()}, tensors)
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(tensors[key])
        live_names = {keys[name]: name.removeprefix(_PREFIX) for name in live}
        del saved  # it would keep the initial tensors where they are replaced
        with backbone.occupied_by(peft_model):
            yield Attached(backbone, peft_model, parameters, live_names)
    finally:
        restore_copied(backbone)
        peft_model.unload()
        backbone.model.requires_grad_(False).eval()


def _require_layers(config: PeftConfig, backbone: Backbone) -> None:
    kind = method_type(config)
    reason = _REFUSED.get(kind)
    if config.is_prompt_learning:
        reason = "it lives in PEFT's own forward pass and puts no layer into the model; use prompt or prefix"
    if getattr(config, "trainable_token_indices", None):
        reason = "trainable_token_indices trains rows of the embeddings, which are shared with other modules"
    if getattr(config, "alora_invocation_tokens", None):
        reason = (
            "alora_invocation_tokens (aLoRA) takes effect only behind these tokens, whose places PEFT's own forward pass "
            "finds; without that, as here, the expert changes nothing; train it as plain lora"
        )
    if reason:
        raise ExpertError(f"method {kind} cannot be put on backbone {backbone.name!r}: {reason}")


def _require_own(config: PeftConfig, live: Mapping[str, nn.Parameter], base: set[int]) -> None:
    """An expert that trains the backbone's tensors could not be taken off again."""
    if touched := [f"{n.removeprefix(_PREFIX)} {list(p.shape)}" for n, p in live.items() if id(p) in base]:
        raise ExpertError(
            f"method {method_type(config)} would train tensors of the backbone itself, which stays frozen; set bias='none', or "
            f"use bitfit for biases:{listed(touched)}"
        )


def _require_saved(config: PeftConfig, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    """Proof that a folder with the trained tensors is all that PEFT reads: neither buffers nor other names."""
    own = {p.data_ptr() for p in parameters.values()}
    problems = [f"PEFT saves no tensor {key} {list(p.shape)}" for key, p in parameters.items() if key not in saved]
    problems += [
        f"PEFT saves {key} {list(t.shape)}, which is not trained"
        for key, t in saved.items()
        if key not in parameters and t.data_ptr() not in own
    ]
    if problems:
        hint = "; set save_projection=False, so that PEFT draws its projections from a seed" * hasattr(
            config, "save_projection"
        )
        raise ExpertError(
            f"method {method_type(config)} with these settings is more than the tensors that it trains{hint}:{listed(problems)}"
        )


def restore_copied(backbone: Backbone) -> None:
    """Put the modules of ``modules_to_save`` back: PEFT's unloading leaves their trained copies in the model."""
    for name, module in list(backbone.model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            backbone.model.set_submodule(name, module.original_module)


def strip(backbone: Backbone) -> None:
    """Take out what a failed injection or loading has left: PEFT replaces one module after the other and raises in between."""
    restore_copied(backbone)
    for name, module in list(backbone.model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            backbone.model.set_submodule(name, module.get_base_layer())
    if hasattr(backbone.model, "peft_config"):
        del backbone.model.peft_config
    backbone.model.requires_grad_(False).eval()


def peft_config(config: PeftConfig | Mapping[str, Any]) -> PeftConfig:
    """A fresh PEFT configuration object; attaching one never changes the caller's."""
    import pituning.methods  # noqa: F401 - enters our methods into PEFT's tables

    settings = config_dict(config) if isinstance(config, PeftConfig) else dict(config)
    settings |= {"inference_mode": False, "base_model_name_or_path": None}
    if settings.get("peft_type") not in set(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ExpertError(
            f"adapter configuration has peft_type {settings.get('peft_type')!r}, which PEFT does not know"
        )
    try:
        with warnings.catch_warnings():
            # a choice that the user has made, and was warned of then: projections come from a seed
            warnings.filterwarnings("ignore", message="Specified to not save", category=UserWarning)
            return PeftConfig.from_peft_type(**settings)
    except (ValueError, TypeError) as error:
        raise ExpertError(f"the adapter configuration is not valid: {error}") from error


def method_type(config: PeftConfig) -> str:
    """PEFT's name of a configuration's method, such as ``"LORA"``."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def config_dict(config: PeftConfig) -> dict[str, Any]:
    """A PEFT configuration as plain JSON values, in a fixed order, without machine paths."""
    values = json.loads(json.dumps(config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
    values["peft_type"] = method_type(config)
    values["base_model_name_or_path"] = None
    return dict(sorted(values.items()))


def initial_tensors(backbone: Backbone, config: PeftConfig | Mapping[str, Any]) -> dict[str, Tensor]:
    """The common starting point φ_0 of all experts with this configuration on this backbone."""
    with attached(backbone, config) as site:
        return {key: p.detach().clone() for key, p in site.parameters.items()}


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], where: str = "expert") -> None:
    """Compare key sets, shapes and finiteness.

    Raises:
        ExpertError: names every tensor that is missing, extra, misshaped or not finite.
    """
    if problems := tensor_problems(expected, found):
        raise ExpertError(f"{where} does not fit its configuration:{listed(problems)}")


def _init_seed(backbone: Backbone, config: PeftConfig) -> int:
    """Seed of the initial tensors: a hash of backbone and configuration.

    Fields that have no part in the initial tensors are left out. So a field that a release adds to one of our methods
    leaves the start of every expert that was trained before where it was.
    """
    free = {f.name for f in fields(config) if not f.metadata.get("shapes_start", True)}
    settings = {k: v for k, v in config_dict(config).items() if k not in free | {"peft_version"}}
    text = backbone.fingerprint + json.dumps(settings, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _file_keys(live: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> dict[str, str]:
    """PEFT's file keys of the live parameters: by name, or by storage where PEFT has a name of its own (DoRA's magnitudes)."""
    by_storage = {t.data_ptr(): key for key, t in saved.items()}
    keys = {name: _file_key(name) for name in live}
    return {n: k if k in saved else by_storage.get(live[n].data_ptr(), k) for n, k in keys.items()}


def _file_key(name: str) -> str:
    """The adapter's name is the last or the last but one part, and is left out."""
    head, _, last = name.rpartition(".")
    if last == _ADAPTER:
        return head
    return f"{head.removesuffix('.' + _ADAPTER)}.{last}"
