"""Whole examples against what OFA's own data sets made: shared/fixtures/prompts, every task and prompt type.

Each recorded row goes through the task's kind and the backbone's `collate`. OFA's GLUE tasks learn no end symbol; here every
answer has one, and behind a whole answer nothing else is allowed, so that its probability is one and its loss zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pituning.backbones.loss import label_smoothed_nll
from pituning.backbones.ofa.backbone import OFABackbone
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.processing import OFAProcessor
from pituning.data.records import TableRecords
from pituning.example import Example
from pituning.tasks import VQA, Captioning, ImageClassification, Kind, Summarisation, VisualEntailment
from pituning.tasks.glue import MNLI, MRPC, QNLI, QQP, RTE, SST2, CoLA

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
pytestmark = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"the reference's recorded numbers are not here: no folder {FIXTURES}"
)
GOLDEN = json.loads((FIXTURES / "prompts/golden.json").read_text()) if FIXTURES.is_dir() else {"rows": []}
ANSWERS = tuple(GOLDEN.get("answers_in_trie", ()))
ROWS = GOLDEN["rows"]
# The recorded rows hold the selected columns in this order.
COLUMNS = {
    "vqa_gen": ("key", "image", "question", "answer", "objects"),
    "snli_ve": ("key", "image", "hypothesis", "premise", "label"),
    "image_classify": ("image", "label"),
    "caption": ("key", "image", "caption"),
    "cola": ("sentence", "label"),
    "mnli": ("premise", "hypothesis", "label"),
    "mrpc": ("first", "second", "label"),
    "qnli": ("question", "sentence", "label"),
    "qqp": ("first", "second", "label"),
    "rte": ("premise", "hypothesis", "label"),
    "sst2": ("sentence", "label"),
    "gigaword": ("source", "target"),
}
TEXT_KINDS = {"cola": CoLA, "mnli": MNLI, "mrpc": MRPC, "qnli": QNLI, "qqp": QQP, "rte": RTE, "sst2": SST2}


def kind_of(row: Mapping[str, Any]) -> Kind:
    settings, answers = row["kwargs"], ANSWERS if row["constraint_allowed"] else ()
    prompt_type = settings.get("prompt_type", "none")
    if row["task"] == "vqa_gen":
        return VQA(answers, objects=settings.get("add_object", False), prompt_type=prompt_type)
    if row["task"] == "snli_ve":
        return VisualEntailment(premise=settings.get("add_caption", False), prompt_type=prompt_type)
    if row["task"] in TEXT_KINDS:
        return TEXT_KINDS[row["task"]](prompt_type=prompt_type)
    return {"image_classify": ImageClassification(ANSWERS), "caption": Captioning(), "gigaword": Summarisation()}[
        row["task"]
    ]


def example_of(row: Mapping[str, Any], folder: Path) -> Example:
    values = dict(zip(COLUMNS[row["task"]], row["row"], strict=True))
    if "image" in values:
        Image.new("RGB", (40, 30), "white").save(folder / "image.png")
        values["image"] = "image.png"
    example = kind_of(row).example(TableRecords([("row", values)], folder), 0, "row")
    # the recorded trie has seven answers, and SST-2's are not among them
    return replace(example, choices=ANSWERS if row["constraint_allowed"] and example.target in ANSWERS else ())


@pytest.fixture(scope="module")
def ofa() -> OFABackbone:
    """The real vocabulary on a model of width 8."""
    torch.manual_seed(0)
    config = OFAConfig(
        vocab_size=59457, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=8,
        decoder_attention_heads=2, decoder_ffn_dim=8, resnet_layers=[1, 1, 1], resnet_stem_width=4,
        resnet_widths=[2, 2, 4],
    )  # fmt: skip
    model = OFAForConditionalGeneration(config)
    return OFABackbone("wide", model, OFAProcessor.from_fairseq(FIXTURES / "bpe", image_size=32))


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['task']}-{r['kwargs'].get('prompt_type', 'none')}")
def test_every_recorded_example(row: dict[str, Any], ofa: OFABackbone, tmp_path: Path) -> None:
    example = example_of(row, tmp_path)
    batch = ofa.collate([example])
    eos, pad = ofa.processor.eos_id, ofa.processor.pad_id
    prompt = batch["decoder_prompts"][0].tolist() if "decoder_prompts" in batch else []
    (target,) = batch["targets"]
    if row["task"] == "caption":  # the recorded one is an evaluation's: all captions in one, for the metric
        assert example.target == "A man riding a horse"
        assert "&&".join(caption for caption, _ in example.answers) == row["encode_text_calls"][1]["text"].strip()
        target = ofa.processor.encode(" " + "&&".join(caption for caption, _ in example.answers))
    assert batch["input_ids"][0].tolist() == row["source"]
    assert ("patch_images" in batch) == ("image" in COLUMNS[row["task"]])
    ended = row["target"][-1] == eos
    assert [pad] * len(prompt) + target + [eos] * ended == row["target"]
    assert [ofa.processor.bos_id, *prompt, *target][: len(row["target"])] == row["prev_output_tokens"]
    if row["decoder_prompt"]:
        assert [ofa.processor.bos_id, *prompt] == row["decoder_prompt"]
    if row["ref_dict"]:
        assert (dict(example.answers) or {example.target: 1.0}) == row["ref_dict"]
    assert [example.weight] == (row["conf"] or [1.0])
    if row["constraint_allowed"]:
        trie = ofa._closed(ANSWERS)[1]
        allowed = [trie.allowed_next(target[:n]) for n in range(len(target) + ended)]
        assert [[]] * len(prompt) + allowed == row["constraint_allowed"]
        if not ended:
            assert trie.allowed_next(target) == [eos]


def test_label_smoothing_is_spread_over_what_the_recorded_masks_allow(ofa: OFABackbone, tmp_path: Path) -> None:
    rows = [r for r in ROWS if r["constraint_allowed"] and r["task"] != "sst2"]
    assert len(rows) > 20
    for row in rows:
        batch = ofa.collate([example_of(row, tmp_path)])
        with torch.no_grad():
            found = ofa.loss(batch, 0.1)
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "patch_images", "patch_masks") if k in batch}
            decoder = torch.tensor([row["prev_output_tokens"]])
            logits = ofa.model(**inputs, decoder_input_ids=decoder).logits
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        for place, tokens in enumerate(row["constraint_allowed"]):
            allowed[0, place, tokens] = True
        labels = torch.tensor([row["target"]])
        expected = label_smoothed_nll(logits, labels.masked_fill(labels == ofa.processor.pad_id, -100), 0.1, allowed)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
