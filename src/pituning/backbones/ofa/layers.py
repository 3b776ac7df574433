"""Attention and the transformer layers of OFA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.positions import with_relative
from pituning.backbones.ofa.stem import DropPath


class BranchOutput(nn.Dropout):
    """The end of a residual branch: its dropout, and the place where the paper puts an adapter.

    Attributes:
        out_features: width of what passes.
        drop_path_rate: the layer's rate of stochastic depth, which the reference uses as its adapters' dropout.
    """

    def __init__(self, width: int, dropout: float, drop_path_rate: float) -> None:
        super().__init__(dropout)
        self.out_features = width
        self.drop_path_rate = drop_path_rate


class OFAAttention(nn.Module):
    """Multi-head attention with an additive score bias and one learned factor per head.

    Args:
        heads: number of heads.
        layer_index: which entry of a cache belongs to this layer.
    """

    def __init__(self, config: OFAConfig, heads: int, layer_index: int) -> None:
        super().__init__()
        width = config.d_model
        self.config = config
        self.heads = heads
        self.head_width = width // heads
        self.scale = (self.head_width * config.attn_scale_factor) ** -0.5
        self.dropout = config.attention_dropout
        self.layer_index = layer_index
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.c_attn = nn.Parameter(torch.ones(heads)) if config.scale_heads else None

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        bias: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to ``hidden_states`` themselves, or to ``key_value_states``.

        Args:
            hidden_states: ``[rows, length, d_model]``.
            key_value_states: ``[batch, source, d_model]``. ``rows`` may be a multiple of ``batch``: then every group of
                ``rows / batch`` successive rows (beams, answer choices) attends to the same source, which is
                projected once.
            bias: ``[1 or batch, heads, length, source]``, added to the scaled scores; −∞ hides a position.
            past_key_values: cache to read from and add to.
            prefix: keys and values ``[rows, prefix, d_model]`` put before the projected ones, without bias and never
                hidden.
            output_attentions: return the attention weights as well (slower).

        Returns:
            output ``[rows, length, d_model]``, weights ``[rows, heads, length, prefix + source]`` or ``None``.
        """
        rows = len(hidden_states)
        query = self._split(self.q_proj(hidden_states))
        key, value = self._keys_and_values(hidden_states, key_value_states, past_key_values)
        if prefix is not None:
            key = torch.cat([self._split(prefix[0].to(key.dtype)), key], dim=2)
            value = torch.cat([self._split(prefix[1].to(value.dtype)), value], dim=2)
            bias = None if bias is None else F.pad(bias, (prefix[0].shape[1], 0))
        groups, rest = divmod(rows, key.shape[0])
        if rest:
            raise ValueError(f"{rows} decoder rows cannot be shared out among {key.shape[0]} encoded sources")
        if groups > 1:
            query = query.view(-1, groups, *query.shape[1:]).transpose(1, 2).flatten(2, 3)
            bias = None if bias is None else bias.repeat(1, 1, groups, 1)
        bias = None if bias is None else bias.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        rounded = self.config.reference_rounding
        if output_attentions or rounded or self.config._attn_implementation == "eager":
            scores = (query * self.scale) @ key.transpose(2, 3)
            wide = torch.float32 if rounded else torch.promote_types(scores.dtype, torch.float32)
            weights = torch.softmax(scores if bias is None else scores + bias, dim=-1, dtype=wide)
            out = F.dropout(weights.to(value.dtype), dropout) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=self.scale)
        if groups > 1:
            out = _ungroup(out, groups)
            if weights is not None:
                weights = _ungroup(weights, groups)
        if self.c_attn is not None:
            out = out * self.c_attn[:, None, None]
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights

    def _split(self, x: Tensor) -> Tensor:
        """``[rows, length, d_model]`` to ``[rows, heads, length, head width]``."""
        return x.view(*x.shape[:2], self.heads, self.head_width).transpose(1, 2)

    def _keys_and_values(
        self, hidden_states: Tensor, source: Tensor | None, cache: EncoderDecoderCache | None
    ) -> tuple[Tensor, Tensor]:
        if source is not None and cache is not None and cache.is_updated.get(self.layer_index):
            stored: Any = cache.cross_attention_cache.layers[self.layer_index]
            return stored.keys, stored.values
        attended = hidden_states if source is None else source
        key, value = self._split(self.k_proj(attended)), self._split(self.v_proj(attended))
        if cache is None:
            return key, value
        part: Any = cache.self_attention_cache if source is None else cache.cross_attention_cache
        key, value = part.update(key, value, self.layer_index)
        if source is not None:
            cache.is_updated[self.layer_index] = True
        return key, value


def _ungroup(x: Tensor, groups: int) -> Tensor:
    """``[batch, heads, groups · length, d]`` to ``[batch · groups, heads, length, d]``."""
    return x.view(*x.shape[:2], groups, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)


class RoundedActivation(nn.Module):
    """An activation function in float32 whatever the dtype of its input."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """``[…]`` to the same shape and dtype."""
        out: Tensor = self.function(x.float())
        return out.to(x.dtype)


class FeedForward(nn.Module):
    """Shared by both kinds of layer through inheritance: the FFN branch, pre-norm, with its residual."""

    fc1: nn.Linear
    fc2: nn.Linear

    def _add_feed_forward(self, config: OFAConfig, inner: int, drop_path_rate: float) -> None:
        activation = ACT2FN[config.activation_function]
        self.activation = RoundedActivation(activation) if config.reference_rounding else activation
        self.activation_dropout = nn.Dropout(config.activation_dropout)
        self.fc1 = nn.Linear(config.d_model, inner)
        self.ffn_layer_norm = nn.LayerNorm(inner) if config.scale_fc else nn.Identity()
        self.fc2 = nn.Linear(inner, config.d_model)
        self.ffn_output = BranchOutput(config.d_model, config.dropout, drop_path_rate)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.w_resid = nn.Parameter(torch.ones(config.d_model)) if config.scale_resids else None

    def _feed_forward(self, hidden_states: Tensor, drop_path: nn.Module) -> Tensor:
        x = self.activation(self.fc1(self.final_layer_norm(hidden_states)))
        x = self.ffn_output(self.fc2(self.ffn_layer_norm(self.activation_dropout(x))))
        residual = hidden_states if self.w_resid is None else self.w_resid * hidden_states
        out: Tensor = residual + drop_path(x)
        return out


def mid_norm(config: OFAConfig) -> nn.Module:
    """The norm between an attention's output projection and the residual, where the configuration has it."""
    return nn.LayerNorm(config.d_model) if config.scale_attn else nn.Identity()


class OFAEncoderLayer(GradientCheckpointingLayer, FeedForward):
    """Self-attention and FFN, both pre-norm."""

    def __init__(self, config: OFAConfig, index: int, drop_path_rate: float) -> None:
        super().__init__()
        assert config.encoder_ffn_dim is not None
        self.self_attn = OFAAttention(config, config.encoder_attention_heads, index)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn_mid_layer_norm = mid_norm(config)
        self.self_attn_output = BranchOutput(config.d_model, config.dropout, drop_path_rate)
        self.drop_path = DropPath(drop_path_rate)
        self._add_feed_forward(config, config.encoder_ffn_dim, drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor,
        relative: Sequence[tuple[int, nn.Module, Tensor]] = (),
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``[batch, length, d_model]`` to the same, and the attention weights if wanted.

        ``bias`` is the same in all layers. What this layer adds to it, ``relative`` (see :func:`with_relative`), is added
        here, so that gradient checkpointing does not keep one sum per layer.
        """
        x, weights = self.self_attn(
            self.self_attn_layer_norm(hidden_states),
            bias=with_relative(bias, relative),
            output_attentions=output_attentions,
        )
        hidden_states = hidden_states + self.drop_path(self.self_attn_output(self.self_attn_mid_layer_norm(x)))
        return self._feed_forward(hidden_states, self.drop_path), weights


class OFADecoderLayer(GradientCheckpointingLayer, FeedForward):
    """Self-attention, cross-attention and FFN, all pre-norm."""

    def __init__(self, config: OFAConfig, index: int, drop_path_rate: float) -> None:
        super().__init__()
        assert config.decoder_attention_heads is not None
        assert config.decoder_ffn_dim is not None
        self.self_attn = OFAAttention(config, config.decoder_attention_heads, index)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn_mid_layer_norm = mid_norm(config)
        self.self_attn_output = BranchOutput(config.d_model, config.dropout, drop_path_rate)
        self.cross_attn = OFAAttention(config, config.decoder_attention_heads, index)
        self.cross_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attn_mid_layer_norm = mid_norm(config)
        self.cross_attn_output = BranchOutput(config.d_model, config.dropout, drop_path_rate)
        self.drop_path = DropPath(drop_path_rate)
        self._add_feed_forward(config, config.decoder_ffn_dim, drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        self_bias: Tensor,
        cross_bias: Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``[rows, length, d_model]`` to the same, and both attentions' weights if wanted."""
        x, self_weights = self.self_attn(
            self.self_attn_layer_norm(hidden_states),
            bias=self_bias,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
        )
        hidden_states = hidden_states + self.drop_path(self.self_attn_output(self.self_attn_mid_layer_norm(x)))
        x, cross_weights = self.cross_attn(
            self.cross_attn_layer_norm(hidden_states),
            key_value_states=encoder_hidden_states,
            bias=cross_bias,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
        )
        hidden_states = hidden_states + self.drop_path(self.cross_attn_output(self.cross_attn_mid_layer_norm(x)))
        return self._feed_forward(hidden_states, self.drop_path), self_weights, cross_weights
