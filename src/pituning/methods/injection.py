"""How a self-attention takes more keys and values: through an argument of its own, or through transformers' interface.

Most models of transformers hand query, key, value and mask to one exchangeable function. For the length of a call, that
function is one that puts the prefix in front of keys, values, mask and position bias and goes on to the model's own. By
then keys have been rotated and the cache has been filled, so a prefix has no position and is in no cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from pituning.errors import RefusedError

_NAME = "pituning_prefix"
_MASKED = ("eager", "sdpa")  # the others take no mask that could be made longer
_KEY_PROJECTIONS = ("k_proj", "k", "key", "k_lin")
_FUSED_PROJECTIONS = ("query_key_value", "c_attn", "Wqkv")


@dataclass(frozen=True)
class Injection:
    """How a kind of self-attention takes a prefix.

    Attributes:
        width: size of one key (and one value), all heads together.
        rows: number of sequences in a call, from its arguments.
        run: calls the module with keys and values ``[rows, length, width]`` in front of its own.
    """

    width: Callable[[nn.Module], int]
    rows: Callable[..., int]
    run: Callable[..., Any]


def injection_of(module: nn.Module) -> Injection | None:
    """The way to put a prefix into a module, or ``None`` where there is none."""
    if "prefix" in inspect.signature(module.forward).parameters:
        return _AS_ARGUMENT if isinstance(getattr(module, "k_proj", None), nn.Linear) else None
    forward = _plain_forward(module)
    through_interface = (
        "get_interface" in forward.__code__.co_names and "eager_attention_forward" in forward.__globals__
    )
    return _THROUGH_INTERFACE if through_interface and _key_width(module) else None


def _plain_forward(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _key_width(module: nn.Module) -> int:
    """Size of the key projection's output, 0 where there is none."""
    for names, parts in ((_KEY_PROJECTIONS, 1), (_FUSED_PROJECTIONS, 3)):
        for name in names:
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Linear):
                return projection.out_features // parts
            if isinstance(projection, Conv1D):
                return int(projection.nf) // parts
    return 0


def _rows(
    hidden_states: Tensor, *args: Any, key_value_states: Any = None, encoder_hidden_states: Any = None, **kwargs: Any
) -> int:
    if key_value_states is not None or encoder_hidden_states is not None:
        raise RefusedError("a prefix goes in front of self-attention; this module attends to other states")
    return len(hidden_states)


def _as_argument(module: nn.Module, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return module(*args, prefix=(key, value), **kwargs)


class _Diverted:
    """A module's configuration, but for the attention function that it names, and the prefix for it."""

    _attn_implementation = _NAME

    def __init__(self, config: Any, key: Tensor, value: Tensor) -> None:
        self.config, self.key, self.value = config, key, value
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _through_interface(module: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    config = module.config
    if config._attn_implementation not in _MASKED:
        raise RefusedError(
            f"prefix in a {type(module).__name__} with attention {config._attn_implementation!r}: it takes no mask that could "
            f"be made longer; load the model with attn_implementation={' or '.join(map(repr, _MASKED))}"
        )
    module.config = diverted = _Diverted(config, key, value)
    try:
        output = module(*args, **kwargs)
    finally:
        module.config = config
    if diverted.calls != 1:
        raise RefusedError(
            f"prefix in a {type(module).__name__}: its forward asked for attention {diverted.calls} times and not once"
        )
    return output


def _prefixed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: keys and values ``[rows, heads, positions, head width]``."""
    diverted: _Diverted = module.config
    diverted.calls += 1
    own = diverted.config._attn_implementation
    length = diverted.key.shape[1]
    if attention_mask is None and own == "sdpa":
        attention_mask = _causal_mask(module, query, key, kwargs.get("is_causal"))
    if attention_mask is not None:
        attention_mask = _longer(attention_mask, length, key, attention_mask.dtype == torch.bool, module)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = _longer(kwargs["position_bias"], length, key, False, module)
    key = torch.cat([_by_head(diverted.key, key, module), key], dim=2)
    value = torch.cat([_by_head(diverted.value, value, module), value], dim=2)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(own, _plain_forward(module).__globals__["eager_attention_forward"])
    output: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **kwargs)
    return output


def _causal_mask(module: Any, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """The mask ``[1, 1, queries, keys]`` that sdpa means where it is given none, as sdpa decides it."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries = query.shape[2]
    if not causal or queries == 1:
        return None
    return torch.ones(1, 1, queries, key.shape[2], dtype=torch.bool, device=key.device).tril()


def _longer(mask: Tensor, length: int, key: Tensor, value: bool, module: Any) -> Tensor:
    """A mask or bias ``[…, keys]`` with ``length`` more columns in front, through which every query sees."""
    if mask.shape[-1] != key.shape[2]:
        raise RefusedError(
            f"prefix in a {type(module).__name__}: its mask {list(mask.shape)} does not have the {key.shape[2]} keys' columns"
        )
    return torch.cat([mask.new_full((*mask.shape[:-1], length), value), mask], dim=-1)


def _by_head(prefix: Tensor, like: Tensor, module: Any) -> Tensor:
    """``[rows, length, width]`` to ``[rows, heads, length, head width]``."""
    rows, heads, _, width = like.shape
    if prefix.shape[0] != rows or prefix.shape[2] != heads * width:
        raise RefusedError(
            f"prefix in a {type(module).__name__}: keys or values are {rows} × {heads} heads × {width}, which "
            f"{prefix.shape[0]} × {prefix.shape[2]} of the prefix do not fit"
        )
    return prefix.view(rows, -1, heads, width).transpose(1, 2).to(like.dtype)


_AS_ARGUMENT = Injection(_key_width, _rows, _as_argument)  # OFA's attention
_THROUGH_INTERFACE = Injection(_key_width, _rows, _through_interface)

ALL_ATTENTION_FUNCTIONS.register(_NAME, _prefixed)
