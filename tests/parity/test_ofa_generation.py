"""Beam search against the hypotheses that the reference implementation wrote down.

A further case of the tiny model is one more entry of `MODELS`: a function that gives the model of that fixture folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import pytest
from safetensors.torch import load_file

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.generation import beam_search
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from tests.parity.reference import (
    FIXTURES,
    check_hypotheses,
    filled,
    inputs_of,
    needs_fixtures,
    recipe,
    recorded,
    settings_of,
    tiny_model,
)

pytestmark = needs_fixtures
SETTINGS = ("refcoco", "long_norepeat2", "beam3_min2_unnormalized_temp", "greedy")
REFCOCO = {"beam": 5, "min_len": 4, "max_len_a": 0, "max_len_b": 4}
MODELS: Mapping[str, Callable[[], OFAForConditionalGeneration]] = {"plain": tiny_model}


@lru_cache(maxsize=1)
def model_of(case: str) -> OFAForConditionalGeneration:
    return MODELS[case]()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("batch", ["A", "B"])
@pytest.mark.parametrize("case", MODELS)
def test_tiny(case: str, batch: str, setting: str) -> None:
    reference = recorded(case)[1]["generate"][batch][setting]
    found = beam_search(model_of(case), inputs_of(batch), settings_of(reference["args"]))
    check_hypotheses(found, reference["hypos"])


def test_every_recorded_search_is_compared() -> None:
    for case in MODELS:
        searches = recorded(case)[1]["generate"]
        assert {b: set(settings) for b, settings in searches.items()} == {"A": set(SETTINGS), "B": set(SETTINGS)}


@pytest.fixture(scope="module")
def real_tiny() -> OFAForConditionalGeneration:
    """OFA-tiny with its real vocabulary."""
    return filled(OFAConfig.of_size("tiny"), recipe)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64x64", "128x96"])
def test_real_vocabulary(real_tiny: OFAForConditionalGeneration, size: str) -> None:
    outputs, meta = recorded("real_tiny_plain")
    images = load_file(FIXTURES / "inputs" / f"real_patch_images_{size}.safetensors")["patch_images"]
    inputs = {"input_ids": outputs[f"{size}.src_tokens"], "patch_images": images}
    check_hypotheses(beam_search(real_tiny, inputs, settings_of(REFCOCO)), meta["cases"][size]["beam5"])
