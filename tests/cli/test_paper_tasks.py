"""The paper's tasks through the verbs, from files in OFA's layout to answers, on a tiny OFA."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pituning import evaluate, predict
from pituning.experts import ExpertPool
from pituning.tasks import load_task
from tests.backbones.ofa.conftest import build_backbone
from tests.cli.test_cli import error, run, run_json

COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}
LABELS = ("entailment", "neutral", "contradiction")


@pytest.fixture(autouse=True)
def ofa(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny OFA stands in for whatever is loaded."""
    backbone = build_backbone(max_source_positions=128, max_target_positions=128)
    monkeypatch.setattr("pituning.backbones.load_backbone", lambda name, **_: backbone)
    return backbone


def picture(colour: str) -> str:
    held = io.BytesIO()
    Image.new("RGB", (40, 30), COLOURS[colour]).save(held, "PNG")
    return base64.urlsafe_b64encode(held.getvalue()).decode()


def write(path: Path, rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """RefCOCO, VQA, SNLI-VE and captions of a few rows, as OFA has them on disk."""
    rng, folder = random.Random(0), tmp_path / "data"

    def words() -> str:
        return " ".join("".join(rng.choices("abcdefg", k=rng.randint(2, 5))) for _ in range(rng.randint(1, 3)))

    def rows(kind: str, count: int) -> list[list[str]]:
        made = []
        for n in range(count):
            colour = rng.choice(sorted(COLOURS))
            image = picture(colour)
            made.append(
                {
                    "refcoco": [str(n), "i", words(), "1,2,20,25", image],
                    "vqa": [str(100 + n), "i", words(), f"1.0|!+{colour}&&0.3|!+no", "", image],
                    "snli_ve": [f"{n}.jpg#0", "i", image, words(), words(), LABELS[n % 3]],
                    "caption": [str(n), str(n), f"{words()}&&{words()}", "", image],
                }[kind]
            )
        return made

    for kind, splits in {
        "refcoco": ("train", "val", "testA", "testB"), "vqa": ("train", "val", "test"),
        "snli_ve": ("train", "dev", "test"), "caption": ("stage1_train", "val", "test"),
    }.items():  # fmt: skip
        for split in splits:
            write(folder / f"{kind}_data" / f"{kind}_{split}.tsv", rows(kind, 8 if "train" in split else 5))
    return folder


def test_train_evaluate_and_blend_from_ofas_files(data: Path, tmp_path: Path) -> None:
    shared = ["--data", data, "--pool", tmp_path / "experts"]
    for task, split, metric in (
        ("refcoco", "testA", "acc@0.5"), ("vqa", "dev", "vqa-accuracy"), ("snli_ve-premise", "test", "accuracy"),
    ):  # fmt: skip
        how = ["--steps", 2, "--method", "bottleneck", "--batch-size", 3, "--accumulate", 2, "--label-smoothing", 0.1]
        trained = run_json("train", task, *shared, *how)
        assert trained["task"] == task
        said = {k: trained["training"][k] for k in ("steps", "batch_size", "accumulate", "label_smoothing")}
        assert said == {"steps": 2, "batch_size": 3, "accumulate": 2, "label_smoothing": 0.1}
        found = run_json("eval", task, task, *shared, "--split", split)
        assert (found["metric"], found["examples"], set(found["metrics"])) == (metric, 5, {metric, "log-loss"})
        assert 0 <= found["metrics"][metric] <= 1
    few = ["snli_ve", *shared, "--shots", 2]
    ranked = run_json("rank", *few, "--kind", "fisher")
    assert {e["name"] for e in ranked["experts"]} == {"refcoco", "vqa", "snli_ve-premise"}
    assert run_json("pool", "verify", "--pool", tmp_path / "experts")["broken"] == 0


def test_two_ways_to_answer_closed_questions(data: Path, tmp_path: Path, ofa: Any) -> None:
    task = load_task("vqa", data=data)
    by_score, by_beam = (evaluate(ofa, None, task, "dev", by=by) for by in ("score", "beam"))  # type: ignore[arg-type]
    assert by_score.metrics["log-loss"] == pytest.approx(by_beam.metrics["log-loss"], rel=1e-5)
    assert by_score.predictions == by_beam.predictions, "three answers fit into a beam of five"
    answers = [task.choices[int(p or 0)] for p in by_score.predictions]
    truth = [dict(e.answers) for e in task.split("dev")]
    assert by_score.value == pytest.approx(sum(t.get(a, 0) for t, a in zip(truth, answers, strict=True)) / 5)
    shown = run_json("eval", "vqa", "--data", data, "--split", "dev", "--by", "beam", "--pool", tmp_path)
    assert shown["metrics"]["vqa-accuracy"] == pytest.approx(by_score.value)


def test_captions_are_generated_and_compared_with_all_references(data: Path, tmp_path: Path) -> None:
    found = run_json("eval", "caption", "--data", data, "--pool", tmp_path, "--metric", "ROUGE-L")
    assert set(found["metrics"]) == {"CIDEr-D", "BLEU-4", "ROUGE-L", "log-loss"}
    assert "compares answers of the kind 'choice'" in error(
        "eval", "caption", "--data", data, "--pool", tmp_path, "--metric", "accuracy"
    )


class TestPredict:
    def test_answers_for_a_server(self, data: Path, tmp_path: Path, ofa: Any) -> None:
        rows = [[*row[:3], "", *row[4:]] for row in _rows(data / "vqa_data" / "vqa_test.tsv")]
        write(data / "vqa_data" / "vqa_test.tsv", rows)
        out = tmp_path / "new" / "answers.json"
        shown = run("predict", "vqa", "--data", data, "--pool", tmp_path, "--out", out)
        assert f"written to {out}" in shown.stdout
        answers = json.loads(out.read_text())
        assert [a["question_id"] for a in answers] == [100, 101, 102, 103, 104]
        assert {a["answer"] for a in answers} <= {"red", "blue", "no"}
        assert [a for _, a in predict(ofa, None, load_task("vqa", data=data))] == [a["answer"] for a in answers]
        message = error("eval", "vqa", "--data", data, "--pool", tmp_path)
        assert "example 'vqa/test/0' has no right answer" in message
        assert "pituning predict" in message

    def test_captions_and_boxes(self, data: Path, tmp_path: Path) -> None:
        run_json("predict", "caption", "--data", data, "--pool", tmp_path, "--out", tmp_path / "c.json", "--limit", 2)
        assert {tuple(row) for row in json.loads((tmp_path / "c.json").read_text())} == {("image_id", "caption")}
        run_json(
            "predict", "refcoco", "--data", data, "--split", "testB", "--pool", tmp_path, "--out", tmp_path / "b.json"
        )
        boxes = [row["box"] for row in json.loads((tmp_path / "b.json").read_text())]
        assert all(len(box) == 4 for box in boxes)


def _rows(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


class TestZeroShot:
    def test_the_most_similar_expert_is_used_as_it_is(self, data: Path, tmp_path: Path, ofa: Any) -> None:
        shared = ["--data", data, "--pool", tmp_path / "experts"]
        for task in ("refcoco", "vqa"):
            run_json("train", task, *shared, "--steps", 2, "--method", "bottleneck")
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "experts").rglob("adapter_model.safetensors")}
        found = run_json("zeroshot", "snli_ve", *shared, "--shots", 2)
        assert found["chosen"] == found["ranking"][0]["name"]
        assert found["kind"] == "fisher (shared)"
        task = load_task("snli_ve", data=data, shots=2)
        expert = ExpertPool(tmp_path / "experts").load(found["chosen"])
        assert found["expert"]["accuracy"] == evaluate(ofa, expert, task).value
        assert found["backbone"]["accuracy"] == evaluate(ofa, None, task).value
        assert found["gain"] == pytest.approx(found["expert"]["accuracy"] - found["backbone"]["accuracy"])
        after = {p: p.stat().st_mtime_ns for p in before}
        assert after == before
        assert "nothing trained on it" in run("zeroshot", "snli_ve", *shared, "--shots", 2, "--kind", "score").stdout

    def test_a_pool_of_two_methods_wants_a_choice(self, data: Path, tmp_path: Path) -> None:
        shared = ["--data", data, "--pool", tmp_path / "experts"]
        run_json("train", "refcoco", *shared, "--steps", 1)
        run_json("train", "vqa", *shared, "--steps", 1, "--method", "bottleneck")
        assert "experts of bottleneck and lora: choose a method" in error("zeroshot", "snli_ve", *shared)
        found = run_json("zeroshot", "snli_ve", *shared, "--method", "bottleneck", "--shots", 1)
        assert found["chosen"] == "vqa"


class TestOwnFiles:
    def test_a_kind_with_its_settings(self, data: Path, tmp_path: Path) -> None:
        folder, pool = data / "vqa_data", ["--pool", tmp_path / "experts"]
        (tmp_path / "answers.txt").write_text("red\nblue\nno\ngreen\n")
        files = ["--train-file", folder / "vqa_train.tsv", "--dev-file", folder / "vqa_val.tsv"]
        kind = ["--task-kind", "vqa", "--answers", tmp_path / "answers.txt", "--objects", "--prompt-type", "none"]
        trained = run_json("train", "mine", *pool, *files, *kind, "--steps", 2)
        assert trained["choices"] == ["red", "blue", "no", "green"]
        assert "dev log-loss" in trained["metrics"]

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--task-kind", "vqa", "--premise", "--train-file", "a.tsv"],
            ["--task-kind", "vqa", "--labels", "a=b", "--train-file", "a.tsv"],
            ["--objects", "--train-file", "a.tsv", "--labels", "a=b"],
            ["--answers", "a.txt"],
            ["--task-kind", "caption", "--train-file", "a.tsv"],
        ],
    )
    def test_settings_that_do_not_belong_together(self, arguments: list[str]) -> None:
        assert "Error" in run("train", "mine", *arguments, code=2).stderr


class TestValidate:
    def test_a_recipe_whose_inputs_are_missing(self) -> None:
        root = Path(__file__).parents[2] / "recipes"
        shown = run("validate", root / "ofa" / "table2-full.yaml", code=1).stdout
        assert "missing: backbone: there is no folder ./models/ofa-base" in shown
        assert shown.count("missing: ") == 9
        assert "0 mistake(s), 9 missing input(s)" in shown
        found = run_json("validate", root / "ofa" / "table2-full.yaml", "--without-inputs")
        assert (found["problems"], found["missing"]) == ([], [])
        assert "is valid" in run("validate", root / "text" / "demo.yaml").stdout

    def test_all_mistakes_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(
            "title: x\ntarget: sst3\npool: {folder: p, tasks: [cr]}\noutput: o\narms: [ownn]\n"
        )
        shown = run("validate", tmp_path / "a.yaml", code=1).stdout
        assert "did you mean 'sst2'" in shown
        assert "unknown arm 'ownn'" in shown
        assert "2 mistake(s)" in shown
        assert "mistake: no such recipe" in run("validate", tmp_path / "b.yaml", code=1).stdout.replace(
            str(tmp_path), ""
        )


def test_a_tables_stages_and_tasks_are_named(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "ofa" / "table1-base.yaml"
    assert "there is no stage 'expert'" in run("run", recipe, "--stages", "expert", code=2).stderr
    assert "Error" in run("run", recipe, "--seeds", "0", code=2).stderr
    assert "input(s) are missing, nothing was run" in error("run", recipe, "--output", tmp_path)
    assert "Error" in run("run", recipe.parents[1] / "text" / "demo.yaml", "--stages", "experts", code=2).stderr
