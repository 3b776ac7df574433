"""`verify`, `export_merged`, `push` and `pull`: what is proven, and what is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from transformers import BertModel, T5ForConditionalGeneration

from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, ExpertError, RefusedError, UnknownNameError
from pituning.experts import Expert, ExpertPool
from pituning.experts.expert import file_hash
from pituning.experts.export import export_merged
from pituning.experts.sharing import pull, push
from pituning.interpolation.operators import merge
from pituning.interpolation.verify import Check, verify
from pituning.methods import initial_tensors
from tests.methods.tiny import expert as expert_of


def states(checks: list[Check]) -> dict[str, bool | None]:
    return {c.name: c.ok for c in checks}


def tampered(folder: Path, key: str, change: Any) -> Path:
    """Change a tensor and make the card agree, as a careful forger would."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[key] = change(tensors[key])
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    card = json.loads((folder / "expert.json").read_text())
    card["sha256"], card["tensors"][key] = file_hash(path), list(tensors[key].shape)
    (folder / "expert.json").write_text(json.dumps(card))
    return folder


class TestVerify:
    @pytest.mark.parametrize(
        ("family", "method"),
        [("encoder", "lora"), ("encoder", "bottleneck"), ("seq2seq", "lora"), ("encoder", "bitfit"), ("ofa", "prefix")],
    )
    def test_a_sound_expert(
        self, backbone_of: Any, random_expert: Any, tmp_path: Path, family: str, method: str
    ) -> None:
        backbone = backbone_of(family)
        folder = random_expert(backbone, method, 1).save(tmp_path / "one")
        found = states(verify(folder, backbone))
        assert found == {"files": True, "health": True, "backbone": True, "plain PEFT": True, "lineage": None}
        assert states(verify(folder)) == {**found, "backbone": None, "plain PEFT": None}
        assert not any(p.requires_grad for p in backbone.model.parameters())

    def test_changed_bytes(self, bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
        folder = random_expert(bert, "lora", 1).save(tmp_path / "one")
        data = bytearray((folder / "adapter_model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "adapter_model.safetensors").write_bytes(bytes(data))
        (check,) = verify(folder, bert)
        assert (check.name, check.ok) == ("files", False)
        assert "was changed after it was saved" in check.found

    def test_modules_of_an_experts_own_are_taken_off_again(
        self, fresh_bert_of: Any, random_examples: Any, tmp_path: Path
    ) -> None:
        bert = fresh_bert_of(torch.float32)
        config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["attention.output.LayerNorm", "pooler"])
        folder = expert_of(bert, config).save(tmp_path / "one")
        batch = bert.collate(random_examples(4, 3))
        modules = [f"{n} {type(m)}" for n, m in bert.model.named_modules()]
        with torch.no_grad():
            bare = bert.loss(batch)
            assert states(verify(folder, bert))["plain PEFT"] is True
            assert torch.equal(bert.loss(batch), bare)
        assert [f"{n} {type(m)}" for n, m in bert.model.named_modules()] == modules

    def test_a_folder_that_peft_cannot_load(
        self, fresh_bert_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bert = fresh_bert_of(torch.float32)
        config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"])
        folder = expert_of(bert, config).save(tmp_path / "one")
        modules = [f"{n} {type(m)}" for n, m in bert.model.named_modules()]

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("of no use")

        monkeypatch.setattr(PeftModel, "load_adapter", fail)  # it comes after the layers have gone in
        check = {c.name: c for c in verify(folder, bert)}["plain PEFT"]
        assert check.ok is False
        assert check.found == f"PEFT cannot load {folder} onto tiny-bert: of no use"
        assert [f"{n} {type(m)}" for n, m in bert.model.named_modules()] == modules
        assert not hasattr(bert.model, "peft_config")
        assert not any(p.requires_grad for p in bert.model.parameters())

    def test_a_forged_tensor(self, bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
        expert = random_expert(bert, "lora", 1)
        key = next(k for k in expert.tensors if "lora_B" in k)
        folder = tampered(expert.save(tmp_path / "one"), key, lambda t: torch.zeros(3, 5))
        checks = {c.name: c for c in verify(folder, bert)}
        assert checks["backbone"].ok is False
        assert f"tensor {key} has shape [3, 5], expected [16, 3]" in checks["backbone"].found
        assert checks["plain PEFT"].ok is False

    def test_no_effect(self, bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
        folder = random_expert(bert, "lora", 1, scale=0.0).save(tmp_path / "one")
        check = verify(folder, bert)[1]
        assert check.ok is False
        assert "never trained" in check.found
        assert "no effect" in check.found

    def test_another_backbone(self, bert: Backbone, t5: Backbone, random_expert: Any, tmp_path: Path) -> None:
        found = verify(random_expert(bert, "lora", 1).save(tmp_path / "one"), t5)
        assert states(found)["backbone"] is False

    @pytest.mark.parametrize("operator", ["uniform_soup", "task_arithmetic", "concatenate", "ties", "dare"])
    @pytest.mark.parametrize("method", ["lora", "bottleneck"])
    def test_a_merge_is_made_again(
        self, bert: Backbone, random_experts: Any, tmp_path: Path, operator: str, method: str
    ) -> None:
        if (operator, method) == ("concatenate", "bottleneck"):
            return
        pool = ExpertPool(tmp_path)
        experts = random_experts(bert, method, 3, 5)
        for expert in experts:
            pool.add(expert)
        needs = method == "bottleneck" and operator != "uniform_soup"
        settings = {"initial": initial_tensors(bert, experts[0].config)} if needs else {}
        folder = pool.add(merge(experts, operator, **settings).expert, "merged")
        check = verify(folder, bert, pool)[-1]
        assert check.ok is True, check.found
        key = next(k for k in Expert.load(folder).tensors if k.endswith(("lora_B.weight", "bottleneck_up.weight")))
        check = verify(tampered(folder, key, lambda t: 1.01 * t), bert, pool)[-1]
        assert check.ok is False
        assert "made again, differs by" in check.found

    def test_a_bias_that_was_changed(self, bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
        """What ``lora_bias`` adds is part of a merge."""
        pool = ExpertPool(tmp_path)
        experts = [random_expert(bert, "lora", k, lora_bias=True) for k in range(2)]
        for expert in experts:
            pool.add(expert)
        folder = pool.add(merge(experts, "uniform_soup").expert, "merged")
        assert verify(folder, bert, pool)[-1].ok is True
        key = next(k for k in Expert.load(folder).tensors if k.endswith("lora_B.bias"))
        assert verify(tampered(folder, key, lambda t: 1.01 * t), bert, pool)[-1].ok is False

    def test_a_parent_that_is_gone(self, bert: Backbone, random_experts: Any, tmp_path: Path) -> None:
        pool = ExpertPool(tmp_path)
        experts = random_experts(bert, "lora", 2, 5)
        pool.add(experts[0])
        folder = pool.add(merge(experts, "uniform_soup").expert, "merged")
        assert verify(folder, None, pool)[-1].ok is False
        assert verify(folder)[-1].ok is None


class TestExport:
    @pytest.mark.parametrize("family", ["encoder", "seq2seq"])
    @pytest.mark.parametrize("method", ["lora", "bitfit"])
    def test_transformers_alone_computes_the_same(
        self, backbone_of: Any, random_expert: Any, random_examples: Any, attached_loss: Any, tmp_path: Path, family: str,
        method: str,
    ) -> None:  # fmt: skip
        if (family, method) == ("seq2seq", "bitfit"):
            return  # T5 has no bias
        backbone = backbone_of(family)
        expert = random_expert(backbone, method, 3)
        before = {k: t.clone() for k, t in backbone.model.state_dict().items()}
        done = export_merged(backbone, expert, tmp_path / "merged")
        assert 0 <= done.difference < 1e-4
        model = {"encoder": BertModel, "seq2seq": T5ForConditionalGeneration}[family].from_pretrained(done.folder)
        examples = random_examples(4, 3)
        expected = attached_loss(backbone, expert, examples)
        own = backbone.model
        try:
            backbone.model = model.eval()
            with torch.no_grad():
                found = backbone.loss(backbone.collate(examples))
        finally:
            backbone.model = own
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(before[k], t) for k, t in backbone.model.state_dict().items())

    @pytest.mark.parametrize(("family", "method"), [("encoder", "bottleneck"), ("ofa", "prefix")])
    def test_methods_that_no_weight_stands_for(
        self, backbone_of: Any, random_expert: Any, tmp_path: Path, family: str, method: str
    ) -> None:
        backbone = backbone_of(family)
        with pytest.raises(RefusedError, match=f"of method '{method}' cannot be folded into the backbone"):
            export_merged(backbone, random_expert(backbone, method, 1), tmp_path / "merged")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
    def test_a_tied_weight(self, t5: Backbone, random_expert: Any, tmp_path: Path) -> None:
        assert t5.model.lm_head.weight is t5.model.shared.weight
        expert = random_expert(t5, "lora", 1, target_modules=["lm_head"])
        with pytest.raises(RefusedError, match=r"lm_head\.weight \[\d+, 16\] is also .*encoder\.embed_tokens\.weight"):
            export_merged(t5, expert, tmp_path / "merged")

    def test_other_refusals(self, bert: Backbone, t5: Backbone, random_expert: Any, tmp_path: Path) -> None:
        expert = random_expert(bert, "lora", 1)
        with pytest.raises(ExpertError, match="exists; a merged model is written to a new folder"):
            export_merged(bert, expert, tmp_path)
        with pytest.raises(BackboneMismatchError):
            export_merged(t5, expert, tmp_path / "merged")


class TestSharing:
    def test_there_and_back(self, bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
        here, there = ExpertPool(tmp_path / "here"), ExpertPool(tmp_path / "there")
        expert = random_expert(bert, "lora", 1, name="one")
        folder = here.add(expert)
        (folder / "task_embedding.safetensors").write_bytes(b"as it is")
        place = push(here, "one", str(tmp_path / "repository"))
        assert Path(place) == tmp_path / "repository" / "one"
        found = pull(str(tmp_path / "repository"), there, "one")
        assert found.card == expert.card
        assert all(torch.equal(found.tensors[k], t) for k, t in expert.tensors.items())
        assert (tmp_path / "there" / "one" / "task_embedding.safetensors").read_bytes() == b"as it is"

    def test_refusals(self, bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
        here = ExpertPool(tmp_path / "here")
        folder = here.add(random_expert(bert, "lora", 1, name="one"))
        push(here, "one", tmp_path / "repository")
        with pytest.raises(ExpertError, match="has an expert 'one' already"):
            pull(tmp_path / "repository", here, "one")
        with pytest.raises(UnknownNameError, match="unknown expert 'two'"):
            pull(tmp_path / "repository", ExpertPool(tmp_path / "there"), "two")
        key = next(k for k in Expert.load(folder).tensors if "lora_B" in k)
        spoilt = tampered(tmp_path / "repository" / "one", key, lambda t: torch.full_like(t, float("nan")))
        with pytest.raises(ExpertError, match="NaN or infinite"):
            pull(spoilt.parent, ExpertPool(tmp_path / "there"), "one")

    def test_the_hub_out_of_reach(self, bert: Backbone, random_expert: Any, tmp_path: Path, message: Any) -> None:
        pool = ExpertPool(tmp_path)
        pool.add(random_expert(bert, "lora", 1, name="one"))
        assert "could not be pushed to owner/experts" in message(push, pool, "one", "owner/experts")
        assert "could not be fetched from the hub" in message(pull, "owner/experts", pool, "two")
