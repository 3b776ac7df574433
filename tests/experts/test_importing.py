"""PEFT folders that pituning did not write: exactly the adapter they hold, or a refusal that names what is wrong."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel

from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, RefusedError
from pituning.experts import ExpertCard, ExpertPool
from pituning.experts.health import broken, without_effect
from pituning.experts.importing import import_expert, import_notes
from pituning.interpolation import build_mixture, collapse
from pituning.methods import attached

PREFIX = "base_model.model."
QUERY = "encoder.layer.0.attention.self.query"


def peft_folder(model: torch.nn.Module, config: PeftConfig, folder: Path, seed: int = 0, scale: float = 0.3) -> Path:
    """What PEFT itself writes for a model of its own, with random tensors; the model is left as it was."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have invalid shape.*")  # PEFT takes lora_bias for a broken factor
        peft_model.save_pretrained(folder)
    peft_model.unload()
    return folder


def edit(folder: Path, tensors: Any = None, **settings: Any) -> Path:
    """Change a folder's tensors by a function, and its configuration by values."""
    if tensors is not None:
        path = folder / "adapter_model.safetensors"
        safetensors.torch.save_file(tensors(safetensors.torch.load_file(path)), path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {k.replace(old, new): t for k, t in tensors.items()}


@pytest.fixture
def model(bert: Backbone) -> BertModel:
    """A second BERT with the backbone's weights, for PEFT to work on."""
    copy = BertModel(bert.model.config)
    copy.load_state_dict(bert.model.state_dict())
    return copy


@pytest.fixture
def lora(model: BertModel, tmp_path: Path) -> Path:
    """A LoRA folder of PEFT's."""
    return peft_folder(model, LoraConfig(r=2, target_modules=["query", "value"]), tmp_path / "someones")


def peft_output(model: torch.nn.Module, folder: Path, ids: Tensor, **inputs: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        loaded = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        out: Tensor = loaded.eval()(**{"input_ids": ids, **inputs})[0]
    loaded.unload()
    return out


def own_output(backbone: Backbone, expert: Any, ids: Tensor) -> Tensor:
    with attached(backbone, expert.config, expert.tensors), torch.no_grad():
        out: Tensor = backbone.model(input_ids=ids)[0]
    return out


IDS = torch.tensor([[2, 9, 14, 27, 3]])


class TestNames:
    def test_pefts_own_folder(self, bert: Backbone, model: BertModel, lora: Path) -> None:
        expert = import_expert(lora, bert, task="somewhere")
        assert (expert.name, expert.card.task, expert.card.method) == ("someones", "somewhere", "lora")
        assert expert.card.fingerprint == bert.fingerprint
        assert import_notes(expert) == ""
        expected = peft_output(model, lora, IDS)
        assert torch.equal(own_output(bert, expert, IDS), expected)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (renamed(PREFIX, ""), "(nothing) → base_model.model."),
            (renamed(PREFIX, "base_model.model.bert."), "base_model.model.bert. → base_model.model."),
            (renamed(PREFIX, "base_model.model.model.language_model."), "model.language_model. → base_model.model."),
            (renamed(".weight", ".default.weight"), ""),
            (renamed("lora_A.weight", "lora_A.my_task.weight"), ""),
        ],
    )
    def test_other_names_for_the_same_modules(
        self, bert: Backbone, model: BertModel, lora: Path, change: Any, said: str
    ) -> None:
        expected = peft_output(model, lora, IDS)
        expert = import_expert(edit(lora, change), bert)
        assert torch.equal(own_output(bert, expert, IDS), expected)
        assert said in import_notes(expert)

    def test_targets_that_name_another_class(self, bert: Backbone, model: BertModel, lora: Path) -> None:
        """A configuration that lists whole paths of a model with a head."""
        expected = peft_output(model, lora, IDS)
        paths = [f"bert.encoder.layer.{n}.attention.self.{p}" for n in range(2) for p in ("query", "value")]
        edit(lora, renamed(PREFIX, "base_model.model.bert."), target_modules=paths)
        assert torch.equal(own_output(bert, import_expert(lora, bert), IDS), expected)

    def test_targets_that_lack_what_stands_in_front(self, bert: Backbone, model: BertModel, lora: Path) -> None:
        """The same of an inner module: whole paths that are shorter than the backbone's."""
        expected = peft_output(model, lora, IDS)
        paths = [f"layer.{n}.attention.self.{p}" for n in range(2) for p in ("query", "value")]
        edit(lora, renamed(f"{PREFIX}encoder.", PREFIX), target_modules=["inner." + p for p in paths])
        expert = import_expert(lora, bert)
        assert torch.equal(own_output(bert, expert, IDS), expected)
        assert "base_model.model. → base_model.model.encoder." in import_notes(expert)

    def test_names_that_fit_nowhere(self, bert: Backbone, lora: Path, message: Any) -> None:
        edit(lora, renamed("attention.self", "mixer"))
        text = message(import_expert, lora, bert)
        assert "'someones' does not fit" in text
        assert f"not in the folder: {PREFIX}{QUERY}.lora_A.weight [2, 16]" in text
        assert f"not in the backbone: {PREFIX}encoder.layer.0.mixer.query.lora_A.weight [2, 16]" in text

    def test_a_missing_tensor(self, bert: Backbone, lora: Path, message: Any) -> None:
        edit(lora, lambda t: {k: v for k, v in t.items() if k != f"{PREFIX}{QUERY}.lora_B.weight"})
        assert f"not in the folder: {PREFIX}{QUERY}.lora_B.weight [16, 2]" in message(import_expert, lora, bert)

    def test_an_extra_tensor(self, bert: Backbone, lora: Path, message: Any) -> None:
        key = f"{PREFIX}encoder.layer.9.attention.self.query.lora_A.weight"
        edit(lora, lambda t: {**t, key: torch.ones(2, 16)})
        assert f"not in the backbone: {key} [2, 16]" in message(import_expert, lora, bert)

    def test_another_width(self, bert: Backbone, lora: Path, message: Any) -> None:
        edit(lora, lambda t: {k: (v[:, :8].contiguous() if "lora_A" in k else v) for k, v in t.items()})
        text = message(import_expert, lora, bert)
        assert f"tensor {PREFIX}{QUERY}.lora_A.weight has shape [2, 8], expected [2, 16]" in text

    def test_ia3(self, bert: Backbone, model: BertModel, tmp_path: Path) -> None:
        config = IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
        folder = peft_folder(model, config, tmp_path / "scaled")
        expected = peft_output(model, folder, IDS)
        assert torch.equal(own_output(bert, import_expert(folder, bert), IDS), expected)


class TestHeads:
    @pytest.fixture
    def classifier(self, bert: Backbone, tmp_path: Path) -> Path:
        """A LoRA of a BERT with a classification head, which PEFT saves beside it."""
        config = BertConfig.from_dict(bert.model.config.to_dict())
        model = BertForSequenceClassification(config)
        model.bert.load_state_dict(bert.model.state_dict())
        return peft_folder(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "judge")

    def test_a_head_is_refused_by_name(self, bert: Backbone, classifier: Path) -> None:
        with pytest.raises(RefusedError, match=r"drop_heads=True") as caught:
            import_expert(classifier, bert)
        assert f"{PREFIX}classifier.weight [2, 16]" in str(caught.value)
        assert f"{PREFIX}classifier.bias [2]" in str(caught.value)

    def test_or_left_out_and_said(self, bert: Backbone, classifier: Path) -> None:
        expert = import_expert(classifier, bert, drop_heads=True)
        assert not any("classifier" in k for k in expert.tensors)
        assert len(expert.tensors) == 4
        assert f"left out: {PREFIX}classifier" in import_notes(expert)
        assert "base_model.model.bert. → base_model.model." in import_notes(expert)
        build_mixture([expert, expert.with_card(name="again")], train="none")

    def test_a_module_that_the_backbone_has(self, bert: Backbone, model: BertModel, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"])
        folder = peft_folder(model, config, tmp_path / "pooled")
        with pytest.raises(RefusedError, match=r"pooler\.dense\.weight \[16, 16\]"):
            import_expert(folder, bert)
        assert len(import_expert(folder, bert, drop_heads=True).tensors) == 4

    def test_a_copy_of_the_backbones_own_tensor(self, bert: Backbone, model: BertModel, lora: Path) -> None:
        """What PEFT writes for embeddings that an adapter may have changed."""
        expected = peft_output(model, lora, IDS)
        key, own = f"{PREFIX}embeddings.word_embeddings.weight", bert.model.embeddings.word_embeddings.weight.detach()
        edit(lora, lambda t: {**t, key: own.clone()})
        expert = import_expert(lora, bert)
        assert torch.equal(own_output(bert, expert, IDS), expected)
        assert expert.card.training["imported"]["same_as_the_backbone"] == [key]
        edit(lora, lambda t: {**t, key: own + 1})
        with pytest.raises(RefusedError, match=r"differ from the backbone's.*\n.*word_embeddings\.weight"):
            import_expert(lora, bert)


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
class TestTied:
    """T5's output layer and embeddings are one weight; PEFT writes a copy of it beside an adapter of either."""

    @pytest.mark.parametrize("target", ["lm_head", "shared"])
    def test_an_adapter_of_a_tied_layer_runs_alone(self, t5: Backbone, tmp_path: Path, target: str) -> None:
        model = copy.deepcopy(t5.model)
        folder = peft_folder(model, LoraConfig(r=2, target_modules=["q", target]), tmp_path / "tied")
        ids = {"input_ids": IDS, "decoder_input_ids": IDS[:, :2]}
        expected = peft_output(model, folder, IDS, **ids)
        expert = import_expert(folder, t5)
        with attached(t5, expert.config, expert.tensors), torch.no_grad():
            assert torch.equal(t5.model(**ids)[0], expected)
        copied = expert.card.training["imported"].get("same_as_the_backbone", [])
        assert copied == ([f"{PREFIX}lm_head.base_layer.weight"] if target == "lm_head" else [])
        if target == "shared":
            with pytest.raises(RefusedError, match=r"shared\.lora_embedding_A \[2, \d+\] is not a LoRA factor"):
                build_mixture([expert, expert], train="none")


class TestBroken:
    def test_all_of_b_is_zero(self, bert: Backbone, lora: Path, message: Any) -> None:
        edit(lora, lambda t: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in t.items()})
        text = message(import_expert, lora, bert)
        assert "'someones' is broken" in text
        assert "no effect: all of its 4 modules are as before training" in text

    def test_some_of_b_is_zero(self, bert: Backbone, lora: Path) -> None:
        edit(
            lora,
            lambda t: {k: torch.zeros_like(v) if "0.attention.self.query.lora_B" in k else v for k, v in t.items()},
        )
        expert = import_expert(lora, bert)
        assert without_effect(expert) == [f"{PREFIX}{QUERY}"]
        assert broken(expert) == []

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_none(self, bert: Backbone, lora: Path, message: Any, value: float) -> None:
        def spoilt(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            changed = {k: t.clone() for k, t in tensors.items()}
            changed[f"{PREFIX}{QUERY}.lora_A.weight"][0, 3] = value
            return changed

        text = message(import_expert, edit(lora, spoilt), bert)
        assert f"{PREFIX}{QUERY}.lora_A.weight [2, 16] holds 1 values that are NaN or infinite" in text

    def test_untrained_of_every_method(self, backbone_of: Any, random_expert: Any) -> None:
        for family, method in (
            ("encoder", "lora"),
            ("encoder", "bottleneck"),
            ("encoder", "bitfit"),
            ("ofa", "bitfit"),
        ):
            expert = random_expert(backbone_of(family), method, 1, scale=0.0)
            assert "never trained" in broken(expert)[0], method
            foreign = broken(expert.with_card(init_hash=""))
            assert (method == "bottleneck") == (not foreign), "a bottleneck starts near, not at, no effect"
            assert broken(random_expert(backbone_of(family), method, 1)) == []

    def test_twice_the_same_and_untrained_in_a_pool(self, bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
        pool = ExpertPool(tmp_path)
        for seed, name in ((1, "one"), (2, "two"), (1, "then")):
            pool.add(random_expert(bert, "lora", seed), name)
        pool.add(random_expert(bert, "lora", 3, scale=0.0), "zero")
        report = pool.verify(bert)
        assert (report["one"], report["two"]) == ("", "")
        assert report["then"] == "expert 'then' has the same tensors as 'one', bit by bit"
        assert "never trained" in report["zero"]


class TestFolders:
    def test_a_pickle_is_not_read(self, bert: Backbone, lora: Path, message: Any) -> None:
        torch.save({}, lora / "adapter_model.bin")
        (lora / "adapter_model.safetensors").unlink()
        assert "pickle only, which is never read" in message(import_expert, lora, bert)

    def test_an_unknown_setting_that_is_on(self, bert: Backbone, lora: Path, message: Any) -> None:
        import_expert(edit(lora, a_later_switch=False, another=None), bert)
        assert "no setting a_later_switch=0.5" in message(import_expert, edit(lora, a_later_switch=0.5), bert)

    def test_an_unknown_method(self, bert: Backbone, lora: Path, message: Any) -> None:
        assert "'LATER' is not known" in message(import_expert, edit(lora, peft_type="LATER"), bert)

    def test_another_base(self, bert: Backbone, lora: Path) -> None:
        edit(lora, base_model_name_or_path="someone/large-model")
        with pytest.raises(BackboneMismatchError, match=r"'someone/large-model'.*'tiny-bert'.*--any-base"):
            import_expert(lora, bert)
        assert import_expert(lora, bert, any_base=True).card.training["imported"]["base_model_name_or_path"]
        import_expert(edit(lora, base_model_name_or_path="someone/tiny-BERT"), bert)

    @pytest.mark.parametrize("source", ["./not/there", "three/part/name", "nowhere"])
    def test_no_folder(self, bert: Backbone, source: str, message: Any) -> None:
        assert "is no folder" in message(import_expert, source, bert)

    def test_the_hub_out_of_reach(self, bert: Backbone, message: Any) -> None:
        assert "could not be fetched from the hub" in message(import_expert, "owner/name", bert)

    def test_one_of_ours(self, bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
        expert = random_expert(bert, "bottleneck", 1)
        found = import_expert(expert.save(tmp_path / "own"), bert, name="mine")
        assert (found.name, found.card.init_hash) == ("mine", expert.card.init_hash)
        assert all(torch.equal(found.tensors[k], t) for k, t in expert.tensors.items())
        assert (found.card.task, found.card.licence) == (expert.card.task, expert.card.licence)
        card = import_expert(tmp_path / "own", bert, task="sst2", licence="mit").card
        assert (card.name, card.task, card.licence) == (expert.name, "sst2", "mit")
        for option in ("drop_heads", "any_base"):
            with pytest.raises(RefusedError, match=f"leave out {option}"):
                import_expert(tmp_path / "own", bert, **{option: True})


def test_mixed_pools_interpolate(
    bert: Backbone, model: BertModel, tmp_path: Path, lora_deltas: Any, distance: Any
) -> None:
    """Ranks, targets, scalings and dtypes differ: ΔW of the blend is the weighted sum of the experts' own."""
    configs = [
        LoraConfig(r=2, lora_alpha=8, target_modules=["query", "value"]),
        LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["query", "key"]),
        LoraConfig(r=3, rank_pattern={"layer.0.attention.self.value": 1}, target_modules=["value"]),
    ]
    folders = [peft_folder(model, c, tmp_path / f"e{k}", seed=k) for k, c in enumerate(configs)]
    edit(folders[1], lambda t: {k: v.bfloat16() for k, v in t.items()})
    experts = [import_expert(f, bert) for f in folders]
    mixture, config = build_mixture(experts, [0.5, 0.2, 0.3], train="none")
    blended = lora_deltas(collapse(mixture, config, ExpertCard("blend")).expert)
    expected: dict[str, Tensor] = {}
    for weight, expert in zip((0.5, 0.2, 0.3), experts, strict=True):
        for module, delta in lora_deltas(expert).items():
            expected[module] = expected.get(module, torch.zeros_like(delta)) + weight * delta
    assert blended.keys() == expected.keys()
    assert all(distance(blended[m], d) <= 1e-5 for m, d in expected.items())
