"""The bottleneck adapter of π-Tuning as a PEFT tuner: x + W_up relu(W_down x + b_down) + b_up on a module's output.

PEFT has no bottleneck adapter. Importing this module enters one into PEFT's tables, after which ``get_peft_model``,
``save_pretrained`` and ``PeftModel.from_pretrained`` work with it as with PEFT's own methods.

Source: Houlsby et al., ICML 2019 (adapters after attention and after FFN); π-Tuning §3 uses the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

PEFT_TYPE = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of :class:`BottleneckModel`.

    Args:
        r: width of the bottleneck.
        target_modules: suffixes of the Linear modules whose *output* is adapted (attention output, FFN output).
        init_std: standard deviation of the up-projection's start. The default is close to the identity; the
            reference implementation of π-Tuning uses 0.02. The down-projection always starts at N(0, 0.02).
    """

    r: int = field(default=64, metadata={"help": "width of the bottleneck"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "suffixes of the adapted modules"})
    init_std: float = field(default=1e-3, metadata={"help": "standard deviation of the up-projection at the start"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A Linear module followed by bottleneck adapters, one of which is active.

    Shapes: the base layer maps ``[..., in]`` to ``[..., d]``; down is ``[r, d]``, up is ``[d, r]``, both with bias.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add one adapter."""
        base: Any = self.get_base_layer()  # type: ignore[operator]
        width: int = base.out_features
        down, up = nn.Linear(width, config.r), nn.Linear(config.r, width)
        nn.init.normal_(down.weight, std=0.02)
        nn.init.normal_(up.weight, std=config.init_std)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer, then the active adapters one after another."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:  # type: ignore[union-attr]
            if name in self.bottleneck_down:
                out = out + self.bottleneck_up[name](torch.relu(self.bottleneck_down[name](out)))
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a ReLU between two projections cannot be folded into a Linear."""
        raise NotImplementedError("a bottleneck adapter has a nonlinearity and cannot be merged into its base layer")

    def unmerge(self) -> None:
        """Refused, as :meth:`merge` is."""
        raise NotImplementedError("a bottleneck adapter is never merged")


class BottleneckModel(BaseTuner):
    """PEFT tuner that puts a :class:`BottleneckLayer` around every target Linear."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own attribute

    def _create_and_replace(
        self,
        config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, nn.Linear):
            raise TypeError(f"bottleneck adapts nn.Linear modules; {current_key} is a {type(target).__name__}")
        layer = BottleneckLayer(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


# PEFT's public register function insists on a closed enum of types; its tables take a plain string.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BottleneckModel.prefix
