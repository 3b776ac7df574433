"""The OFA model as its users meet it: saving, caching, grouping, freezing, refusing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.encoder import OFAEncoderOutput
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration, new_cache
from pituning.errors import DataError, PituningError
from tests.backbones.ofa.conftest import build_ofa

Inputs = dict[str, Tensor]


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 33.5), ("medium", 93), ("base", 182.2), ("large", 473), ("huge", 930)]
)
def test_the_published_sizes(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = OFAForConditionalGeneration(OFAConfig.of_size(size))
    found = sum(p.numel() for p in model.parameters()) - 2 * model.lm_head.weight.numel() * (
        model.lm_head.weight is not model.model.encoder.embed_tokens.weight
    )
    assert found / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_size_that_does_not_exist() -> None:
    with pytest.raises(PituningError, match="did you mean 'large'"):
        OFAConfig.of_size("larg")


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(PituningError, match="32 is not a multiple of 5"):
        build_ofa(encoder_attention_heads=5)


def test_saved_and_loaded_through_the_auto_classes(ofa: OFAForConditionalGeneration, tmp_path: Path) -> None:
    ofa.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).resnet_layers == [1, 2, 1]
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is OFAForConditionalGeneration
    assert loaded.state_dict().keys() == ofa.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), ofa.state_dict().values(), strict=True))
    assert loaded.lm_head.weight is loaded.model.encoder.embed_tokens.weight
    assert loaded.model.decoder.embed_tokens.weight is loaded.model.encoder.embed_tokens.weight
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body.encoder.image_proj.weight, ofa.model.encoder.image_proj.weight)


def test_decoding_step_by_step_is_decoding_at_once(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    # longer than the biases' first capacity, so that they have to grow
    tokens = torch.randint(4, 93, (3, 31))
    encoded = ofa.get_encoder()(**inputs)
    whole = ofa(encoder_outputs=encoded, decoder_input_ids=tokens).logits
    cache = new_cache()
    steps = [
        ofa(encoder_outputs=encoded, decoder_input_ids=tokens[:, i : i + 1], past_key_values=cache).logits
        for i in range(31)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attentions", [False, True])
def test_rows_of_one_example_share_its_source(
    ofa: OFAForConditionalGeneration, inputs: Inputs, attentions: bool
) -> None:
    tokens = torch.randint(4, 93, (6, 4))
    encoded = ofa.get_encoder()(**inputs)
    repeated = OFAEncoderOutput(
        last_hidden_state=encoded.last_hidden_state.repeat_interleave(2, 0),
        padding_mask=encoded.padding_mask.repeat_interleave(2, 0),
        position_embeddings=encoded.position_embeddings,
    )
    grouped = ofa(encoder_outputs=encoded, decoder_input_ids=tokens, output_attentions=attentions)
    alone = ofa(encoder_outputs=repeated, decoder_input_ids=tokens, output_attentions=attentions)
    torch.testing.assert_close(grouped.logits, alone.logits, rtol=1e-5, atol=1e-5)
    if attentions:
        torch.testing.assert_close(grouped.cross_attentions[1], alone.cross_attentions[1], rtol=1e-5, atol=1e-6)


def test_rows_that_cannot_be_shared_out(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="4 decoder rows cannot be shared out among 3"):
        ofa(**inputs, decoder_input_ids=torch.zeros(4, 2, dtype=torch.long))


def test_an_example_does_not_depend_on_its_batch(inputs: Inputs) -> None:
    ofa = build_ofa(torch.float64)
    inputs["patch_images"] = inputs["patch_images"].double()
    labels = torch.randint(4, 93, (3, 3))
    together = ofa(**inputs, labels=labels).logits
    for i, length in enumerate((7, 5, 6)):
        single = {k: v[i : i + 1, :length] if k == "input_ids" else v[i : i + 1] for k, v in inputs.items()}
        torch.testing.assert_close(ofa(**single, labels=labels[i : i + 1]).logits[0], together[i], rtol=1e-9, atol=1e-9)
        if i == 2:  # an ignored image is as good as none
            without = {"input_ids": single["input_ids"]}
            torch.testing.assert_close(
                ofa(**without, labels=labels[i : i + 1]).logits[0], together[i], rtol=1e-9, atol=1e-9
            )


def test_attention_weights_agree_with_the_fused_kernel(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    labels = torch.randint(4, 93, (3, 3))
    plain, watched = ofa(**inputs, labels=labels), ofa(**inputs, labels=labels, output_attentions=True)
    torch.testing.assert_close(plain.logits, watched.logits, rtol=1e-5, atol=1e-5)
    patches = 4 * 3
    assert watched.encoder_attentions[0].shape == (3, 4, patches + 7, patches + 7)
    assert (watched.encoder_attentions[0][2, ..., :patches] == 0).all(), "the ignored image is looked at"
    assert (watched.decoder_attentions[0].triu(1) == 0).all(), "the future is looked at"
    ofa.set_attn_implementation("eager")
    torch.testing.assert_close(ofa(**inputs, labels=labels).logits, watched.logits)


def _gradients(model: OFAForConditionalGeneration, inputs: Inputs, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(inputs: Inputs) -> None:
    ofa = build_ofa(dropout=0.0)
    labels = torch.randint(4, 93, (3, 3))
    expected = _gradients(ofa, inputs, labels)
    ofa.train()
    ofa.model.encoder.embed_images.requires_grad_(False)  # its statistics would move in training
    ofa.activation_checkpointing_enable()
    for cached in (False, True):
        ofa.zero_grad()
        ofa(**inputs, labels=labels, use_cache=cached).loss.backward()
        found = {n: p.grad for n, p in ofa.named_parameters() if p.grad is not None}
        assert found
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_frozen_stem_keeps_its_statistics_in_training(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    before = {k: v.clone() for k, v in ofa.state_dict().items()}
    stem, images = ofa.model.encoder.embed_images, inputs["patch_images"]
    trainable = stem(images).detach()
    ofa.requires_grad_(False)
    frozen = stem(images)
    torch.testing.assert_close(frozen, trainable, rtol=1e-5, atol=1e-5)
    assert torch.equal(stem.train()(images), frozen)
    ofa.train()(**inputs, labels=torch.randint(4, 93, (3, 3)))
    assert all(torch.equal(v, before[k]) for k, v in ofa.state_dict().items())


@pytest.mark.parametrize("freeze", [False, True])
def test_a_trained_stem_moves_its_statistics_unless_the_configuration_freezes_it(
    inputs: Inputs, tmp_path: Path, freeze: bool
) -> None:
    build_ofa(freeze_resnet=freeze).save_pretrained(tmp_path)
    ofa = OFAForConditionalGeneration.from_pretrained(tmp_path).requires_grad_(True).train()
    norm = ofa.model.encoder.embed_images.bn1
    before = norm.running_mean.clone()
    ofa.model.encoder.embed_images(inputs["patch_images"]).square().mean().backward()
    assert torch.equal(norm.running_mean, before) == freeze
    assert (norm.weight.grad is None) == freeze
    assert ofa.model.encoder.embed_images.conv1.weight.grad is not None


def test_a_frozen_backbone_hands_its_attention_masks_without_gradient(
    ofa: OFAForConditionalGeneration, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    fused = nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any, **named: Any) -> Tensor:
        masks.append(mask)
        return fused(q, k, v, mask, *rest, **named)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    ofa.requires_grad_(False)
    for layer in ofa.model.encoder.layers:
        layer.fc1.requires_grad_(True)
    ofa(**inputs, labels=torch.randint(4, 93, (3, 3))).loss.backward()
    assert len(masks) == 6
    assert not any(m.requires_grad for m in masks)


def test_layers_compile_without_graph_breaks(ofa: OFAForConditionalGeneration) -> None:
    torch._dynamo.reset()
    hidden, source = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    own, cross = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 7)
    decoder, encoder = ofa.model.decoder.layers[1], ofa.model.encoder.layers[1]
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, source, own, cross)[0], decoder(hidden, source, own, cross)[0])
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, own)[0], encoder(hidden, own)[0])


def test_an_image_that_is_too_large_is_refused(ofa: OFAForConditionalGeneration) -> None:
    tokens = torch.zeros(1, 3, dtype=torch.long)
    ofa.get_encoder()(tokens, patch_images=torch.zeros(1, 3, 128, 128))
    for height, width in ((144, 64), (64, 129)):
        with pytest.raises(DataError, match=rf"{height} × {width} pixels.*128 × 128"):
            ofa.get_encoder()(tokens, patch_images=torch.zeros(1, 3, height, width))


def test_texts_that_are_too_long_are_refused(ofa: OFAForConditionalGeneration) -> None:
    tokens = torch.full((1, 65), 5)
    with pytest.raises(DataError, match="65 tokens is longer than max_source_positions = 64"):
        ofa.get_encoder()(tokens)
    with pytest.raises(DataError, match="33 tokens is longer than max_target_positions = 32"):
        ofa(tokens[:, :4], decoder_input_ids=tokens[:, :33])


def test_a_second_image_needs_a_type_of_its_own(inputs: Inputs) -> None:
    second = torch.randn(3, 3, 32, 32)
    with pytest.raises(PituningError, match="type_vocab_size=3"):
        build_ofa().get_encoder()(**inputs, patch_images_2=second)
    encoded = build_ofa(type_vocab_size=3).get_encoder()(**inputs, patch_images_2=second)
    assert encoded.last_hidden_state.shape == (3, 2 * 2 + 4 * 3 + 7, 32)
    assert encoded.padding_mask[2, : 4 + 12].all()
    assert not encoded.padding_mask[0].any()


def test_encoder_outputs_of_another_model_are_refused(ofa: OFAForConditionalGeneration) -> None:
    with pytest.raises(PituningError, match=r"padding_mask and position_embeddings"):
        ofa(encoder_outputs=(torch.zeros(1, 3, 32),), decoder_input_ids=torch.zeros(1, 1, dtype=torch.long))


def test_drop_path_drops_whole_branches() -> None:
    ofa = build_ofa(dropout=0.0, encoder_drop_path_rate=0.5, decoder_drop_path_rate=0.5, resnet_drop_path_rate=0.5)
    assert [layer.drop_path.rate for layer in ofa.model.encoder.layers] == [0.0, 0.5]
    assert [b.drop_path.rate for b in ofa.model.encoder.embed_images.layer2] == [0.0, 0.5]
    drop = ofa.model.encoder.layers[1].drop_path.train()
    x = torch.ones(4000, 2, 3)
    out = drop(x)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out == out[:, :1, :1]).all(), "an example's branch is dropped in part"
    assert out[:, 0, 0].mean().item() == pytest.approx(1.0, abs=0.08)


def test_bfloat16_runs_close_to_float32(inputs: Inputs) -> None:
    from pituning.training.precision import bf16_survives

    if not bf16_survives():
        pytest.skip("a bfloat16 product ends a process on this machine")
    labels = torch.randint(4, 93, (3, 3))
    exact = build_ofa()(**inputs, labels=labels).loss
    half = build_ofa(torch.bfloat16)(**inputs, labels=labels)
    assert half.logits.dtype == torch.bfloat16
    assert half.loss.item() == pytest.approx(exact.item(), rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert build_ofa()(**inputs, labels=labels).loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_interpolated_positions_serve_images_larger_than_in_pretraining() -> None:
    ofa = build_ofa(interpolate_position=True, orig_patch_image_size=64).double()
    plain = build_ofa().double()
    encoder = ofa.model.encoder
    assert torch.equal(encoder._image_positions(4, 4), plain.model.encoder._image_positions(4, 4))
    # twice the side: every interpolated position lies between its neighbours; the corners are the corners
    found = encoder._image_positions(8, 8).view(8, 8, -1)
    known = encoder._image_positions(4, 4).view(4, 4, -1)
    torch.testing.assert_close(found[0, 0], known[0, 0])
    torch.testing.assert_close(found[7, 7], known[3, 3])
    torch.testing.assert_close(found[0, 1], 0.75 * known[0, 0] + 0.25 * known[0, 1])


def test_a_mask_of_the_target_counts_with_a_cache_as_without(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    tokens = torch.randint(4, 93, (3, 4))
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[1, 2] = 0
    encoded = ofa.get_encoder()(**inputs)
    whole = ofa(encoder_outputs=encoded, decoder_input_ids=tokens, decoder_attention_mask=mask).logits
    assert not torch.allclose(whole, ofa(encoder_outputs=encoded, decoder_input_ids=tokens).logits)
    cache, steps = new_cache(), []
    for i in range(4):
        one = {"decoder_input_ids": tokens[:, i : i + 1], "decoder_attention_mask": mask[:, : i + 1]}
        steps.append(ofa(encoder_outputs=encoded, past_key_values=cache, **one).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="for 3 positions, the target has 5"):
        ofa(encoder_outputs=encoded, past_key_values=cache, decoder_input_ids=tokens[:, :1],
            decoder_attention_mask=mask[:, :3])  # fmt: skip
    mask[2, 0] = 0
    with pytest.raises(DataError, match="padded on the left"):
        ofa(encoder_outputs=encoded, decoder_input_ids=tokens, decoder_attention_mask=mask)


def test_a_model_used_in_inference_mode_can_be_trained_afterwards(inputs: Inputs) -> None:
    ofa = build_ofa()
    with torch.inference_mode():
        ofa(**inputs, labels=torch.randint(4, 93, (3, 3)))
    ofa(**inputs, labels=torch.randint(4, 93, (3, 3))).loss.backward()
    assert ofa.model.encoder.image_rel_pos_table_list[0].weight.grad is not None


def test_the_loss_keeps_float64(inputs: Inputs) -> None:
    inputs["patch_images"] = inputs["patch_images"].double()
    assert build_ofa(torch.float64)(**inputs, labels=torch.randint(4, 93, (3, 3))).loss.dtype == torch.float64


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_attn": False, "scale_fc": False, "scale_heads": False},
        {"scale_resids": True},
        {"scale_embedding": True},
        {"entangle_position_embedding": True, "decoder_entangle_position_embedding": True},
        {"add_type_embedding": False, "layernorm_embedding": False, "patch_layernorm_embedding": False},
        {"activation_function": "relu", "attn_scale_factor": 1.0},
        {"encoder_layers": 1, "decoder_layers": 3, "decoder_attention_heads": 8, "decoder_ffn_dim": 48},
        {"resnet_layers": [2, 1, 3], "resnet_stem_width": 4, "resnet_widths": [2, 6, 4]},
    ],
    ids=lambda s: next(iter(s)),
)
def test_every_switch_changes_the_model_and_decodes_alike_with_a_cache(settings: Any, inputs: Inputs) -> None:
    ofa, plain = build_ofa(**settings), build_ofa()
    labels = torch.randint(4, 93, (3, 5))
    output = ofa(**inputs, labels=labels)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert not torch.allclose(output.logits, plain(**inputs, labels=labels).logits, atol=1e-3)
    cached = ofa(**inputs, labels=labels, use_cache=True)
    torch.testing.assert_close(cached.logits, output.logits, rtol=1e-5, atol=1e-5)
    ofa.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)


def test_settings_that_no_model_could_have_are_refused() -> None:
    for settings, message in (
        ({"max_target_positions": 2048}, "max_target_positions = 2048.*1024 tokens"),
        ({"encoder_drop_path_rate": 1.0}, "encoder_drop_path_rate = 1.0"),
        ({"resnet_layers": [1, 2]}, "three stages"),
        ({"resnet_type": "resnet18", "resnet_layers": None}, "unknown image stem 'resnet18'"),
    ):
        with pytest.raises(PituningError, match=message):
            build_ofa(**settings)


def test_a_static_cache_is_refused(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    with pytest.raises(PituningError, match="growing cache"):
        ofa.generate(**inputs, max_new_tokens=3, cache_implementation="static")


def test_generation_mixin_reads_images(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    greedy = ofa.generate(**inputs, max_new_tokens=6, do_sample=False)
    beams = ofa.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=3)
    uncached = ofa.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=3, use_cache=False)
    assert torch.equal(beams, uncached)
    # greedy by hand
    tokens = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(6):
        step = ofa(**inputs, decoder_input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, step], 1)
    for own, by_hand in zip(greedy.tolist(), tokens.tolist(), strict=True):
        length = by_hand.index(2) + 1 if 2 in by_hand else len(by_hand)
        assert own[:length] == by_hand[:length]
