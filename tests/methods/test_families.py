"""What every method keeps on every generative family: padding, cache, scores, the bare backbone, and PEFT's own loading."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.experts import Expert
from pituning.methods import attached
from tests.methods.tiny import CHOICES, GENERATIVE, SEQ2SEQ, backbone, examples, expert

METHODS = ("ia3", "prefix", "prompt")


@pytest.fixture(params=[(kind, method) for kind in GENERATIVE for method in METHODS], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Backbone, Expert]:
    """A backbone and an expert of one of the methods on it."""
    kind, method = request.param
    return backbone(kind), expert(backbone(kind), method)


def test_padding_changes_nothing(case: tuple[Backbone, Expert]) -> None:
    model, own = case
    several = examples(5)
    bare = model.loss(model.collate(several))
    with torch.no_grad(), attached(model, own.config, own.tensors):
        together = model.loss(model.collate(several))
        alone = torch.cat([model.loss(model.collate([e])) for e in several])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (together - bare).abs().max() > 1e-2, "the expert must matter"


def test_scores_are_log_probabilities_of_the_choices(case: tuple[Backbone, Expert]) -> None:
    model, own = case
    several = examples(3, choices=CHOICES)
    with torch.no_grad(), attached(model, own.config, own.tensors):
        found = model.score(model.collate(several), CHOICES)
        for column, choice in enumerate(CHOICES):
            losses = [model.loss(model.collate([replace(e, target=choice)])) for e in several]
            torch.testing.assert_close(found[:, column], -torch.cat(losses), rtol=1e-5, atol=1e-5)


def test_generation_with_a_cache_is_generation_without(case: tuple[Backbone, Expert]) -> None:
    """Greedy and by beams, prompts of several lengths together; without a cache every step reads everything anew."""
    model, own = case
    several = examples(3, seed=3)
    with torch.no_grad(), attached(model, own.config, own.tensors):
        batch = model.collate(several)
        for beams in (1, 3):
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams}
            cached = model.generate(batch, **options)
            assert cached == model.generate(batch, use_cache=False, **options)
            assert cached == [model.generate(model.collate([e]), **options)[0] for e in several]


def test_the_bare_backbone_comes_back(case: tuple[Backbone, Expert]) -> None:
    model, own = case
    batch = model.collate(examples(3))
    bare, modules = model.loss(batch), [f"{n} {type(m)}" for n, m in model.model.named_modules()]
    with attached(model, own.config, own.tensors), torch.no_grad(), model.bare():
        assert torch.equal(model.loss(batch), bare)
    assert torch.equal(model.loss(batch), bare)
    assert [f"{n} {type(m)}" for n, m in model.model.named_modules()] == modules


def test_peft_loads_the_folder(case: tuple[Backbone, Expert], tmp_path: Path) -> None:
    model, own = case
    batch = {k: v for k, v in model.collate(examples(3)).items() if k != "labels"}
    if model.name in SEQ2SEQ:
        batch["decoder_input_ids"] = torch.tensor([[1, 5, 9]] * 3)
    with torch.no_grad(), attached(model, own.config, own.tensors):
        expected = model.model(**batch).logits
    own.save(tmp_path / "expert")
    ours = "import pituning.methods" in (tmp_path / "expert" / "README.md").read_text(encoding="utf-8")
    assert ours == (own.config["peft_type"] != "IA3"), "PEFT's own methods load without pituning"
    loaded = PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / "expert").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
        with loaded.disable_adapter():
            bare: Tensor = loaded(**batch).logits
    assert torch.equal(bare, model.model(**batch).logits)
