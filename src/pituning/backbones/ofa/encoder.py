"""The encoder of OFA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from pituning.backbones.ofa.configuration import STEM_STRIDE, OFAConfig
from pituning.backbones.ofa.layers import OFAEncoderLayer
from pituning.backbones.ofa.positions import (
    absolute_scores,
    image_bucket_matrix,
    patch_positions,
    token_bucket_matrix,
)
from pituning.backbones.ofa.pretrained import OFAPreTrainedModel, padding_of, position_tables
from pituning.backbones.ofa.stem import ImageStem, drop_path_rates
from pituning.errors import DataError, PituningError


@dataclass
class OFAEncoderOutput(BaseModelOutput):
    """What the decoder needs of the encoder.

    Attributes:
        last_hidden_state: ``[batch, patches + tokens, d_model]``, image patches first.
        padding_mask: ``[batch, patches + tokens]``, True where nothing may look.
        position_embeddings: normed absolute positions, ``[1, patches + tokens, d_model]``, the same for all examples.
    """

    padding_mask: Tensor | None = None
    position_embeddings: Tensor | None = None


class OFAEncoder(OFAPreTrainedModel):
    """Reads image patches and text tokens."""

    def __init__(self, config: OFAConfig) -> None:
        super().__init__(config)
        width, heads, layers = config.d_model, config.encoder_attention_heads, config.encoder_layers
        self.embed_scale = width**0.5 if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else nn.Identity()
        self.type_embedding = nn.Embedding(config.type_vocab_size, width) if config.add_type_embedding else None
        self.embed_images = ImageStem(config)
        self.image_proj = nn.Linear(self.embed_images.out_channels, width)
        self.patch_layernorm_embedding = nn.LayerNorm(width) if config.patch_layernorm_embedding else nn.Identity()
        self.embed_positions = nn.Embedding(config.max_source_positions + 2, width)
        self.embed_image_positions = nn.Embedding(config.image_bucket_size**2 + 1, width)
        self.pos_ln = nn.LayerNorm(width)
        self.image_pos_ln = nn.LayerNorm(width)
        self.pos_q_linear = nn.Linear(width, width)
        self.pos_k_linear = nn.Linear(width, width)
        self.pos_scale = (width / heads * config.attn_scale_factor) ** -0.5
        rates = drop_path_rates(config.encoder_drop_path_rate, layers)
        self.layers = nn.ModuleList(OFAEncoderLayer(config, i, rate) for i, rate in enumerate(rates))
        self.layer_norm = nn.LayerNorm(width)
        self.token_rel_pos_table_list, self.image_rel_pos_table_list = position_tables(config, layers, heads)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings, shared with the decoder and the output."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        patch_images: Tensor | None = None,
        patch_images_2: Tensor | None = None,
        patch_masks: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> OFAEncoderOutput:
        """Encode.

        Args:
            input_ids: ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``, 0 for padding; by default what is not ``pad_token_id``.
            patch_images: ``[batch, 3, height, width]``, normalised.
            patch_images_2: a second image per example, for configurations with ``type_vocab_size`` 3.
            patch_masks: ``[batch]``, False for examples whose images are to be ignored; by default all True.
            inputs_embeds: ``[batch, tokens, d_model]``, the tokens' embeddings, where they are looked up already.

        Raises:
            DataError: for a text or an image that is larger than the position tables.
            PituningError: for a second image where the model has no type embedding for it.
        """
        padding = padding_of(input_ids, attention_mask, self.config.pad_token_id)
        if input_ids.shape[1] > self.config.max_source_positions:
            raise DataError(
                f"a source of {input_ids.shape[1]} tokens is longer than max_source_positions = "
                f"{self.config.max_source_positions}"
            )
        text_positions = self.embed_positions.weight[: input_ids.shape[1]]
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.embed_scale * inputs_embeds
        hidden = self.layernorm_embedding(self._typed(hidden, 0, text_positions))
        # parts in the order of the sequence: the second image, the first one, the text
        parts, positions = [self._dropout(hidden)], [self.pos_ln(text_positions)]
        grids: list[tuple[int, int]] = []
        for kind, images in ((1, patch_images), (2, patch_images_2)):
            if images is None:
                continue
            patches, place, grid = self._patches(images, kind)
            hidden_away = ~patch_masks.bool() if patch_masks is not None else padding.new_zeros(len(images))
            padding = torch.cat([hidden_away[:, None].expand(-1, patches.shape[1]), padding], dim=1)
            parts, positions, grids = [patches, *parts], [place, *positions], [grid, *grids]
        hidden = torch.cat(parts, dim=1)
        place = torch.cat(positions)[None]
        hidden = hidden * ~padding[..., None]
        bias = absolute_scores(
            self.pos_q_linear(place), self.pos_k_linear(place), self.config.encoder_attention_heads, self.pos_scale
        )
        if padding.any():
            bias = bias.masked_fill(padding[:, None, None, :], float("-inf"))
        places = self._relative_places(grids, input_ids.shape[1], bias.device)
        states, attentions = [hidden], []
        tables = zip(self.image_rel_pos_table_list, self.token_rel_pos_table_list, strict=True)
        for layer, both in zip(self.layers, tables, strict=True):
            relative = [(start, both[is_text], buckets) for start, is_text, buckets in places]
            hidden, weights = layer(hidden, bias, relative, bool(output_attentions))
            states.append(hidden)
            attentions.append(weights)
        return OFAEncoderOutput(
            last_hidden_state=self.layer_norm(hidden),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            padding_mask=padding,
            position_embeddings=place,
        )

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _typed(self, x: Tensor, kind: int, positions: Tensor) -> Tensor:
        if self.config.entangle_position_embedding:
            x = x + positions
        return x if self.type_embedding is None else x + self.type_embedding.weight[kind]

    def _patches(self, images: Tensor, kind: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Hidden states ``[batch, patches, d_model]``, normed positions ``[patches, d_model]`` and (height, width)."""
        types = 2 if self.type_embedding is None else self.type_embedding.num_embeddings
        if kind >= types:
            raise PituningError(
                f"this OFA model has {types} types of input, and image number {kind} would be one more: configure "
                f"type_vocab_size={kind + 1} and train it"
            )
        size = self.config.image_bucket_size * STEM_STRIDE
        if max(images.shape[-2:]) > size:  # before the stem's work; patch_positions checks again
            raise DataError(
                f"images of {images.shape[-2]} × {images.shape[-1]} pixels do not fit this model's position table of "
                f"{size} × {size} pixels: resize them"
            )
        features = self.embed_images(images.to(self.embed_images.conv1.weight.dtype))
        height, width = features.shape[-2:]
        positions = self._image_positions(height, width)
        hidden = self.embed_scale * self.image_proj(features.flatten(2).transpose(1, 2))
        hidden = self._dropout(self.patch_layernorm_embedding(self._typed(hidden, kind, positions)))
        return hidden, self.image_pos_ln(positions), (height, width)

    def _image_positions(self, height: int, width: int) -> Tensor:
        table, bucket_size = self.embed_image_positions, self.config.image_bucket_size
        rows = patch_positions(height, width, bucket_size, table.weight.device)
        side = self.config.orig_patch_image_size // STEM_STRIDE
        if not self.config.interpolate_position or height * width <= side * side:
            return table(rows)  # type: ignore[no-any-return]
        known = table(patch_positions(side, side, bucket_size, table.weight.device))
        known = known.view(1, side, side, -1).permute(0, 3, 1, 2)
        return F.interpolate(known, size=(height, width), mode="bilinear")[0].flatten(1).t()

    def _relative_places(
        self, grids: list[tuple[int, int]], tokens: int, device: torch.device
    ) -> list[tuple[int, bool, Tensor]]:
        """First position, whether it is the text, and buckets of each part of the sequence."""
        places, start = [], 0
        for height, width in grids:
            places.append((start, False, image_bucket_matrix(height, width, self.config.image_bucket_size, device)))
            start += height * width
        return [*places, (start, True, token_bucket_matrix(tokens, self.config.token_bucket_size, device))]
