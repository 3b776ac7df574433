"""OFA as a `transformers` model: one encoder-decoder that reads text and image patches and writes tokens.

Source: Wang et al., "OFA", ICML 2022. Parameter names are those of the Hugging Face format of the released checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput

from pituning.backbones.loss import IGNORED
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.decoder import OFADecoder
from pituning.backbones.ofa.encoder import OFAEncoder, OFAEncoderOutput
from pituning.backbones.ofa.pretrained import OFAPreTrainedModel
from pituning.errors import PituningError

__all__ = [
    "OFAConfig",
    "OFADecoder",
    "OFAEncoder",
    "OFAEncoderOutput",
    "OFAForConditionalGeneration",
    "OFAModel",
    "OFAPreTrainedModel",
    "new_cache",
]


class OFAModel(OFAPreTrainedModel):
    """Encoder and decoder, without the output projection."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OFAConfig) -> None:
        super().__init__(config)
        self.encoder = OFAEncoder(config)
        self.decoder = OFADecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings of both sides."""
        self.encoder.embed_tokens = value
        self.decoder.embed_tokens = value

    def get_encoder(self, modality: str | None = None) -> OFAEncoder:
        """The encoder."""
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        patch_images: Tensor | None = None,
        patch_images_2: Tensor | None = None,
        patch_masks: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: OFAEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """Encode and decode.

        Args:
            input_ids, attention_mask, patch_images, patch_images_2, patch_masks: see :meth:`OFAEncoder.forward`.
            decoder_input_ids: ``[rows, length]``; ``rows`` may be a multiple of the batch, see
                :meth:`OFAAttention.forward`.
            encoder_outputs: what the encoder returned, instead of its inputs.
            past_key_values: keys and values of earlier positions; ``decoder_input_ids`` are then the new ones only.
        """
        if decoder_input_ids is None:
            raise PituningError("OFA needs decoder_input_ids, or labels to make them from")
        decoder_embeds = None
        if encoder_outputs is None:
            if input_ids is None:
                raise PituningError("OFA needs input_ids or encoder_outputs")
            embeds, decoder_embeds = self._embed_both(input_ids, decoder_input_ids)
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask=attention_mask,
                patch_images=patch_images,
                patch_images_2=patch_images_2,
                patch_masks=patch_masks,
                inputs_embeds=embeds,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
            )
        if not isinstance(encoder_outputs, OFAEncoderOutput) or encoder_outputs.padding_mask is None:
            raise PituningError(
                "encoder_outputs must be what OFA's encoder returned: the decoder needs its padding_mask and "
                "position_embeddings as well"
            )
        if use_cache and past_key_values is None:
            past_key_values = new_cache()
        decoded = self.decoder(
            decoder_input_ids,
            encoder_outputs,
            attention_mask=decoder_attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return Seq2SeqModelOutput(
            **decoded,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def _embed_both(self, source: Tensor, target: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both sides' embeddings from one look-up where the shared table is trained: its dense gradient is made once."""
        table, other = self.encoder.embed_tokens, self.decoder.embed_tokens
        # an expert's layer in the place of a table must run as it is
        shared = type(table) is type(other) is nn.Embedding and table.weight is other.weight
        if not (shared and torch.is_grad_enabled() and table.weight.requires_grad):
            return None, None
        looked_up = table(torch.cat([source.flatten(), target.flatten()]))
        first, second = looked_up.split([source.numel(), target.numel()])
        return first.view(*source.shape, -1), second.view(*target.shape, -1)


class OFAForConditionalGeneration(OFAPreTrainedModel, GenerationMixin):
    """OFA with its output projection, which shares its weight with the token embeddings."""

    _tied_weights_keys = {  # noqa: RUF012
        "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
        "lm_head.weight": "model.encoder.embed_tokens.weight",
    }

    def __init__(self, config: OFAConfig) -> None:
        super().__init__(config)
        self.model = OFAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> OFAEncoder:
        """The encoder."""
        return self.model.encoder

    def get_output_embeddings(self) -> nn.Linear:
        """The output projection."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        patch_images: Tensor | None = None,
        patch_images_2: Tensor | None = None,
        patch_masks: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: OFAEncoderOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """Encode, decode and project; arguments as in :meth:`OFAModel.forward`.

        Args:
            labels: ``[batch, length]``, −100 where nothing is to be learned. ``decoder_input_ids`` default to the labels
                shifted to the right.

        Returns:
            ``logits`` ``[rows, length, vocabulary]`` and, with labels, ``loss``: mean cross-entropy over the tokens.
        """
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            patch_images=patch_images,
            patch_images_2=patch_images_2,
            patch_masks=patch_masks,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        values = {k: v for k, v in output.items() if k != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **values)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels shifted to the right behind the start token, −100 replaced by padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        assert start is not None
        assert pad is not None
        shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORED, pad)


def new_cache() -> EncoderDecoderCache:
    """An empty key-value cache for decoding."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


AutoModel.register(OFAConfig, OFAModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(OFAConfig, OFAForConditionalGeneration, exist_ok=True)
