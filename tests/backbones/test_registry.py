"""Loading by folder: what a file lacks is named, what a task model has besides is left out, and fingerprints stay."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    MPNetConfig,
    MPNetForMaskedLM,
    PreTrainedModel,
    SqueezeBertConfig,
    SqueezeBertForMaskedLM,
)

from pituning.backbones import load_backbone
from pituning.backbones.base import Backbone
from pituning.errors import PituningError
from tests.conftest import VOCABULARY, BackboneOf

SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "embedding_size": 16,
}  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path, backbone_of: BackboneOf) -> Callable[..., str]:
    """A folder with a model beside the tiny tokenizer, without the tensors whose names match a pattern."""

    def save(model: Any, without: str = "$^", family: str = "encoder") -> str:
        kept = {k: v for k, v in model.state_dict().items() if not re.search(without, k)}
        model.save_pretrained(tmp_path, state_dict=kept)
        backbone_of(family).tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def test_an_encoder_without_a_tensor_is_refused(saved: Callable[..., str], bert: Backbone) -> None:
    folder = saved(bert.model, r"^encoder\.layer\.0\.attention\.self\.query\.weight$")
    with pytest.raises(PituningError, match=r"missing encoder\.layer\.0\.attention\.self\.query\.weight"):
        load_backbone(folder)


def test_an_encoder_decoder_without_a_decoder_is_refused(saved: Callable[..., str], t5: Backbone) -> None:
    folder = saved(t5.model, r"^decoder\.block", "seq2seq")
    with pytest.raises(PituningError, match=r"missing decoder\.block\.0\.layer\.0"):
        load_backbone(folder)


def test_layers_beyond_the_configuration_are_named(saved: Callable[..., str], bert: Backbone) -> None:
    folder = Path(saved(BertForMaskedLM(bert.model.config)))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(PituningError, match=r"unexpected bert\.encoder\.layer\.1\.") as caught:
        load_backbone(str(folder))
    assert "cls." not in str(caught.value)


def test_a_checkpoint_with_a_pooler_keeps_it_and_its_fingerprint(saved: Callable[..., str], bert: Backbone) -> None:
    loaded = load_backbone(saved(bert.model))
    assert loaded.fingerprint == bert.fingerprint
    assert "pooler.dense.weight" in loaded.model.state_dict()


@pytest.mark.parametrize(
    "of",
    [
        lambda config: BertForMaskedLM(config),
        lambda config: BertForSequenceClassification(config),
        lambda _: MPNetForMaskedLM(MPNetConfig(**SIZES)),
        lambda _: SqueezeBertForMaskedLM(SqueezeBertConfig(**SIZES, q_groups=1)),  # its class insists on a pooler
    ],
    ids=["BERT masked", "BERT classifier", "MPNet masked", "SqueezeBERT masked"],
)
def test_a_task_models_encoder_has_one_fingerprint(
    saved: Callable[..., str], bert: Backbone, of: Callable[[Any], PreTrainedModel]
) -> None:
    torch.manual_seed(0)
    folder = saved(of(bert.model.config), r"\.pooler\.")
    prints = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        prints.add(load_backbone(folder).fingerprint)
    assert len(prints) == 1


def test_an_encoder_decoders_head_for_a_task_is_left_out(saved: Callable[..., str]) -> None:
    config = BartConfig(
        vocab_size=len(VOCABULARY), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=0,
        eos_token_id=3, bos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    assert isinstance(
        load_backbone(saved(BartForSequenceClassification(config), family="seq2seq")).model,
        BartForConditionalGeneration,
    )
