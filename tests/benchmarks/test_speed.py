"""The speed page: its registry, its statistics, its records, its page, and every measurement once at tiny shapes."""

from __future__ import annotations

import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pages import fill
from benchmarks.speed import __main__ as command_line
from benchmarks.speed import child, diagonals, gpu, machine, merging, ofa, startup, steps
from benchmarks.speed.collapse import dense, folded, pool
from benchmarks.speed.interpolation import build
from benchmarks.speed.measuring import (
    ROOT,
    ChildFailedError,
    NotApplicableError,
    Sample,
    Setting,
    in_process,
    interleaved,
    median_interval,
    peak_above_now,
    peak_mb,
    resolve,
)
from benchmarks.speed.page import block, tally, verdict
from benchmarks.speed.records import Outcome, Record, claim, read, write
from benchmarks.speed.reference import PROBE_OF_REFERENCE, SHOWN
from benchmarks.speed.registry import MEASUREMENTS, Bar, Figure, Measurement, measurement
from benchmarks.speed.running import complaint, outcome, without_paths
from pituning.errors import DataError, PituningError, UnknownNameError

BEGIN, END = "<!-- begin speed -->", "<!-- end speed -->"
UNITS = {"", "×", "s", "ms", "MB", "GB", "MB/s", "rows/s", "tokens/s", "scenes/s", "pictures/s", "TFLOP/s"}
QUICK = Setting(quick=True)

# registry


@pytest.mark.parametrize("one", MEASUREMENTS, ids=lambda m: m.name)
def test_a_measurement_is_well_formed(one: Measurement) -> None:
    assert callable(resolve(one.function))
    assert one.about
    assert not one.about.endswith(".")
    names = [f.name for f in one.figures]
    assert names
    assert len(set(names)) == len(names)
    assert {f.unit for f in one.figures} <= UNITS
    assert set(one.devices) <= {"cpu", "cuda"}
    assert bool(one.source) == any(f.recorded for f in one.figures)


def test_the_registry_has_every_bar() -> None:
    assert len({m.name for m in MEASUREMENTS}) == len(MEASUREMENTS)
    found = {(m.name, f.name): (f.bar.sign, f.bar.limit, f.unit) for m in MEASUREMENTS for f in m.figures if f.bar}
    for name in ("fisher", "fisher-short", "fisher-small"):
        for method in ("LoRA", "bottleneck"):
            assert found.pop((name, f"{method}, time / plain passes")) == ("≤", 1.3, "×")
            assert found.pop((name, f"{method}, memory / plain passes")) == ("≤", 1.5, "×")
            assert found.pop((name, f"{method}, loop / Fisher")) == ("≥", 5, "×")
            assert found.pop((name, f"{method}, relative error")) == ("≤", 1e-5, "")
    for method in ("LoRA", "bottleneck"):
        for case, bar in {
            "K=8, shared, forward and backward / one expert": 1.25,
            "K=8, shared, whole step / one expert": 1.15,
            "K=16, shared, forward and backward / one expert": 1.25,
            "K=16, weights, forward and backward / one expert": 1.25,
            "K=16, shared, held / K + 4 experts": 1.1,
            "K=16, weights, held / K + 4 experts": 1.1,
        }.items():
            assert found.pop(("many-experts", f"{method}, {case}")) == ("≤", bar, "×")
    for size in ("tiny", "base"):
        for method in ("adapter", "lora"):
            assert found.pop(("ofa-experts", f"{size} {method}, K=8 / K=1")) == ("≤", 1.25, "×")
            assert found.pop(("ofa-experts", f"{size} {method}, K=8, growth / parameters and gradients")) == (
                "≤",
                1.2,
                "×",
            )
        for method in ("full", "adapter", "lora", "prefix"):
            for mode, limit in (("train", 1), ("beam", 0.667)):
                name = f"{size} {mode} {method} K=1 batch=2, time / reference"
                assert found.pop(("ofa-reference", name)) == ("≤", limit, "×")
        name = f"{size} beam adapter K=4 batch=2, time / reference"
        assert found.pop(("ofa-reference", name)) == ("≤", 0.667, "×")
    assert found == {
        ("collapse", "exactly, relative error"): ("≤", 1e-5, ""),
        ("collapse", "to one expert's rank, seconds"): ("<", 2, "s"),
        ("search", "cards and compact embeddings"): ("<", 100, "ms"),
        ("search", "whole search"): ("<", 100, "ms"),
        ("tsv", "indexing"): ("≥", 300, "MB/s"),
        ("tsv", "opening"): ("<", 1, "s"),
        ("tsv", "opening, peak"): ("<", 300, "MB"),
        ("tsv", "text of random rows, not cached"): ("≥", 2000, "rows/s"),
        ("tsv", "text of random rows, after one reading"): ("≥", 2000, "rows/s"),
        ("scenes", "scenes per second"): ("≥", 300, "scenes/s"),
        ("startup", "import pituning"): ("<", 0.3, "s"),
        ("demo", "pituning demo --fast"): ("<", 120, "s"),
        ("demo", "pituning demo"): ("<", 480, "s"),
    }


def test_unknown_measurements_come_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'fisher'"):
        measurement("fischer")


@pytest.mark.parametrize(
    ("sign", "below", "at", "above"),
    [("≤", True, True, False), ("<", True, False, False), ("≥", False, True, True), (">", False, False, True)],
)
def test_a_bar_at_its_limit(sign: Any, below: bool, at: bool, above: bool) -> None:
    bar = Bar(sign, 1.3)
    assert (bar.met(1.2999999), bar.met(1.3), bar.met(1.3000001)) == (below, at, above)
    assert not bar.met(float("nan"))
    assert verdict(bar, Sample.once(1.3)) == ("met" if at else "**not met**")
    assert verdict(bar, None) == "not measured"
    assert verdict(None, Sample.once(1.3)) == ""


# statistics and processes


def test_the_interval_is_that_of_all_resampled_medians() -> None:
    rng = random.Random(0)
    values = [rng.gauss(5, 2) for _ in range(9)]
    slow = sorted(statistics.median(rng.choices(values, k=9)) for _ in range(20_000))
    value, low, high = median_interval(values)
    assert value == statistics.median(values)
    assert slow[int(0.02 * len(slow))] <= low <= slow[int(0.03 * len(slow))]
    assert slow[int(0.97 * len(slow))] <= high <= slow[int(0.98 * len(slow))]


def test_ratios_are_of_the_same_repetition() -> None:
    base = [1.0, 10.0, 3.0, 0.5]
    assert asdict(Sample.ratio([2 * b for b in base], base)) == {"value": 2, "low": 2, "high": 2, "repeats": 4}
    assert Sample.rate(6, [1.0, 2.0, 3.0]).value == 3


def test_each_case_runs_once_in_every_repetition() -> None:
    ran: list[str] = []

    def case(name: str) -> Callable[[], int]:
        return lambda: ran.append(name) or len(ran)

    found = interleaved({name: case(name) for name in "abc"}, repeats=7, warm_up=2)
    assert len(ran) == 27
    rounds = [ran[n : n + 3] for n in range(0, 27, 3)]
    assert all(sorted(r) == list("abc") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    for name in "abc":
        assert found[name] == [3 * n + rounds[n].index(name) + 1 for n in range(2, 9)]


def test_memory_is_counted_in_megabytes() -> None:
    def hold() -> None:
        held = torch.ones(64 * 2**18)
        time.sleep(0.2)  # a busy machine samples late
        del held

    grown = peak_above_now(hold)
    assert 56 < grown < 90  # 64 MB in float32
    assert peak_mb() > 64


def test_a_process_of_its_own_answers_or_says_why_not() -> None:
    assert in_process("measuring:median_interval", [1.0, 3.0, 2.0])[0] == 2.0
    with pytest.raises(NotApplicableError, match="only with --demo"):
        in_process("child:measured", "startup:demo", {"demo": False})
    with pytest.raises(ChildFailedError, match=r"AttributeError.*no_such_thing"):
        in_process("measuring:no_such_thing")
    with pytest.raises(ChildFailedError, match=r"took longer than 0\.01 s"):
        in_process("measuring:peak_mb", limit=0.01)


def test_what_is_killed_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -ILL $$\n")
    killer.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(ChildFailedError, match="killed by SIGILL"):
        in_process("measuring:peak_mb")


def test_a_missing_package_is_not_applicable_a_missing_module_of_ours_is_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without(name: str) -> Callable[[Setting], dict[str, Sample]]:
        def measure(setting: Setting) -> dict[str, Sample]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return measure

    monkeypatch.setattr(child, "resolve", lambda function: without("cma.core"))
    with pytest.raises(NotApplicableError, match=r"'cma\.core' is not installed"):
        child.measured("any:any", {})
    monkeypatch.setattr(child, "resolve", lambda function: without("pituning.nothing"))
    with pytest.raises(ModuleNotFoundError):
        child.measured("any:any", {})


def test_outcomes_have_reasons() -> None:
    assert outcome(measurement("compile"), QUICK) == Outcome("not applicable", reason="no GPU")
    assert outcome(measurement("demo"), QUICK) == Outcome("not applicable", reason="only with --demo")
    failed = outcome(replace(measurement("scenes"), function="measuring:no_such_thing"), QUICK)
    assert failed.status == "failed"
    assert "no_such_thing" in failed.reason


def test_reasons_have_no_paths() -> None:
    assert without_paths("[Errno 2] no file '/home/a b/c/d.py' or ~/x/y, 3 / 4 is and/or") == (
        "[Errno 2] no file 'd.py' or y, 3 / 4 is and/or"
    )
    assert len(without_paths("x " * 1000)) == 300


def test_samples_must_be_those_of_the_registry() -> None:
    one = Measurement("x", "about", "a:b", (Figure("one", "s"), Figure("two", "s")))
    both = {"one": Sample.once(1), "two": Sample.once(2)}
    assert complaint(one, both, quick=False) == ""
    assert "not returned: two" in complaint(one, {"one": both["one"]}, quick=False)
    assert complaint(one, {"one": both["one"]}, quick=True) == ""
    assert "does not know: three" in complaint(one, {**both, "three": Sample.once(3)}, quick=True)
    assert "no numbers: two" in complaint(one, {**both, "two": Sample.once(float("inf"))}, quick=False)


# records


def made_record(name: str = "2026-02-03-cpu-1", **changes: Any) -> Record:
    facts = {
        "processor": "A processor | of some kind",
        "cores": 2,
        "threads": 2,
        "flags": ["avx2", "avx512f"],
        "memory_gb": 24.0,
        "load_before": 0.25,
        "python": "3.11.9",
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "code": "abc1234",
    }
    outcomes = {
        "scenes": Outcome("measured", {"scenes per second": Sample(300.0, 290.5, 310.25, 30)}, seconds=12.5),
        "startup": Outcome(
            "measured",
            {
                "bare Python": Sample(0.02, 0.019, 0.021, 30),
                "import pituning": Sample(0.3, 0.29, 0.31, 30),
                "import torch": Sample.once(1.5),
                "pituning --help": Sample(0.25, 0.2, 0.3, 30),
            },
        ),
        "search": Outcome("failed", reason="killed by SIGKILL", seconds=3.0),
        "demo": Outcome("not applicable", reason="only with --demo"),
    }
    values = {
        "date": name[:10],
        "device": "cpu",
        "command": "python -m benchmarks.speed run --device cpu --threads 2",
        "machine": facts,
        "options": {"tsv_gigabytes": 4.0},
        "outcomes": outcomes,
        "name": name,
    }
    return Record(**{**values, **changes})


def test_records_round_trip(tmp_path: Path) -> None:
    record = made_record()
    path = claim(tmp_path, record.date, record.device)
    write(record, path)
    assert path.name == "2026-02-03-cpu-1.json"
    assert read(tmp_path) == [record]
    assert claim(tmp_path, record.date, record.device).name == "2026-02-03-cpu-2.json"
    assert claim(tmp_path, record.date, "cuda").name == "2026-02-03-cuda-1.json"
    assert not list(tmp_path.glob("*.partial"))


def test_records_are_read_in_order_of_date_and_number(tmp_path: Path) -> None:
    names = [f"2026-02-03-cpu-{n}" for n in range(1, 12)] + ["2026-02-04-cpu-1"]
    for name in reversed(names):
        write(made_record(name), tmp_path / f"{name}.json")
    (tmp_path / "notes.json").write_text("no record")
    assert [r.name for r in read(tmp_path)] == names


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({**made_record().document(), "schema": 99})])
def test_damaged_records_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "2026-02-03-cpu-1.json").write_text(text)
    with pytest.raises(DataError, match="2026-02-03-cpu-1"):
        read(tmp_path)


def test_facts_of_a_machine_are_json_without_its_name_or_folders() -> None:
    text = json.dumps(machine.facts("cpu", 2))
    found = json.loads(text)
    assert found["threads"] == 2
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["cores"] >= 1
    assert str(ROOT) not in text
    if len(platform.node()) > 3:
        assert platform.node() not in text


# page


def test_the_page_says_what_is_met_and_what_is_not() -> None:
    text = block([made_record()])
    assert "Bars: 1 met, 1 not met, 73 not measured." in text
    assert "| scenes | scenes per second | 300 scenes/s [290, 310] | ≥ 300 scenes/s | met |" in text
    assert "| startup | import pituning | 0.300 s [0.290, 0.310] | < 0.3 s | **not met** |" in text
    assert "| search | whole search | killed by SIGKILL | < 100 ms | not measured |" in text
    assert "| demo | pituning demo | only with --demo | < 480 s | not measured |" in text
    assert "**Failed**: killed by SIGKILL." in text
    assert "`python -m benchmarks.speed run --only scenes --device cpu`; `2026-02-03-cpu-1`" in text
    assert "| import torch | 1.50 s | 1 | | |" in text
    assert "| indexing | ≥ 300 MB/s | 479 MB/s |" in text  # what was recorded before stands there unmeasured
    assert "Recorded before: One thread: [graph.md](graph.md)." in text
    assert "2 cores, 2 threads, avx512f, torch 2.13.0, peft 0.21.2, code `abc1234`, load 0.25 before" in text
    gpu_part = text[text.index("## GPU") :]
    assert "**Nothing has been measured yet.**" in gpu_part
    assert "### ofa-large (GPU)" in gpu_part
    assert "### tsv" not in gpu_part
    assert "| history |" not in text


def test_every_table_of_the_page_is_rectangular() -> None:
    records = [made_record(), made_record("2026-02-04-cpu-1")]
    width = 0
    for line in block(records).splitlines():
        cells = line.replace("\\|", "").count("|")
        assert not width or not cells or cells == width, line
        width = cells


def test_a_part_measured_later_does_not_hide_the_rest() -> None:
    old = made_record()
    outcomes = {"scenes": Outcome("measured", {"scenes per second": Sample.once(100)})}
    new = made_record("2026-02-05-cpu-1", outcomes=outcomes)
    text = block([old, new])
    assert "| scenes | scenes per second | 100 scenes/s | ≥ 300 scenes/s | **not met** |" in text
    assert "0.300 s [0.290, 0.310]" in text
    assert "| history | 2026-02-03-cpu-1 | 2026-02-05-cpu-1 |" in text
    assert "| scenes per second | 300 scenes/s | 100 scenes/s |" in text


def test_what_does_not_apply_any_more_does_not_hide_what_was_measured() -> None:
    demo = {"demo": Outcome("measured", {"pituning demo": Sample.once(401), "pituning demo --fast": Sample.once(70)})}
    text = block([made_record(outcomes=demo), made_record("2026-02-05-cpu-1")])
    assert "| demo | pituning demo | 401 s | < 480 s | met |" in text


def test_other_machines_and_quick_runs_have_no_part_in_the_tables() -> None:
    other = made_record("2026-02-05-cpu-1", outcomes={})
    other = replace(other, machine={**other.machine, "threads": 1})
    quick = made_record("2026-02-06-cpu-1", quick=True)
    assert "0.300 s" not in block([made_record(), other])
    assert "`2026-02-06-cpu-1`" not in block([made_record(), quick])
    assert "**Nothing has been measured yet.**" in block([quick]).split("## GPU")[0]


def test_only_what_is_between_the_marks_is_replaced() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert fill(page, "speed", "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(PituningError, match="needs the marks"):
        fill(page.replace(END, ""), "speed", "new")


def test_the_page_in_the_docs_is_that_of_the_records_in_the_repository() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert fill(page, "speed", block(read(ROOT / "benchmarks" / "speed" / "history"))) == page


def test_bars_of_what_was_not_asked_for_do_not_count() -> None:
    assert tally(made_record().outcomes) == {"met": 1, "not met": 1, "not measured": 4}


# command line


def faked(status: Any) -> Callable[..., Iterator[tuple[Measurement, Outcome]]]:
    def run(chosen: Sequence[Measurement], *rest: Any) -> Iterator[tuple[Measurement, Outcome]]:
        for one in chosen:
            yield one, Outcome(status, reason="for a reason")

    return run


@pytest.mark.parametrize(("status", "exit_status"), [("not applicable", 0), ("failed", 1)])
def test_only_failures_change_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str, exit_status: int
) -> None:
    monkeypatch.setattr(command_line, "run", faked(status))
    words = ["run", "--device", "cpu", "--only", "scenes", "demo", "--work", str(tmp_path / "w"), "--threads", "1"]
    assert command_line.main([*words, "--history", str(tmp_path)]) == exit_status
    record = read(tmp_path)[0]
    assert {name: o.reason for name, o in record.outcomes.items()} == dict.fromkeys(("scenes", "demo"), "for a reason")
    assert str(tmp_path) not in json.dumps(record.document())
    assert record.command == (
        "python -m benchmarks.speed run --device cpu --threads 1 --only scenes demo --tsv-gigabytes 4"
    )


def test_mistakes_of_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["run", "--only", "collaps"]) == 2
    assert "did you mean 'collapse'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command_line.main(["run", "--device", "cuda"]) == 2
        assert "no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--quick", "--only", "collapse", "--device", "cpu", "--threads", "1", "--history", str(tmp_path)]
    assert command_line.main(words) == 0
    assert "exactly, relative error" in capsys.readouterr().out
    record = read(tmp_path)[0]
    assert record.quick
    found = record.outcomes["collapse"]
    assert found.status == "measured"
    assert complaint(measurement("collapse"), found.samples, quick=False) == ""
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    assert command_line.main(["report", "--history", str(tmp_path), "--page", str(page)]) == 0
    assert "### collapse (CPU)" in page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["collapse", "fisher", "interpolation", "ofa"])
def test_scripts_run_by_their_path(script: str, tmp_path: Path) -> None:
    path = ROOT / "benchmarks" / "speed" / f"{script}.py"
    words = ["--help"]
    if script == "collapse":
        words = ["--experts", "2", "--modules", "1", "--width", "8", "--rank", "2", "--repeats", "1", "--threads", "1"]
    run = subprocess.run([sys.executable, path, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage:" in run.stdout or json.loads(run.stdout)["results"]["ours"]["true error"] < 1


# measurements, at tiny shapes


def require_complete(name: str, samples: dict[str, Sample]) -> None:
    assert complaint(measurement(name), samples, quick=False) == ""
    assert all(s.low <= s.value <= s.high for s in samples.values())


def test_collapse_is_exact() -> None:
    samples = merging.collapsing(QUICK)
    require_complete("collapse", samples)
    assert samples["exactly, relative error"].value < 1e-6
    experts, weights = pool(3, 1, 12, 2)
    found = folded(experts, weights, None).expert
    module = next(iter(found.tensors)).rsplit(".lora_", 1)[0]
    slow = torch.zeros(12, 12, dtype=torch.float64)
    for weight, expert in zip(weights, experts, strict=True):
        a, b = (expert.tensors[f"{module}.lora_{x}.weight"].double() for x in "AB")
        slow += weight * b @ a
    torch.testing.assert_close(dense(found, module).double(), slow, rtol=1e-5, atol=1e-8)


def test_merges_against_peft() -> None:
    require_complete("merge-against-peft", merging.against_peft(QUICK))


def test_steps() -> None:
    require_complete("step", steps.steps(QUICK))


def test_many_experts() -> None:
    samples = steps.many(QUICK)
    require_complete("many-experts", samples)
    for method in ("LoRA", "bottleneck"):
        assert samples[f"{method}, K=16, shared, held / K + 4 experts"].value == pytest.approx(1, abs=0.1)
        assert 0.8 <= samples[f"{method}, K=16, weights, held / K + 4 experts"].value < 0.9


def test_the_plain_step_has_the_loss_of_ours() -> None:
    built = build("lora", 1, **steps.shapes(QUICK))
    expected = built.backbone.loss(built.inputs).mean()
    loss, parameters = steps.plain_peft(built)
    torch.testing.assert_close(loss(), expected)  # an untrained LoRA changes nothing
    assert sum(p.numel() for p in parameters) == sum(t.numel() for t in built.initial.values())


def test_memory_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def here(function: str, *arguments: Any, **options: Any) -> Any:
        asked.append(arguments[0])
        return resolve(function)(*arguments)

    monkeypatch.setattr(steps, "in_process", here)
    require_complete("step-memory", steps.memory(QUICK))
    assert len(set(asked)) == len(asked) == 7


def test_fisher_at_both_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagonals, "peak", lambda method, case, arguments: {"fisher": 3.0, "plain": 2.0}[case])
    samples = diagonals.usual(QUICK)
    require_complete("fisher", samples)
    assert samples["LoRA, memory / plain passes"].value == 1.5
    assert samples["bottleneck, relative error"].value < 1e-5
    assert set(samples) == {f.name for f in measurement("fisher-small").figures}


@pytest.mark.slow
def test_generation() -> None:
    require_complete("generation", resolve("generation:generation")(QUICK))


def test_stores(tmp_path: Path) -> None:
    setting = replace(QUICK, folder=str(tmp_path))
    for name in ("tsv", "search", "scenes"):
        require_complete(name, resolve(measurement(name).function)(setting))
    assert not list(tmp_path.glob("*.tsv*"))  # the pool stays, the file does not


def test_startup_and_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(startup, "python", lambda command, folder=None: ran.append([*command, str(folder)]))
    require_complete("startup", startup.startup(QUICK))
    ran.clear()
    require_complete("demo", startup.demo(replace(QUICK, demo=True)))
    assert [words[2:-1] for words in ran] == [["demo", "--fast"], ["demo"]]
    folders = [Path(words[-1]) for words in ran]
    assert folders[0] != folders[1]
    assert not any(f.exists() for f in folders)


def test_the_import_is_timed_in_a_process_of_its_own() -> None:
    startup.python(startup.COMMANDS["import pituning"])
    with pytest.raises(subprocess.CalledProcessError):
        startup.python(["-c", "import pituning.nothing"])


def test_the_reference_is_compared_in_units_of_the_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def twice_as_fast(size: str, case: Any, repeats: int, probe: Path) -> dict[str, Any]:
        seconds = ofa.recorded(size, case)[0]
        row = {"case": ofa.case_name(size, case), "probe_seconds": 2 * PROBE_OF_REFERENCE, "peak_mb": 700}
        return {**row, "reference_seconds": seconds, "times": [seconds] * repeats}

    probe = tmp_path / "speed_probe.py"
    with pytest.raises(NotApplicableError, match="--probe"):
        ofa.against_reference(Setting(probe=str(probe)))
    probe.touch()
    monkeypatch.setattr(ofa.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(ofa, "compared", twice_as_fast)
    samples = ofa.against_reference(Setting(probe=str(probe)))
    require_complete("ofa-reference", samples)
    assert len(samples) == 4 * len(SHOWN)
    assert all(s.value == pytest.approx(0.5) for n, s in samples.items() if n.endswith("time / reference"))


def test_many_experts_of_ofa(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(function: str, *arguments: Any, **options: Any) -> Any:
        return resolve(function)(*arguments)

    monkeypatch.setattr(ofa, "in_process", here)
    monkeypatch.setattr(ofa, "THREADS", torch.get_num_threads())
    samples = ofa.more_experts(QUICK)
    assert set(samples) == {f.name for f in measurement("ofa-experts").figures if f.name.startswith("tiny")}
    peaks = {1: (100.0, 3.0), 8: (170.0, 24.0)}
    answers = {"ofa:in_turn": lambda experts: {"1": [1.0], "8": [1.5]}, "ofa:peak": lambda experts: peaks[experts]}
    monkeypatch.setattr(ofa, "in_process", lambda function, *a, **_: answers[function](a[2]))
    samples = ofa.more_experts(QUICK)
    assert samples["tiny lora, K=8 / K=1"].value == 1.5
    assert samples["tiny lora, K=8, growth"].value == 70
    assert samples["tiny lora, K=8, growth / parameters and gradients"].value == pytest.approx(70 / 42)


def test_matrix_products() -> None:
    require_complete("matmul", gpu.matmul(QUICK))


def test_operations_are_those_of_the_products() -> None:
    layer, x = torch.nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    assert gpu.operations(lambda: layer(x)) == 2 * 3 * 5 * 7
    assert gpu.operations(lambda: layer(x).sum().backward()) == 3 * 2 * 3 * 5 * 7


@pytest.mark.slow
def test_what_is_for_a_gpu_runs_at_tiny_shapes() -> None:
    require_complete("bf16", gpu.bf16(QUICK))
    samples = gpu.ofa_large(QUICK)
    require_complete("ofa-large", samples)
    for case in ("one expert", "π"):
        share = samples[f"{case}, achieved"].value / samples["ceiling"].value
        assert samples[f"{case}, achieved / ceiling"].value == pytest.approx(share)


@pytest.mark.slow
def test_compiled_steps() -> None:
    require_complete("compile", gpu.compiled(QUICK, backend="aot_eager"))
