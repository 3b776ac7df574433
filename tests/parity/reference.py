"""What the comparisons with the reference's recorded numbers share: the files, the models they came from, the tolerances.

The figures and how each was made: README of the fixtures folder, which is not part of this repository.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.initialization import no_init_weights

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.generation import BeamSettings, Hypothesis
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.names import fairseq_name

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"the reference's recorded numbers are not here: no folder {FIXTURES}"
)
TIED = 1e-4  # where scores are closer than this, either may be first
BATCHES = ("A", "B", "C", "D")
TINY, REAL, GRADIENT = 1e-5, 1e-4, 1e-4  # tolerances of the fixtures' README
# The original rounds GELU and softmax to float32, whose last bits depend on the processor's kernels: with AVX-512, 1e-9 holds.
DOUBLE = 1e-9 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 3e-8


def recorded(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Output tensors and ``meta.json`` of a case."""
    meta: dict[str, Any] = json.loads((FIXTURES / case / "meta.json").read_text())
    return load_file(FIXTURES / case / "outputs.safetensors"), meta


def assert_near(found: Tensor | float, expected: Tensor | float, tolerance: float = TINY) -> None:
    """Largest difference at most tolerance · max(1, largest expected magnitude)."""
    found, expected = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape
    limit = tolerance * max(1.0, float(expected.abs().max()))
    difference = float((found.detach() - expected).abs().max())
    assert difference <= limit, f"off by {difference:.3g}, allowed {limit:.3g}"


def assert_same_gradient(found: Tensor | None, expected: Tensor, name: str) -> None:
    """Relative norm of the difference at most 1e-4; a gradient that is zero up to rounding need only be small."""
    assert found is not None, f"{name} has no gradient"
    assert found.shape == expected.shape, name
    difference, norm = float((found - expected).norm()), float(expected.norm())
    assert difference <= GRADIENT * norm + 1e-5, f"gradient of {name} is off by {difference:.3g} of {norm:.3g}"


def in_reference(name: str) -> str:
    """The reference's name of one of the model's tensors; tied copies go by the embedding's."""
    if name in ("lm_head.weight", "model.decoder.embed_tokens.weight"):
        return "encoder.embed_tokens.weight"
    return fairseq_name(name)


def filled(config: OFAConfig, tensor_of: Callable[[str, torch.Size], Tensor]) -> OFAForConditionalGeneration:
    """A model with ``tensor_of(name in the reference, shape)`` as its tensors."""
    with no_init_weights():
        model = OFAForConditionalGeneration(config).eval()
    model.tie_weights()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                tensor.copy_(tensor_of(in_reference(name), tensor.shape))
    return model


def tiny_config(**settings: Any) -> OFAConfig:
    """The sizes of the tiny cases."""
    return OFAConfig(
        vocab_size=93, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64,
        resnet_layers=[1, 2, 1], resnet_stem_width=8, resnet_widths=[4, 8, 16], max_source_positions=64,
        max_target_positions=32, token_bucket_size=16, image_bucket_size=8, code_image_size=32, **settings,
    )  # fmt: skip


def tiny_model(**settings: Any) -> OFAForConditionalGeneration:
    """The tiny model of the fixtures, with their plain weights."""
    tensors = load_file(FIXTURES / "plain" / "weights.safetensors")
    return filled(tiny_config(**settings), lambda name, _: tensors[name])


def inputs_of(batch: str) -> dict[str, Tensor]:
    """The encoder's arguments of one recorded batch."""
    tensors = load_file(FIXTURES / "inputs" / "inputs.safetensors")
    names = {"input_ids": "src_tokens", "patch_images": "patch_images", "patch_masks": "patch_masks"}
    return {own: tensors[f"{batch}.{name}"] for own, name in names.items() if f"{batch}.{name}" in tensors}


def targets_of(batch: str) -> tuple[Tensor, Tensor]:
    """What the decoder reads, and the labels with −100 for padding."""
    tensors = load_file(FIXTURES / "inputs" / "inputs.safetensors")
    target = tensors[f"{batch}.target"]
    return tensors[f"{batch}.prev_output_tokens"], target.masked_fill(target == 1, -100)


def recipe(name: str, shape: torch.Size) -> Tensor:
    """The fixtures' weights of large cases: a function of the tensor's name in the reference."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith(".running_mean"):
        return 0.1 * z
    if name.endswith(".running_var"):
        return 1 + 0.5 * z.abs()
    if len(shape) == 1:
        return 1 + 0.1 * z if name.endswith((".weight", "c_attn", "w_resid")) else 0.05 * z
    z = 0.5 * z if "rel_pos_table" in name else z / shape[1:].numel() ** 0.5
    if name == "encoder.embed_tokens.weight":
        z[1] = 0
    return z


def settings_of(arguments: Mapping[str, Any]) -> BeamSettings:
    """The reference's command line arguments as settings."""
    names = {"lenpen": "length_penalty"}
    values = {names.get(k, k): v for k, v in arguments.items() if k != "unnormalized"}
    return BeamSettings(**values, normalize=not arguments.get("unnormalized", False))


def check_hypotheses(found: Sequence[Sequence[Hypothesis]], reference: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Same tokens in the same order, but where scores tie; scores within 1e-5 · max(1, |recorded|)."""
    for own, theirs in zip(found, reference, strict=True):
        assert [h.score for h in own] == sorted((h.score for h in own), reverse=True)
        scores = {tuple(h["tokens"]): h for h in theirs}
        for hypothesis, expected in zip(own, theirs, strict=True):
            tokens = tuple(hypothesis.tokens.tolist())
            if tokens != tuple(expected["tokens"]):
                assert abs(scores[tokens]["score"] - expected["score"]) < TIED
                expected = scores[tokens]
            assert hypothesis.score == pytest.approx(expected["score"], rel=1e-5, abs=1e-5)
            if "positional_scores" in expected:
                for position, score in zip(hypothesis.positional_scores, expected["positional_scores"], strict=True):
                    assert float(position) == pytest.approx(score, rel=1e-5, abs=1e-5)
