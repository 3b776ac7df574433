"""`pituning convert`: what a user gets of an original checkpoint, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from pituning.backbones import load_backbone
from pituning.backbones.base import fingerprint_of
from pituning.backbones.ofa import OFAForConditionalGeneration, OFAProcessor
from pituning.backbones.ofa.checkpoint import state_from_fairseq
from pituning.backbones.ofa.selfcheck import UnreadOFA, checked_logits
from pituning.errors import PituningError
from pituning.experts import Expert, ExpertPool
from pituning.methods import attached
from tests.backbones.ofa.checkpoints import (
    drifted,
    fairseq_state,
    merged,
    random_adapters,
    random_lora,
    random_prefixes,
    save_checkpoint,
)
from tests.backbones.ofa.conftest import build_ofa
from tests.cli.test_cli import error, process, run, run_json

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def logits(model: Any) -> Tensor:
    return checked_logits(model, model.config)


@pytest.fixture(scope="module")
def ofa() -> OFAForConditionalGeneration:
    return build_ofa()


@pytest.fixture(scope="module")
def state(ofa: OFAForConditionalGeneration) -> dict[str, Tensor]:
    return fairseq_state(ofa)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 93 symbols as the tiny model has them."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())[:60]
    places = [*(f"<code_{i}>" for i in range(8)), *(f"<bin_{i}>" for i in range(20))]
    processor = OFAProcessor.from_symbols(["<s>", "<pad>", "</s>", "<unk>", *pieces, "<mask>", *places], [])
    folder = tmp_path_factory.mktemp("tokenizer")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("files") / "base.pt", state)


@pytest.fixture(scope="module")
def base(base_file: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted backbone."""
    folder = tmp_path_factory.mktemp("converted") / "tiny-ofa"
    run("convert", base_file, folder, "--tokenizer", tokenizer)
    return folder


@pytest.fixture
def file(tmp_path: Path, state: dict[str, Tensor]) -> Callable[..., Path]:
    """``file(expert, args, **extra_state)``: an expert checkpoint on the base."""

    def write(expert: dict[str, Tensor], args: Any = None, backbone: Any = None, **extra_state: Any) -> Path:
        return save_checkpoint(tmp_path / "expert.pt", {**(backbone or state), **expert}, args, **extra_state)

    return write


class TestHelp:
    def test_it_says_what_it_does_with_an_example(self) -> None:
        assert "pituning convert" in run("convert", "--help").stdout.split("Example", 1)[1]
        assert "│ convert " in run("--help").stdout

    def test_help_imports_nothing_heavy(self) -> None:
        code = """
import sys
from pituning.cli import main
try:
    main()
finally:
    print(sorted({"torch", "transformers", "peft"} & set(sys.modules)), file=sys.stderr)
"""
        assert process(code, "convert", "--help").stderr.strip().splitlines()[-1] == "[]"


class TestBackbone:
    def test_the_folder_is_loaded_by_transformers_and_by_us(
        self, ofa: OFAForConditionalGeneration, base_file: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        document = run_json("convert", base_file, tmp_path / "out", "--tokenizer", tokenizer)
        assert (document["kind"], document["format"], document["ema"]) == ("backbone", "fairseq", None)
        assert document["check"] == {"passed": True, "logits": 2 * 6 * 93}
        assert document["parameters"] == sum(p.numel() for p in ofa.parameters())
        loaded, found = OFAForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(found.values())
        assert torch.equal(logits(loaded.eval()), logits(ofa))
        assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()), logits(ofa))
        backbone = load_backbone(str(tmp_path / "out"))
        assert backbone.fingerprint == document["fingerprint"]
        assert torch.equal(logits(backbone.model), logits(ofa))
        settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
        assert (settings["image_size"], settings["max_image_size"], settings["num_bins"]) == (64, 64, 20)
        assert listing(tmp_path) == ["out"], "no temporary folder stays"
        modes = {p.stat().st_mode for p in (tmp_path / "out").iterdir()}
        assert len(modes) == 1, "the weights are as readable as the rest"

    def test_people_are_told_the_same(self, base_file: Path, tmp_path: Path) -> None:
        shown = run("convert", base_file, tmp_path / "out")
        for said in (
            "backbone out, from base.pt",
            "77,936 in",
            "float32",
            "none: load_backbone needs one",
            "equal and finite",
        ):
            assert said in shown.stdout
        assert f"saved to {tmp_path / 'out'}" in shown.stdout.replace("\n", "")

    def test_half_precision(self, base_file: Path, tmp_path: Path) -> None:
        document = run_json("convert", base_file, tmp_path / "out", "--dtype", "float16")
        assert document["bytes"] < 200_000
        model = OFAForConditionalGeneration.from_pretrained(tmp_path / "out")
        assert model.dtype == torch.float16
        loaded = OFAForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert loaded.lm_head.weight.dtype == torch.float32

    @pytest.mark.parametrize(("flag", "averaged"), [([], True), (["--ema"], True), (["--no-ema"], False)])
    def test_averaged_weights(
        self, state: dict[str, Tensor], file: Any, tmp_path: Path, flag: list[str], averaged: bool
    ) -> None:
        ema = {k: 1.5 * t if k.endswith("fc1.weight") else t for k, t in state.items()}
        path = file({}, ema=ema)
        document = run_json("convert", path, tmp_path / "out", *flag)
        assert document["ema"] is averaged
        assert any("averaged ones were taken" in n for n in document["notes"]) is not bool(flag)
        stored = OFAForConditionalGeneration.from_pretrained(tmp_path / "out").model.encoder.layers[0].fc1.weight
        assert torch.equal(stored, (ema if averaged else state)["encoder.layers.0.fc1.weight"])

    def test_no_averaged_weights(self, base_file: Path, tmp_path: Path) -> None:
        assert "no averaged (EMA) weights" in error("convert", base_file, tmp_path / "out", "--ema")

    def test_a_folder_in_the_hugging_face_format(
        self, ofa: OFAForConditionalGeneration, tokenizer: Path, tmp_path: Path
    ) -> None:
        source = tmp_path / "theirs"
        shutil.copytree(tokenizer, source)
        names = {k.removeprefix("model."): t for k, t in ofa.state_dict().items() if k != "lm_head.weight"}
        torch.save(names, source / "pytorch_model.bin")
        values = {
            k: v for k, v in ofa.config.to_dict().items() if not k.startswith(("decoder_entangle", "scale_", "resnet_"))
        }
        (source / "config.json").write_text(json.dumps({**values, "normformer": True, "resnet_type": "resnet50"}))
        document = run_json("convert", source, tmp_path / "out")
        assert (document["format"], document["tokenizer"]) == ("huggingface", True)
        assert torch.equal(logits(load_backbone(str(tmp_path / "out")).model), logits(ofa))

    def test_an_expert_is_left_out_only_when_asked(
        self, ofa: OFAForConditionalGeneration, state: dict[str, Tensor], file: Any, base: Path, tmp_path: Path
    ) -> None:
        document = run_json("convert", file(random_adapters()), tmp_path / "a", "--to", "backbone")
        assert document["notes"] == ["the file's expert (32 tensors) is left out"]
        lora = random_lora()
        path = file({**merged(state, lora), **lora})
        assert "merged in or not" in error("convert", path, tmp_path / "b", "--to", "backbone")
        document = run_json("convert", path, tmp_path / "b", "--to", "backbone", "--base", base)
        assert document["notes"] == ["the file's expert (48 tensors) is left out"]
        for name in "ab":
            loaded = OFAForConditionalGeneration.from_pretrained(tmp_path / name).eval()
            assert torch.equal(logits(loaded), logits(ofa))

    def test_a_vocabulary_of_another_size(self, base_file: Path, tokenizer: Path, tmp_path: Path) -> None:
        folder = tmp_path / "smaller"
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet())[:59]
        places = [*(f"<code_{i}>" for i in range(8)), *(f"<bin_{i}>" for i in range(20))]
        symbols = ["<s>", "<pad>", "</s>", "<unk>", *pieces, "<mask>", *places]
        OFAProcessor.from_symbols(symbols, []).save_pretrained(folder)
        text = error("convert", base_file, tmp_path / "out", "--tokenizer", folder)
        assert "has 92 symbols" in text
        assert "but the model has 93" in text
        assert not (tmp_path / "out").exists()


class TestExpert:
    def test_adapters(self, state: dict[str, Tensor], file: Any, base: Path, tmp_path: Path) -> None:
        adapters = random_adapters()
        path = file(adapters, {"adapter": True, "adapter_dim": 8})
        document = run_json("convert", path, tmp_path / "pool" / "refcoco", "--base", base)
        assert (document["kind"], document["method"], document["task"]) == ("expert", "bottleneck", "refcoco")
        assert document["parameters"] == sum(t.numel() for t in adapters.values())
        expert = Expert.load(tmp_path / "pool" / "refcoco")
        backbone = load_backbone(str(base))
        expert.verify(backbone)
        assert expert.card.fingerprint == backbone.fingerprint == document["fingerprint"]
        assert (expert.card.name, expert.card.backbone, expert.card.training["source"]) == (
            "refcoco",
            "tiny-ofa",
            "expert.pt",
        )
        key = "base_model.model.model.decoder.layers.1.ffn_output.bottleneck_up.weight"
        assert torch.equal(expert.tensors[key], adapters["decoder.layers.1.adapter2.up_proj.weight"])
        assert ExpertPool(tmp_path / "pool").names() == ["refcoco"]

    def test_an_expert_is_small(self, file: Any, base: Path, tmp_path: Path) -> None:
        """Fault 31 of the reference: its experts are whole models with optimizer and tables of indices."""
        adapters = random_adapters()
        path = file(adapters)
        document = run_json("convert", path, tmp_path / "out", "--base", base)
        content = sum(4 * t.numel() for t in adapters.values())
        assert document["bytes"] < content + 16_000 < path.stat().st_size / 10

    def test_a_file_can_be_the_base(self, file: Any, base: Path, base_file: Path, tmp_path: Path) -> None:
        path = file(random_prefixes({"encoder": 5, "decoder": 3}))
        assert run_json("convert", path, tmp_path / "a", "--base", base_file)["method"] == "prefix"
        run("convert", path, tmp_path / "b", "--base", base)
        one, other = Expert.load(tmp_path / "a"), Expert.load(tmp_path / "b")
        assert one.card.fingerprint == other.card.fingerprint == load_backbone(str(base)).fingerprint

    def test_lora_that_was_saved_merged(
        self, ofa: OFAForConditionalGeneration, state: dict[str, Tensor], file: Any, base: Path, tmp_path: Path
    ) -> None:
        lora = random_lora()
        path = file({**merged(state, lora), **lora})
        assert run_json("convert", path, tmp_path / "out", "--base", base)["merged"] == 24
        expert, backbone = Expert.load(tmp_path / "out"), load_backbone(str(base))
        truth = build_ofa()
        names = state_from_fairseq(merged(state, lora))
        truth.load_state_dict({**truth.state_dict(), **names})
        with attached(backbone, expert.config, expert.tensors):
            assert torch.allclose(logits(backbone.model), logits(truth), atol=1e-5)

    def test_lora_without_a_base(self, state: dict[str, Tensor], file: Any, tmp_path: Path) -> None:
        lora = random_lora()
        path = file({**merged(state, lora), **lora})
        arguments = ["convert", path, tmp_path / "out", "--keep-backbone", tmp_path / "own"]
        assert "--lora-weights merged or unmerged" in error(*arguments)
        run(*arguments, "--lora-weights", "merged")
        own = OFAForConditionalGeneration.from_pretrained(tmp_path / "own")
        for name, tensor in own.state_dict().items():
            if name.endswith("q_proj.weight"):
                reference = name.removeprefix("model.").replace("cross_attn", "encoder_attn")
                assert torch.allclose(tensor, state[reference], atol=1e-6)

    def test_an_interpolation_becomes_one_expert(self, file: Any, base: Path, tmp_path: Path) -> None:
        adapters = random_adapters(2)
        path = file(adapters, {"adapter_num": 2, "combine_adapter_path": "x/refcoco.pt,x/refcocog.pt"})
        document = run_json("convert", path, tmp_path / "out", "--base", base, "--parts", tmp_path / "parts")
        expert = Expert.load(tmp_path / "out")
        assert [parent["name"] for parent in expert.card.lineage] == ["refcoco", "refcocog"]
        assert [parent["weight"] for parent in expert.card.lineage] == document["weights"]
        assert document["logits"]["encoder.layers.0.adapter_interpolation_weight1"] == pytest.approx(
            adapters["encoder.layers.0.adapter_interpolation_weight1"].tolist()
        )
        pool = ExpertPool(tmp_path / "parts")
        assert pool.names() == ["refcoco", "refcocog"]
        assert not any(pool.verify(load_backbone(str(base))).values())
        key = "base_model.model.model.encoder.layers.0.ffn_output.bottleneck_down.weight"
        assert torch.equal(
            pool.load("refcocog").tensors[key], adapters["encoder.layers.0.adapters2.1.down_proj.weight"]
        )

    def test_fewer_experts_than_the_training_combined(self, file: Any, base: Path, tmp_path: Path) -> None:
        text = error("convert", file(random_adapters(2), {"adapter_num": 3}), tmp_path / "out", "--base", base)
        assert "adapter_num = 3, but the file holds 2 experts" in text

    def test_one_tensor_too_few_is_named(self, file: Any, base: Path, tmp_path: Path) -> None:
        """Fault 26 of the reference: every loading error is reported as "ensure that the architectures match"."""
        adapters = random_adapters()
        del adapters["decoder.layers.0.adapter2.down_proj.bias"]
        text = error("convert", file(adapters), tmp_path / "out", "--base", base)
        assert "missing tensor decoder.layers.0.adapter2.down_proj.bias [8]" in text
        assert listing(tmp_path) == ["expert.pt"]


class TestMovedStatistics:
    """Fault 7 of the reference: BatchNorm statistics of the frozen backbone move, and the expert needs its own."""

    @pytest.fixture
    def moved(self, state: dict[str, Tensor], file: Any) -> Path:
        path: Path = file({**drifted(state), **random_adapters()})
        return path

    def truth(self, state: dict[str, Tensor], expert: Expert) -> Tensor:
        model = build_ofa()
        model.load_state_dict({**model.state_dict(), **state_from_fairseq(drifted(state))})
        with attached(UnreadOFA("own", model), expert.config, expert.tensors):
            return logits(model)

    def test_refused_unless_one_says_how(self, moved: Path, base: Path, tmp_path: Path) -> None:
        text = error("convert", moved, tmp_path / "out", "--base", base)
        assert "32 BatchNorm statistics" in text
        assert "--keep-backbone" in text
        assert "--ignore-batchnorm" in text
        assert "model.encoder.embed_images.bn1.running_mean" in text
        assert not (tmp_path / "out").exists()

    def test_ignoring_them_says_what_it_changes(
        self, state: dict[str, Tensor], moved: Path, base: Path, tmp_path: Path
    ) -> None:
        document = run_json("convert", moved, tmp_path / "out", "--base", base, "--ignore-batchnorm")
        expert, backbone = Expert.load(tmp_path / "out"), load_backbone(str(base))
        expected = self.truth(state, expert)
        with attached(backbone, expert.config, expert.tensors):
            found = logits(backbone.model)
        effect = float((found - expected).abs().max() / expected.abs().max())
        assert effect > 1e-3
        assert document["changes"]["effect"] == pytest.approx(effect)
        assert f"{effect:.3g}" in document["notes"][0]
        assert document["fingerprint"] == backbone.fingerprint

    def test_keeping_the_backbone_is_exact(
        self, state: dict[str, Tensor], moved: Path, base: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        options = ["--base", base, "--keep-backbone", tmp_path / "own", "--tokenizer", tokenizer]
        document = run_json("convert", moved, tmp_path / "out", *options)
        assert (document["changes"]["batchnorm"], document["tokenizer"]) == (32, True)
        expert, backbone = Expert.load(tmp_path / "out"), load_backbone(str(tmp_path / "own"))
        expert.verify(backbone)
        assert expert.card.backbone == "own"
        with attached(backbone, expert.config, expert.tensors):
            assert torch.equal(logits(backbone.model), self.truth(state, expert))
        with pytest.raises(PituningError, match="was trained on backbone 'own'"):
            expert.verify(load_backbone(str(base)))

    def test_a_kept_backbone_in_half_precision_is_the_one_the_expert_names(self, moved: Path, tmp_path: Path) -> None:
        shown = run("convert", moved, tmp_path / "out", "--keep-backbone", tmp_path / "own", "--dtype", "bfloat16")
        assert "none: load_backbone needs one, give --tokenizer" in shown.stdout
        loaded = OFAForConditionalGeneration.from_pretrained(tmp_path / "own", dtype=torch.float32)
        assert Expert.load(tmp_path / "out").card.fingerprint == fingerprint_of(loaded)

    def test_a_kept_backbone_without_vocabulary(self, moved: Path, base: Path, tmp_path: Path) -> None:
        document = run_json("convert", moved, tmp_path / "a", "--keep-backbone", tmp_path / "own")
        assert document["tokenizer"] is False
        document = run_json("convert", moved, tmp_path / "b", "--base", base, "--ignore-batchnorm")
        assert document["tokenizer"] is None, "no backbone is written"

    def test_a_backbone_without_its_expert_says_what_moved(
        self, state: dict[str, Tensor], file: Any, base: Path, tmp_path: Path
    ) -> None:
        path = file({**drifted(state), **random_lora()})
        document = run_json("convert", path, tmp_path / "out", "--to", "backbone", "--base", base)
        assert document["notes"][1] == "32 BatchNorm statistics differ from the base's; written as the file has them"

    def test_trained_weights_are_never_ignored(
        self, state: dict[str, Tensor], file: Any, base: Path, tmp_path: Path
    ) -> None:
        tuned = {**state, "encoder.layers.0.fc1.bias": state["encoder.layers.0.fc1.bias"] + 1}
        path = file({**tuned, **random_adapters()})
        text = error("convert", path, tmp_path / "out", "--base", base, "--ignore-batchnorm")
        assert "1 weights" in text
        assert "model.encoder.layers.0.fc1.bias 1" in text
        assert "ties it to the base all the same" not in text

    def test_a_fully_tuned_file_without_expert(
        self, state: dict[str, Tensor], file: Any, base: Path, base_file: Path, tmp_path: Path
    ) -> None:
        """Fault 8 of the reference: a file without experts is taken for one."""
        options = ["--to", "expert", "--base", base]
        assert "its weights are the base's" in error("convert", base_file, tmp_path / "out", *options)
        path = file({k: 2 * t if k.endswith("fc1.weight") else t for k, t in state.items()})
        text = error("convert", path, tmp_path / "out", *options)
        assert "Training changed 4 weights" in text
        assert "model.encoder.layers.0.fc1.weight" in text

    def test_changed_biases_are_bitfit(self, state: dict[str, Tensor], file: Any, base: Path, tmp_path: Path) -> None:
        path = file({k: t + 0.1 if k.endswith("fc1.bias") else t for k, t in state.items()})
        document = run_json("convert", path, tmp_path / "out", "--to", "expert", "--base", base)
        assert (document["method"], document["tensors"]) == ("bitfit", 4)
        assert "--to expert makes it one of BitFit" in error("convert", path, tmp_path / "b", "--base", base)

    def test_a_base_that_computes_differently(self, file: Any, base: Path, tmp_path: Path) -> None:
        text = error("convert", file(random_adapters(), {"attn_scale_factor": 3}), tmp_path / "out", "--base", base)
        assert "attn_scale_factor is 3, in the base 2" in text


class TestRefusals:
    def test_a_malicious_file(self, tmp_path: Path) -> None:
        """Fault 36 of the reference."""

        class Runs:
            def __reduce__(self) -> Any:
                return os.system, (f"touch {tmp_path / 'ran'}",)

        torch.save({"model": {}, "args": Runs()}, tmp_path / "x.pt")
        assert "system" in error("convert", tmp_path / "x.pt", tmp_path / "out")
        assert listing(tmp_path) == ["x.pt"]

    def test_nothing_is_replaced(self, base_file: Path, base: Path, file: Any, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        for arguments in ([base_file, tmp_path / "out"], [file(random_adapters()), tmp_path / "e", "--base", base]):
            if arguments[1].name == "e":
                arguments += ["--keep-backbone", tmp_path / "out"]
            assert "exists and is not replaced" in error("convert", *arguments)
        assert listing(tmp_path / "out") == ["mine.txt"]
        assert not (tmp_path / "e").exists()

    @pytest.mark.parametrize("wrong", ["logits", "tensors", "not finite"])
    @pytest.mark.parametrize("kind", ["backbone", "expert"])
    def test_a_failed_self_check_leaves_nothing(
        self,
        base_file: Path,
        base: Path,
        file: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        wrong: str,
    ) -> None:
        """Each fault is put between memory and disk, where only the check can see it."""
        source, options = (base_file, []) if kind == "backbone" else (file(random_adapters()), ["--base", base])
        if wrong == "tensors":
            name = "save_pretrained" if kind == "backbone" else "save"
            owner = OFAForConditionalGeneration if kind == "backbone" else Expert
            original = getattr(owner, name)

            def save(self: Any, folder: Path) -> Any:
                if kind == "expert":
                    changed = {k: t + 1e-3 for k, t in self.tensors.items()}
                    return original(Expert(changed, self.config, self.card), folder)
                weight = self.model.encoder.layer_norm.weight
                with torch.no_grad():
                    weight += 1
                    original(self, folder)
                    weight -= 1
                return None

            monkeypatch.setattr(owner, name, save)
        else:
            forward, calls = OFAForConditionalGeneration.forward, []

            def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
                output = forward(self, *args, **kwargs)
                calls.append(1)
                output["logits"] = output.logits + (len(calls) * 1e-6 if wrong == "logits" else float("nan"))
                return output

            monkeypatch.setattr(OFAForConditionalGeneration, "forward", broken)
        text = error("convert", source, tmp_path / "out", *options)
        assert "the self-check failed" in text
        assert "nothing was written" in text
        assert set(listing(tmp_path)) <= {"expert.pt"}

    def test_without_the_check(self, base_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(OFAForConditionalGeneration, "forward", None)
        assert run_json("convert", base_file, tmp_path / "out", "--no-check")["check"] is None

    def test_options_that_do_not_belong_together(
        self, base_file: Path, base: Path, file: Any, tokenizer: Path, tmp_path: Path
    ) -> None:
        out, path = tmp_path / "out", file(random_adapters())
        assert "an expert needs its backbone" in error("convert", path, out)
        assert "--task" in error("convert", base_file, out, "--task", "x")
        assert "--base would change nothing" in error("convert", base_file, out, "--base", base)
        lora = ["--lora-weights", "merged"]
        assert "holds no LoRA" in error("convert", base_file, out, *lora)
        assert "--lora-weights would change nothing" in error("convert", path, out, "--base", base, *lora)
        text = error("convert", path, out, "--to", "backbone", "--base", base, *lora)
        assert "--base and --lora-weights would change nothing" in text
        assert "--dtype float16 is a backbone's" in error("convert", path, out, "--base", base, "--dtype", "float16")
        assert "a single expert" in error("convert", path, out, "--base", base, "--parts", tmp_path / "parts")
        assert "--tokenizer belongs to a backbone" in error(
            "convert", path, out, "--base", base, "--tokenizer", tokenizer
        )
        assert "holds an expert itself" in error("convert", path, out, "--base", path)
        assert "is a converted folder already" in error("convert", base, out)
        assert "same folder" in error("convert", path, out, "--keep-backbone", out)
        assert "no such file" in error("convert", tmp_path / "nowhere.pt", out)
        assert not out.exists()


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"the reference's own files are not here: no folder {FIXTURES}")
class TestGenuineFiles:
    @pytest.fixture
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The reference's files, with the vocabulary of its tiny model."""
        folder = tmp_path_factory.mktemp("genuine")
        for name in ("base", "adapter_expert_a", "lora_expert_a"):
            with gzip.open(FIXTURES / "checkpoint" / f"{name}.pt.gz") as packed:
                (folder / f"{name}.pt").write_bytes(packed.read())
        (folder / "bpe").mkdir()
        for name in ("encoder.json", "vocab.bpe"):
            shutil.copy(FIXTURES / "bpe" / name, folder / "bpe" / name)
        lines = (FIXTURES / "bpe" / "dict.txt").read_text(encoding="utf-8").split("\n")[:60]
        (folder / "bpe" / "dict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    def test_from_files_to_an_expert_at_work(self, folder: Path, tmp_path: Path) -> None:
        backbone = tmp_path / "tiny"
        document = run_json("convert", folder / "base.pt", backbone, "--tokenizer", folder / "bpe")
        assert document["parameters"] == 77936
        for name, method in (("adapter_expert_a", "bottleneck"), ("lora_expert_a", "lora")):
            options = ["--base", backbone, "--keep-backbone", tmp_path / f"{name}-ofa", "--tokenizer", folder / "bpe"]
            document = run_json("convert", folder / f"{name}.pt", tmp_path / name, *options)
            assert (document["method"], document["changes"]["batchnorm"]) == (method, 32)
            Expert.load(tmp_path / name).verify(load_backbone(str(tmp_path / f"{name}-ofa")))
            assert "32 BatchNorm statistics" in error(
                "convert", folder / f"{name}.pt", tmp_path / "x", "--base", backbone
            )

    def test_reading_needs_neither_fairseq_nor_omegaconf(self) -> None:
        assert not {"fairseq", "omegaconf"} & sys.modules.keys()
