"""BitFit as a PEFT tuner: only biases are trained. The expert holds what is *added* to each bias, and starts at zero.

Source: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
ACL 2022: all bias terms of the transformer. The reference implementation of π-Tuning trains fewer, see ``subset``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from pituning.backbones.base import bias_width, normed_and_linear
from pituning.methods.tuner import OwnLayer, OwnTuner, Placement, placement_of, register

PEFT_TYPE = "BITFIT"
ALL = "all"
REFERENCE_NAMES = (
    "self_attn_layer_norm", "cross_attn_layer_norm", "final_layer_norm", "layer_norm", "fc1", "fc2",
)  # fmt: skip
"""What the reference's choice of names with ``layer_norm`` or ``fc`` in them comes to, in the names of our OFA: 20 of the
52 biases of a layer pair and the stacks' last norms, without any attention projection or mid norm."""


@dataclass
class BitFitConfig(PeftConfig):
    """Configuration of :class:`BitFitModel`.

    Args:
        target_modules: suffixes of Linear and norm modules; ``None`` or ``"all"`` takes every one that has a bias.
            A module without bias that is named here gets one, which cannot be merged into the base.
        subset: ``"all"``, or ``"reference"`` for those of OFA's modules whose bias the code of π-Tuning trains.

    Raises:
        ValueError: for another subset.
    """

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "suffixes of the adapted modules"})
    subset: str = field(
        default=ALL, metadata={"help": "'all', or 'reference' for the choice of π-Tuning's code on OFA"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.subset not in (ALL, "reference"):
            raise ValueError(f"subset must be 'all' or 'reference', not {self.subset!r}")


class BitFitLayer(OwnLayer):
    """A Linear or norm module with vectors ``[width]`` to add to what it gives, one of which is active.

    Args:
        name: the wrapped module's name, for messages.
    """

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, name: str, placement: Placement) -> None:
        super().__init__(base_layer, adapter_name, placement)
        self.name = name
        self.bitfit_bias = nn.ParameterDict()
        self._own_bias: Tensor | None = None  # the base's own, while adapters are merged into it

    def update_layer(self, adapter_name: str, config: BitFitConfig) -> None:
        """Add one adapter."""
        width = bias_width(self.get_base_layer())  # type: ignore[operator]
        assert width is not None
        self.bitfit_bias[adapter_name] = nn.Parameter(torch.zeros(width))
        self._settle(adapter_name, config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped module's output with the active adapters' vectors added."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        out: Tensor = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return out
        for name in self.active_adapters:  # type: ignore[union-attr]
            if name in self.bitfit_bias:
                out = out + self.bitfit_bias[name].to(out.dtype)
        return out

    def require_bias(self) -> nn.Parameter:
        """The base's bias.

        Raises:
            ValueError: if there is none to merge into.
        """
        base: Any = self.get_base_layer()  # type: ignore[operator]
        if not isinstance(getattr(base, "bias", None), nn.Parameter):
            raise ValueError(
                f"{self.name} is a {type(base).__name__} without bias: its adapter [{bias_width(base)}] cannot be merged"
            )
        bias: nn.Parameter = base.bias
        return bias

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' vectors to the base's bias.

        Args:
            safe_merge: refuse a sum that is not finite.
            adapter_names: by default the active ones.

        Raises:
            ValueError: if the base has no bias, or the sum is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.bitfit_bias]
        if not names:
            return
        bias = self.require_bias()
        total = bias.clone()
        for name in names:
            total += self.bitfit_bias[name].to(bias)
        if safe_merge and not torch.isfinite(total).all():
            raise ValueError(f"NaNs or infinities in the merged bias of {self.name}")
        if self._own_bias is None:
            self._own_bias = bias.detach().clone()
        bias.copy_(total)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base its own bias back, bit by bit."""
        if self._own_bias is not None:
            self.require_bias().copy_(self._own_bias)
            self._own_bias = None
        self.merged_adapters.clear()


class BitFitModel(OwnTuner):
    """PEFT tuner that puts a :class:`BitFitLayer` around every target module."""

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer

    def _prepare_adapter_config(self, peft_config: BitFitConfig, model_config: dict[str, Any]) -> BitFitConfig:
        if peft_config.target_modules in (None, ALL):
            peft_config.target_modules = normed_and_linear(self.model)
            if not peft_config.target_modules:
                raise ValueError("BitFit finds no Linear or norm module with a bias in this model; give target_modules")
        if not any(self._check_target_module_exists(peft_config, n) for n, _ in self.model.named_modules()):
            raise ValueError(
                f"BitFit finds none of target_modules={peft_config.target_modules} with subset={peft_config.subset!r} in "
                f"this model ('reference' knows the names of OFA: {', '.join(REFERENCE_NAMES)})"
            )
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: BitFitConfig, key: str) -> bool | re.Match[str] | None:
        if peft_config.subset == "reference" and key.rpartition(".")[2] not in REFERENCE_NAMES:
            return False
        found: bool | re.Match[str] | None = OwnTuner._check_target_module_exists(peft_config, key)
        return found

    def _create_and_replace(
        self,
        config: BitFitConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BitFitLayer):
            target.update_layer(adapter_name, config)
            return
        if bias_width(target) is None or isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                "BitFit adapts Linear, LayerNorm and RMSNorm modules outside nn.MultiheadAttention (which reads its weights "
                f"itself); {current_key} is a {type(target).__name__} in a {type(parent).__name__}"
            )
        layer = BitFitLayer(target, adapter_name, current_key, placement_of(target, parent))
        layer.update_layer(adapter_name, config)
        self._wrap(parent, target_name, layer, adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, BitFitLayer):
                module.require_bias()


register(PEFT_TYPE, BitFitConfig, BitFitModel)
