"""Label texts are embedded once, and whoever asked first has no part in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pituning.training.precision import bf16_survives, precision

CHOICES = ("ba", "de fi", "go ku la mi")


def slow(backbone: Any, text: str) -> torch.Tensor:
    """The mean of the last hidden states, of unit length."""
    tokens = backbone.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
    return F.normalize(hidden[0].mean(0), dim=0)


@pytest.mark.skipif(not bf16_survives(), reason="a bfloat16 product would end this process")
@pytest.mark.parametrize("block", ["autocast", "precision"])
def test_label_embeddings_are_float32_wherever_they_were_first_asked_for(fresh_bert_of: Any, block: str) -> None:
    first, other = fresh_bert_of(torch.float32), fresh_bert_of(torch.float32)
    coarse = precision(first, "bf16") if block == "precision" else torch.autocast("cpu", dtype=torch.bfloat16)
    with coarse:
        inside = first.label_embeddings(CHOICES)
    assert inside.dtype == torch.float32
    for embedding, text in zip(inside, CHOICES, strict=True):
        torch.testing.assert_close(embedding, slow(other, text), rtol=1e-4, atol=1e-5)
    assert torch.equal(first.label_embeddings(CHOICES), other.label_embeddings(CHOICES)), "the same bits as without it"
    assert first.label_embeddings(CHOICES) is first.label_embeddings(CHOICES)
