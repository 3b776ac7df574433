"""The options by which `pituning rank` and `pituning interpolate` compare and choose: what has no effect is refused."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import typer

from pituning.backbones.base import Backbone
from pituning.cli.rank import RankingOptions, SelectionOptions
from pituning.errors import RefusedError, UnknownNameError
from pituning.experts import ExpertPool
from pituning.similarity import rank_experts
from tests.methods.tiny import expert as expert_of


@pytest.mark.parametrize(
    ("options", "otherwise", "checked", "said"),
    [
        ({"top": 1}, None, True, "--top 1 has no effect without --select"),
        ({"soup": "score"}, None, True, "--soup score has no effect without --select"),
        (
            {"diversity": 0.0},
            "top-k",
            False,
            "--diversity 0.0 has no effect without --select: it belongs to --select diverse",
        ),
        ({"threshold": 9.0}, "top-k", False, "--threshold 9.0 has no effect without --select"),
        (
            {"select": "threshold", "threshold": 9.0, "top": 2},
            None,
            True,
            "--top 2 has no effect with --select threshold",
        ),
        (
            {"select": "diverse", "soup": "uniform"},
            "top-k",
            False,
            "--soup uniform has no effect with --select diverse",
        ),
    ],
)
def test_an_option_without_effect_is_refused(options: dict[str, Any], otherwise: Any, checked: bool, said: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        SelectionOptions(**options).require_effect(otherwise, checked=checked)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "otherwise", "checked"),
    [
        ({}, None, True),
        ({"top": 1}, "top-k", False),
        ({"select": "greedy", "top": 2, "soup": "score"}, "top-k", False),
        ({"select": "diverse", "top": 2, "diversity": 0.2, "soup": "score"}, None, True),
        ({"select": "threshold", "threshold": 0.0}, None, True),
    ],
)
def test_the_others_are_taken(options: dict[str, Any], otherwise: Any, checked: bool) -> None:
    SelectionOptions(**options).require_effect(otherwise, checked=checked)


def test_any_method_of_the_pools_cards_can_be_chosen(
    bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Any
) -> None:
    pool, task = ExpertPool(tmp_path), make_task()
    pool.add(random_expert(bert, "lora", 1, name="factors"))
    norms = expert_of(bert, peft.LNTuningConfig(target_modules=["LayerNorm"]), scale=0.1)
    pool.add(norms.with_card(name="norms", fingerprint=bert.fingerprint, task="other"))
    with pytest.raises(RefusedError, match="holds experts of ln_tuning and lora: choose with --method"):
        RankingOptions().rank(bert, task, pool, None)
    found = RankingOptions(method="ln_tuning").rank(bert, task, pool, None)
    assert [e.name for e in found.experts] == ["norms"]
    assert found.similarities == rank_experts(bert, task, pool, exclude=["factors"]).similarities
    with pytest.raises(UnknownNameError, match="unknown method 'ln_tunning': did you mean 'ln_tuning'"):
        RankingOptions(method="ln_tunning").rank(bert, task, pool, None)


def test_a_named_blend_that_has_seen_the_target_is_refused(
    bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Any
) -> None:
    pool = ExpertPool(tmp_path)
    pool.add(random_expert(bert, "lora", 1).with_card(name="mine", task="target"))
    pool.add(random_expert(bert, "lora", 2).with_card(name="blend", lineage=({"name": "mine", "weight": 1.0},)))
    pool.add(random_expert(bert, "lora", 3, name="free"))
    with pytest.raises(RefusedError, match="blend: blended from an expert that was trained on task 'target' itself"):
        RankingOptions().rank(bert, make_task(), pool, None, among=["blend", "free"])
    assert [e.name for e in RankingOptions().rank(bert, make_task(), pool, None).experts] == ["free"]
