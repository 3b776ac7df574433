"""What all parts of OFA share: initialisation of the weights, padding, and the tables of relative positions."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.positions import image_bucket_count


class OFAPreTrainedModel(PreTrainedModel):
    """Weights' initialisation, loading and saving."""

    config: OFAConfig
    config_class = OFAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OFAEncoderLayer", "OFADecoderLayer", "ImageStem"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        for name in ("c_attn", "w_resid"):
            if getattr(module, name, None) is not None:
                init.ones_(getattr(module, name))


def position_tables(config: OFAConfig, layers: int, heads: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """One table of relative text positions and one of relative patch positions for each layer."""
    tokens = nn.ModuleList(nn.Embedding(2 * config.token_bucket_size - 1, heads) for _ in range(layers))
    images = nn.ModuleList(nn.Embedding(image_bucket_count(config.image_bucket_size), heads) for _ in range(layers))
    return tokens, images


def padding_of(tokens: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """True where a position holds padding, ``[batch, length]``: where the mask is 0, or the token is ``pad``."""
    return tokens.eq(-1 if pad is None else pad) if attention_mask is None else attention_mask.eq(0)
