"""`OFAConfig`: the sizes and switches of OFA, with the published sizes by name.

Source: Wang et al., "OFA: Unifying Architectures, Tasks, and Modalities Through a Simple Sequence-to-Sequence Learning
Framework", ICML 2022, Table 1; the names are those of the Hugging Face format of the released checkpoints.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from pituning.errors import PituningError, unknown_name

RESNET_LAYERS = {"resnet50": [3, 4, 6], "resnet101": [3, 4, 23], "resnet152": [3, 8, 36]}
"""Blocks in the three stages of the image stem (a ResNet without its last stage)."""

MAX_RELATIVE_POSITION = 1024
"""Longest text, in tokens, that the relative position buckets tell apart; the same in every OFA model."""

STEM_STRIDE = 16
"""Pixels per patch, vertically and horizontally."""

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4, "resnet_type": "resnet50"},
    "medium": {"d_model": 512, "encoder_layers": 4, "encoder_attention_heads": 8, "resnet_type": "resnet101"},
    "base": {"d_model": 768, "encoder_layers": 6, "encoder_attention_heads": 12, "resnet_type": "resnet101"},
    "large": {"d_model": 1024, "encoder_layers": 12, "encoder_attention_heads": 16, "resnet_type": "resnet152"},
    "huge": {
        "d_model": 1280,
        "encoder_layers": 24,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "resnet_type": "resnet152",
        "interpolate_position": True,  # pretrained at 256 pixels, used at 480
    },
}


@strict
class OFAConfig(PreTrainedConfig):
    """Configuration of an OFA model; the defaults are OFA-base.

    Args:
        vocab_size: words, ``<mask>``, image codes and location bins together.
        d_model: width of encoder and decoder.
        encoder_layers, decoder_layers, encoder_attention_heads, decoder_attention_heads, encoder_ffn_dim,
            decoder_ffn_dim: sizes; what is left out of the decoder is the encoder's, an FFN left out is 4 · ``d_model``.
        activation_function: of the FFNs, by its name in transformers.
        dropout, attention_dropout, activation_dropout: probabilities.
        encoder_drop_path_rate, decoder_drop_path_rate, resnet_drop_path_rate: stochastic depth of the last layer or
            block; it grows linearly from 0 over the layers (over each stage's blocks in the stem).
        max_source_positions, max_target_positions: longest source text and target, in tokens; at most 1024.
        token_bucket_size: half the number of relative text position buckets.
        image_bucket_size: patches per side of the image position tables: an image has at most 16 times as many pixels.
        code_image_size: kept for the format; writing image codes is not supported.
        attn_scale_factor: scores are divided by sqrt(head width · factor), the positions' as well as the contents'.
        scale_embedding: multiply embeddings by sqrt(``d_model``).
        layernorm_embedding, patch_layernorm_embedding, code_layernorm_embedding, add_type_embedding: parts of the
            input embeddings. ``type_vocab_size`` is 2 (text, image); 3 admits a second image.
        entangle_position_embedding, decoder_entangle_position_embedding: add absolute positions to the inputs as well.
        scale_attn, scale_fc, scale_heads: the mid-attention norms, the FFN norms, and one factor per attention head.
        scale_resids: one factor per feature on the residual before the FFN's output is added.
        resnet_type: ``resnet50``, ``resnet101`` or ``resnet152``; or leave it out and give ``resnet_layers``.
        resnet_layers: blocks in each of the three stages.
        resnet_stem_width: channels of the first convolution.
        resnet_widths: inner channels of the stages; their outputs have four times as many.
        freeze_resnet: normalise with stored statistics and do not train scale and shift, even in full fine-tuning.
            (Whatever the setting, the statistics stay as they are where the norms' scale requires no gradient.)
        interpolate_position, orig_patch_image_size: for images larger than the pretraining's ``orig_patch_image_size``
            pixels, interpolate its absolute positions (OFA-huge: pretrained at 256).
        reference_rounding: compute GELU and the attention's softmax in float32 whatever the model's dtype, as the original
            code does; for comparing float64 figures with its own.
        init_std: standard deviation of new weights.
        use_cache: whether ``generate`` keeps keys and values.
        pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id: OFA's are 1, 0, 2 and 0.

    Raises:
        PituningError: for sizes that do not fit together.

    >>> OFAConfig.of_size("tiny").d_model
    256
    """

    model_type = "ofa"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own attribute
    attribute_map = {  # noqa: RUF012
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
    }

    vocab_size: int = 59457
    d_model: int = 768
    encoder_layers: int = 6
    decoder_layers: int | None = None
    encoder_attention_heads: int = 12
    decoder_attention_heads: int | None = None
    encoder_ffn_dim: int | None = None
    decoder_ffn_dim: int | None = None
    activation_function: str = "gelu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    encoder_drop_path_rate: float | int = 0.0
    decoder_drop_path_rate: float | int = 0.0
    resnet_drop_path_rate: float | int = 0.0
    max_source_positions: int = 1024
    max_target_positions: int = 1024
    token_bucket_size: int = 256
    image_bucket_size: int = 42
    code_image_size: int = 128
    attn_scale_factor: float | int = 2.0
    scale_embedding: bool = False
    layernorm_embedding: bool = True
    patch_layernorm_embedding: bool = True
    code_layernorm_embedding: bool = True
    add_type_embedding: bool = True
    type_vocab_size: int = 2
    entangle_position_embedding: bool = False
    decoder_entangle_position_embedding: bool = False
    scale_attn: bool = True
    scale_fc: bool = True
    scale_heads: bool = True
    scale_resids: bool = False
    resnet_type: str | None = None
    resnet_layers: list[int] | None = None
    resnet_stem_width: int = 64
    resnet_widths: list[int] | None = None
    freeze_resnet: bool = False
    interpolate_position: bool = False
    orig_patch_image_size: int = 256
    reference_rounding: bool = False
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 0
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.decoder_layers = self.encoder_layers if self.decoder_layers is None else self.decoder_layers
        if self.decoder_attention_heads is None:
            self.decoder_attention_heads = self.encoder_attention_heads
        self.encoder_ffn_dim = 4 * self.d_model if self.encoder_ffn_dim is None else self.encoder_ffn_dim
        self.decoder_ffn_dim = self.encoder_ffn_dim if self.decoder_ffn_dim is None else self.decoder_ffn_dim
        self._set_stem()
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_attention_heads")
            if self.d_model % heads:
                raise PituningError(f"OFAConfig: d_model {self.d_model} is not a multiple of {heads} {side} heads")
        for name in ("max_source_positions", "max_target_positions"):
            if getattr(self, name) > MAX_RELATIVE_POSITION:
                raise PituningError(
                    f"OFAConfig: {name} = {getattr(self, name)}, but relative positions reach {MAX_RELATIVE_POSITION} tokens"
                )
        for name in ("encoder_drop_path_rate", "decoder_drop_path_rate", "resnet_drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise PituningError(f"OFAConfig: {name} = {getattr(self, name)} must be at least 0 and less than 1")
        super().__post_init__(**kwargs)

    def _set_stem(self) -> None:
        if self.resnet_layers is None:
            self.resnet_type = self.resnet_type or "resnet101"
            if self.resnet_type not in RESNET_LAYERS:
                raise unknown_name("image stem", self.resnet_type, RESNET_LAYERS, "Or give resnet_layers.")
            self.resnet_layers = list(RESNET_LAYERS[self.resnet_type])
        if self.resnet_widths is None:
            self.resnet_widths = [self.resnet_stem_width * f for f in (1, 2, 4)]
        for name in ("resnet_layers", "resnet_widths"):
            if len(getattr(self, name)) != 3:
                raise PituningError(f"OFAConfig: {name} needs three stages, not {getattr(self, name)}")

    @classmethod
    def of_size(cls, size: str, **overrides: Any) -> OFAConfig:
        """The configuration of a published size: tiny 33M, medium 93M, base 182M, large 473M or huge 930M parameters."""
        if size not in SIZES:
            raise unknown_name("OFA size", size, SIZES)
        return cls(**{**SIZES[size], **overrides})


AutoConfig.register("ofa", OFAConfig, exist_ok=True)
