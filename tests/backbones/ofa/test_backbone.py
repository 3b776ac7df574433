"""OFA as a backbone: losses, closed answers, text, boxes, and loading from a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pituning import load_backbone
from pituning.backbones.ofa.backbone import OFABackbone
from pituning.errors import DataError, PituningError, RefusedError
from pituning.example import Example
from pituning.methods import attached, initial_tensors, make_config
from tests.backbones.ofa.conftest import CHOICES, SYMBOLS, boxes, build_backbone, build_ofa, closed


def alone(backbone: OFABackbone, examples: Sequence[Example]) -> torch.Tensor:
    return torch.cat([backbone.loss(backbone.collate([e])) for e in examples])


@pytest.mark.parametrize("make", [closed, boxes])
def test_an_examples_loss_does_not_depend_on_its_batch(make: Any) -> None:
    backbone = build_backbone(torch.float64)
    examples = make()
    torch.testing.assert_close(backbone.loss(backbone.collate(examples)), alone(backbone, examples), rtol=1e-9, atol=0)


def test_closed_answers_share_all_probability_and_the_loss_is_their_score() -> None:
    backbone = build_backbone(torch.float64)
    examples = closed()
    batch = backbone.collate(examples)
    scores = backbone.score(batch, CHOICES)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(4, dtype=torch.float64))
    truth = torch.tensor([e.label for e in examples])
    torch.testing.assert_close(-backbone.loss(batch), scores.gather(1, truth[:, None])[:, 0])


def test_closed_scores_against_a_walk_through_the_allowed_tokens() -> None:
    """Token by token: softmax over what can still become an answer, the rest of the vocabulary left out."""
    backbone = build_backbone(torch.float64)
    example = closed(2)[1]
    batch = backbone.collate([example])
    answers = [[*backbone.processor.encode(f" {c}"), 2] for c in CHOICES]
    for answer, found in zip(answers, backbone.score(batch, CHOICES)[0], strict=True):
        total = 0.0
        for place, token in enumerate(answer):
            allowed = sorted({a[place] for a in answers if a[:place] == answer[:place]})
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "patch_images", "patch_masks")}
            prefix = torch.tensor([[0, *answer[:place]]])
            logits = backbone.model(**inputs, decoder_input_ids=prefix).logits[0, -1]
            total += float(logits[allowed].log_softmax(0)[allowed.index(token)])
        assert float(found) == pytest.approx(total, rel=1e-9)


def test_an_open_loss_counts_the_whole_vocabulary() -> None:
    backbone = build_backbone(torch.float64)
    example = boxes(1)[0]
    batch = backbone.collate([example])
    labels = torch.tensor([[*backbone.processor.encode_box(example.box, (40, 30)), 2]])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "patch_images", "patch_masks")}
    expected = backbone.model(**inputs, labels=labels).loss * 5
    torch.testing.assert_close(backbone.loss(batch)[0], expected)


def test_boxes_are_read_in_the_pictures_own_pixels() -> None:
    backbone = build_backbone()
    examples = boxes()
    found = backbone.locate(backbone.collate(examples))
    assert len(found) == 3
    for box in found:
        assert box is not None
        assert all(0 <= x <= 40 * 1.1 for x in box[::2])
        assert all(0 <= y <= 30 * 1.1 for y in box[1::2])


def test_text_is_generated_by_beam_search_or_drawn() -> None:
    backbone = build_backbone()
    batch = backbone.collate(closed())
    found = backbone.generate(batch, max_len_b=5)
    assert len(found) == 4
    assert all(isinstance(text, str) for text in found)
    torch.manual_seed(0)
    drawn = {tuple(backbone.generate(batch, do_sample=True, num_beams=1, max_new_tokens=5)) for _ in range(3)}
    assert len(drawn) > 1


def test_words_of_other_libraries_for_the_same_settings() -> None:
    backbone = build_backbone()
    batch = backbone.collate(closed())
    assert backbone.generate(batch, num_beams=2, max_new_tokens=4) == backbone.generate(batch, beam=2, max_len_b=4)
    with pytest.raises(PituningError, match="no setting max_lenght; it has beam"):
        backbone.generate(batch, max_lenght=3)


def test_a_target_that_is_no_answer_is_named() -> None:
    with pytest.raises(DataError, match="'e': its target 'maybe' is not one of its answers: 'yes'"):
        build_backbone().collate([Example("e", ("",), " is it", "maybe", CHOICES)])


def test_nothing_to_score() -> None:
    backbone = build_backbone()
    with pytest.raises(RefusedError, match="no choices"):
        backbone.score(backbone.collate(boxes(1)), ())


def test_a_box_without_a_picture_is_refused() -> None:
    with pytest.raises(RefusedError, match="'b' has a box but no image"):
        build_backbone().collate([Example("b", ("",), " where", "0,0,1,1", box=(0.0, 0.0, 1.0, 1.0))])


def test_a_broken_picture_is_named() -> None:
    with pytest.raises(DataError, match=r"'?e7'?: not an image"):
        build_backbone().collate([Example("e7", ("",), " what", "yes", image=b"no picture")])


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix", "bitfit"])
def test_methods_sit_where_the_papers_code_has_them(method: str) -> None:
    backbone = build_backbone()
    before = backbone.loss(backbone.collate(closed()))
    tensors = initial_tensors(backbone, make_config(method, backbone))
    places = {k.removeprefix("base_model.model.model.") for k in tensors}
    assert any(p.startswith("encoder.layers.0.self_attn") for p in places)
    crossed = {p for p in places if "cross_attn" in p}
    assert bool(crossed) == (method in ("lora", "bitfit"))
    assert not any("embed_images" in p for p in places), "the image stem is adapted"
    with attached(backbone, make_config(method, backbone), tensors) as site:
        site.backbone.loss(site.backbone.collate(closed())).sum().backward()
        without = [k for k, p in site.parameters.items() if p.grad is None]
        assert not without, f"no gradient reaches {without}"
    torch.testing.assert_close(backbone.loss(backbone.collate(closed())), before, rtol=0, atol=0)


def save(backbone: OFABackbone, folder: Path) -> None:
    backbone.model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)


def test_a_saved_folder_is_the_same_backbone(tmp_path: Path) -> None:
    backbone = build_backbone()
    save(backbone, tmp_path / "ofa")
    loaded = load_backbone(str(tmp_path / "ofa"))
    assert isinstance(loaded, OFABackbone)
    assert loaded.fingerprint == backbone.fingerprint
    batch = backbone.collate(boxes())
    assert torch.equal(loaded.loss(loaded.collate(boxes())), backbone.loss(batch))


def test_a_folder_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    save(build_backbone(), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors["model.encoder.image_proj.weight"]
    tensors["model.encoder.stranger"] = torch.zeros(2)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PituningError, match=r"missing model.encoder.image_proj.weight") as error:
        load_backbone(str(tmp_path))
    assert "unexpected model.encoder.stranger" in str(error.value)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    save(build_backbone(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
    with pytest.raises(PituningError, match="do not fit its configuration"):
        load_backbone(str(tmp_path))


def test_a_processor_with_more_symbols_than_the_model_is_refused() -> None:
    backbone = build_backbone()
    with pytest.raises(PituningError, match=r"78 symbols.*77"):
        OFABackbone("mixed up", build_ofa(vocab_size=len(SYMBOLS) - 1), backbone.processor)
