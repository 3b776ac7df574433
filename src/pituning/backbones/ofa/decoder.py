"""The decoder of OFA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.encoder import OFAEncoderOutput
from pituning.backbones.ofa.layers import OFADecoderLayer
from pituning.backbones.ofa.positions import absolute_scores, look_up, token_bucket_matrix
from pituning.backbones.ofa.pretrained import OFAPreTrainedModel, padding_of, position_tables
from pituning.backbones.ofa.stem import drop_path_rates
from pituning.errors import DataError, PituningError

FIRST_CAPACITY = 16  # target positions whose biases are computed at a cached decoding's first step; doubled when needed


@dataclass
class DecoderBiases:
    """Score biases of target positions 0 … capacity − 1; they do not depend on examples or beams.

    Attributes:
        self_attention: per layer ``[1, heads, capacity, capacity]``, −∞ above the diagonal.
        cross_attention: ``[1, heads, capacity, source]``, without the source's padding.
    """

    self_attention: list[Tensor]
    cross_attention: Tensor

    @property
    def capacity(self) -> int:
        """Number of target positions."""
        return self.cross_attention.shape[2]


class OFADecoder(OFAPreTrainedModel):
    """Writes tokens one after another."""

    def __init__(self, config: OFAConfig) -> None:
        super().__init__(config)
        assert config.decoder_layers is not None
        assert config.decoder_attention_heads is not None
        width, heads, layers = config.d_model, config.decoder_attention_heads, config.decoder_layers
        self.heads = heads
        self.embed_scale = width**0.5 if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else nn.Identity()
        # The next three serve sequences of image codes only. Released checkpoints hold them.
        self.code_layernorm_embedding = nn.LayerNorm(width) if config.code_layernorm_embedding else nn.Identity()
        self.embed_image_positions = nn.Embedding(config.image_bucket_size**2 + 1, width)
        self.image_pos_ln = nn.LayerNorm(width)
        self.embed_positions = nn.Embedding(config.max_target_positions + 2, width)
        self.pos_ln = nn.LayerNorm(width)
        self.self_pos_q_linear = nn.Linear(width, width)
        self.self_pos_k_linear = nn.Linear(width, width)
        self.cross_pos_q_linear = nn.Linear(width, width)
        self.cross_pos_k_linear = nn.Linear(width, width)
        self.pos_scale = (width / heads * config.attn_scale_factor) ** -0.5
        rates = drop_path_rates(config.decoder_drop_path_rate, layers)
        self.layers = nn.ModuleList(OFADecoderLayer(config, i, rate) for i, rate in enumerate(rates))
        self.layer_norm = nn.LayerNorm(width)
        self.token_rel_pos_table_list, self.image_rel_pos_table_list = position_tables(config, layers, heads)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings, shared with the encoder and the output."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        encoder_outputs: OFAEncoderOutput,
        attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> dict[str, Any]:
        """Decode; shapes as in :class:`OFAModel`.

        Raises:
            DataError: for targets longer than the position table, or padded on the left.
            PituningError: for a static cache.
        """
        if past_key_values is not None and past_key_values.is_compileable:
            raise PituningError("OFA decodes with a growing cache; leave out cache_implementation='static'")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = input_ids.shape[1]
        biases = self._biases(encoder_outputs, past + length, past_key_values)
        cross_bias = biases.cross_attention[:, :, past : past + length]
        padding = encoder_outputs.padding_mask
        assert padding is not None
        if padding.any():
            cross_bias = cross_bias.masked_fill(padding[:, None, None, :], float("-inf"))
        hidden_away = self._hidden_targets(input_ids, attention_mask, past)
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.embed_scale * inputs_embeds
        if self.config.decoder_entangle_position_embedding:
            hidden = hidden + self.embed_positions.weight[past : past + length]
        hidden = F.dropout(self.layernorm_embedding(hidden), self.config.dropout, self.training)
        states, self_weights, cross_weights = [hidden], [], []
        for layer, bias in zip(self.layers, biases.self_attention, strict=True):
            bias = bias[:, :, past : past + length, : past + length]
            if hidden_away is not None:
                bias = bias.masked_fill(hidden_away[:, None, None, :], float("-inf"))
            hidden, own, cross = layer(
                hidden,
                encoder_outputs.last_hidden_state,
                bias,
                cross_bias,
                past_key_values=past_key_values,  # by name: gradient checkpointing leaves it out
                output_attentions=bool(output_attentions),
            )
            states.append(hidden)
            self_weights.append(own)
            cross_weights.append(cross)
        return {
            "last_hidden_state": self.layer_norm(hidden),
            "past_key_values": past_key_values,
            "decoder_hidden_states": tuple(states) if output_hidden_states else None,
            "decoder_attentions": tuple(self_weights) if output_attentions else None,
            "cross_attentions": tuple(cross_weights) if output_attentions else None,
        }

    def _hidden_targets(self, tokens: Tensor, mask: Tensor | None, past: int) -> Tensor | None:
        """Where targets hold padding, ``[rows, past + length]``; ``None`` if nowhere. Generated padding needs no hiding.

        Raises:
            DataError: for a mask of another length, or padding on the left.
        """
        if mask is None and past:
            return None
        hidden = padding_of(tokens, mask, self.config.pad_token_id)
        if hidden.shape[1] != past + tokens.shape[1]:
            raise DataError(
                f"the decoder's attention mask is for {hidden.shape[1]} positions, the target has {past + tokens.shape[1]}"
            )
        if not hidden.any():
            return None
        if hidden[:, 0].any():
            raise DataError("a target is padded on the left, where its positions are counted from: pad on the right")
        return hidden

    def _biases(
        self, encoder_outputs: OFAEncoderOutput, needed: int, cache: EncoderDecoderCache | None
    ) -> DecoderBiases:
        """Biases of at least ``needed`` target positions; with a cache they are kept there from step to step."""
        if needed > self.config.max_target_positions:
            raise DataError(
                f"a target of {needed} tokens is longer than max_target_positions = {self.config.max_target_positions}"
            )
        kept: DecoderBiases | None = getattr(cache, "ofa_biases", None)
        if kept is not None and kept.capacity >= needed:
            return kept
        capacity = needed
        if cache is not None:
            capacity = FIRST_CAPACITY if kept is None else 2 * kept.capacity
            capacity = min(max(capacity, needed), self.config.max_target_positions)
        source = encoder_outputs.position_embeddings
        assert source is not None
        source = source[:1]  # beam search in transformers repeats every tensor of the encoder's output
        place = self.pos_ln(self.embed_positions.weight[None, :capacity])
        absolute = absolute_scores(
            self.self_pos_q_linear(place), self.self_pos_k_linear(place), self.heads, self.pos_scale
        )
        future = torch.ones(capacity, capacity, dtype=torch.bool, device=absolute.device).triu(1)
        absolute = absolute.masked_fill(future, float("-inf"))
        buckets = token_bucket_matrix(capacity, self.config.token_bucket_size, absolute.device)
        cross = absolute_scores(
            self.cross_pos_q_linear(place), self.cross_pos_k_linear(source), self.heads, self.pos_scale
        )
        biases = DecoderBiases([absolute + look_up(t, buckets) for t in self.token_rel_pos_table_list], cross)
        if cache is not None:
            cache.ofa_biases = biases
        return biases
