"""The plain model against the reference: every layer, losses, gradients, position tables, and the real sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pituning.backbones.loss import label_smoothed_nll
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.positions import image_bucket_matrix, token_bucket_matrix
from tests.parity.reference import (
    BATCHES,
    DOUBLE,
    FIXTURES,
    REAL,
    assert_near,
    assert_same_gradient,
    filled,
    in_reference,
    inputs_of,
    needs_fixtures,
    recipe,
    recorded,
    targets_of,
    tiny_model,
)

pytestmark = needs_fixtures


@pytest.mark.parametrize("batch", BATCHES)
def test_every_state_of_encoder_and_decoder(batch: str) -> None:
    outputs, _ = recorded("plain")
    model = tiny_model()
    decoder_input, _ = targets_of(batch)
    with torch.no_grad():
        if batch != "C":
            stem = model.model.encoder.embed_images(inputs_of(batch)["patch_images"])
            assert_near(stem, outputs[f"{batch}.resnet_out"])
        encoded = model.get_encoder()(**inputs_of(batch), output_hidden_states=True)
        decoded = model(
            encoder_outputs=encoded, decoder_input_ids=decoder_input, output_hidden_states=True, output_attentions=True
        )
        fused = model(encoder_outputs=encoded, decoder_input_ids=decoder_input)
    assert_near(encoded.last_hidden_state.transpose(0, 1), outputs[f"{batch}.encoder_out"])
    assert torch.equal(encoded.padding_mask, outputs[f"{batch}.encoder_padding_mask"].bool())
    assert_near(encoded.position_embeddings.expand(2, -1, -1), outputs[f"{batch}.position_embeddings"])
    for i in range(3):
        assert_near(encoded.hidden_states[i].transpose(0, 1), outputs[f"{batch}.encoder_state.{i}"])
        assert_near(decoded.decoder_hidden_states[i].transpose(0, 1), outputs[f"{batch}.decoder_state.{i}"])
    assert_near(decoded.cross_attentions[-1].mean(1), outputs[f"{batch}.decoder_attn"])
    assert_near(decoded.logits, outputs[f"{batch}.logits"])
    assert_near(fused.logits, outputs[f"{batch}.logits"])


@pytest.mark.parametrize("batch", BATCHES)
def test_losses(batch: str) -> None:
    _, meta = recorded("plain")
    model = tiny_model()
    decoder_input, labels = targets_of(batch)
    with torch.no_grad():
        logits = model(**inputs_of(batch), decoder_input_ids=decoder_input).logits
    for epsilon in (0.0, 0.1):
        expected = meta["loss"][f"{batch}.ls{epsilon}"]
        assert_near(label_smoothed_nll(logits, labels, epsilon).sum(), expected["loss_sum"])
        assert_near(label_smoothed_nll(logits, labels).sum(), expected["nll_sum"])
        assert int((labels != -100).sum()) == expected["sample_size"]


@pytest.mark.parametrize("batch", BATCHES)
def test_float64(batch: str) -> None:
    """The reference computes GELU and softmax in float32 even then; with the same rounding we agree to the last bits."""
    _, meta = recorded("plain")
    decoder_input, labels = targets_of(batch)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_of(batch).items()}
    expected = meta["loss"][f"{batch}.ls0.1"]
    for rounding, tolerance in ((True, DOUBLE), (False, max(1e-8, DOUBLE))):
        model = tiny_model(reference_rounding=rounding).double()
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=decoder_input).logits
        assert_near(label_smoothed_nll(logits, labels, 0.1).sum(), expected["loss_sum_f64"], tolerance)
        assert_near(logits.abs().sum(), expected["logits_f64_sum_abs"], tolerance)


def test_gradients_of_all_parameters() -> None:
    outputs, meta = recorded("plain")
    model = tiny_model()
    decoder_input, labels = targets_of("A")
    label_smoothed_nll(model(**inputs_of("A"), decoder_input_ids=decoder_input).logits, labels, 0.1).sum().backward()
    without = set(meta["no_grad_though_trainable"]["A.ls0.1"])
    compared = set()
    for name, parameter in model.named_parameters():
        reference = in_reference(name)
        if reference in without:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert_same_gradient(parameter.grad, outputs[f"A.ls0.1.grad.{reference}"], name)
        compared.add(reference)
    assert compared == set(meta["trainable"])


def test_position_tables() -> None:
    tables = np.load(FIXTURES / "buckets" / "rp_buckets.npz")
    cpu = torch.device("cpu")
    seen = 0
    for name in tables:
        if "token" in name:
            size = 256 if "256" in name else 16
            expected = torch.from_numpy(tables[name]).long()
            length = expected.shape[0]
            assert torch.equal(token_bucket_matrix(length, size, cpu), expected), name
            seen += 1
        elif "image_rp" in name:  # row and column 0 stand for the start of a code sequence
            expected = torch.from_numpy(tables[name]).long()[1:, 1:]
            assert torch.equal(image_bucket_matrix(8, 8, 8, cpu), expected), name
            seen += 1
    assert seen >= 3


@pytest.fixture(scope="module", params=["tiny", "base", "large"])
def real(request: pytest.FixtureRequest) -> tuple[str, OFAForConditionalGeneration]:
    return request.param, filled(OFAConfig.of_size(request.param), recipe)


@pytest.mark.slow
def test_real_sizes(real: tuple[str, OFAForConditionalGeneration]) -> None:
    size, model = real
    outputs, meta = recorded(f"real_{size}_plain")
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]
    compared = 0
    for case, expected in meta["cases"].items():
        images = FIXTURES / "inputs" / f"real_patch_images_{case}.safetensors"
        if not images.is_file():
            continue  # the README: larger images are not stored
        target = outputs[f"{case}.target"]
        with torch.no_grad():
            inputs = {"input_ids": outputs[f"{case}.src_tokens"], "patch_images": load_file(images)["patch_images"]}
            encoded = model.get_encoder()(**inputs)
            logits = model(encoder_outputs=encoded, decoder_input_ids=outputs[f"{case}.prev_output_tokens"]).logits
        hidden = encoded.last_hidden_state.transpose(0, 1)
        assert list(hidden.shape) == expected["encoder_out_shape"]
        assert list(logits.shape) == expected["logits_shape"]
        assert_near(hidden.abs().double().sum(), expected["encoder_out_abs_sum"], REAL)
        assert_near(logits.abs().double().sum(), expected["logits_abs_sum"], REAL)
        assert logits.argmax(-1).tolist() == expected["argmax"]
        labels = target.masked_fill(target == 1, -100)
        assert_near(label_smoothed_nll(logits, labels, 0.1).sum(), expected["loss_sum_ls0.1"], REAL)
        assert_near(hidden[::5, :, ::16], outputs[f"{case}.encoder_out_slice"], REAL)
        assert_near(logits[..., ::211], outputs[f"{case}.logits_slice"], REAL)
        assert_near(logits[..., -1000::8], outputs[f"{case}.logits_bins"], REAL)
        compared += 1
    assert compared
