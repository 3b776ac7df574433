"""The bottleneck adapter of π-Tuning as a PEFT tuner: x + s · (W_up f(W_down x + b_down) + b_up) on a module's output.

PEFT has no bottleneck adapter. Importing this module enters one into PEFT's tables, after which ``get_peft_model``,
``save_pretrained`` and ``PeftModel.from_pretrained`` work with it as with PEFT's own methods.

Source: Houlsby et al., ICML 2019 (adapters after attention and after FFN); π-Tuning §3 uses the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pituning.errors import unknown_name
from pituning.methods.tuner import KEEPS_START, OwnLayer, OwnTuner, Placement, placement_of, register

PEFT_TYPE = "BOTTLENECK"
DROP_PATH = "drop-path"


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of :class:`BottleneckModel`.

    Args:
        r: width of the bottleneck.
        target_modules: suffixes of the modules whose *output* is adapted (attention output, FFN output): Linear or
            LayerNorm modules, or others with an integer ``out_features``, such as OFA's ``self_attn_output``.
        init_std: standard deviation of the up-projection's start. The default is close to the identity; the
            reference implementation of π-Tuning uses 0.02. The down-projection always starts at N(0, 0.02).
        dropout: probability on the hidden units, behind the activation. ``"drop-path"`` is the reference's choice: the
            layer's rate of stochastic depth, which only OFA's modules know.
        activation: ``"relu"``, ``"gelu"``, ``"tanh"``, ``"identity"`` or another of transformers' names.
        scaling: factor on the up-projection's output, its bias included.

    Raises:
        ValueError: for a value that has no meaning.
    """

    r: int = field(default=64, metadata={"help": "width of the bottleneck"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "suffixes of the adapted modules"})
    init_std: float = field(default=1e-3, metadata={"help": "standard deviation of the up-projection at the start"})
    dropout: float | str = field(
        default=0.0, metadata={"help": "dropout of the hidden units, or 'drop-path'", **KEEPS_START}
    )
    activation: str = field(default="relu", metadata={"help": "nonlinearity of the hidden units", **KEEPS_START})
    scaling: float = field(default=1.0, metadata={"help": "factor on the up-projection's output", **KEEPS_START})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.dropout, str):
            if self.dropout != DROP_PATH:
                raise ValueError(f"dropout must be a probability or {DROP_PATH!r}, not {self.dropout!r}")
        elif not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, not {self.dropout}")
        activation_of(self.activation)


class BottleneckLayer(OwnLayer):
    """A module followed by bottleneck adapters, one of which is active.

    Shapes: the wrapped module gives ``[..., d]``; down is ``[r, d]``, up is ``[d, r]``, both with bias.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_activation", "bottleneck_dropout", "scaling")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, placement: Placement
    ) -> None:
        super().__init__(base_layer, adapter_name, placement)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_activation = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add one adapter."""
        width = output_width(self.get_base_layer())  # type: ignore[operator]
        assert width is not None
        down, up = nn.Linear(width, config.r), nn.Linear(config.r, width)
        nn.init.normal_(down.weight, std=0.02)
        nn.init.normal_(up.weight, std=config.init_std)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_activation[adapter_name] = activation_of(config.activation)
        self.bottleneck_dropout[adapter_name] = nn.Dropout(self._dropout_rate(config))
        self.scaling[adapter_name] = config.scaling
        self._settle(adapter_name, config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped module, then the active adapters one after another."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:  # type: ignore[union-attr]
            if name in self.bottleneck_down:
                down: Any = self.bottleneck_down[name]
                # PEFT keeps adapters in float32 where the backbone is in half precision
                hidden = self.bottleneck_activation[name](down(out.to(down.weight.dtype)))
                change = self.bottleneck_up[name](self.bottleneck_dropout[name](hidden))
                out = out + (self.scaling[name] * change).to(out.dtype)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a nonlinearity between two projections cannot be folded into a Linear."""
        raise NotImplementedError("a bottleneck adapter has a nonlinearity and cannot be merged into its base layer")

    def unmerge(self) -> None:
        """Refused, as :meth:`merge` is."""
        raise NotImplementedError("a bottleneck adapter is never merged")

    def _dropout_rate(self, config: BottleneckConfig) -> float:
        if config.dropout != DROP_PATH:
            return float(config.dropout)
        base: nn.Module = self.get_base_layer()  # type: ignore[operator]
        rate = getattr(base, "drop_path_rate", None)
        if not isinstance(rate, float | int):
            raise TypeError(
                f"dropout={DROP_PATH!r} takes the rate of the layer's stochastic depth, but a {type(base).__name__} has no "
                "drop_path_rate; give a number"
            )
        return float(rate)


class BottleneckModel(OwnTuner):
    """PEFT tuner that puts a :class:`BottleneckLayer` around every target module."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

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
        if output_width(target) is None:
            raise TypeError(
                "bottleneck adapts Linear and LayerNorm modules and such as say their width in out_features; "
                f"{current_key} is a {type(target).__name__}"
            )
        layer = BottleneckLayer(target, adapter_name, config, placement_of(target, parent))
        self._wrap(parent, target_name, layer, adapter_name)


def output_width(module: nn.Module) -> int | None:
    """Size of the last dimension of what a module gives; ``None`` where it does not say."""
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    width = getattr(module, "nf" if type(module).__name__ == "Conv1D" else "out_features", None)  # nf: GPT-2
    return width if isinstance(width, int) else None


def activation_of(name: str) -> nn.Module:
    """A nonlinearity by transformers' name for it, or ``"identity"``.

    Raises:
        UnknownNameError: for another name.
        ValueError: for one with parameters of its own, which would be no part of the adapter.
    """
    if name == "identity":
        return nn.Identity()
    if name not in ACT2FN:
        raise unknown_name("activation", name, [*ACT2FN, "identity"])
    activation: nn.Module = ACT2FN[name]
    if next(activation.parameters(), None) is not None:
        raise ValueError(f"activation {name!r} has parameters of its own; take one without")
    return activation


register(PEFT_TYPE, BottleneckConfig, BottleneckModel)
