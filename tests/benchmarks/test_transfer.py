"""The transfer benchmark: its statistics, its cells, its arms on a tiny encoder, and the figures of its page."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from benchmarks.pages import fill
from benchmarks.transfer.__main__ import main
from benchmarks.transfer.arms import ARMS, rescaled
from benchmarks.transfer.cells import REVISION, Cells, claimed, digest, read_parquet
from benchmarks.transfer.descent import fully_tuned
from benchmarks.transfer.explanations import EXPLANATIONS
from benchmarks.transfer.explanations import verdict as explained
from benchmarks.transfer.intervals import Difference, paired_difference, resampled_means, upper_bounds
from benchmarks.transfer.report import Commands, block, differences, gather, keep
from benchmarks.transfer.running import Bench, Part, prepared, run
from benchmarks.transfer.setting import Setting
from benchmarks.transfer.sharing import Shared
from benchmarks.transfer.sources import audit, source_rows
from benchmarks.transfer.suites import ABLATIONS, FIRST, MAIN, OTHER_METHODS, SUITES, Suite
from pituning.backbones import Backbone
from pituning.example import Example
from pituning.experiments.controls import random_parameters
from pituning.experts import Expert
from pituning.experts.health import require_sound
from pituning.tasks import Task, load_task
from pituning.training.crossfit import Search
from pituning.training.evaluation import log_probabilities
from pituning.training.interpolate import _compared, choose
from pituning.training.train_expert import fold_experts
from pituning.training.trainer import TrainSettings

from ..conftest import SYLLABLES, RandomExpert, build_bert

DATA = Path(__file__).parents[3] / "shared" / "data" / "text"
NAMES = ("cr", "mrpc", "rte", "sst2", "subj")  # names that recipes know; what they ask here is made up
TINY = replace(
    SUITES["core"],
    development=("cr",),
    report=("sst2",),
    sources=NAMES,
    shots=(4,),
    without_classes=1,
    seeds=(0, 1),
    arms=(*MAIN, *ABLATIONS),
    fewer_seeds={},
    on_development=None,
    test_limit=9,
    source_rows=8,
    source_training=TrainSettings(learning_rate=1e-2, steps=2, epochs=1.0, batch_size=4),
    search=Search(learning_rates=(1e-2,), steps=2, eval_every=1, batch_size=4),
)


def made_task(name: str) -> Task:
    """Two labels, told by words that every task draws from other syllables."""
    rng, offset = random.Random(name), 3 * NAMES.index(name)
    choices = (f"{SYLLABLES[offset]} one", f"{SYLLABLES[offset + 1]} two")

    def examples(split: str, count: int) -> tuple[Example, ...]:
        made = []
        for number in range(count):
            label = number % 2
            words = " ".join(rng.choices(SYLLABLES[20 * label + offset : 20 * label + offset + 12], k=7))
            made.append(Example(f"{name}/{split}/{number}", (words,), words, choices[label], choices))
        return tuple(made)

    return Task(name, choices, {"train": examples("train", 24), "test": examples("test", 12)})


@pytest.fixture(scope="module")
def made_tasks() -> dict[str, Task]:
    return {name: made_task(name) for name in NAMES}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, made_tasks: Mapping[str, Task]) -> Bench:
    """The tiny suite with trained sources, which all tests of this file share."""
    work = tmp_path_factory.mktemp("transfer")
    found = prepared(TINY, build_bert(torch.float32), made_tasks, work, say=lambda line: None)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def setting(bench: Bench) -> Setting:
    return bench.setting(bench.draw("sst2", 4, 0), 4)


# statistics


def test_the_bootstrap_has_the_distribution_of_all_possible_draws() -> None:
    values = [[1.0, 4.0], [0.0, -3.0]]
    outcomes = []
    for targets in itertools.product(range(2), repeat=2):
        for seeds in itertools.product(itertools.product(range(2), repeat=2), repeat=2):
            means = [sum(values[t][s] for s in drawn) / 2 for t, drawn in zip(targets, seeds, strict=True)]
            outcomes.append(sum(means) / 2)
    found = resampled_means(values, times=40_000)
    for at in sorted(set(outcomes)):
        expected = np.mean([o <= at + 1e-9 for o in outcomes])
        assert abs(np.mean(found <= at + 1e-9) - expected) < 4 * 0.5 / 40_000**0.5


def test_the_bootstrap_agrees_with_a_slow_loop_where_targets_have_different_seeds() -> None:
    rng = random.Random(1)
    values = [[rng.gauss(t, 1 + t) for _ in range(n)] for t, n in enumerate((5, 2, 1, 4))]
    slow = []
    for _ in range(20_000):
        means = []
        for _ in values:
            row = values[rng.randrange(len(values))]
            means.append(sum(rng.choice(row) for _ in row) / len(row))
        slow.append(sum(means) / len(means))
    fast = resampled_means(values, times=20_000)
    spread = float(np.std(slow))
    for q in (0.025, 0.25, 0.5, 0.75, 0.975):
        assert abs(np.quantile(fast, q) - np.quantile(slow, q)) < 0.06 * spread


def test_a_constant_difference_has_an_interval_without_width() -> None:
    right = {"a": {0: 3.0, 1: 8.0}, "b": {0: -2.0, 1: 5.0}}
    left = {t: {s: v + 1.5 for s, v in row.items()} for t, row in right.items()}
    found = paired_difference(left, right, ["a", "b"])
    assert found is not None
    assert (found.mean, found.low, found.high, found.won, found.pairs) == (1.5, 1.5, 1.5, 1.0, 4)


def test_differences_are_paired_by_target_and_seed() -> None:
    left = {"a": {0: 5.0, 1: 7.0, 2: 100.0}, "b": {0: 1.0}, "c": {0: 50.0}}
    right = {"a": {0: 4.0, 1: 4.0}, "b": {0: 3.0, 5: 9.0}, "d": {0: 1.0}}
    found = paired_difference(left, right, ["a", "b", "c", "d"])
    assert found is not None
    assert found.by_target == {"a": 2.0, "b": -2.0}
    assert (found.mean, found.worst, found.won, found.pairs) == (0.0, "b", 0.5, 3)
    assert paired_difference(left, right, ["c", "d"]) is None


def test_a_single_target_has_students_interval_and_bound() -> None:
    left = {"a": {0: 1.0, 1: 2.0, 2: 6.0}, "b": {0: 5.0}, "c": {0: 1.0, 1: 1.0}}
    right = {t: dict.fromkeys(row, 0.0) for t, row in left.items()}
    found = paired_difference(left, right, ["a"])
    known = scipy.stats.ttest_1samp([1.0, 2.0, 6.0], 0.0)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert upper_bounds(left, right, ["a", "b", "c", "d"]) == {
        "a": pytest.approx(known.confidence_interval(0.90).high),  # one-sided at 95 %
        "c": 1.0,
    }
    single = paired_difference(left, right, ["b"])
    assert single is not None
    assert np.isnan([single.low, single.high]).all()


# suites


def test_the_split_into_development_and_report_targets_is_fixed() -> None:
    core = SUITES["core"]
    assert core.development == ("agnews", "cr", "sick_para", "sst2", "subj", "tweet_emotion")
    assert core.report == ("cola", "movie_reviews", "mrpc", "qnli", "trec6", "tweet_sentiment")
    assert (SUITES["shots"].development, SUITES["shots"].report) == (core.development, core.report)
    assert (SUITES["t5"].development, SUITES["t5"].report) == (("cr", "subj"), ("mrpc", "trec6"))
    assert set(SUITES["drawings"].report) == {"nlvr", "easy_vqa"}


def test_no_report_target_is_one_that_defaults_are_chosen_on() -> None:
    from benchmarks.predict import TASKS

    chosen_on = {"sst2", "cr", *sorted(TASKS)[::2]}  # predict.py chooses on every other target, in the order of names
    assert set(SUITES["core"].development) == chosen_on
    for suite in SUITES.values():
        assert not chosen_on & set(suite.report)
        assert not set(suite.development) & set(suite.report)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the language tasks are not here: no folder {DATA}")
def test_the_targets_are_the_twelve_tasks_with_the_most_test_examples() -> None:
    from pituning.tasks import task_names

    known = {p.name for p in DATA.iterdir() if p.is_dir()} & set(task_names())
    sizes = {name: len(load_task(name, data=DATA).split("test")) for name in known}
    twelve = sorted(sizes, key=lambda n: -sizes[n])[:12]
    assert tuple(sorted(twelve)) == SUITES["core"].targets
    assert set(SUITES["core"].sources) == known


def test_every_arm_of_a_suite_is_there_and_only_those() -> None:
    assert set(ARMS) == {*MAIN, *OTHER_METHODS, *ABLATIONS}
    assert set(FIRST) <= set(MAIN)
    for suite in SUITES.values():
        assert set(suite.arms) <= set(ARMS)


# sources


def test_rows_that_are_near_duplicates_of_a_targets_are_left_out(
    made_tasks: Mapping[str, Task], tmp_path: Path
) -> None:
    leaked = made_tasks["sst2"].splits["test"][3]
    bad = replace(made_tasks["rte"].split("train", 10)[2], texts=leaked.texts, prompt=leaked.prompt)
    train = tuple(bad if e.id == bad.id else e for e in made_tasks["rte"].split("train"))
    tasks = {**made_tasks, "rte": replace(made_tasks["rte"], splits={"train": train})}
    suite = replace(TINY, source_rows=16)
    rows = source_rows(suite, tasks, tmp_path)
    assert [o.left for o in rows["rte"].dropped] == [leaked.id]
    assert bad.id not in {e.id for e in rows["rte"].rows}
    assert len(rows["rte"].rows) == 16
    (found,) = audit(suite, tasks, rows)
    assert found == {
        "target": "sst2", "source": "rte", "dropped, train": 0, "left, train": 0, "dropped, test": 1, "left, test": 0,
    }  # fmt: skip
    unaudited = {**rows, "rte": replace(rows["rte"], rows=(*rows["rte"].rows, bad))}
    assert audit(suite, tasks, unaudited)[0]["left, test"] == 1


def test_a_task_is_never_its_own_source(bench: Bench, setting: Setting) -> None:
    assert sorted(bench.pool.names()) == sorted(NAMES)
    for ranking in (setting.ranking, setting.published_ranking):
        assert sorted(e.card.task for e in ranking.experts) == sorted(set(NAMES) - {"sst2"})
    assert setting.published_ranking.kind == "fisher-paper (own)"


# arms


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_gives_an_expert_that_verifies(name: str, bench: Bench, setting: Setting) -> None:
    outcome = ARMS[name].compute(setting)
    json.dumps(outcome.details)
    if name == "zero-shot":
        assert outcome.expert is None
        return
    if name == "full":
        assert outcome.backbone is not None
        assert outcome.expert is None
        return
    assert outcome.expert is not None
    outcome.expert.verify(bench.backbone)
    require_sound(outcome.expert)
    if name != "own":
        assert "sst2" not in outcome.details.get("experts", ())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bottleneck"])
@pytest.mark.parametrize(
    "name", ["own-rescaled", "ties-tuned", "lorahub", "multitask-tuned", "pi-published", "pi-noise"]
)
def test_arms_run_on_experts_that_mix_in_parameter_space(
    name: str, method: str, made_tasks: Mapping[str, Task], tmp_path_factory: pytest.TempPathFactory
) -> None:
    suite = replace(TINY, method=method, sources=("mrpc", "rte", "subj"))
    work = tmp_path_factory.getbasetemp() / f"transfer-{method}"
    bench = prepared(suite, build_bert(torch.float32), made_tasks, work, say=lambda line: None)
    assert bench is not None
    outcome = ARMS[name].compute(bench.setting(bench.draw("sst2", 4, 0), 4))
    assert outcome.expert is not None
    outcome.expert.verify(bench.backbone)
    require_sound(outcome.expert)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit"])
def test_own_rescaled_at_one_is_own(method: str, bench: Bench, setting: Setting, random_expert: RandomExpert) -> None:
    own = random_expert(bench.backbone, method, seed=3)
    found = rescaled(setting, own, 1.0)
    assert found.config == own.config
    assert all(torch.equal(found.tensors[k], own.tensors[k]) for k in own.tensors)


def test_rescaling_scales_what_the_expert_changes(
    bench: Bench, setting: Setting, random_expert: RandomExpert, lora_deltas: Callable[[Expert], dict[str, Tensor]]
) -> None:
    own = random_expert(bench.backbone, "lora", seed=3)
    before, after = lora_deltas(own), lora_deltas(rescaled(setting, own, 1.5))
    for module, delta in before.items():
        torch.testing.assert_close(after[module], 1.5 * delta, rtol=1e-5, atol=1e-7)


def test_random_parameter_experts_change_as_much_as_the_experts_they_stand_for(
    bench: Bench, random_expert: RandomExpert, lora_deltas: Callable[[Expert], dict[str, Tensor]]
) -> None:
    expert, other = (random_expert(bench.backbone, "lora", seed=s, name=f"e{s}") for s in (3, 4))
    noise, again, else_seed, of_other = (
        random_parameters(bench.backbone, e, s) for e, s in ((expert, 0), (expert, 0), (expert, 1), (other, 0))
    )
    before, after = lora_deltas(expert), lora_deltas(noise)
    for module, delta in before.items():
        assert float(after[module].norm()) == pytest.approx(float(delta.norm()), rel=1e-5)
        assert abs(float((after[module] * delta).sum() / delta.norm() ** 2)) < 0.5
    assert all(torch.equal(noise.tensors[k], again.tensors[k]) for k in noise.tensors)
    for another in (else_seed, of_other):  # three experts in one direction would be one expert
        for module, delta in lora_deltas(another).items():
            assert abs(float(torch.cosine_similarity(delta.flatten(), after[module].flatten(), 0))) < 0.6


def test_random_parameter_experts_of_other_methods_are_as_far_from_the_common_start(
    bench: Bench, random_expert: RandomExpert
) -> None:
    from pituning.experts.expert import initial_of

    expert = random_expert(bench.backbone, "bottleneck", seed=3)
    noise, start = random_parameters(bench.backbone, expert, 0), initial_of(bench.backbone, expert)
    for key, tensor in expert.tensors.items():
        distance = float((noise.tensors[key] - start[key]).norm())
        assert distance == pytest.approx(float((tensor - start[key]).norm()), rel=1e-4)


def test_full_fine_tuning_changes_a_copy_and_not_the_backbone(bench: Bench, setting: Setting) -> None:
    before = {k: t.clone() for k, t in bench.backbone.model.state_dict().items()}
    tuned, found = fully_tuned(bench.backbone, setting.examples, replace(setting.search, learning_rates=(0.1,)), 0)
    after = bench.backbone.model.state_dict()
    assert all(torch.equal(after[k], t) for k, t in before.items())
    assert not any(p.requires_grad for p in tuned.model.parameters())
    moved = any(not torch.equal(t, before[k]) for k, t in tuned.model.state_dict().items())
    assert moved == (found["steps"] > 0)
    assert found["learning_rate"] == pytest.approx(0.01)


def test_full_fine_tuning_of_rounded_weights_is_in_float32(setting: Setting) -> None:
    tuned, _ = fully_tuned(
        build_bert(torch.bfloat16), setting.examples, replace(setting.search, learning_rates=(0.1,)), 0
    )
    assert {p.dtype for p in tuned.model.parameters()} == {torch.float32}
    assert log_probabilities(tuned, setting.examples).dtype == torch.float32


def test_published_pi_trains_weights_and_experts_from_the_uniform_mean_with_own(setting: Setting) -> None:
    details = ARMS["pi-published"].compute(setting).details
    assert details["experts"] == [*(e.name for e in setting.published_ranking.top(3)), "sst2 (own)"]
    (weights,) = details["weights"].values()
    assert sum(weights) == pytest.approx(1.0, abs=1e-5)


# pieces


def test_a_piece_is_made_once_and_timed_without_what_it_needs(tmp_path: Path) -> None:
    made: list[str] = []

    def make(shared: Shared, name: str, needs: Sequence[str] = ()) -> Any:
        def call() -> tuple[Any, dict[str, Expert]]:
            for need in needs:
                make(shared, need)
            made.append(name)
            return {"of": name}, {}

        return shared.get(name, call)

    first = Shared(tmp_path)
    _, alone, needs = first.measured(lambda: make(first, "outer", ["inner"]))
    assert made == ["inner", "outer"]
    assert needs == ("outer",)
    assert alone >= 0
    second = Shared(tmp_path)
    assert make(second, "outer", ["inner"]).needs == ("inner",)
    assert made == ["inner", "outer"]
    assert second.seconds(["outer"]) == pytest.approx(sum(make(second, n).seconds for n in ("outer", "inner")))


def test_arms_find_what_others_shared_on_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> Setting:
        return bench.setting(bench.draw("sst2", 4, 1), 4)

    own = fresh().own(1)
    monkeypatch.setattr("benchmarks.transfer.setting.train_expert", lambda *_, **__: pytest.fail("trained again"))
    again = fresh().own(1)
    assert all(torch.equal(again.tensors[k], own.tensors[k]) for k in own.tensors)


# cells


PART = Part(tasks=("sst2",), arms=("zero-shot", "nearest"), seeds=(0,))


@pytest.fixture
def own_bench(bench: Bench, tmp_path: Path) -> Bench:
    """The same sources with a work folder of the test's own."""
    return replace(bench, work=tmp_path)


def test_a_second_run_computes_nothing(own_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(own_bench, PART, say=lambda line: None)
    assert (first.computed, first.known) == (2, 0)
    monkeypatch.setattr("benchmarks.transfer.running.compute", lambda *_: pytest.fail("computed again"))
    again = run(own_bench, PART, say=lambda line: None)
    assert (again.computed, again.known, again.failed) == (0, 2, [])


@pytest.mark.parametrize(
    "change",
    [
        {"test_limit": 7},
        {"top": 2},
        {"search": replace(TINY.search, steps=1)},
        {"source_rows": 6},
    ],
)
def test_a_changed_setting_computes_anew(change: dict[str, Any], own_bench: Bench) -> None:
    run(own_bench, PART, say=lambda line: None)
    suite = replace(TINY, **change)
    common = {**own_bench.common, "settings": json.loads(json.dumps(suite.settings()))}
    tally = run(replace(own_bench, suite=suite, common=common), PART, say=lambda line: None)
    assert (tally.computed, tally.known) == (2, 0)


def test_the_key_of_a_cell_tells_arm_task_shots_seed_data_pool_and_precision(bench: Bench) -> None:
    def keys(bench: Bench, arm: str = "pi", name: str = "sst2", shots: int = 4, seed: int = 0) -> str:
        return digest(bench.identity(arm, bench.draw(name, shots, seed), shots))

    other = bench.tasks["sst2"]
    test = (replace(other.splits["test"][0], texts=("ba",)), *other.splits["test"][1:])
    relabelled = {**bench.tasks, "sst2": replace(other, splits={**other.splits, "test": test})}
    found = [
        keys(bench),
        keys(bench, arm="pi-k2"),
        keys(bench, name="cr"),
        keys(bench, shots=3),
        keys(bench, seed=1),
        keys(replace(bench, tasks=relabelled, suite=replace(TINY, test_limit=12))),
        keys(replace(bench, common={**bench.common, "pool": "another"})),
        keys(replace(bench, common={**bench.common, "precision": "bf16"})),
    ]
    assert len(set(found)) == len(found)
    assert keys(bench) == found[0]


def test_defaults_for_few_shots_are_dated_by_themselves() -> None:
    """So that changing them leaves what was measured with more."""
    few, enough = (ARMS["pi"].identity(shots)["defaults"] for shots in (15, 16))
    assert few != enough == ARMS["pi"].identity(64)["defaults"]
    assert ARMS["nearest-tuned"].identity(4) == ARMS["nearest-tuned"].identity(16)


def test_an_interrupted_or_broken_write_is_ignored(own_bench: Bench) -> None:
    run(own_bench, PART, say=lambda line: None)
    cells = Cells(own_bench.work / "cells")
    whole, broken = sorted((own_bench.work / "cells").glob("*/*.json"))
    text = broken.read_text()
    broken.with_name(f"{broken.name}.partial").write_text(text[:50])
    assert len(cells.all()) == 2
    broken.write_text(text[:50])
    assert [c["arm"] for c in cells.all()] == [json.loads(whole.read_text())["arm"]]
    tally = run(own_bench, PART, say=lambda line: None)
    assert (tally.computed, tally.known) == (1, 1)
    assert cells.read(broken)["value"] == json.loads(text)["value"]  # type: ignore[index]


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"


def test_a_cell_that_another_process_computes_is_skipped_and_taken_up_when_that_died(own_bench: Bench) -> None:
    cells, task = Cells(own_bench.work / "cells"), own_bench.draw("sst2", 4, 0)
    path = cells.path(own_bench.identity("nearest", task, 4))
    lock = path.parent / "locks" / f"{path.stem}.lock"
    lock.parent.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "1\n"
            tally = run(own_bench, PART, say=lambda line: None)
            assert (tally.computed, tally.elsewhere) == (1, 1)
            assert "another process" in str(tally)
        finally:
            other.kill()
    tally = run(own_bench, PART, say=lambda line: None)
    assert (tally.computed, tally.known, tally.elsewhere) == (1, 1, 0)


def test_a_lock_file_holds_the_process_id_and_is_held_once(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "a.lock"
    with claimed(lock) as mine:
        assert mine
        assert lock.read_text() == f"{os.getpid()}\n"
        with claimed(lock) as again:
            assert not again
    with claimed(lock) as later:
        assert later


def test_a_budget_stops_before_the_next_cell(own_bench: Bench) -> None:
    left = iter([False, True])
    tally = run(own_bench, PART, out_of_time=lambda: next(left), say=lambda line: None)
    assert (tally.computed, tally.out_of_time) == (1, True)
    assert "stopped" in str(tally)


def test_a_cell_that_fails_is_named_and_the_others_are_computed(
    own_bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(setting: Setting) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(ARMS, "zero-shot", replace(ARMS["zero-shot"], compute=fails))
    tally = run(own_bench, PART, say=lambda line: None)
    assert (tally.computed, tally.failed) == (1, ["zero-shot/sst2/4/0"])
    assert "no such luck" in capsys.readouterr().err
    assert len(Cells(own_bench.work / "cells").all()) == 1


def test_a_cell_has_what_the_report_needs(own_bench: Bench) -> None:
    part = Part(tasks=("sst2",), arms=("pi",), seeds=(0,))
    run(own_bench, part, say=lambda line: None)
    (cell,) = Cells(own_bench.work / "cells").all()
    assert cell["examples"] == 9
    assert 0 <= cell["value"] <= 1
    assert cell["steps"] in (0, 1, 2)
    assert set(cell["experts"]) <= {*NAMES, "sst2 (own)"} - {"sst2"}
    assert all(len(row) == len(cell["experts"]) for row in cell["weights"].values())
    assert cell["seconds"] >= cell["seconds_alone"]
    assert {"own-0", "ranking"} <= set(cell["needs"])


def test_main_arms_come_before_ablations_and_seed_by_seed() -> None:
    wanted = Part(arms=("own", "pi-k1"), tasks=("sst2",)).wanted(TINY)
    assert wanted == [("own", "sst2", 4, 0), ("own", "sst2", 4, 1), ("pi-k1", "sst2", 4, 0), ("pi-k1", "sst2", 4, 1)]
    assert {cell[1] for cell in Part(tasks=("report",)).wanted(SUITES["core"])} == set(SUITES["core"].report)


def test_a_suite_may_plan_fewer_seeds_of_an_arm_and_few_arms_on_development_targets() -> None:
    fewer = replace(TINY, arms=("own", "pi", "pi-k1"), fewer_seeds={"pi-k1": 1}, on_development=("own",))
    assert set(fewer.plan()) == {
        *(("own", "sst2", 4, s) for s in (0, 1)), *(("pi", "sst2", 4, s) for s in (0, 1)),
        ("pi-k1", "sst2", 4, 0), ("own", "cr", 4, 0),
    }  # fmt: skip
    assert sorted(Part().wanted(fewer)) == sorted(fewer.plan())
    assert Part(arms=("pi-k1",)).wanted(fewer) == [("pi-k1", "sst2", 4, 0)]
    assert Part(arms=("pi-k1",), tasks=("cr",)).wanted(fewer) == []
    outside = Part(arms=("pi-k1",), tasks=("cr",), seeds=(1,)).wanted(fewer)
    assert outside == [("pi-k1", "cr", 4, 1)], "named whole, it is computed"


def test_what_a_suite_does_not_plan_is_not_missing(figures: list[dict[str, Any]]) -> None:
    fewer = replace(SMALL, fewer_seeds={"pi": 1}, on_development=("pi",))
    planned = [c for c in figures if (c["arm"], c["task"], c["shots"], c["seed"]) in fewer.plan()]
    assert len(planned) == 2 * 2 * 2 + 2 + 1
    text = block(gather(fewer, planned), [], COMMANDS, {})
    assert "Complete: all 11 cells." in text
    assert "2 seeds (1 of `pi`; on development targets one of `pi`); at most" in text
    assert row_of(text, "π as shipped (`pi`)")[-1] == "**2**", "as planned, but over fewer draws than others"
    more = block(gather(fewer, figures), [], COMMANDS, {})
    assert row_of(more, "π as shipped (`pi`)")[-1] == "4", "cells beyond the plan are shown"
    less = block(gather(fewer, planned[1:]), [], COMMANDS, {})
    assert "**Partial: 10 of 11 cells.**" in less


def test_of_each_seed_the_arms_that_are_compared_first_come_first() -> None:
    part = Part(arms=("zero-shot", "pi", "own-extra"), tasks=("sst2", "cr"))
    wanted = [(arm, task, seed) for arm, task, _, seed in part.wanted(TINY)]
    first = [("own-extra", "pi"), ("zero-shot",)]
    assert wanted == [(a, t, s) for s in (0, 1) for arms in first for t in ("cr", "sst2") for a in arms]


@pytest.mark.parametrize(("shots", "taken"), [(9, 8), (3, 2), (1, 2)])
def test_shots_may_count_a_tasks_examples_in_all(shots: int, taken: int, bench: Bench) -> None:
    in_all = replace(bench, suite=replace(TINY, examples_in_all=True))
    examples = in_all.draw("sst2", shots, 0).split("train")
    assert len(examples) == taken
    assert len({e.target for e in examples}) == 2
    assert len(bench.draw("sst2", 3, 0).split("train")) == 6


def test_a_suite_without_development_targets_says_so(message: Callable[..., str]) -> None:
    assert "has no development targets" in message(SUITES["table1"].chosen_targets, ("development",))
    assert SUITES["table1"].chosen_targets(("report",)) == SUITES["table1"].targets


def test_own_experts_of_folds_may_be_given_and_must_be_complete(
    setting: Setting, message: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, experts = setting.own(0), setting.ranking.top(2)
    folds = fold_experts(setting.backbone, setting.task, own, setting.search, 0)
    trained = choose(setting.backbone, setting.task, experts, own, search=setting.search)
    monkeypatch.setattr("pituning.training.interpolate.fold_experts", None)
    given = choose(setting.backbone, setting.task, experts, own, search=setting.search, own_folds=folds)
    assert [f.loss for f in given.found] == pytest.approx([f.loss for f in trained.found], rel=1e-5)
    del folds[1]
    assert "no expert without fold 1" in message(
        lambda: choose(setting.backbone, setting.task, experts, own, search=setting.search, own_folds=folds)
    )


def test_choices_on_one_draw_may_share_the_alternatives(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, experts = setting.own(0), setting.ranking.top(2)
    cross_fitted = replace(setting, shared=Shared(tmp_path)).cross_fitted
    made: list[str] = []

    def counted(backbone: Backbone, plan: Any, examples: Any) -> Any:
        made.append(plan.name)
        return _compared(backbone, plan, examples)

    monkeypatch.setattr("pituning.training.interpolate._compared", counted)
    alone = choose(setting.backbone, setting.task, experts, own, search=setting.search)
    first, again = (
        choose(setting.backbone, setting.task, experts, own, search=setting.search, shared=cross_fitted)
        for _ in range(2)
    )
    names = [candidate.name for candidate in alone.candidates()]
    assert [name.split(" from ")[0] for name in names[2:]] == ["warm start", "keep the own expert"]
    assert made == [*names, *names, *names[:2]]  # a blend is an arm's own
    assert first.candidates() == again.candidates()
    for shared in (first, again):
        for one, other in zip(shared.found, alone.found, strict=True):
            assert (one.learning_rate, one.steps, list(one.curves)) == (
                other.learning_rate,
                other.steps,
                list(other.curves),
            )
            for rate, curve in other.curves.items():
                assert one.curves[rate] == pytest.approx(curve)
            torch.testing.assert_close(one.losses, other.losses, check_dtype=False)


def test_a_wrong_name_is_refused_with_the_nearest(message: Callable[..., str]) -> None:
    assert "own-extra" in message(Part(arms=("own-extr",)).wanted, TINY)
    assert "sst2" in message(Part(tasks=("sst",)).wanted, TINY)


# the report


PAGE = "# Transfer\n<!-- begin core -->\nold\n<!-- end core -->\nafter\n"
COMMANDS = Commands("core", "DATA", "WORK")
SMALL = replace(
    SUITES["core"],
    development=("cr",),
    report=("mrpc", "trec6"),
    seeds=(0, 1),
    arms=("own-extra", "nearest-tuned", "pi"),
    fewer_seeds={},
    on_development=None,
)
FIGURES = {
    ("own-extra", "mrpc"): (0.50, 0.60),
    ("own-extra", "trec6"): (0.30, 0.40),
    ("nearest-tuned", "mrpc"): (0.54, 0.62),
    ("nearest-tuned", "trec6"): (0.30, 0.34),
    ("pi", "mrpc"): (0.56, 0.66),
    ("pi", "trec6"): (0.36, 0.46),
    ("own-extra", "cr"): (0.1, 0.1),
    ("nearest-tuned", "cr"): (0.9, 0.9),
    ("pi", "cr"): (0.9, 0.9),
}


def cell(arm: str, task: str, seed: int, value: float, suite: Suite = SMALL, **common: Any) -> dict[str, Any]:
    shared = {
        "revision": REVISION,
        "settings": suite.settings(),
        "backbone": "b",
        "device": "cpu",
        "precision": "fp32",
        "versions": {"pituning": "0"},
        **common,
    }
    own = {"arm": ARMS[arm].identity(16), "task": task, "shots": 16, "seed": seed, "data": "d"}
    figures = {"metric": "accuracy", "value": value, "log_loss": 0.5, "examples": 500, "seconds": 10.0 + seed}
    more = {"seconds_alone": 4.0, "seconds_of_test": 1.0, "learning_rate": 1e-3, "steps": 40, "experts": ["cr"]}
    rest = {
        "weights": {"model": [1.0]},
        "chosen": None,
        "details": {},
        "code": "c",
        "pool": "p",
        "needs": ["own-0"],
        "finished": "2026-01-01",
    }
    key = {"arm": arm, "task": task, "shots": 16, "seed": seed, "identity": {"common": shared, "cell": own}}
    return json.loads(json.dumps({**key, **figures, **more, **rest}))  # type: ignore[no-any-return]


@pytest.fixture
def figures() -> list[dict[str, Any]]:
    return [cell(arm, task, s, v) for (arm, task), values in FIGURES.items() for s, v in enumerate(values)]


def row_of(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [part.strip() for part in line.strip("|").split("|")]


def test_the_report_of_made_figures_has_the_right_numbers(figures: list[dict[str, Any]]) -> None:
    found = gather(SMALL, figures)
    text = block(found, [], COMMANDS, {})
    assert "Complete: all 18 cells." in text
    # Means over mrpc and trec6: own-extra 45, nearest 45, π 51; π − own-extra is 6 in every pair, π − nearest 2, 4 and 6, 12.
    # Of the 64 draws of the latter one each has the mean 2 and 12, and four each 2.5 and 10.5: 1.6 % and 7.8 % are so far out.
    assert row_of(text, "π as shipped (`pi`)")[1:] == [
        "51.0", "+6.0 (+6.0 to +6.0)", "+6.0 (+2.5 to +10.5)", "mrpc +6.0", "2 of 2", "10", "4",
    ]  # fmt: skip
    nearest = row_of(text, "nearest, fine-tuned (`nearest-tuned`)")
    assert nearest[1:] == ["45.0", "0.0 (−4.5 to +3.5)", "", "trec6 −3.0", "1 of 2", "10", "4"]
    assert row_of(text, "own + the same extra steps (`own-extra`)")[2] == ""
    assert row_of(text, "a single expert, tuned")[1:] == [
        "`nearest-tuned`", "0.0 of +6.0", "+6.0 (+2.5 to +10.5)", "2 of 2", "4", "behind",
    ]  # fmt: skip
    assert "in bold" not in text
    where = "--device cpu --precision fp32"  # "auto" may be another precision elsewhere
    assert f"`python -m benchmarks.transfer run --suite core --data DATA --work WORK {where} --tasks mrpc`" in text
    assert differences(found, "own-extra", 16, ["cr"])["pi"].mean == pytest.approx(80.0)


@pytest.mark.parametrize(
    ("nearest", "verdict"),
    [
        ((0.54, 0.62, 0.30, 0.34), "behind"),  # by 2, 4, 6 and 12: on every target, though Student's t reaches below 0
        ((0.58, 0.62, 0.30, 0.34), "not told apart"),
        ((0.56, 0.66, 0.36, 0.45), "as good"),
        ((0.70, 0.80, 0.40, 0.50), "ahead"),
    ],
)
def test_the_verdict_on_an_explanation(nearest: tuple[float, ...], verdict: str, figures: list[dict[str, Any]]) -> None:
    given = iter(nearest)
    at = {(t, s): next(given) for t in ("mrpc", "trec6") for s in (0, 1)}
    moved = [
        {**c, "value": at[c["task"], c["seed"]]} if c["arm"] == "nearest-tuned" and c["task"] != "cr" else c
        for c in figures
    ]
    text = block(gather(SMALL, moved), [], COMMANDS, {})
    assert row_of(text, "a single expert, tuned")[-1] == verdict
    assert "drawn at random" not in text, "no cell, no row"


def test_the_verdict_asks_for_students_interval_or_every_target() -> None:
    """Six means of 4.1 and a standard deviation of 4.3 have a Student's interval of 4.1 ± 2.571 · 4.3 / √6."""
    means = dict(zip("abcdef", (8.0, 8.0, 6.0, 5.0, 0.6, -3.0), strict=True))
    low, high = Difference(4.1, 0.5, 7.5, means, 30).students
    spread = 2.5706 * np.std(list(means.values()), ddof=1) / 6**0.5
    assert (low, high) == pytest.approx((4.1 - spread, 4.1 + spread), abs=1e-3)
    assert low < 0
    assert explained(Difference(4.1, 0.5, 7.5, means, 30)) == "probably behind"
    assert explained(Difference(4.1, 0.5, 7.5, {t: abs(v) for t, v in means.items()}, 30)) == "behind"
    assert explained(Difference(4.1, 2.0, 6.0, dict.fromkeys(means, 4.1), 30)) == "behind"


def test_every_explanation_names_an_arm() -> None:
    assert {arm for _, arm in EXPLANATIONS} <= ARMS.keys()


def test_a_partial_suite_is_not_called_complete_and_says_what_is_missing(figures: list[dict[str, Any]]) -> None:
    there = [
        c for c in figures if c["arm"] != "nearest-tuned" and (c["arm"], c["task"], c["seed"]) != ("pi", "mrpc", 1)
    ]
    text = block(gather(SMALL, there), [], COMMANDS, {})
    assert "**Partial: 11 of 18 cells.**" in text
    assert "Complete" not in text
    assert "- all cells of `nearest-tuned`" in text
    assert "- `pi`, seeds of: mrpc 1" in text
    assert row_of(text, "π as shipped (`pi`)")[-1] == "**3 of 4**"
    empty = block(gather(SMALL, []), None, COMMANDS, {})
    assert "**Nothing has been measured yet:** 0 of 18 cells." in empty


def test_cells_of_other_settings_are_not_mixed_in(figures: list[dict[str, Any]], message: Callable[..., str]) -> None:
    other_device = [cell("pi", "mrpc", 0, 0.0, device="cuda")]
    other_grid = [cell("pi", "mrpc", 0, 0.0, replace(SMALL, search=Search(steps=7)))]
    earlier = [cell("pi", "mrpc", 0, 0.0, revision=REVISION - 1)]
    found = gather(SMALL, [*other_grid, *earlier, *figures, *other_device])
    assert len(found.cells) == 18
    assert [len(cells) for cells in found.others.values()] == [1]
    assert "are left out: 1 of" in block(found, [], COMMANDS, {})
    (name,) = found.others
    assert [c["value"] for c in gather(SMALL, [*figures, *other_device], name).cells] == [0.0]
    assert "there are" in message(gather, SMALL, figures, "nowhere")
    assert "two cells are pi/mrpc/16/0" in message(gather, SMALL, [*figures, figures[8]])


def test_the_page_says_what_leaks_and_whether_that_was_looked_for(figures: list[dict[str, Any]]) -> None:
    found = gather(SMALL, figures)
    assert "**Leakage: not audited.**" in block(found, None, COMMANDS, {})
    row = {
        "target": "mrpc",
        "source": "rte",
        "dropped, train": 3,
        "dropped, test": 2,
        "left, train": 0,
        "left, test": 1,
    }
    text = block(found, [row], COMMANDS, {})
    assert "**1 are left**" in text
    assert "| mrpc | rte | 3 | 2 | 1 |" in text


def test_a_block_replaces_what_is_between_its_marks(message: Callable[..., str]) -> None:
    assert fill(PAGE, "core", "new") == "# Transfer\n<!-- begin core -->\nnew\n<!-- end core -->\nafter\n"
    assert "<!-- begin t5 -->" in message(fill, PAGE, "t5", "new")


def test_cells_of_other_environments_are_kept(figures: list[dict[str, Any]], tmp_path: Path) -> None:
    found = gather(SMALL, [*figures, cell("pi", "mrpc", 0, 0.0, device="cuda")])
    kept = read_parquet(keep(found, tmp_path / "core.parquet"))
    assert len(kept) == 19
    assert sorted(map(whole, gather(SMALL, kept).cells)) == sorted(map(whole, figures))


def test_the_parquet_file_has_one_row_for_each_cell(figures: list[dict[str, Any]], tmp_path: Path) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    path = keep(gather(SMALL, figures), tmp_path / "core.parquet")
    rows = pq.read_table(path).to_pylist()
    values = {(r["arm"], r["task"], r["seed"]): r["value"] for r in rows}
    assert values == {(a, t, s): v for (a, t), both in FIGURES.items() for s, v in enumerate(both)}
    assert {r["role"] for r in rows if r["task"] == "cr"} == {"development"}
    assert sorted(map(whole, figures)) == sorted(map(whole, read_parquet(path)))
    assert pq.read_table(keep(gather(SMALL, []), tmp_path / "none.parquet")).num_rows == 0


def test_kept_cells_that_are_outdated_are_not_dropped_without_a_word(
    figures: list[dict[str, Any]], tmp_path: Path, message: Callable[..., str]
) -> None:
    path = keep(gather(SMALL, figures), tmp_path / "core.parquet")
    before = path.read_bytes()
    moved = replace(SMALL, source_rows=7)
    found = gather(moved, read_parquet(path))
    assert found.cells == ()
    said = message(keep, found, path)
    assert "18 cells" in said
    assert "nearest-tuned 6, own-extra 6, pi 6" in said
    assert path.read_bytes() == before
    keep(gather(SMALL, [*read_parquet(path), cell("pi", "mrpc", 0, 0.0, moved)]), path)  # not of the file
    keep(found, path, forget=True)
    assert read_parquet(path) == []


def test_a_broken_parquet_file_is_named_and_left(tmp_path: Path, message: Callable[..., str]) -> None:
    path = tmp_path / "core.parquet"
    path.write_text("nonsense")
    assert "core.parquet cannot be read" in message(read_parquet, path)
    assert path.read_text() == "nonsense"


def whole(cell: Mapping[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)


def test_cells_that_are_kept_are_not_computed_again_and_those_of_the_folder_go_before_them(
    own_bench: Bench, tmp_path: Path
) -> None:
    run(own_bench, PART, say=lambda line: None)
    folder = own_bench.work / "cells"
    kept = keep(gather(own_bench.suite, Cells(folder).all()), tmp_path / "core.parquet")
    one, other = sorted(folder.glob("*/*.json"))
    before = json.loads(one.read_text())
    one.unlink()
    other.write_text(json.dumps({**json.loads(other.read_text()), "value": 2.0}))
    tally = run(replace(own_bench, kept=kept), PART, say=lambda line: None)
    assert (tally.computed, tally.known) == (0, 2)
    found = Cells(folder, kept).all()
    assert before in found
    assert [cell["value"] for cell in found if cell["arm"] != before["arm"]] == [2.0]
    retrained = replace(own_bench, kept=kept, state="other tensors of the same training")
    assert run(retrained, PART, say=lambda line: None).known == 2
    assert (
        retrained.setting(retrained.draw("sst2", 4, 0), 4).shared.folder
        != own_bench.setting(own_bench.draw("sst2", 4, 0), 4).shared.folder
    )


def test_the_page_says_how_often_the_sources_were_trained(figures: list[dict[str, Any]]) -> None:
    assert "sources trained" not in block(gather(SMALL, figures), [], COMMANDS, {})
    figures[0]["pool"] = "another"
    assert "**sources trained 2 times**" in block(gather(SMALL, figures), [], COMMANDS, {})


def test_the_repositorys_page_has_a_place_for_every_suite_and_explains_every_arm() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transfer.md").read_text(encoding="utf-8")
    for name in SUITES:
        fill(page, name, "")
    for arm in ARMS:
        assert f"`{arm}`" in page


@pytest.mark.slow
def test_the_command_line_writes_page_pictures_and_parquet(
    figures: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SUITES, "core", SMALL)
    cells = Cells(tmp_path / "work" / "cells")
    for values in figures[:-1]:
        cells.write(cells.path(values["identity"]), values)
    page = tmp_path / "transfer.md"
    page.write_text(PAGE)
    where = ["--work", str(tmp_path / "work"), "--figures", str(tmp_path / "figures")]
    assert main(["report", *where, "--page", str(page)]) == 0
    text = page.read_text()
    assert "**Partial: 17 of 18 cells.**" in text
    assert str(tmp_path) not in text
    for picture in ("differences", "targets"):
        assert f"(images/transfer-core-{picture}.png)" in text
        assert (tmp_path / "images" / f"transfer-core-{picture}.png").stat().st_size > 5000
    assert (tmp_path / "figures" / "core.parquet").is_file()
    assert "PARTIAL, 1 are missing" in capsys.readouterr().out
    assert main(["run", "--work", str(tmp_path / "work"), "--arms", "pie"]) == 2
    assert "did you mean 'pi'" in capsys.readouterr().err


def test_a_backbone_that_has_to_be_made_first(tmp_path, monkeypatch, capsys):
    """Otherwise its folder's name would be taken for one on the hub, and asked for again and again."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--suite", "t5", "--work", "work"]) == 2
    assert "benchmarks/flan_t5_small.py makes it" in capsys.readouterr().err
