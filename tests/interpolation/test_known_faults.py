"""What users of other tools report as silently wrong, each exact here or refused. Numbers are of huggingface/peft's issues.

A merge that gives one adapter the weight 1.0 has to give back that very adapter; a merge of several has to be the weighted sum
of what they add to the model's weights, and it has to load again in PEFT alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import BertModel

from pituning.backbones.base import Backbone
from pituning.errors import RefusedError
from pituning.experts import Expert, ExpertCard
from pituning.experts.importing import import_expert
from pituning.interpolation import build_mixture, collapse
from tests.experts.test_importing import IDS, edit, peft_folder, peft_output, renamed

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rsLoRA (#3761)": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "lora_bias (#3761)": {"r": 4, "lora_alpha": 8, "lora_bias": True},
    "rank_pattern (#3737)": {"r": 4, "rank_pattern": {"layer.0.attention.self.query": 2}},
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"layer.1.attention.self.value": 3}},
    "another rank (#2512)": {"r": 7, "lora_alpha": 2},
    "other modules": {"r": 3, "target_modules": ["key", "output.dense"]},
}


@pytest.fixture
def model(bert: Backbone) -> BertModel:
    copy = BertModel(bert.model.config)
    copy.load_state_dict(bert.model.state_dict())
    return copy


def folder_of(model: BertModel, variant: str, place: Path, seed: int = 0) -> Path:
    settings = {"target_modules": ["query", "value"], **VARIANTS[variant]}
    return peft_folder(model, LoraConfig(**settings), place, seed=seed)


def merged(experts: list[Expert], weights: list[float], place: Path, rank: int | None = None) -> Path:
    """A saved merge, as PEFT alone will load it."""
    mixture, config = build_mixture(experts, weights, train="none", coefficients="linear")
    return collapse(mixture, config, ExpertCard("merged"), rank).expert.save(place)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_one_gives_back_the_adapter(bert: Backbone, model: BertModel, tmp_path: Path, variant: str) -> None:
    folder = folder_of(model, variant, tmp_path / "one")
    expected = peft_output(model, folder, IDS)
    expert = import_expert(folder, bert)
    assert torch.equal(peft_output(model, merged([expert], [1.0], tmp_path / "alone"), IDS), expected)
    other = import_expert(folder_of(model, "plain", tmp_path / "other", seed=1), bert)
    found = peft_output(model, merged([expert, other], [1.0, 0.0], tmp_path / "both"), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.5, -0.7]], ids=["mean (#1155)", "negative (#3004)"])
def test_a_merge_is_the_sum_of_what_each_adds(
    bert: Backbone, model: BertModel, tmp_path: Path, variant: str, weights: list[float]
) -> None:
    """No cross terms A_1 B_2, no scaling applied twice: W + Σ w s (B A), and the bias that ``lora_bias`` adds."""
    folders = [folder_of(model, v, tmp_path / str(n), seed=n) for n, v in enumerate((variant, "plain"))]
    found = peft_output(model, merged([import_expert(f, bert) for f in folders], weights, tmp_path / "merged"), IDS)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    added: dict[str, Tensor] = {k: torch.zeros_like(t) for k, t in before.items()}
    for weight, folder in zip(weights, folders, strict=True):
        for key, change in what_peft_adds(model, folder).items():
            added[key] += weight * change
    model.load_state_dict({k: before[k] + added[k] for k in before})
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def what_peft_adds(model: BertModel, folder: Path) -> dict[str, Tensor]:
    """The difference that PEFT's own ``merge_and_unload`` makes to the weights of a copy."""
    import copy
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        merged_model = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    own = model.state_dict()
    return {k: t - own[k] for k, t in merged_model.state_dict().items()}


class TestDora:
    @pytest.fixture
    def dora(self, model: BertModel, tmp_path: Path) -> Path:
        return peft_folder(model, LoraConfig(r=2, target_modules=["query"], use_dora=True), tmp_path / "dora")

    def test_alone_it_is_itself(self, bert: Backbone, model: BertModel, dora: Path, tmp_path: Path) -> None:
        expected = peft_output(model, dora, IDS)
        mixture, config = build_mixture([import_expert(dora, bert)], train="none")
        saved = collapse(mixture, config, ExpertCard("again")).expert.save(tmp_path / "again")
        assert torch.equal(peft_output(model, saved, IDS), expected)

    def test_two_are_refused(self, bert: Backbone, model: BertModel, dora: Path, tmp_path: Path) -> None:
        """The norm of W + ΔW divides, so that no ΔW of the blend exists (#3761: relative error .99 without a word)."""
        experts = [import_expert(dora, bert), import_expert(folder_of(model, "plain", tmp_path / "p"), bert)]
        with pytest.raises(RefusedError, match="expert 'dora' uses use_dora"):
            build_mixture(experts, train="none")


def test_a_truncated_merge_says_its_error(bert: Backbone, model: BertModel, tmp_path: Path) -> None:
    """PEFT's svd at the default rank loses half of ΔW and says nothing (#3004)."""
    experts = [import_expert(folder_of(model, "plain", tmp_path / str(n), seed=n), bert) for n in range(3)]
    mixture, config = build_mixture(experts, train="none")
    folded = collapse(mixture, config, ExpertCard("small"), rank=4)
    assert all(0.05 < error < 1 for error in folded.errors.values())
    bounded = collapse(mixture, config, ExpertCard("bounded"), max_error=0.2)
    assert all(error <= 0.2 for error in bounded.errors.values())
    ranks = {len(t) for k, t in bounded.expert.tensors.items() if "lora_A" in k}
    assert max(ranks) < 12
    exact = collapse(mixture, config, ExpertCard("exact"), max_error=0.0)
    assert max(exact.errors.values()) == 0.0


@pytest.mark.parametrize("adapter", ["weight", "lora", "default"])
def test_names_of_adapters_do_not_matter(bert: Backbone, model: BertModel, tmp_path: Path, adapter: str) -> None:
    """#1932, #1323: adapters that are called like a part of a key."""
    folder = folder_of(model, "plain", tmp_path / adapter)
    expected = peft_output(model, folder, IDS)
    edit(folder, renamed("lora_B.weight", f"lora_B.{adapter}.weight"))
    edit(folder, renamed("lora_A.weight", f"lora_A.{adapter}.weight"))
    mine = merged([import_expert(folder, bert)], [1.0], tmp_path / "mine")
    assert torch.equal(peft_output(model, mine, IDS), expected)
