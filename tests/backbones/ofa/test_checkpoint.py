"""Reading OFA checkpoints: nothing in them is run, nothing is guessed, and every tensor that does not fit is named."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import sys
import types
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from pituning.backbones.ofa.checkpoint import (
    config_from_fairseq,
    load_state,
    model_from,
    open_checkpoint,
    parse_fairseq_flags,
    read_fairseq,
    state_from_fairseq,
    state_from_hf,
    state_to_fairseq,
)
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.names import fairseq_name, our_name
from pituning.backbones.ofa.positions import token_bucket_matrix
from tests.backbones.ofa.checkpoints import ARGS, fairseq_state, random_adapters, save_checkpoint
from tests.backbones.ofa.conftest import build_ofa

Message = Callable[..., str]


class Runs:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def state(ofa: OFAForConditionalGeneration) -> dict[str, Tensor]:
    return fairseq_state(ofa)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    assert set(names) <= state.keys()
    return {k: t for k, t in state.items() if k not in names}


class TestNames:
    @pytest.mark.parametrize(
        ("fairseq", "ours"),
        [
            ("encoder.layers.0.attn_ln.weight", "encoder.layers.0.self_attn_mid_layer_norm.weight"),
            ("decoder.layers.11.self_attn_ln.bias", "decoder.layers.11.self_attn_mid_layer_norm.bias"),
            ("decoder.layers.1.cross_attn_ln.weight", "decoder.layers.1.cross_attn_mid_layer_norm.weight"),
            ("decoder.layers.1.encoder_attn.c_attn", "decoder.layers.1.cross_attn.c_attn"),
            ("decoder.layers.1.encoder_attn.out_proj.bias", "decoder.layers.1.cross_attn.out_proj.bias"),
            ("decoder.layers.1.encoder_attn_layer_norm.bias", "decoder.layers.1.cross_attn_layer_norm.bias"),
            ("encoder.layers.3.ffn_layernorm.weight", "encoder.layers.3.ffn_layer_norm.weight"),
            ("encoder.layers.3.self_attn.c_attn", "encoder.layers.3.self_attn.c_attn"),
            ("encoder.layers.3.self_attn_layer_norm.weight", "encoder.layers.3.self_attn_layer_norm.weight"),
            ("decoder.layers.3.w_resid", "decoder.layers.3.w_resid"),
            ("encoder.embed_images.layer2.1.conv3.weight", "encoder.embed_images.layer2.1.conv3.weight"),
            ("encoder.layer_norm.weight", "encoder.layer_norm.weight"),
            ("decoder.layernorm_embedding.weight", "decoder.layernorm_embedding.weight"),
            ("decoder.code_layernorm_embedding.bias", "decoder.code_layernorm_embedding.bias"),
            ("encoder.token_rel_pos_table_list.0.weight", "encoder.token_rel_pos_table_list.0.weight"),
        ],
    )
    def test_both_ways(self, fairseq: str, ours: str) -> None:
        assert our_name(fairseq) == f"model.{ours}"
        assert our_name(ours) == f"model.{ours}"
        assert fairseq_name(f"model.{ours}") == fairseq

    def test_every_tensor_of_the_model_comes_back(
        self, ofa: OFAForConditionalGeneration, state: dict[str, Tensor]
    ) -> None:
        ours = state_from_fairseq(state)
        assert ours.keys() == ofa.state_dict().keys() - {"lm_head.weight", "model.decoder.embed_tokens.weight"}
        assert all(torch.equal(ofa.state_dict()[k], t) for k, t in ours.items())
        assert state_to_fairseq(ours).keys() == state.keys() - {"encoder.version", "decoder.version"}

    def test_tied_copies_must_agree(self, state: dict[str, Tensor], message: Message) -> None:
        name = "decoder.output_projection.weight"
        state[name][7, 3] += 1
        text = message(state_from_fairseq, state)
        assert name in text
        assert "1 of 93 rows differ, the first is row 7" in text
        state[name] = state[name][:90]
        assert "[90, 32] and [93, 32]" in message(state_from_fairseq, state)

    def test_tied_copies_buffers_and_counters_may_be_left_out(
        self, ofa: OFAForConditionalGeneration, state: dict[str, Tensor]
    ) -> None:
        counters = [k for k in state if k.endswith("num_batches_tracked")]
        small = without(
            state, "decoder.output_projection.weight", "decoder.embed_tokens.weight", "encoder.version", *counters
        )
        model = model_from(ofa.config, state_from_fairseq(small))
        assert all(torch.equal(ofa.state_dict()[k], t) for k, t in model.state_dict().items())
        assert model.lm_head.weight is model.model.encoder.embed_tokens.weight

    def test_two_names_for_one_tensor(self, state: dict[str, Tensor], message: Message) -> None:
        state["encoder.layers.0.self_attn_mid_layer_norm.weight"] = torch.ones(32)
        text = message(state_from_fairseq, state)
        assert "encoder.layers.0.attn_ln.weight" in text
        assert "encoder.layers.0.self_attn_mid_layer_norm.weight" in text

    def test_an_expert_is_not_dropped_silently(self, state: dict[str, Tensor], message: Message) -> None:
        text = message(state_from_fairseq, {**state, **random_adapters()})
        assert "32 tensors" in text
        assert "adapter1" in text


class TestStrictness:
    def test_whatever_does_not_fit_is_named(
        self, ofa: OFAForConditionalGeneration, state: dict[str, Tensor], message: Message
    ) -> None:
        ours = state_from_fairseq(state)
        del ours["model.encoder.layers.1.fc1.bias"]
        ours["model.decoder.layer_norm.weight"] = torch.ones(31)
        ours["model.encoder.pos_ln.bias"] = torch.full((32,), torch.nan)
        ours["classification_heads.cola.dense.weight"] = torch.ones(2, 32)
        before = {k: t.clone() for k, t in ofa.state_dict().items()}
        text = message(load_state, ofa, ours, "x.pt")
        assert text.splitlines()[0].startswith("x.pt does not fit")
        for said in (
            "missing tensor model.encoder.layers.1.fc1.bias [64]",
            "model.decoder.layer_norm.weight has shape [31], expected [32]",
            "model.encoder.pos_ln.bias [32] holds 32 values that are NaN",
            "extra tensor classification_heads.cola.dense.weight [2, 32]",
        ):
            assert said in text
        assert all(torch.equal(before[k], t) for k, t in ofa.state_dict().items()), "all or nothing"

    def test_many_problems_are_counted(self, ofa: OFAForConditionalGeneration, message: Message) -> None:
        text = message(load_state, ofa, {})
        expected = len(ofa.state_dict()) - 2
        assert len(text.splitlines()) == 10
        assert text.endswith(f"… and {expected - 8} more")

    @pytest.mark.parametrize(
        "name", ["encoder.layers.1.self_attn.q_proj.weight", "encoder.embed_images.bn1.running_var"]
    )
    def test_a_checkpoint_with_a_hole_is_refused(
        self, state: dict[str, Tensor], tmp_path: Path, message: Message, name: str
    ) -> None:
        checkpoint = open_checkpoint(save_checkpoint(tmp_path / "x.pt", without(state, name)))
        assert our_name(name) in message(model_from, checkpoint.config, checkpoint.state)

    def test_a_layer_that_is_missing_altogether_contradicts_the_arguments(
        self, state: dict[str, Tensor], tmp_path: Path, message: Message
    ) -> None:
        short = {k: t for k, t in state.items() if not k.startswith("decoder.layers.1.")}
        text = message(open_checkpoint, save_checkpoint(tmp_path / "x.pt", short))
        assert "decoder_layers is 2, but the tensors have 1" in text

    def test_another_scheme_of_relative_positions_is_refused(
        self, state: dict[str, Tensor], tmp_path: Path, message: Message
    ) -> None:
        table = token_bucket_matrix(1024, 16, torch.device("cpu"))
        assert (
            open_checkpoint(save_checkpoint(tmp_path / "a.pt", {**state, "encoder.token_rp_bucket": table})).notes == ()
        )
        rounded = table.clone()
        rounded[500, :3] += 1
        notes = open_checkpoint(save_checkpoint(tmp_path / "b.pt", {**state, "encoder.token_rp_bucket": rounded})).notes
        assert "3 of 1048576 entries of encoder.token_rp_bucket" in notes[0]
        path = save_checkpoint(tmp_path / "c.pt", {**state, "encoder.token_rp_bucket": table.t().contiguous()})
        assert "entries of encoder.token_rp_bucket differ" in message(open_checkpoint, path)


class TestNothingIsRun:
    """Fault 36 of the reference: a checkpoint from a stranger runs code."""

    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("place", ["args", "model", "extra_state"])
    def test_a_malicious_pickle_is_refused_by_name(
        self, state: dict[str, Tensor], tmp_path: Path, message: Message, place: str, zipped: bool, protocol: int
    ) -> None:
        marker = tmp_path / "ran"
        content: dict[str, Any] = {"args": Namespace(**ARGS), "model": state, "extra_state": {}}
        content[place] = Runs(os.system, f"touch {marker}")
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        text = message(read_fairseq, tmp_path / "x.pt")
        assert f"{os.system.__module__}.system" in text
        assert "nothing was run" in text
        assert "weights_only" not in text, "torch's own advice is to switch the protection off"
        assert not marker.exists()

    @pytest.mark.parametrize(
        ("function", "arguments"),
        [(builtins.eval, ("1",)), (builtins.getattr, ("a", "b")), (builtins.__import__, ("os",)), (Path, ("/",))],
    )
    def test_so_is_every_other_function(self, tmp_path: Path, message: Message, function: Any, arguments: Any) -> None:
        torch.save({"model": {}, "args": Runs(function, *arguments)}, tmp_path / "x.pt")
        text = message(read_fairseq, tmp_path / "x.pt")
        assert "refused" in text
        assert function.__name__ in text

    def test_a_bare_pickle(self, tmp_path: Path, message: Message) -> None:
        (tmp_path / "x.pt").write_bytes(pickle.dumps(Runs(os.system, f"touch {tmp_path / 'ran'}")))
        assert "system" in message(read_fairseq, tmp_path / "x.pt")
        assert not (tmp_path / "ran").exists()

    def test_the_hugging_face_format_is_guarded_too(self, tmp_path: Path, message: Message) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "ofa"}')
        torch.save({"a": Runs(os.system, f"touch {tmp_path / 'ran'}")}, tmp_path / "pytorch_model.bin")
        assert "system" in message(open_checkpoint, tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_objects_of_fairseq_and_omegaconf_become_inert(
        self, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The classes of such a file are not installed here; whatever they would do when they are read does not happen."""
        made = {}
        for package in ("omegaconf", "fairseq"):
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        for name in ("omegaconf.dictconfig.DictConfig", "omegaconf.nodes.AnyNode", "fairseq.meters.AverageMeter"):
            module, _, short = name.rpartition(".")
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
            made[short] = type(short, (), {"__module__": module})
            setattr(sys.modules[module], short, made[short])

        def node(value: Any) -> Any:
            wrapped = made["AnyNode"]()
            wrapped._val = value
            return wrapped

        cfg = made["DictConfig"]()
        cfg._content = {"model": node(Namespace(**ARGS)), "task": node(None), "unset": node("???")}
        extra = {"loss": np.float64(0.5), "meter": made["AverageMeter"]()}
        torch.save({"args": None, "cfg": cfg, "model": state, "extra_state": extra}, tmp_path / "x.pt")
        monkeypatch.undo()
        assert open_checkpoint(tmp_path / "x.pt").config.d_model == 32

    @pytest.mark.parametrize(
        "content",
        [
            b"", b"no checkpoint", b"PK\x03\x04 a broken archive", b"Rate limit exceeded", b"<html></html>",
            b"Xab", b"\x80", b"\x80\x02b.", b"h\x01.", b"tt.", b"\x80\x02}q\x00X",
        ],
    )  # fmt: skip
    def test_a_broken_file(self, tmp_path: Path, message: Message, content: bytes) -> None:
        path = tmp_path / "x.pt"
        path.write_bytes(content)
        expected = f"{path} cannot be read, it is truncated or not a torch file ("
        assert message(read_fairseq, path).startswith(expected)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", content)
            archive.writestr("x/version", "3\n")
        assert message(read_fairseq, path).startswith(expected)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", content)
        assert message(read_fairseq, path).startswith(expected)

    def test_the_cause_is_named_where_nothing_forbidden_is_wanted(
        self, tmp_path: Path, message: Message, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        meters = types.ModuleType("fairseq.meters")
        meter = type("AverageMeter", (), {"__module__": "fairseq.meters"})
        vars(meters)["AverageMeter"] = meter
        monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
        monkeypatch.setitem(sys.modules, "fairseq.meters", meters)
        torch.save({"model": {}, "meter": meter()}, tmp_path / "x.pt", pickle_protocol=4)
        torch.save({"model": {}, "meter": meter()}, tmp_path / "y.pt", _use_new_zipfile_serialization=False)
        text = message(read_fairseq, tmp_path / "x.pt")
        assert "(unsupported pickle instruction " in text
        assert "fairseq" not in text
        assert "build fairseq.meters.AverageMeter" in message(read_fairseq, tmp_path / "y.pt"), "no stand-ins there"
        with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
            archive.writestr("z/data.pkl", b"\x80\x02K\x01}b.")
            archive.writestr("z/version", "3\n")
        text = message(read_fairseq, tmp_path / "z.pt")
        assert "(Can only build Tensor" in text
        assert "weights_only" not in text

    def test_a_truncated_file(self, state: dict[str, Tensor], tmp_path: Path, message: Message) -> None:
        path = save_checkpoint(tmp_path / "x.pt", state)
        path.write_bytes(path.read_bytes()[:-1000])
        assert "truncated" in message(read_fairseq, path)
        assert "no such file" in message(read_fairseq, tmp_path / "y.pt")

    def test_a_file_of_something_else(self, tmp_path: Path, message: Message) -> None:
        torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "x.pt")
        text = message(read_fairseq, tmp_path / "x.pt")
        assert "expected a dictionary with the entry 'model'" in text
        assert "state_dict, epoch" in text
        torch.save({"model": {"a": 3}}, tmp_path / "y.pt")
        assert "'a' (int)" in message(read_fairseq, tmp_path / "y.pt")


class TestAveragedWeights:
    @pytest.fixture
    def averaged(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t + 1 if t.is_floating_point() else t for k, t in state.items() if not k.endswith("version")}

    def test_they_are_taken_where_there_are_any(
        self, state: dict[str, Tensor], averaged: dict[str, Tensor], tmp_path: Path
    ) -> None:
        path = save_checkpoint(tmp_path / "x.pt", state, ema=averaged)
        read = read_fairseq(path)
        assert (read.ema, read.has_ema) == (True, True)
        assert torch.equal(read.state["encoder.layer_norm.weight"], averaged["encoder.layer_norm.weight"])
        last = read_fairseq(path, ema=False)
        assert (last.ema, last.has_ema) == (False, True)
        assert torch.equal(last.state["encoder.layer_norm.weight"], state["encoder.layer_norm.weight"])

    def test_those_in_full_precision_are_preferred(
        self, state: dict[str, Tensor], averaged: dict[str, Tensor], tmp_path: Path
    ) -> None:
        half = {k: t.half() if t.is_floating_point() else t for k, t in averaged.items()}
        read = read_fairseq(save_checkpoint(tmp_path / "x.pt", state, ema=half, ema_fp32_params=averaged))
        assert read.state["encoder.layer_norm.weight"].dtype == torch.float32

    def test_asking_for_what_is_not_there(self, state: dict[str, Tensor], tmp_path: Path, message: Message) -> None:
        path = save_checkpoint(tmp_path / "x.pt", state)
        assert not read_fairseq(path).has_ema
        assert "no averaged (EMA) weights" in message(lambda: read_fairseq(path, ema=True))

    def test_an_average_with_a_hole_is_no_average(
        self, state: dict[str, Tensor], averaged: dict[str, Tensor], tmp_path: Path, message: Message
    ) -> None:
        path = save_checkpoint(tmp_path / "x.pt", state, ema=without(averaged, "encoder.layers.0.fc2.weight"))
        checkpoint = open_checkpoint(path)
        text = message(model_from, checkpoint.config, checkpoint.state)
        assert "missing tensor model.encoder.layers.0.fc2.weight" in text


class TestConfiguration:
    def test_a_file_gives_the_model_that_wrote_it(
        self, ofa: OFAForConditionalGeneration, state: dict[str, Tensor], inputs: dict[str, Tensor], tmp_path: Path
    ) -> None:
        checkpoint = open_checkpoint(save_checkpoint(tmp_path / "x.pt", state))
        model = model_from(checkpoint.config, checkpoint.state)
        target = torch.tensor([[0, 5, 6]] * 3)
        with torch.no_grad():
            assert torch.equal(
                model(**inputs, decoder_input_ids=target).logits, ofa(**inputs, decoder_input_ids=target).logits
            )

    def test_old_files_have_args_and_no_cfg(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        torch.save({"args": Namespace(**ARGS), "model": OrderedDict(state)}, tmp_path / "x.pt")
        assert open_checkpoint(tmp_path / "x.pt").config.d_model == 32

    def test_a_file_without_arguments_is_refused(
        self, state: dict[str, Tensor], tmp_path: Path, message: Message
    ) -> None:
        torch.save({"model": OrderedDict(state)}, tmp_path / "x.pt")
        assert "neither args nor cfg.model" in message(open_checkpoint, tmp_path / "x.pt")

    @pytest.mark.parametrize(
        ("settings", "args"),
        [
            ({"scale_attn": False, "scale_fc": False, "scale_heads": False}, {}),
            ({"scale_resids": True}, {}),
            ({"layernorm_embedding": False, "patch_layernorm_embedding": False, "code_layernorm_embedding": False}, {}),
            ({"add_type_embedding": False}, {}),
            ({"decoder_layers": 1, "decoder_attention_heads": 8, "decoder_ffn_dim": 48}, {}),
            ({"resnet_layers": [2, 1, 1], "resnet_widths": [4, 4, 8], "resnet_stem_width": 4}, {}),
            ({"type_vocab_size": 3}, {}),
            ({"freeze_resnet": True}, {"freeze_resnet": True}),
            ({"decoder_entangle_position_embedding": True}, {"disable_entangle": False}),
            ({"entangle_position_embedding": True}, {"entangle_position_embedding": True}),
            ({"activation_function": "gelu_new"}, {"activation_fn": "gelu_accurate"}),
            ({"scale_embedding": True}, {"no_scale_embedding": False}),
            ({"attn_scale_factor": 1.5}, {"attn_scale_factor": 1.5}),
            ({"interpolate_position": True}, {"interpolate_position": True}),
        ],
    )
    def test_tensors_and_arguments_together_describe_the_model(
        self, settings: dict[str, Any], args: dict[str, Any], inputs: dict[str, Tensor], tmp_path: Path
    ) -> None:
        shown = ("layers", "heads", "embed", "scale", "norm", "type", "task")  # left to the tensors, in every case
        said = {
            k: v
            for k, v in ARGS.items()
            if k in ("arch", "no_scale_embedding", "disable_entangle") or not any(s in k for s in shown)
        }
        model = build_ofa(**settings)
        path = tmp_path / "x.pt"
        torch.save({"args": Namespace(**{**said, **args}), "model": fairseq_state(model)}, path)
        checkpoint = open_checkpoint(path)
        found = model_from(checkpoint.config, checkpoint.state)
        target = torch.tensor([[0, 5, 6]] * 3)
        with torch.no_grad():
            expected = model(**inputs, decoder_input_ids=target).logits
            assert torch.equal(found(**inputs, decoder_input_ids=target).logits, expected)

    def test_contradictions_are_listed_together(self, state: dict[str, Tensor], message: Message) -> None:
        text = message(
            config_from_fairseq, {**ARGS, "encoder_attention_heads": 8, "scale_fc": False, "vocab_size": 94}, state
        )
        for said in (
            "encoder_attention_heads is 8, but the tensors have 4",
            "scale_fc is False, but the tensors have True",
            "vocab_size is 94, but the tensors have 93",
        ):
            assert said in text

    def test_the_stem_of_published_width_must_be_the_named_one(self, message: Message) -> None:
        model = build_ofa(resnet_stem_width=64, resnet_widths=[64, 128, 256])
        text = message(config_from_fairseq, ARGS, fairseq_state(model))
        assert "resnet_type is 'resnet50', but the tensors have [1, 2, 1] blocks" in text

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("encoder_normalize_before", False), ("decoder_normalize_before", False), ("share_all_embeddings", False),
            ("adaptive_softmax_cutoff", "100,200"), ("encoder_layerdrop", 0.1), ("decoder_layerdrop", 0.1),
            ("quant_noise_pq", 0.1), ("quant_noise_scalar", 0.5), ("sync_bn", True), ("no_cross_attention", True),
            ("decoder_embed_dim", 64), ("decoder_output_dim", 16), ("encoder_layers_to_keep", "0,1"),
            ("cross_self_attention", True), ("use_ofasys", True),
        ],
    )  # fmt: skip
    def test_what_is_not_supported_is_refused_by_name(self, message: Message, argument: str, value: object) -> None:
        assert f"{argument} = {value!r} is not supported" in message(config_from_fairseq, {**ARGS, argument: value})

    @pytest.mark.parametrize(
        ("argument", "value", "said"),
        [
            ("encoder_layers", "2", "encoder_layers is '2', expected int"),
            ("scale_attn", 1, "scale_attn is 1, expected bool"),
            ("dropout", True, "dropout is True, expected float"),
            ("activation_fn", "swoosh", "unknown activation 'swoosh'"),
        ],
    )
    def test_values_of_the_wrong_kind(self, message: Message, argument: str, value: object, said: str) -> None:
        assert said in message(config_from_fairseq, {**ARGS, argument: value})

    def test_flags_alone(self, message: Message) -> None:
        flags = [
            "--scale-attn",
            "--encoder-layers",
            "3",
            "--disable-entangle",
            "--encoder-embed-dim=64",
            "--lora-r",
            "4",
        ]
        config = config_from_fairseq({"arch": "ofa_huge", **parse_fairseq_flags(flags)})
        assert (config.encoder_layers, config.decoder_layers, config.d_model) == (3, 12, 64)
        assert (config.scale_attn, config.scale_fc, config.scale_heads) == (True, False, False)
        assert config.encoder_ffn_dim == 5120, "the architecture's own, not four times the given width"
        assert not config.decoder_entangle_position_embedding
        assert config_from_fairseq({"arch": "ofa_base"}).decoder_entangle_position_embedding, "as in the reference"
        assert "did you mean 'ofa_base'" in message(config_from_fairseq, {"arch": "ofa_bas"})
        assert "'2' follows no flag" in message(parse_fairseq_flags, ["--a", "1", "2"])

    @pytest.mark.parametrize("size", ["tiny", "medium", "base", "large", "huge"])
    def test_published_sizes(self, size: str) -> None:
        flags = ["--scale-attn", "--scale-fc", "--scale-heads", "--disable-entangle", "--dropout", "0.1"]
        found = config_from_fairseq({"arch": f"ofa_{size}", **parse_fairseq_flags(flags)})
        assert found.to_dict() == OFAConfig.of_size(size).to_dict()

    def test_arguments_that_nobody_said_and_no_tensor_shows_are_noted(
        self, state: dict[str, Tensor], tmp_path: Path
    ) -> None:
        args = {k: v for k, v in ARGS.items() if k != "disable_entangle"}
        torch.save({"args": Namespace(**args), "model": state}, tmp_path / "x.pt")
        checkpoint = open_checkpoint(tmp_path / "x.pt")
        assert "lack disable_entangle" in checkpoint.notes[0]
        assert checkpoint.config.decoder_entangle_position_embedding


HF_CONFIG = {
    "model_type": "ofa", "architectures": ["OFAModel"], "vocab_size": 93, "d_model": 32, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "normformer": True, "resnet_type": "resnet50", "token_bucket_size": 16, "image_bucket_size": 8,
    "code_image_size": 32, "attn_scale_factor": 2.0, "encoder_normalize_before": True, "decoder_normalize_before": True,
    "entangle_position_embedding": False, "share_decoder_input_output_embed": True, "activation_function": "gelu",
    "use_cache": False, "transformers_version": "4.15.0", "torch_dtype": "float32", "pad_token_id": 1,
}  # fmt: skip


def hf_state(model: OFAForConditionalGeneration) -> dict[str, Tensor]:
    """As OFA's own branch of transformers saves it: no prefix, the tied tensors and the tables of indices written out."""
    named = {k.removeprefix("model."): t.clone() for k, t in model.state_dict().items() if k != "lm_head.weight"}
    tables = {"encoder.token_rp_bucket": torch.zeros(3, 3, dtype=torch.long)}
    return {**named, "decoder.output_projection.weight": model.lm_head.weight.detach().clone(), **tables}


class TestHuggingFaceFormat:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
        return tmp_path

    @pytest.mark.parametrize("kind", ["bin", "safetensors", "parts", "without output projection"])
    def test_a_folder_gives_the_model_that_wrote_it(
        self, ofa: OFAForConditionalGeneration, folder: Path, kind: str
    ) -> None:
        state = hf_state(ofa)
        if kind == "without output projection":
            del state["decoder.output_projection.weight"]
        if kind == "safetensors":
            safetensors.torch.save_file(state, folder / "model.safetensors")
        elif kind == "parts":
            names = sorted(state)
            parts = {"one.bin": names[: len(names) // 2], "two.bin": names[len(names) // 2 :]}
            for file, members in parts.items():
                torch.save({n: state[n] for n in members}, folder / file)
            index = {"weight_map": {n: file for file, members in parts.items() for n in members}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(state, folder / "pytorch_model.bin")
        checkpoint = open_checkpoint(folder)
        assert checkpoint.format == "huggingface"
        model = model_from(checkpoint.config, checkpoint.state)
        assert all(torch.equal(ofa.state_dict()[k], t) for k, t in model.state_dict().items())
        different = {k for k, v in ofa.config.to_dict().items() if checkpoint.config.to_dict()[k] != v}
        assert different <= {"init_std", "resnet_type", "architectures", "dtype"}

    def test_our_own_folder_is_read_as_well(self, ofa: OFAForConditionalGeneration, tmp_path: Path) -> None:
        ofa.save_pretrained(tmp_path / "x")
        checkpoint = open_checkpoint(tmp_path / "x")
        assert checkpoint.format == "pituning"
        model = model_from(checkpoint.config, checkpoint.state)
        assert all(torch.equal(ofa.state_dict()[k], t) for k, t in model.state_dict().items())

    @pytest.mark.parametrize(
        ("entangle", "disable", "expected"), [(False, False, False), (True, False, True), (True, True, False)]
    )
    def test_its_decoder_adds_positions_only_where_its_encoder_does(
        self, ofa: OFAForConditionalGeneration, folder: Path, entangle: bool, disable: bool, expected: bool
    ) -> None:
        torch.save(hf_state(ofa), folder / "pytorch_model.bin")
        values = {**HF_CONFIG, "entangle_position_embedding": entangle, "disable_entangle": disable}
        (folder / "config.json").write_text(json.dumps(values))
        config = open_checkpoint(folder).config
        assert config.entangle_position_embedding is entangle
        assert config.decoder_entangle_position_embedding is expected

    @pytest.mark.parametrize(
        ("name", "value"), [("use_ofasys", True), ("encoder_normalize_before", False), ("attn_scale_factor", 3.0)]
    )
    def test_what_is_not_supported(
        self, ofa: OFAForConditionalGeneration, folder: Path, message: Message, name: str, value: object
    ) -> None:
        torch.save(hf_state(ofa), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps({**HF_CONFIG, name: value}))
        assert f"{name} = {value!r} is not supported" in message(open_checkpoint, folder)

    def test_a_configuration_of_another_model(
        self, ofa: OFAForConditionalGeneration, folder: Path, message: Message
    ) -> None:
        torch.save(hf_state(ofa), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps({**HF_CONFIG, "d_model": 64, "normformer": False}))
        text = message(open_checkpoint, folder)
        assert "d_model is 64, but the tensors have 32" in text
        assert "scale_fc is False, but the tensors have True" in text

    def test_broken_folders(self, folder: Path, tmp_path: Path, message: Message) -> None:
        assert "has no weights" in message(open_checkpoint, folder)
        (folder / "model.safetensors").write_bytes(b"x")
        assert "model.safetensors cannot be read" in message(open_checkpoint, folder)
        (folder / "config.json").write_text('{"model_type": "bart"}')
        assert "model_type is 'bart', expected 'ofa'" in message(open_checkpoint, folder)
        (folder / "config.json").write_text("{")
        assert "not valid JSON" in message(open_checkpoint, folder)
        (folder / "config.json").unlink()
        assert "no such file" in message(open_checkpoint, folder)

    def test_an_index_must_stay_in_its_folder(self, folder: Path, message: Message) -> None:
        index = {"weight_map": {"a": "../elsewhere.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert "'../elsewhere.bin' in weight_map is not a file name" in message(open_checkpoint, folder)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"weight_map": ["a.bin"]}, "weight_map should be an object, found list"),
            ({}, "weight_map should be an object, found NoneType"),
            ({"weight_map": {"a": ["a.bin"], "b": 1}}, "['a.bin'] in weight_map is not a file name"),
        ],
    )
    def test_a_broken_index(self, folder: Path, message: Message, values: object, said: str) -> None:
        path = folder / "pytorch_model.bin.index.json"
        path.write_text(json.dumps(values))
        assert message(open_checkpoint, folder) == f"{path}: {said}"

    def test_untied_output(self, ofa: OFAForConditionalGeneration, message: Message) -> None:
        state = hf_state(ofa)
        state["decoder.output_projection.weight"] += 1
        assert "untied embeddings are not supported" in message(state_from_hf, state)
