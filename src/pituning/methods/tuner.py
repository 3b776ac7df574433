"""What pituning's own PEFT tuners share: where their tensors are placed, and their entry into PEFT's tables."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

KEEPS_START: dict[str, Any] = {"shapes_start": False}
"""Metadata of a configuration's field that has no part in the initial tensors: experts that differ in it share their start."""

OWN_TYPES: set[str] = set()
"""PEFT types of this project, which PEFT knows only after ``import pituning.methods``."""

Placement = tuple[torch.device | None, torch.dtype | None]


class OwnLayer(nn.Module, BaseTunerLayer):
    """A tuner layer around any module, with or without parameters of its own.

    Args:
        base_layer: the wrapped module.
        adapter_name: the adapter that is active at first.
        placement: device and dtype for the adapter's tensors where the wrapped module has no parameters.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, placement: Placement) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._placement = placement
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = adapter_name

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Placement:
        device, dtype = placement_of(base_layer)
        return (device, dtype) if device is not None else self._placement

    def _settle(self, adapter_name: str, inference_mode: bool) -> None:
        """To be called when an adapter's tensors are there: puts them where they belong and sets what is trained."""
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)  # type: ignore[operator]


class OwnTuner(BaseTuner):
    """Base of the tuners; a subclass names its layer class and says which modules it wraps."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own version needs a weight in the child; our layers have been placed when they were made
        setattr(parent, child_name, new_module)

    def _wrap(self, parent: nn.Module, name: str, layer: OwnLayer, adapter_name: str) -> None:
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, name, layer, layer.base_layer)


def placement_of(*modules: nn.Module) -> Placement:
    """Device and dtype of the first floating-point parameter that one of the modules has."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return None, None


def register(peft_type: str, config: type[PeftConfig], tuner: type[OwnTuner]) -> None:
    """Enter a method into PEFT: ``get_peft_model``, ``save_pretrained`` and ``from_pretrained`` then know it.

    PEFT's public function of this purpose insists on a closed enum of types; its tables take a plain string.
    """
    OWN_TYPES.add(peft_type)
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix
