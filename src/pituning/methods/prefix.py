"""Prefix tuning as a PEFT tuner: trained keys and values in front of a self-attention's own, layer by layer.

PEFT's PREFIX_TUNING puts its prefix into the cache of decoder-only models. This one hands each self-attention its keys
and values, so it works in encoders and decoders alike, and each layer's tensors have file keys of their own:
``….self_attn.prefix_key`` and ``….self_attn.prefix_value``, both ``[length, width]``. The prefix has no positions: its
keys are not rotated and have no relative bias, the positions of the text stay as they are, and a cache never holds it.

Source: Li and Liang, "Prefix-Tuning", ACL 2021; Yang et al., "Prompt Tuning for Generative Multimodal Pretrained
Models", 2022 (OFA: in every layer of encoder and decoder).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from pituning.errors import ExpertError
from pituning.methods.injection import Injection, injection_of
from pituning.methods.tuner import KEEPS_START, OwnLayer, OwnTuner, Placement, placement_of, register

PEFT_TYPE = "PREFIX_KV"


@dataclass
class PrefixConfig(PeftConfig):
    """Configuration of :class:`PrefixModel`.

    Args:
        length: positions in front of each self-attention's keys, 0 for none.
        decoder_length: the same in a model's decoder, by default ``length``. The paper has 100 in both stacks.
        target_modules: suffixes of the self-attention modules.
        projection: train a small network that makes the keys and values (Li and Liang, §4.3) in place of the keys and
            values: one embedding ``[length, width]``, Linear, ReLU and Linear per stack. It is only a way to train:
            :func:`folded` gives the plain prefix, and only plain ones are compared or interpolated.
        projection_dim: hidden units of that network, by default twice the width.
        dropout: probability on the prefix's entries, drawn for each example; the reference has a fixed 0.2.
        init_std: standard deviation of plain keys and values at the start.

    Raises:
        ValueError: for a value that has no meaning.
    """

    length: int = field(default=32, metadata={"help": "positions of the prefix"})
    decoder_length: int | None = field(default=None, metadata={"help": "positions in the decoder, by default length"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "suffixes of the self-attentions"})
    projection: bool = field(default=False, metadata={"help": "train a network that makes the prefix"})
    projection_dim: int | None = field(default=None, metadata={"help": "hidden units of that network"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on keys and values", **KEEPS_START})
    init_std: float = field(default=0.02, metadata={"help": "standard deviation of keys and values at the start"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        lengths = (self.length, self.length if self.decoder_length is None else self.decoder_length)
        if min(lengths) < 0 or not any(lengths):
            raise ValueError(
                f"length={self.length}, decoder_length={self.decoder_length}: at least one stack needs a prefix of 1 "
                "position or more, none may be negative"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, not {self.dropout}")
        if self.projection_dim is not None and (not self.projection or self.projection_dim < 1):
            raise ValueError(
                f"projection_dim={self.projection_dim} needs projection=True and at least 1 hidden unit"
                if not self.projection
                else f"projection_dim must be at least 1, not {self.projection_dim}"
            )


class PrefixRows(nn.Dropout):
    """``[length, width]`` to one copy per sequence, ``[rows, length, width]``, with dropout of its own.

    A module, so that hooks on it see every example's gradient.
    """

    def forward(self, key: Tensor, value: Tensor, rows: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Keys and values for all rows."""
        forward = super().forward
        return forward(key.expand(rows, -1, -1)), forward(value.expand(rows, -1, -1))


class PrefixLayer(OwnLayer):
    """A self-attention with prefixes, one of which is active.

    With ``projection``, the first layer of a stack owns the embedding and the first Linear, and each layer owns the
    rows of the second Linear that make its keys (first half) and values.

    Args:
        injection: how the wrapped module takes a prefix.
    """

    adapter_layer_names = ("prefix_key", "prefix_value", "prefix_embedding", "prefix_down", "prefix_up")
    other_param_names = ("prefix_rows", "sources")

    def __init__(self, base_layer: nn.Module, injection: Injection, adapter_name: str, placement: Placement) -> None:
        super().__init__(base_layer, adapter_name, placement)
        self.injection = injection
        self.width = injection.width(base_layer)
        self.prefix_key = nn.ParameterDict()
        self.prefix_value = nn.ParameterDict()
        self.prefix_embedding = nn.ParameterDict()
        self.prefix_down = nn.ModuleDict()
        self.prefix_up = nn.ModuleDict()
        self.prefix_rows = nn.ModuleDict()
        # The layer that owns the shared part: a plain dict, so that its tensors are registered there only.
        self.sources: dict[str, PrefixLayer] = {}

    def update_layer(
        self, adapter_name: str, config: PrefixConfig, length: int, first: PrefixLayer | None = None
    ) -> None:
        """Add one adapter.

        Args:
            length: positions in this layer's stack.
            first: with projection, the first layer of the stack; ``None`` if this is it.
        """
        self.prefix_rows[adapter_name] = PrefixRows(config.dropout)
        if config.projection:
            hidden = config.projection_dim or 2 * self.width
            if first is None:
                self.prefix_embedding[adapter_name] = nn.Parameter(torch.randn(length, self.width))
                self.prefix_down[adapter_name] = nn.Linear(self.width, hidden)
            self.sources[adapter_name] = self if first is None else first
            self.prefix_up[adapter_name] = nn.Linear(hidden, 2 * self.width)
        else:
            for part in (self.prefix_key, self.prefix_value):
                part[adapter_name] = nn.Parameter(config.init_std * torch.randn(length, self.width))
        self._settle(adapter_name, config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The self-attention with the active prefixes, one after another, in front."""
        active = [a for a in self.active_adapters if a in self.prefix_rows]  # type: ignore[union-attr]
        if self.disable_adapters or not active:
            return self.base_layer(*args, **kwargs)
        rows = self.injection.rows(*args, **kwargs)
        parts = [self.prefix_rows[a](*self.plain(a), rows) for a in active]
        key, value = (torch.cat(p, dim=1) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
        return self.injection.run(self.base_layer, key, value, *args, **kwargs)

    def plain(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Keys and values of one adapter, both ``[length, width]``."""
        if adapter_name in self.prefix_key:
            return self.prefix_key[adapter_name], self.prefix_value[adapter_name]
        source, up = self.sources[adapter_name], cast("nn.Linear", self.prefix_up[adapter_name])
        down = cast("nn.Linear", source.prefix_down[adapter_name])
        return _projected(source.prefix_embedding[adapter_name], down.weight, down.bias, up.weight, up.bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a prefix adds positions, and no weight of the base can stand for them."""
        raise NotImplementedError("a prefix adds positions to attention and cannot be merged into the base model")

    def unmerge(self) -> None:
        """Refused, as :meth:`merge` is."""
        raise NotImplementedError("a prefix is never merged")


class PrefixModel(OwnTuner):
    """PEFT tuner that puts a :class:`PrefixLayer` around every target self-attention."""

    prefix = "prefix_"
    tuner_layer_cls = PrefixLayer

    def _create_and_replace(
        self,
        config: PrefixConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        length = self._length(config, current_key)
        if length == 0:
            return
        first = self._first(adapter_name, stack_of(current_key)) if config.projection else None
        if isinstance(target, PrefixLayer):
            target.update_layer(adapter_name, config, length, first)
            return
        injection = injection_of(target)
        if injection is None:
            raise TypeError(
                f"prefix needs self-attention modules that take an argument 'prefix' (OFA's do) or run through transformers' "
                f"attention interface with a key projection of their own; {current_key} is a {type(target).__name__}, which "
                "does neither"
            )
        layer = PrefixLayer(target, injection, adapter_name, placement_of(target, parent))
        if first is not None and first.width != layer.width:
            raise ValueError(
                f"prefix with projection: {current_key} has keys of width {layer.width}, but the first layer of its stack "
                f"has {first.width}"
            )
        layer.update_layer(adapter_name, config, length, first)
        self._wrap(parent, target_name, layer, adapter_name)

    def _length(self, config: PrefixConfig, key: str) -> int:
        if config.decoder_length is None:
            return config.length
        if "decoder" in key.split("."):
            return config.decoder_length
        if not any("decoder" in name.split(".") for name, _ in self.model.named_modules()):
            raise ValueError(
                f"decoder_length={config.decoder_length} is set, but no module of this model is named 'decoder' "
                f"({key} is not in one); set length alone"
            )
        return config.length

    def _first(self, adapter_name: str, stack: str) -> PrefixLayer | None:
        for name, module in self.model.named_modules():
            if isinstance(module, PrefixLayer) and stack_of(name) == stack and adapter_name in module.prefix_embedding:
                return module
        return None


def stack_of(name: str) -> str:
    """The stack of layers that a module belongs to: what stands before the first number in its name.

    >>> stack_of("model.encoder.layers.3.self_attn")
    'model.encoder.layers'
    """
    parts = name.split(".")
    return ".".join(parts[: next((i for i, p in enumerate(parts) if p.isdigit()), len(parts))])


def is_folded(config: Mapping[str, Any]) -> bool:
    """False for a prefix that is still a projection's network, which :func:`folded` turns into keys and values."""
    return not (config.get("peft_type") == PEFT_TYPE and config.get("projection"))


@torch.no_grad()
def folded(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn a prefix with projection into the plain prefix that it makes; anything else is returned as it is.

    Args:
        config: PEFT configuration as plain values.
        tensors: under PEFT's file key names.

    Returns:
        configuration and tensors; the keys and values are those that the network gave in training in the tensors' precision,
        bit by bit on the same device.

    Raises:
        ExpertError: if a tensor of the network is missing.
    """
    if is_folded(config):
        return dict(config), dict(tensors)
    plain: dict[str, Tensor] = {}
    ending = ".prefix_up.weight"
    first = {stack_of(k): k.removesuffix(".prefix_embedding") for k in tensors if k.endswith(".prefix_embedding")}
    for layer in [k.removesuffix(ending) for k in tensors if k.endswith(ending)]:
        source = first.get(stack_of(layer), layer)
        names = [f"{source}.prefix_{n}" for n in ("embedding", "down.weight", "down.bias")]
        names += [f"{layer}.prefix_up.weight", f"{layer}.prefix_up.bias"]
        missing = [n for n in names if n not in tensors]
        if missing:
            raise ExpertError(f"prefix with projection: {layer} needs tensor {missing[0]}, which is not among them")
        with torch.autocast(tensors[names[0]].device.type, enabled=False):
            key, value = _projected(*(tensors[n] for n in names))
        plain |= {f"{layer}.prefix_key": key.contiguous(), f"{layer}.prefix_value": value.contiguous()}
    return {**config, "projection": False, "projection_dim": None}, plain


def _projected(
    embedding: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor
) -> tuple[Tensor, Tensor]:
    key, value = F.linear(F.linear(embedding, down, down_bias).relu(), up, up_bias).chunk(2, dim=-1)
    return key, value


register(PEFT_TYPE, PrefixConfig, PrefixModel)
