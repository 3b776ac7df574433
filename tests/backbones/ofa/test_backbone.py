"""OFA as a backbone: losses, closed answers, text, boxes, and loading from a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
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


class TestDecoderPrompts:
    """OFA's prompt types: the decoder reads the source before it answers."""

    def prompted(self, kind: Any, count: int = 4) -> list[Example]:
        return [replace(e, decoder_prompt=kind) for e in closed(count)]

    @pytest.mark.parametrize("kind", ["source", "source_without_end"])
    def test_scores_against_a_walk_through_the_allowed_tokens(self, kind: Any) -> None:
        backbone = build_backbone(torch.float64)
        example = self.prompted(kind)[3]
        batch = backbone.collate(self.prompted(kind))
        source = [0, *backbone.processor.encode(example.prompt)] + [2] * (kind == "source")
        answers = [[*backbone.processor.encode(f" {c}"), 2] for c in CHOICES]
        alone_batch = backbone.collate([example])
        inputs = {k: alone_batch[k] for k in ("input_ids", "attention_mask", "patch_images", "patch_masks")}
        for answer, found in zip(answers, backbone.score(batch, CHOICES)[3], strict=True):
            total = 0.0
            for place, token in enumerate(answer):
                allowed = sorted({a[place] for a in answers if a[:place] == answer[:place]})
                prefix = torch.tensor([[*source, *answer[:place]]])
                logits = backbone.model(**inputs, decoder_input_ids=prefix).logits[0, -1]
                total += float(logits[allowed].log_softmax(0)[allowed.index(token)])
            assert float(found) == pytest.approx(total, rel=1e-9)

    @pytest.mark.parametrize("kind", ["none", "source", "source_without_end"])
    def test_loss_score_and_batch_agree(self, kind: Any) -> None:
        backbone = build_backbone(torch.float64)
        examples = self.prompted(kind)
        batch = backbone.collate(examples)
        truth = torch.tensor([e.label for e in examples])[:, None]
        torch.testing.assert_close(-backbone.loss(batch), backbone.score(batch, CHOICES).gather(1, truth)[:, 0])
        torch.testing.assert_close(backbone.loss(batch), alone(backbone, examples), rtol=1e-9, atol=0)

    def test_kinds_can_be_mixed(self) -> None:
        backbone = build_backbone(torch.float64)
        examples = [
            replace(e, decoder_prompt=k)
            for e, k in zip(closed(3), ("none", "source", "source_without_end"), strict=True)
        ]  # type: ignore[arg-type]
        torch.testing.assert_close(
            backbone.loss(backbone.collate(examples)), alone(backbone, examples), rtol=1e-9, atol=0
        )

    @pytest.mark.parametrize("kind", ["none", "source_without_end"])
    def test_beam_search_over_closed_answers_finds_the_best(self, kind: Any) -> None:
        backbone = build_backbone()
        examples = self.prompted(kind, 6)
        batch = backbone.collate(examples)
        best = [CHOICES[n] for n in backbone.score(batch, CHOICES).argmax(1).tolist()]
        assert backbone.generate(batch, choices=CHOICES, num_beams=8, normalize=False) == best

    def test_the_prompt_is_no_part_of_the_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backbone = build_backbone()
        decoded: list[list[int]] = []
        monkeypatch.setattr(backbone.processor, "decode", lambda ids: decoded.append(list(ids)) or "x")
        for options in ({"num_beams": 2}, {"do_sample": True, "num_beams": 1}):
            for kind in ("none", "source"):
                torch.manual_seed(0)
                backbone.generate(backbone.collate(self.prompted(kind, 1)), max_new_tokens=3, **options)
        prompt = backbone.processor.encode(closed(1)[0].prompt)
        assert len(decoded) == 4
        assert all(1 <= len(ids) <= 4 and ids[: len(prompt)] != prompt for ids in decoded)

    def test_prompts_of_different_lengths_are_not_sampled_together(self, message: Any) -> None:
        backbone = build_backbone()
        batch = backbone.collate(self.prompted("source", 3))
        assert "draw one by one" in message(backbone.generate, batch, do_sample=True)


def test_a_smoothed_loss_spreads_over_what_can_become_an_answer() -> None:
    backbone = build_backbone(torch.float64)
    example = closed(2)[1]
    batch = backbone.collate([example])
    answers = [[*backbone.processor.encode(f" {c}"), 2] for c in CHOICES]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "patch_images", "patch_masks")}
    answer, expected = answers[example.label], 0.0
    for place, token in enumerate(answer):
        allowed = sorted({a[place] for a in answers if a[:place] == answer[:place]})
        prefix = torch.tensor([[0, *answer[:place]]])
        log_p = backbone.model(**inputs, decoder_input_ids=prefix).logits[0, -1][allowed].log_softmax(0)
        right = float(log_p[allowed.index(token)])
        others = [float(p) for p, t in zip(log_p, allowed, strict=True) if t != token]
        expected += -right if not others else -0.8 * right - 0.2 * sum(others) / len(others)
    assert float(backbone.loss(batch, 0.2)[0]) == pytest.approx(expected, rel=1e-9)


def test_an_example_without_an_answer_can_be_answered_but_has_no_loss(message: Any) -> None:
    backbone = build_backbone()
    examples = [closed(1)[0], replace(closed(2)[1], target="")]
    batch = backbone.collate(examples)
    assert backbone.score(batch, CHOICES).shape == (2, 3)
    assert "the examples [1] of the batch have no answer" in message(backbone.loss, batch)
