"""Miniature Table 1: its tasks and arms, its shots of scenes, every arm on a tiny OFA, and its tables."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.transfer.arms import ARMS
from benchmarks.transfer.cells import REVISION, Cells
from benchmarks.transfer.intervals import paired_difference
from benchmarks.transfer.report import Commands, block, gather
from benchmarks.transfer.running import Bench, load_tasks, prepared, run
from benchmarks.transfer.suites import OTHER_METHODS, SUITES
from pituning.backbones.ofa.backbone import OFABackbone
from pituning.experiments.pretrain_recipe import PretrainRecipe
from pituning.experiments.pretraining import build
from pituning.tasks import Task, emoji
from pituning.training.crossfit import Search
from pituning.training.evaluation import evaluate
from pituning.training.precision import bf16_survives, precision
from pituning.training.trainer import TrainSettings

from ..experiments.test_pretraining import SETTINGS

TABLE1 = SUITES["table1"]
TINY = replace(
    TABLE1,
    report=("refemojig-small", "emoji-count-small"),
    sources=("refemojig-small", "refemoji-small", "emoji-count-small", "emoji-vqa-small"),
    shots=(8,),
    seeds=(1,),
    source_rows=6,
    source_training=TrainSettings(steps=2, batch_size=3),
    search=Search(learning_rates=(1e-2,), steps=2, eval_every=2, batch_size=4),
)


@pytest.fixture(scope="module")
def backbone() -> OFABackbone:
    """An untrained OFA as small as those of the tests of pretraining."""
    model = {**SETTINGS["model"], "max_source_positions": 128, "max_target_positions": 128}
    return OFABackbone("tiny", *build(PretrainRecipe(**{**SETTINGS, "model": model})))


@pytest.fixture(scope="module")
def tasks() -> Mapping[str, Task]:
    """Tasks on scenes in a size for tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "SIZES", {"train": 126, "dev": 2, "test": 6})
        return load_tasks(TABLE1, None)


@pytest.fixture(scope="module")
def bench(backbone: OFABackbone, tasks: Mapping[str, Task], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    found = prepared(TINY, backbone, tasks, tmp_path_factory.mktemp("table1"), say=lambda line: None)
    assert found is not None
    return found


def test_it_has_seven_report_targets_ten_sources_and_the_experts_of_all_four_methods() -> None:
    names = ("refemoji", "refemoji+", "refemojig", "emoji-vqa", "emoji-entailment", "emoji-group", "emoji-count")
    assert TABLE1.report == tuple(f"{n}-small" for n in names)
    assert TABLE1.development == ()
    assert set(TABLE1.targets) < set(TABLE1.sources)
    assert len(TABLE1.sources) == 10
    assert {"own", "own-extra", "full", "nearest-tuned", "soup-tuned", "pi", *OTHER_METHODS} < set(TABLE1.arms)
    assert TABLE1.backbone == "ofa-nano"


def test_rows_are_made_once_and_are_those_of_the_task(tasks: Mapping[str, Task]) -> None:
    for task in tasks.values():
        assert all(isinstance(task.splits[split], tuple) for split in ("train", "test"))
        assert task.split("train")[3].id == f"{task.name}/train/3"


@pytest.mark.parametrize(
    ("name", "classes", "each"),
    [
        ("refemoji", 1, 64),
        ("refemoji+", 1, 64),
        ("refemojig", 1, 64),
        ("emoji-vqa", 1, 64),
        ("emoji-entailment", 3, 21),
        ("emoji-group", 18, 3),
        ("emoji-count", 6, 10),
    ],
)
def test_every_task_has_at_most_64_examples_alike_in_each_class(
    name: str, classes: int, each: int, bench: Bench
) -> None:
    examples = replace(bench, suite=TABLE1).draw(f"{name}-small", 64, 0).split("train")
    assert len(examples) == len({e.id for e in examples}) == classes * each <= 64
    if classes > 1:
        assert set(Counter(e.target for e in examples).values()) == {each}


@pytest.mark.parametrize("name", ["refemojig-small", "emoji-count-small"])
def test_full_fine_tuning_is_evaluated_with_its_own_weights(
    name: str, bench: Bench, backbone: OFABackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.transfer.descent.choose_cell", lambda losses, warm: max(losses))
    before = {k: t.clone() for k, t in backbone.model.state_dict().items()}
    setting = bench.setting(bench.draw(name, 8, 0), 8)
    outcome = ARMS["full"].compute(setting)
    assert outcome.backbone is not None
    assert outcome.details["steps"] == 2
    found = evaluate(outcome.backbone, outcome.expert, setting.task)
    weights = {k: t.clone() for k, t in outcome.backbone.model.state_dict().items()}
    assert all(torch.equal(t, before[k]) for k, t in backbone.model.state_dict().items())
    bare = evaluate(backbone, None, setting.task)
    try:
        backbone.model.load_state_dict(weights)
        expected = evaluate(backbone, None, setting.task)
    finally:
        backbone.model.load_state_dict(before)
    assert (found.predictions, found.value) == (expected.predictions, expected.value)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.metrics["log-loss"] != pytest.approx(bare.metrics["log-loss"], rel=1e-3)


def test_own_experts_of_other_methods_are_trained_on_the_shots(bench: Bench) -> None:
    setting = bench.setting(bench.draw("emoji-count-small", 8, 0), 8)
    for arm, keys in zip(OTHER_METHODS, ("lora_A", "prefix_key", "bias"), strict=True):
        outcome = ARMS[arm].compute(setting)
        assert outcome.expert is not None
        outcome.expert.verify(bench.backbone)
        assert any(keys in key for key in outcome.expert.tensors)
        assert outcome.expert.card.training["examples"] == 6
        assert outcome.expert.card.task == "emoji-count-small"
        assert outcome.details["learning_rate"] == 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_every_arm_runs_on_a_tiny_ofa(
    name: str, backbone: OFABackbone, tasks: Mapping[str, Task], tmp_path: Path
) -> None:
    if name == "bf16" and not bf16_survives():
        pytest.skip("a bfloat16 product kills a process on this machine")
    suite = replace(TINY, report=("refemojig-small",))
    with precision(backbone, name):
        bench = prepared(suite, backbone, tasks, tmp_path, say=lambda line: None)
        assert bench is not None
        assert bench.common["precision"] == name
        tally = run(bench, say=lambda line: None)
    assert (tally.computed, tally.failed) == (len(TABLE1.arms), [])
    cells = {cell["arm"]: cell for cell in Cells(tmp_path / "cells").all()}
    assert set(cells) == set(TABLE1.arms)
    assert all(0 <= cell["value"] <= 1 and cell["examples"] == 6 for cell in cells.values())
    assert {"own-1", "own-folds-0"} <= set(cells["pi"]["needs"])
    assert set(cells["pi"]["needs"]) == set(cells["pi-random"]["needs"])
    text = block(gather(suite, list(cells.values())), None, Commands("table1", "DATA", "WORK"), {})
    assert f"Complete: all {len(cells)} cells." in text


def made(arm: str, task: str, seed: int, value: float) -> dict[str, Any]:
    """A cell with what the tables read."""
    common = {
        "revision": REVISION,
        "settings": TABLE1.settings(),
        "backbone": "b",
        "device": "cpu",
        "precision": "fp32",
        "versions": {},
    }
    own = {"arm": ARMS[arm].identity(64), "task": task, "shots": 64, "seed": seed, "data": "d"}
    cell = {"arm": arm, "task": task, "shots": 64, "seed": seed, "identity": {"common": common, "cell": own}}
    figures = {"metric": "accuracy", "value": value, "log_loss": 0.5, "seconds": 1.0}
    return json.loads(json.dumps({**cell, **figures, "code": "c", "pool": "p", "finished": "2026-01-01"}))  # type: ignore[no-any-return]


def test_its_tables_show_arms_by_tasks_and_what_pi_is_better_by() -> None:
    values = {
        (arm, task, seed): round(0.2 + 0.011 * a + 0.03 * t + 0.002 * seed * (a % 5) + 0.004 * ((a * t) % 7), 4)
        for a, arm in enumerate(TABLE1.arms)
        for t, task in enumerate(TABLE1.report)
        for seed in TABLE1.seeds
    }
    text = block(gather(TABLE1, [made(*key, v) for key, v in values.items()]), None, Commands("table1", "D", "W"), {})
    assert "Complete: all 273 cells." in text

    lines = text.splitlines()
    start = lines.index("#### table1: report targets, values times 100") + 2
    assert lines[start] == "| arm | " + " | ".join(f"{t}, accuracy" for t in TABLE1.report) + " | mean |"
    for arm, line in zip(TABLE1.arms, lines[start + 2 :], strict=False):
        means = [100 * statistics.fmean(values[arm, t, s] for s in TABLE1.seeds) for t in TABLE1.report]
        assert line == f"| `{arm}` | " + " | ".join(f"{m:.1f}" for m in (*means, statistics.fmean(means))) + " |"

    start = lines.index("#### table1: π as shipped less every other arm") + 2
    order = ["own-extra", "nearest-tuned", *(a for a in TABLE1.arms if a not in ("own-extra", "nearest-tuned", "pi"))]
    rows = [line.strip("|").split("|") for line in lines[start + 2 : start + 2 + len(order)]]
    assert [row[0].strip() for row in rows] == [f"`pi` − `{arm}`" for arm in order]

    def of(arm: str) -> dict[str, dict[int, float]]:
        return {t: {s: 100 * values[arm, t, s] for s in TABLE1.seeds} for t in TABLE1.report}

    for arm, row in zip(order, rows, strict=True):
        pairs = [values["pi", t, s] - values[arm, t, s] for t in TABLE1.report for s in TABLE1.seeds]
        mean, low, high = (
            float(part.replace("−", "-")) for part in row[1].replace("(", "").replace(")", "").replace("to", "").split()
        )
        assert mean == pytest.approx(100 * statistics.fmean(pairs), abs=0.06)
        expected = paired_difference(of("pi"), of(arm), TABLE1.report)
        assert expected is not None
        assert [low, high] == pytest.approx([expected.low, expected.high], abs=0.06)
        assert row[3].strip() == "21"
