"""The command line as a user meets it: what goes to standard output, what an error looks like, where things are saved."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from pituning.cli import app
from pituning.cli.interpolate import Granularity, TrainMode
from pituning.cli.options import PromptTypeName, TaskKind
from pituning.cli.rank import Reference
from pituning.experts import Expert, ExpertPool
from pituning.experts.expert import file_hash
from pituning.interpolation.build import GRANULARITIES
from pituning.interpolation.mixture import TRAIN_MODES
from pituning.similarity.embedding import REFERENCES
from pituning.tasks import KINDS
from pituning.tasks.kind import DECODER_PROMPTS
from pituning.training.interpolate import choose
from pituning.version import __version__

LABELS = ["--labels", "neg=a negative remark", "--labels", "pos=a positive remark"]
VERBS = [
    "train",
    "embed",
    "rank",
    "graph",
    "interpolate",
    "eval",
    "predict",
    "zeroshot",
    "merge",
    "import",
    "export",
    "verify",
    "push",
    "pull",
    "pretrain",
    "run",
    "validate",
    "convert",
    "analyse connect",
    "analyse plane",
    "analyse leave-one-out",
    "analyse weights",
    "pool list",
    "pool show",
    "pool verify",
    "pool audit",
    "pool search",
]


def run(*arguments: object, code: int = 0) -> Any:
    """Run a command in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object, code: int = 0) -> Any:
    """Run a command with ``--json``: standard output must hold one JSON document and nothing else."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def error(*arguments: object) -> str:
    """The one ``error:`` message of a command that must fail, without a traceback."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    return str(result.stderr)


def process(code: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, as the ``pituning`` script would."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder)


def pituning(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command."""
    return process("from pituning.cli import main; main()", *arguments, folder=folder)


class TestHelp:
    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_says_what_it_does_with_an_example(self, verb: str) -> None:
        assert f"pituning {verb}" in run(*verb.split(), "--help").stdout.split("Example", 1)[1]

    def test_start_page_names_every_verb(self) -> None:
        page = run("--help").stdout
        assert all(f"│ {verb.split()[0]} " in page for verb in VERBS)

    def test_help_imports_nothing_heavy(self) -> None:
        code = """
import sys
from pituning.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "peft", "datasets", "numpy", "plotly"} & set(sys.modules)
    print(sorted(heavy), file=sys.stderr)
"""
        for arguments in (["--help"], ["interpolate", "--help"], ["train", "no-such-task"]):
            assert process(code, *arguments).stderr.strip().splitlines()[-1] == "[]"

    def test_version(self) -> None:
        assert run("--version").stdout == f"pituning {__version__}\n"

    def test_choices_and_default_are_those_of_the_library(self) -> None:
        assert set(get_args(TrainMode)) == set(TRAIN_MODES)
        assert get_args(Granularity) == GRANULARITIES
        assert set(get_args(Reference)) == set(REFERENCES)
        assert set(get_args(TaskKind)) == {"classification", *KINDS}
        assert set(get_args(PromptTypeName)) == set(DECODER_PROMPTS)
        page = " ".join(run("interpolate", "--help").stdout.replace("│", " ").split())
        for option in ("train", "granularity", "init", "scale"):
            assert f"[default: {inspect.signature(choose).parameters[option].default}]" in page


class TestErrors:
    def test_unknown_task_names_the_nearest_and_shows_no_traceback(self) -> None:
        found = pituning("train", "sst3")
        assert found.returncode == 1
        assert found.stdout == ""
        assert found.stderr.startswith("error: unknown task 'sst3': did you mean 'sst2'")
        assert "Traceback" not in found.stderr

    def test_broken_row_is_shown_with_file_and_line(self, tmp_path: Path) -> None:
        (tmp_path / "mine.tsv").write_text("text\tlabel\ngood\tpos\nbad\tneg\textra\n")
        found = pituning("train", "mine", "--train-file", "mine.tsv", *LABELS, folder=tmp_path)
        assert found.returncode == 1
        assert found.stderr.startswith("error: mine.tsv:3: expected 2 columns (text, label), found 3")
        assert found.stderr.count("\n") == 1

    def test_unknown_label_value_is_shown_with_file_and_line(self, tmp_path: Path) -> None:
        (tmp_path / "mine.tsv").write_text("text\tlabel\ngood\tpos\nbad\tnegative\n")
        assert "mine.tsv:3: label 'negative'" in error("rank", "mine", "--train-file", tmp_path / "mine.tsv", *LABELS)

    def test_debug_shows_the_traceback_and_the_line(self) -> None:
        found = pituning("--debug", "eval", "sst3")
        assert found.returncode == 1
        assert "Traceback (most recent call last)" in found.stderr
        assert found.stderr.splitlines()[-1].startswith("error: unknown task 'sst3'")

    def test_unknown_backbone(self, data: Path) -> None:
        assert "did you mean 'minilm'?" in error("eval", "word_tone", "--data", data, "--backbone", "minlm")
        assert "no such folder" in error("eval", "word_tone", "--data", data, "--backbone", "./nowhere")

    def test_unknown_method_is_found_before_training(self, data: Path, bert: Path, tmp_path: Path) -> None:
        shared = ["word_tone", "--data", data, "--backbone", bert, "--pool", tmp_path / "new"]
        assert "unknown method 'lorra': did you mean 'lora'?" in error("train", *shared, "--method", "lorra")
        assert not (tmp_path / "new").exists()

    def test_unknown_device(self, data: Path, bert: Path) -> None:
        shared = ["eval", "word_tone", "--data", data, "--backbone", bert]
        assert "device 'cuda:99' cannot be used here" in error(*shared, "--device", "cuda:99")

    def test_unknown_expert_names_the_nearest(self, pool: ExpertPool) -> None:
        message = error("pool", "show", "word_ton", "--pool", pool.folder)
        assert "did you mean 'word_tone'" in message
        assert str(pool.folder) in message

    def test_missing_pool_is_an_error_and_no_empty_list(self, tmp_path: Path) -> None:
        for verb in ("list", "verify"):
            assert f"there is no pool {tmp_path / 'nowhere'}" in error("pool", verb, "--pool", tmp_path / "nowhere")

    def test_missing_file(self, tmp_path: Path) -> None:
        assert f"no such recipe: {tmp_path / 'a.yaml'}" in error("run", tmp_path / "a.yaml")
        assert f"no such file: {tmp_path / 'a.tsv'}" in error("eval", "a", "--test-file", tmp_path / "a.tsv", *LABELS)

    def test_interruption_ends_with_130(self, pool: ExpertPool, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(_: ExpertPool) -> list[str]:
            raise KeyboardInterrupt

        monkeypatch.setattr(ExpertPool, "names", interrupted)
        result = run("pool", "list", "--pool", pool.folder, code=130)
        assert result.stderr == "error: interrupted\n"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["train", "sst2", "--steps", "3", "--epochs", "1"],
            ["train", "sst2", "--resume"],
            ["train", "sst2", "--save", "a", "--out", "b"],
            ["train", "sst2", "--shots", "0"],
            ["train", "mine", "--train-file", "a.tsv", "--labels", "neg"],
            ["train", "mine", "--train-file", "a.tsv"],
            ["train", "mine", "--text-column", "sentence"],
            ["embed", "--train-file", "a.tsv", *LABELS],
            ["embed", "mine", *LABELS],
            ["embed", "--task-kind", "vqa"],
            ["train", "mine", "--train-file", "a.tsv", "--dev-file", "b.tsv", "--shots", "4", *LABELS],
            ["rank", "sst2", "--reference", "mine"],
            ["interpolate", "sst2", "--train-mode", "everything"],
            ["interpolate", "sst2", "--init", "0.5,half"],
            ["interpolate", "sst2", "--experts", "a,,b"],
            ["interpolate", "sst2", "--include-own", "yes"],
            ["interpolate", "sst2", "--soup", "score"],
            ["interpolate", "sst2", "--diversity", "0.5"],
            ["run", "a.yaml", "--seeds", "0,one"],
            ["pool", "show"],
        ],
    )
    def test_wrong_use_ends_with_2(self, arguments: list[str]) -> None:
        result = run(*arguments, code=2)
        assert result.stdout == ""
        assert "Error" in result.stderr


class TestPool:
    def test_list(self, pool: ExpertPool) -> None:
        shown = run("pool", "list", "--pool", pool.folder).stdout
        assert "word_tone" in shown
        assert "2 experts" in shown
        listed = run_json("pool", "list", "--pool", pool.folder)["experts"]
        assert [(e["name"], e["task"], e["broken"]) for e in listed] == [
            ("pocket_gear", "pocket_gear", False),
            ("word_tone", "word_tone", False),
        ]

    def test_list_marks_broken_experts(self, pool: ExpertPool, break_tensors: Callable[[Path], None]) -> None:
        break_tensors(pool.folder / "word_tone")
        assert "2 experts, 1 broken" in run("pool", "list", "--pool", pool.folder).stdout
        assert [e["broken"] for e in run_json("pool", "list", "--pool", pool.folder)["experts"]] == [False, True]

    def test_show_an_expert_of_the_pool_or_a_folder(self, pool: ExpertPool) -> None:
        shown = run("pool", "show", "word_tone", "--pool", pool.folder).stdout
        assert "dev log-loss" in shown
        assert "0.5000" in shown
        by_name = run_json("pool", "show", "word_tone", "--pool", pool.folder)
        by_folder = run_json("pool", "show", pool.folder / "word_tone", "--pool", pool.folder / "nowhere")
        assert by_name == by_folder
        stored = pool.load("word_tone").tensors
        assert by_name["tensors"] == {key: list(tensor.shape) for key, tensor in stored.items()}

    def test_trained_on_all_examples_is_said_where_the_card_says_so(self, pool: ExpertPool) -> None:
        card = pool.load("word_tone").card
        pool.add(pool.load("word_tone").with_card(training={**card.training, "examples": 16}), "trained")
        shown = {name: run("pool", "show", name, "--pool", pool.folder).stdout for name in ("trained", "word_tone")}
        assert "all examples" in shown["trained"]
        assert "trained on" not in shown["word_tone"]
        rows = {
            row.split()[0]: row.split() for row in run("pool", "list", "--pool", pool.folder).stdout.splitlines() if row
        }
        assert "all" in rows["trained"]
        assert "all" not in rows["word_tone"]

    def test_verify(self, pool: ExpertPool, bert: Path) -> None:
        assert "all 2 experts ok" in run("pool", "verify", "--pool", pool.folder).stdout
        assert run_json("pool", "verify", "--pool", pool.folder, "--backbone", bert)["broken"] == 0

    def test_verify_lists_every_broken_expert(self, pool: ExpertPool, break_tensors: Callable[[Path], None]) -> None:
        for name in pool.names():
            break_tensors(pool.folder / name)
        assert "2 of 2 experts broken" in run("pool", "verify", "--pool", pool.folder, code=1).stdout
        report = run_json("pool", "verify", "--pool", pool.folder, code=1)
        assert [e["name"] for e in report["experts"] if "safetensors" in e["problem"]] == ["pocket_gear", "word_tone"]

    def test_verify_finds_an_expert_of_another_backbone(self, pool: ExpertPool, bert: Path) -> None:
        pool.add(pool.load("word_tone").with_card(fingerprint="0123456789abcdef"), "stranger")
        report = run_json("pool", "verify", "--pool", pool.folder, "--backbone", bert, code=1)
        problems = {e["name"]: e["problem"] for e in report["experts"]}
        assert "fingerprint 0123456789abcdef" in problems.pop("stranger")
        assert set(problems.values()) == {None}

    def test_audit_finds_a_leaked_sentence(self, pool: ExpertPool, data: Path, tmp_path: Path) -> None:
        leaked = (data / "word_tone" / "train.tsv").read_text().splitlines()[1].split("\t")[0]
        (tmp_path / "mine.tsv").write_text(f"text\tlabel\n{leaked}\tpos\nquite another text\tneg\n")
        arguments = ["pool", "audit", "mine", "--test-file", tmp_path / "mine.tsv", *LABELS]
        arguments += ["--pool", pool.folder, "--data", data]
        report = {e["name"]: e["overlaps"] for e in run_json(*arguments)["experts"]}
        assert report["pocket_gear"] == []
        assert [(o["left"], o["right"]) for o in report["word_tone"]] == [("mine/test/0", "word_tone/train/0")]
        assert "word_tone/train/0" in run(*arguments).stdout

    def test_audit_says_whose_data_it_could_not_read(self, pool: ExpertPool, data: Path) -> None:
        pool.add(pool.load("word_tone").with_card(task="somebody_elses"), "foreign")
        report = run_json("pool", "audit", "movie_quotes", "--pool", pool.folder, "--data", data)
        problems = {e["name"]: e["problem"] for e in report["experts"]}
        assert "unknown task 'somebody_elses'" in problems["foreign"]
        assert problems["word_tone"] is None


@pytest.mark.usefixtures("short_search")
class TestWork:
    """The whole way from training to evaluation, on a tiny backbone."""

    @pytest.fixture
    def shared(self, pool: ExpertPool, data: Path, bert: Path) -> list[object]:
        return ["--pool", pool.folder, "--data", data, "--backbone", bert]

    def test_train_on_shots_then_interpolate_with_the_own_expert(self, shared: list[object], pool: ExpertPool) -> None:
        shots = ["movie_quotes", *shared, "--shots", 4, "--seed", 1]
        trained = run_json("train", *shots)
        assert trained["name"] == "movie_quotes-4shot-seed1"
        assert trained["folder"] == str(pool.folder / trained["name"])
        assert (trained["shots"], trained["seed"], trained["task"]) == (4, 1, "movie_quotes")
        assert "cross-fitted log-loss" in trained["metrics"]
        found = run_json("interpolate", *shots, "--own", trained["name"], "--scale", 1)
        assert found["name"] == "movie_quotes-pi"
        assert {e["name"] for e in found["ranking"]["experts"]} == {"word_tone", "pocket_gear"}
        assert [c["chosen"] for c in found["candidates"]].count(True) == 1
        assert "keep the own expert" in [c["name"] for c in found["candidates"]]
        assert sum(found["weights"].values()) == pytest.approx(1)
        saved = pool.load("movie_quotes-pi").card
        assert {p["name"]: p["weight"] for p in saved.lineage} == pytest.approx(found["weights"])
        assert run_json("eval", *shots, "movie_quotes-pi")["examples"] == 8

    def test_interpolation_as_tables(self, shared: list[object], pool: ExpertPool) -> None:
        arguments = ["movie_quotes", *shared, "--shots", 4, "--experts", "word_tone,pocket_gear", "--init", "0.8,0.2"]
        shown = run(
            "interpolate", *arguments, "--scale", 1, "--train-mode", "none", "--rank", 3, "--save", "blend"
        ).stdout
        assert "Candidates" in shown
        assert f"saved to {pool.folder / 'blend'}" in shown
        weights = {p["name"]: p["weight"] for p in pool.load("blend").card.lineage}
        assert weights in ({"word_tone": pytest.approx(0.8), "pocket_gear": pytest.approx(0.2)}, {"word_tone": 1.0},
                           {"pocket_gear": 1.0})  # fmt: skip
        assert {len(t) for k, t in pool.load("blend").tensors.items() if "lora_A" in k} == {3}

    def test_interpolate_refuses_experts_that_have_seen_the_target(self, shared: list[object]) -> None:
        message = error("interpolate", "word_tone", *shared, "--shots", 4, "--experts", "word_tone,pocket_gear")
        assert "word_tone: trained on task 'word_tone' itself" in message
        assert "is an expert for task 'pocket_gear'" in error("rank", "word_tone", *shared, "--own", "pocket_gear")

    def test_pool_of_two_methods_asks_for_one(self, shared: list[object], pool: ExpertPool) -> None:
        pool.add(pool.load("word_tone").with_card(method="bottleneck"), "other")
        assert "choose with --method" in error("rank", "movie_quotes", *shared, "--shots", 4)
        found = run_json("rank", "movie_quotes", *shared, "--shots", 4, "--method", "lora")
        assert {e["name"] for e in found["experts"]} == {"word_tone", "pocket_gear"}

    def test_rank_is_in_falling_order_and_leaves_out_the_task_itself(self, shared: list[object]) -> None:
        found = run_json("rank", "movie_quotes", *shared)
        values = [e["similarity"] for e in found["experts"]]
        assert values == sorted(values, reverse=True)
        assert len(values) == 2
        assert [e["name"] for e in run_json("rank", "word_tone", *shared)["experts"]] == ["pocket_gear"]

    def test_train_on_own_data_into_a_folder(self, tmp_path: Path, data: Path, bert: Path) -> None:
        rows = (data / "word_tone" / "train.tsv").read_text().replace("text\tlabel", "remark\ttone")
        (tmp_path / "mine.tsv").write_text(rows)
        labels = ["--labels", "negative=a = b", "--labels", "positive=fine"]
        columns = ["--text-column", "remark", "--label-column", "tone"]
        own = ["mine", "--train-file", tmp_path / "mine.tsv", *labels, *columns, "--backbone", bert]
        where = ["--pool", tmp_path / "nowhere", "--out", tmp_path / "expert"]
        logs = ["--log-dir", tmp_path / "logs"]
        shown = run("train", *own, *where, *logs, "--steps", 3, "--learning-rate", 0.01, "--method", "bottleneck")
        assert f"saved to {tmp_path / 'expert'}" in shown.stdout
        card = Expert.load(tmp_path / "expert").card
        assert (card.name, card.task, card.method, card.choices) == ("expert", "mine", "bottleneck", ("a = b", "fine"))
        assert (card.training["steps_taken"], card.training["learning_rate"]) == (3, 0.01)
        assert not (tmp_path / "nowhere").exists()
        found = run_json("eval", *own, tmp_path / "expert", "--split", "train", "--limit", 5)
        assert (found["examples"], found["split"]) == (5, "train")
        run("embed", tmp_path / "expert", *own[1:], "--reference", "own")
        assert (tmp_path / "expert" / "task_embedding.safetensors").is_file()
        again = run(
            "train", *own, *where, *logs, "--steps", 5, "--learning-rate", 0.01, "--method", "bottleneck", "--resume"
        )
        assert "no checkpoint" not in again.stderr
        assert Expert.load(tmp_path / "expert").card.training["steps_taken"] == 5

    def test_eval_without_expert_is_zero_shot(self, shared: list[object]) -> None:
        shown = run("eval", "word_tone", *shared).stdout
        assert "zero-shot" in shown
        assert "accuracy" in shown

    def test_nothing_else_is_ever_overwritten(self, shared: list[object], pool: ExpertPool, tmp_path: Path) -> None:
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "diary.txt").write_text("dear diary")
        train = ["train", "movie_quotes", *shared, "--steps", 1]
        assert "is no expert, so it is not replaced" in error(*train, "--out", tmp_path / "notes")
        assert "holds a lora expert for word_tone" in error(*train, "--save", "word_tone")
        assert "cannot be the name of an expert" in error(*train, "--save", "../away")
        card = pool.folder / "pocket_gear" / "expert.json"
        card.write_text(json.dumps({**json.loads(card.read_text()), "schema": 99}))
        assert "a later version of pituning wrote (schema 99)" in error(*train, "--save", "pocket_gear")
        before = pool.load("word_tone").tensors
        run("train", "word_tone", *shared, "--steps", 1)  # its own kind: a second run of the same command
        assert any(not before[key].equal(tensor) for key, tensor in pool.load("word_tone").tensors.items())

    def test_out_is_the_folder_that_it_says(
        self, shared: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train = ["train", "movie_quotes", *shared, "--steps", 1]
        assert "needs a name without a leading dot" in error(*train, "--out", tmp_path / ".hidden")
        assert "needs a name without a leading dot" in error(*train, "--out", "/")
        run(*train, "--out", tmp_path / "mine")
        monkeypatch.chdir(tmp_path / "mine")
        before = file_hash(tmp_path / "mine" / "adapter_model.safetensors")
        assert run_json(*train, "--seed", 1, "--out", ".")["folder"] == str(tmp_path / "mine")
        assert file_hash(tmp_path / "mine" / "adapter_model.safetensors") != before
        assert not (tmp_path / "mine" / "mine").exists()

    def test_embed_pool_then_rank_by_fisher(self, shared: list[object], pool: ExpertPool) -> None:
        found = run_json("embed", *shared)
        assert [e["name"] for e in found["embeddings"]] == ["pocket_gear", "word_tone"]
        assert all((pool.folder / n / "task_embedding.shared.safetensors").is_file() for n in pool.names())
        assert "agreement" in run("embed", "word_tone", *shared, "--reference", "own").stdout
        ranked = run_json("rank", "movie_quotes", *shared, "--shots", 4, "--kind", "fisher")
        assert ranked["kind"] == "fisher (shared)"

    def test_embed_pool_goes_on_past_an_expert_without_data(self, shared: list[object], pool: ExpertPool) -> None:
        pool.add(pool.load("word_tone").with_card(task="somebody_elses"), "foreign")
        result = run("embed", *shared, "--json", code=1)
        found = json.loads(result.stdout)
        assert [e["name"] for e in found["embeddings"]] == ["pocket_gear", "word_tone"]
        assert list(found["problems"]) == ["foreign"]
        assert (
            "error: 1 of 3 experts could not be embedded:\n  foreign: expert 'foreign' has no stored embedding"
            in result.stderr
        )


class TestRun:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Stand in for the runner, which has tests of its own, and record how it is called."""
        seen: list[Any] = []

        def run_recipe(path: Path, output: Path | None = None, **options: Any) -> dict[str, Any]:
            seen.append((path, output, options))
            arms = [{"name": "pi", "label": "π (this tool)", "values": [0.8, 0.75]}]
            differences = [
                {"name": "π − own expert", "mean": 0.051, "low": 0.032, "high": 0.07},
                {"name": "π − uniform soup", "mean": -0.01, "low": None, "high": None},
            ]
            return {"title": "sst2, 16 shots", "summary": "π helps.", "arms": arms, "differences": differences,
                    "report": "runs/sst2/report.html"}  # fmt: skip

        monkeypatch.setattr("pituning.experiments.runner.run_recipe", run_recipe)
        return seen

    def test_tables_and_report(self, calls: list[Any], tmp_path: Path) -> None:
        recipe = tmp_path / "a.yaml"
        recipe.write_text((Path(__file__).parents[2] / "recipes" / "text" / "demo.yaml").read_text())
        shown = run("run", recipe, "--seeds", "0, 2", "--output", tmp_path / "out", "--quiet").stdout
        assert calls == [(recipe, tmp_path / "out", {"seeds": [0, 2], "progress": False})]
        for part in ("π (this tool)", "77.5", "80.0  75.0", "+5.1", "+3.2 to +7.0", "−1.0", "π helps.", "report.html"):
            assert part in shown
        assert run_json("run", recipe)["differences"][1]["low"] is None

    def test_values_of_other_metrics_are_no_percentages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        arms = [{"name": "pi", "label": "π (this tool)", "values": [1.25]}]
        results = {"title": "captions", "metric": "CIDEr-D", "summary": "", "arms": arms, "report": "r.html"}
        monkeypatch.setattr("pituning.experiments.runner.run_recipe", lambda *a, **k: results)
        shown = run("run", Path(__file__).parents[2] / "recipes" / "text" / "demo.yaml").stdout
        assert "captions, CIDEr-D" in shown
        assert "1.250" in shown
        assert "125" not in shown

    def test_seeds_and_progress_are_passed_on(self, calls: list[Any], tmp_path: Path) -> None:
        recipe = tmp_path / "a.yaml"
        recipe.write_text((Path(__file__).parents[2] / "recipes" / "text" / "demo.yaml").read_text())
        run("run", recipe)
        assert calls == [(recipe, None, {"seeds": None, "progress": True})]
