"""Any PEFT configuration: what PEFT's own loading gives back, bit by bit, or a refusal that says why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel

from pituning.errors import ExpertError, PituningError
from pituning.experts import Expert
from pituning.methods import attached, make_config
from pituning.training.train_expert import train_expert
from pituning.training.trainer import TrainSettings
from tests.conftest import build_bert
from tests.methods.tiny import backbone, expert

TARGETS = {"target_modules": ["query", "value"]}
FROM_A_SEED = "ignore:Specified to not (save|load) vera_A"  # what PEFT says of save_projection=False


def lora(**options: Any) -> PeftConfig:
    return peft.LoraConfig(r=4, **{**TARGETS, **options})


CONFIGS = {
    "dora": lora(use_dora=True),
    "lora-bias": lora(lora_bias=True),
    "rslora": lora(use_rslora=True, lora_alpha=3),
    "lora-patterns": lora(rank_pattern={"query": 2}, alpha_pattern={"0.attention.self.value": 5}),
    "modules-to-save": lora(modules_to_save=["attention.output.LayerNorm", "pooler"]),
    "loha": peft.LoHaConfig(r=4, **TARGETS),
    "lokr": peft.LoKrConfig(r=4, **TARGETS),
    "oft": peft.OFTConfig(oft_block_size=4, r=0, **TARGETS),
    "hra": peft.HRAConfig(r=4, **TARGETS),
    "ia3": peft.IA3Config(feedforward_modules=[], **TARGETS),
    "fourierft": peft.FourierFTConfig(n_frequency=10, **TARGETS),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, **TARGETS),
    "ln-tuning": peft.LNTuningConfig(target_modules=["LayerNorm"]),
}


def loads_as_it_was(config: Any, tmp_path: Path) -> None:
    model = build_bert(torch.float32)
    modules = [f"{n} {type(m)}" for n, m in model.model.named_modules()]
    own = expert(model, config, scale=0.1)
    inputs = {
        "input_ids": torch.tensor([[2, 9, 17, 3], [2, 40, 3, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
    }
    with torch.no_grad():
        bare = model.model(**inputs)[0]
        with attached(model, own.config, own.tensors) as site:
            expected = model.model(**inputs)[0]
            assert sum(p.numel() for p in site.parameters.values()) == sum(
                p.numel() for p in model.model.parameters() if p.requires_grad
            )
        assert torch.equal(model.model(**inputs)[0], bare)
        assert [f"{n} {type(m)}" for n, m in model.model.named_modules()] == modules
        assert (expected - bare).abs().max() > 1e-3
        folder = own.save(tmp_path / "expert")
        torch.manual_seed(123)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model.model), folder).eval()
        assert torch.equal(loaded(**inputs)[0], expected)
    again = Expert.load(folder)
    again.verify(model)
    assert all(torch.equal(again.tensors[k], t) for k, t in own.tensors.items())


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's loading says it of every norm
@pytest.mark.parametrize("name", CONFIGS)
def test_loads_as_it_was(name: str, tmp_path: Path) -> None:
    loads_as_it_was(CONFIGS[name], tmp_path)


@pytest.mark.filterwarnings(FROM_A_SEED)
def test_projections_from_a_seed(tmp_path: Path) -> None:
    loads_as_it_was(peft.VeraConfig(r=4, save_projection=False, **TARGETS), tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            peft.VeraConfig(r=4, **TARGETS),
            r"VERA .* set save_projection=False.*\n.*PEFT saves base_model.vera_A \[4, 16\]",
        ),
        (peft.ShiraConfig(r=2, **TARGETS), r"SHIRA .*more than the tensors that it trains:\n.*shira_indices"),
        (peft.DeloraConfig(r=2, **TARGETS), "DELORA "),
        (peft.VBLoRAConfig(vector_length=8, save_only_topk_weights=True, **TARGETS), "VBLORA "),
        (peft.AdaLoraConfig(init_r=4, total_step=9, **TARGETS), "ADALORA .*its ranks are allocated"),
        (peft.PromptTuningConfig(num_virtual_tokens=3), "PROMPT_TUNING .*use prompt or prefix"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3), "PREFIX_TUNING .*use prompt or prefix"),
        (
            lora(bias="lora_only"),
            r"LORA would train tensors of the backbone itself.*bias='none'.*\n.*base_layer.bias \[16\]",
        ),
        (lora(trainable_token_indices=[3, 4]), "LORA .*trainable_token_indices trains rows of the embeddings"),
        (
            lora(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"),
            r"LORA .*alora_invocation_tokens \(aLoRA\) takes effect only behind these tokens.* changes nothing",
        ),
    ],
    ids=["vera", "shira", "delora", "vblora", "adalora", "prompt-tuning", "prefix-tuning", "bias", "tokens", "alora"],
)
def test_what_would_be_lost_is_refused(config: PeftConfig, said: str) -> None:
    model = build_bert(torch.float32)
    modules = [f"{n} {type(m)}" for n, m in model.model.named_modules()]
    state = {k: v.clone() for k, v in model.model.state_dict().items()}
    with pytest.raises(ExpertError, match=said), attached(model, config):
        pass
    assert [f"{n} {type(m)}" for n, m in model.model.named_modules()] == modules
    assert all(torch.equal(v, state[k]) for k, v in model.model.state_dict().items())
    assert not any(p.requires_grad for p in model.model.parameters())
    model.require_free()


SETTINGS = TrainSettings(learning_rate=3e-2, steps=8, batch_size=4)


class TestTraining:
    @pytest.mark.parametrize("name", ["loha", "dora", "lora-bias"])
    def test_a_configuration_in_place_of_a_method(self, make_task: Any, name: str) -> None:
        model, task = build_bert(torch.float32), make_task(shots=2)
        trained = train_expert(model, task, CONFIGS[name], settings=SETTINGS)
        assert trained.card.method == ("loha" if name == "loha" else "lora")
        trained.verify(model)
        batch = model.collate(task.split("train"))
        with torch.no_grad(), attached(model, CONFIGS[name]):
            before = model.loss(batch).mean()
        with torch.no_grad(), attached(model, trained.config, trained.tensors):
            assert model.loss(batch).mean() < before

    def test_options_beside_a_configuration(self, make_task: Any) -> None:
        with pytest.raises(PituningError, match="a LoHaConfig is complete; set r in it"):
            train_expert(build_bert(torch.float32), make_task(), CONFIGS["loha"], r=3)

    def test_a_configuration_that_is_refused(self, make_task: Any) -> None:
        with pytest.raises(ExpertError, match="PROMPT_TUNING"):
            train_expert(build_bert(torch.float32), make_task(), peft.PromptTuningConfig(num_virtual_tokens=3))

    @pytest.mark.parametrize("kind", ["t5", "llama"])
    @pytest.mark.parametrize("method", ["ia3", "prefix", "prompt"])
    def test_every_method_learns(self, kind: str, method: str, make_task: Any) -> None:
        model, task = backbone(kind), make_task(shots=2)
        trained = train_expert(model, task, method, settings=SETTINGS)
        assert trained.card.method == method
        batch = model.collate(task.split("train"))
        with torch.no_grad(), attached(model, make_config(method, model)):
            before = model.loss(batch).mean()
        with torch.no_grad(), attached(model, trained.config, trained.tensors):
            assert model.loss(batch).mean() < before
