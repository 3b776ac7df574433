"""The reference implementation's prefix encoders, as the keys and values that they make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.errors import PituningError


def plain_prefixes(found: Mapping[str, Tensor], config: OFAConfig) -> dict[str, Tensor]:
    """Keys and values ``[length, d_model]`` of every layer, in place of the prefix encoders that make them.

    An encoder's rows hold, layer after layer, a key and a value; with projection they come from Linear, ReLU, Linear.

    Args:
        found: an expert checkpoint's tensors under fairseq's names.

    Returns:
        ``….3.key`` and ``….3.value`` of layer 3 in place of an encoder's tensors, and a scale's row ``….3``.

    Raises:
        PituningError: for tensors that are missing, or shapes that do not fit together or the model.
    """
    depths = {"encoder": config.encoder_layers, "decoder": config.decoder_layers or config.encoder_layers}
    made: dict[str, Tensor] = {}
    for name in [k for k in found if k.endswith(".embedding.weight")]:
        stem = name.removesuffix(".embedding.weight")
        side, width = name.split(".")[0], config.d_model
        layers = depths[side]
        rows, network = found[name], [f"{stem}.trans.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
        if any(k.startswith(f"{stem}.trans.") for k in found):
            if missing := [k for k in network if k not in found]:
                raise PituningError(f"the prefix encoder {stem} lacks {', '.join(missing)}")
            rows = _projected(stem, rows, [found[k] for k in network])
        if rows.dim() != 2 or rows.shape[1] != 2 * layers * width:
            raise PituningError(
                f"{stem} makes rows of shape {list(rows.shape[1:])}, expected [{2 * layers * width}]: a key and a value "
                f"of {width} for each of {layers} layers"
            )
        for index, part in enumerate(torch.split(rows, width, dim=1)):
            made[f"{stem}.{index // 2}.{('key', 'value')[index % 2]}"] = part.contiguous()
    used = re.compile(r"_prompt_encoder(\.\d+)?\.(embedding\.weight|trans\.[02]\.(weight|bias))$")
    rest = {k: t for k, t in found.items() if not used.search(k)}
    for name in [k for k in rest if k.endswith(".prompt_weight_scale")]:
        scale, side = rest.pop(name), name.split(".")[0]
        layers = depths[side]
        # The reference gives the decoder's scale as many rows as the encoder has layers; it uses the first ones.
        if scale.dim() != 2 or len(scale) < layers:
            raise PituningError(f"{name} has shape {list(scale.shape)}, expected a row for each of {layers} layers")
        rest |= {f"{name}.{layer}": scale[layer] for layer in range(layers)}
    return {**rest, **made}


def _projected(stem: str, rows: Tensor, network: Sequence[Tensor]) -> Tensor:
    first, first_bias, second, second_bias = network
    try:
        hidden = torch.nn.functional.linear(rows.float(), first.float(), first_bias.float()).relu()
        return torch.nn.functional.linear(hidden, second.float(), second_bias.float())
    except RuntimeError as error:
        shapes = [list(t.shape) for t in (rows, *network)]
        raise PituningError(f"the prefix encoder {stem} has shapes {shapes}, which do not fit together") from error
