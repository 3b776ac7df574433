"""Checkpoints of the reference implementation, and what they compute.

The numbers were recorded by running the reference (see the fixtures' README): logits within 1e-5 · max(1, max |recorded|).
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pituning.backbones.ofa.checkpoint import (
    Checkpoint,
    config_from_fairseq,
    model_from,
    open_checkpoint,
    parse_fairseq_flags,
    split_fairseq,
    state_from_fairseq,
    state_to_fairseq,
)
from pituning.backbones.ofa.fairseq_experts import FairseqExpert, FairseqExperts, experts_from_fairseq
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.names import our_name
from pituning.backbones.ofa.selfcheck import UnreadOFA
from pituning.methods import attached, config_dict, peft_config

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
pytestmark = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"the reference's recorded numbers are not here: no folder {FIXTURES}"
)
EXPERT_CASES = (
    "adapter_single", "adapter_k2_learnable", "lora_single", "lora_k2_shared_base", "prefix_single", "prefix_k2",
)  # fmt: skip
INPUTS = {
    "input_ids": "src_tokens", "patch_images": "patch_images", "patch_masks": "patch_masks",
    "decoder_input_ids": "prev_output_tokens",
}  # fmt: skip
REAL_SIZES = ("real_tiny_plain", "real_base_plain", "real_large_plain")


def meta_of(case: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((FIXTURES / case / "meta.json").read_text()))


def args_of(case: str) -> dict[str, Any]:
    meta = meta_of(case)
    flags = [*meta["flags"], *meta["common_flags"], *meta.get("sizes", [])]
    return {"arch": meta["arch"], **parse_fairseq_flags(flags)}


def backbone_of(model: OFAForConditionalGeneration) -> UnreadOFA:
    return UnreadOFA("tiny-ofa", model)


@torch.no_grad()
def logits_of(model: Any, batch: str) -> Tensor:
    tensors = load_file(FIXTURES / "inputs" / "inputs.safetensors")
    arguments = {own: tensors[f"{batch}.{name}"] for own, name in INPUTS.items() if f"{batch}.{name}" in tensors}
    return cast(Tensor, model(**arguments, use_cache=False).logits)


def expert_logits(backbone: UnreadOFA, expert: FairseqExpert, batch: str) -> Tensor:
    with attached(backbone, config_dict(peft_config(expert.config)), expert.tensors):
        return logits_of(backbone.model, batch)


def check_recorded(found: Tensor, case: str, batch: str) -> None:
    recorded = load_file(FIXTURES / case / "outputs.safetensors")[f"{batch}.logits"]
    assert found.shape == recorded.shape
    assert float((found - recorded).abs().max()) <= 1e-5 * max(1.0, float(recorded.abs().max()))


def imported(case: str) -> tuple[FairseqExperts, UnreadOFA]:
    state = load_file(FIXTURES / case / "weights.safetensors")
    args = args_of(case)
    config = config_from_fairseq(args, state)
    found = experts_from_fairseq(split_fairseq(state), config, lora_weights="unmerged", args=args)
    return found, backbone_of(model_from(config, found.backbone))


@cache
def genuine(name: str, folder: Path) -> Checkpoint:
    path = folder / f"{name}.pt"
    with gzip.open(FIXTURES / "checkpoint" / f"{name}.pt.gz") as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def report() -> Mapping[str, Any]:
    return cast(dict[str, Any], json.loads((FIXTURES / "checkpoint" / "report.json").read_text()))


@pytest.mark.parametrize("batch", "ABCD")
def test_a_plain_state_computes_the_recorded_logits(batch: str) -> None:
    state = load_file(FIXTURES / "plain" / "weights.safetensors")
    model = model_from(config_from_fairseq(args_of("plain"), state), state_from_fairseq(state))
    check_recorded(logits_of(model, batch), "plain", batch)


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_an_imported_expert_computes_the_recorded_logits(case: str) -> None:
    found, backbone = imported(case)
    recorded = load_file(FIXTURES / case / "outputs.safetensors")
    batches = sorted(k.removesuffix(".logits") for k in recorded if k.endswith(".logits"))
    assert batches
    for batch in batches:
        check_recorded(expert_logits(backbone, found.blended, batch), case, batch)
    bare = logits_of(backbone.model, batches[0])
    assert float((bare - recorded[f"{batches[0]}.logits"]).abs().max()) > 1e-3, "the expert must matter"


@pytest.mark.parametrize("case", ["adapter_k2_learnable", "lora_k2_shared_base", "prefix_k2"])
def test_an_interpolation_keeps_its_experts_and_logits(case: str) -> None:
    found, _ = imported(case)
    state = load_file(FIXTURES / case / "weights.safetensors")
    assert len(found.parts) == 2
    assert sum(found.mean_weights()) == pytest.approx(1)
    names = [k for k in state if k.endswith(("interpolation_weight", "weight1", "weight2", "prompt_weight_scale"))]
    stored = torch.cat([state[n].flatten() for n in names]).sort().values
    assert torch.equal(torch.cat(list(found.logits.values())).sort().values, stored)


@pytest.mark.parametrize("case", ["plain", *EXPERT_CASES])
def test_backbone_names_there_and_back(case: str) -> None:
    state = load_file(FIXTURES / case / "weights.safetensors")
    parts = split_fairseq(state)
    named = state_to_fairseq(parts.backbone)
    expected = {k: t for k, t in state.items() if k not in parts.expert and k not in parts.tables}
    assert named.keys() == expected.keys()
    assert all(torch.equal(named[k], t) for k, t in expected.items())


@pytest.mark.parametrize("case", REAL_SIZES)
def test_flags_alone_give_the_real_sizes(case: str) -> None:
    config = config_from_fairseq(args_of(case))
    with torch.device("meta"):
        model = OFAForConditionalGeneration(config)
    own = {
        n: p.numel()
        for n, p in model.named_parameters()
        if n not in ("lm_head.weight", "model.decoder.embed_tokens.weight")
    }
    assert sum(own.values()) == meta_of(case)["n_params"]
    assert not config.decoder_entangle_position_embedding


def test_a_genuine_file_is_read_with_its_arguments(folder: Path) -> None:
    base = genuine("base", folder)
    assert (base.format, base.expert, base.notes) == ("fairseq", {}, ())
    assert base.config.resnet_layers == [1, 2, 1]
    assert (base.config.dropout, base.config.encoder_drop_path_rate) == (0.1, 0.2)
    assert base.fairseq is not None
    assert not base.fairseq.has_ema
    assert {"encoder.token_rp_bucket", "decoder.image_position_idx"} <= base.fairseq.parts().tables.keys()
    logits = logits_of(model_from(base.config, base.state), "A")
    assert torch.isfinite(logits).all()


def test_what_training_did_to_the_frozen_backbone_is_listed(folder: Path, report: Mapping[str, Any]) -> None:
    base, checkpoint = genuine("base", folder), genuine("adapter_expert_a", folder)
    assert checkpoint.fairseq is not None
    found = experts_from_fairseq(
        checkpoint.fairseq.parts(), checkpoint.config, base=base.state, args=checkpoint.fairseq.args
    )
    recorded = report["tensors_of_the_frozen_base_that_changed_while_training_an_adapter"]
    without_counters = {our_name(k): v for k, v in recorded.items() if not k.endswith("num_batches_tracked")}
    assert {c.name: c.largest for c in found.changes} == pytest.approx(without_counters)
    assert all(c.is_statistic for c in found.changes)


def test_a_merged_lora_expert_is_not_merged_twice(folder: Path, report: Mapping[str, Any]) -> None:
    """The reference computes W + 2 B A after loading such a file: its error is recorded, and ours must be none."""
    base, checkpoint = genuine("base", folder), genuine("lora_expert_a", folder)
    assert checkpoint.fairseq is not None
    found = experts_from_fairseq(checkpoint.fairseq.parts(), checkpoint.config, base=base.state)
    assert len(found.merged) == 24
    truth = logits_of(model_from(checkpoint.config, checkpoint.state), "A")  # W + B A, as it was saved
    right = expert_logits(backbone_of(model_from(checkpoint.config, found.backbone)), found.blended, "A")
    assert float((right - truth).abs().max()) <= 1e-5
    twice = expert_logits(backbone_of(model_from(checkpoint.config, checkpoint.state)), found.blended, "A")
    recorded = report["lora_logits_after_reload_vs_true"]
    assert float((twice - truth).abs().max()) == pytest.approx(recorded["max_abs_diff"], abs=1e-5)
    assert float(truth.abs().max()) == pytest.approx(recorded["max_abs_logit"], abs=1e-5)


def test_products_that_the_user_says_are_merged_are_taken_out(folder: Path, report: Mapping[str, Any]) -> None:
    base, checkpoint = genuine("base", folder), genuine("lora_expert_a", folder)
    assert checkpoint.fairseq is not None
    found = experts_from_fairseq(checkpoint.fairseq.parts(), checkpoint.config, lora_weights="merged")
    rest = report["lora_saved_weight_minus_base_vs_BA"]["max|W_saved-W_base-BA*scaling|"]
    for name in found.merged:
        ours = our_name(name)
        assert float((found.backbone[ours] - base.state[ours]).abs().max()) <= rest + 6e-8, name


def test_what_the_reference_combines_is_what_we_import(folder: Path) -> None:
    base, single = genuine("base", folder), genuine("adapter_expert_a", folder)
    combined = load_file(FIXTURES / "checkpoint" / "combined_adapter_k2.safetensors")
    other = load_file(FIXTURES / "checkpoint" / "adapter_expert_b.adapters.safetensors")
    assert single.fairseq is not None
    found = experts_from_fairseq(split_fairseq(combined), base.config)
    singles = [
        experts_from_fairseq(single.fairseq.parts(), base.config).blended,
        experts_from_fairseq(split_fairseq(other), base.config).blended,
    ]
    for part, alone in zip(found.parts, singles, strict=True):
        assert part.tensors.keys() == alone.tensors.keys()
        assert all(torch.equal(part.tensors[k], t) for k, t in alone.tensors.items())
    for key, tensor in found.blended.tensors.items():  # equal logits: the mean
        mean = sum(s.tensors[key].double() for s in singles) / 2
        assert torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-8)
