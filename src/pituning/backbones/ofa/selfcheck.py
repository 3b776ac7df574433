"""Prove a written backbone: load its folder again and compare tensors and a forward pass with the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.backbones.ofa.backbone import OFABackbone
from pituning.backbones.ofa.configuration import STEM_STRIDE, OFAConfig
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.errors import PituningError
from pituning.problems import listed


class UnreadOFA(OFABackbone):
    """An OFA without its vocabulary: experts can be put on it, but it reads and writes no text."""

    def __init__(self, name: str, model: OFAForConditionalGeneration) -> None:
        Backbone.__init__(self, name, model, None)


def random_inputs(config: OFAConfig) -> dict[str, Tensor]:
    """Two examples with pictures of at most 64 × 64 pixels and up to six tokens; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    side = STEM_STRIDE * min(4, config.image_bucket_size)

    def tokens(longest: int) -> Tensor:
        return torch.randint(3, config.vocab_size, (2, min(6, longest)), generator=generator)

    return {
        "input_ids": tokens(config.max_source_positions),
        "decoder_input_ids": tokens(config.max_target_positions),
        "patch_images": torch.randn(2, 3, side, side, generator=generator),
    }


@torch.no_grad()
def checked_logits(model: Any, config: OFAConfig) -> Tensor:
    """Logits ``[2, tokens, vocabulary]`` of the random inputs.

    Args:
        model: an OFA, with an expert or without.

    Raises:
        PituningError: if they are not finite.
    """
    logits: Tensor = model(**random_inputs(config), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise PituningError("the self-check failed: the logits of a random input are not finite; nothing was written")
    return logits


def require_equal(found: Tensor, expected: Tensor) -> int:
    """Raise unless two results agree bit by bit; how many numbers were compared.

    Raises:
        PituningError: says by how much they differ.
    """
    if not torch.equal(found, expected):
        difference = float((found - expected).abs().max())
        raise PituningError(
            f"the self-check failed: what was written gives other logits than the model in memory, by up to {difference:.3g}; "
            "nothing was written"
        )
    return found.numel()


def check_folder(model: OFAForConditionalGeneration, folder: Path) -> int:
    """Load a folder in float32 and compare it with the model that was saved; how many logits were compared.

    Raises:
        PituningError: names the tensors that did not come back.
    """
    loaded, found = OFAForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = [str(key) for keys in found.values() for key in keys]
    expected, state = model.state_dict(), loaded.state_dict()
    wrong += [k for k in expected.keys() | state.keys() if k not in state or not torch.equal(expected[k], state[k])]
    if wrong:
        raise PituningError(
            "the self-check failed: these tensors did not come back; nothing was written:" + listed(wrong)
        )
    return require_equal(checked_logits(loaded.eval(), model.config), checked_logits(model, model.config))
