"""`import`, `export`, `verify`, `push`, `pull`, and the options of `train` and `interpolate` that reach the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import BertModel

from pituning.experts import Expert, ExpertPool
from tests.cli.test_cli import error, run, run_json
from tests.conftest import BackboneOf, RandomExpert


@pytest.fixture
def foreign(tmp_path: Path, backbone_of: BackboneOf, random_expert: RandomExpert) -> Path:
    """A PEFT folder without pituning's card."""
    folder = random_expert(backbone_of("encoder"), "lora", 7).save(tmp_path / "foreign")
    (folder / "expert.json").unlink()
    return folder


def test_import_then_verify_then_export(
    foreign: Path,
    pool: ExpertPool,
    bert: Path,
    tmp_path: Path,
) -> None:
    at = ["--pool", pool.folder]
    found = run_json("import", foreign, "--backbone", bert, *at, "--task", "sst2", "--any-base", "--name", "new")
    assert (found["name"], found["changed"]) == ("new", None)
    assert Expert.load(found["folder"]).card.task == "sst2"
    checks = run_json("verify", "new", "--backbone", bert, *at)["checks"]
    assert {c["check"]: c["ok"] for c in checks} == {
        "files": True, "health": True, "backbone": True, "plain PEFT": True, "lineage": None,
    }  # fmt: skip
    page = run("verify", "new", *at).stdout
    assert "no backbone given" in page
    done = run_json("export", "new", "--out", tmp_path / "merged", "--backbone", bert, *at)
    assert done["largest_relative_difference"] < 1e-4
    assert isinstance(BertModel.from_pretrained(done["folder"]), BertModel)


def test_a_folder_that_is_broken_is_not_imported(
    foreign: Path,
    pool: ExpertPool,
    bert: Path,
) -> None:
    path = foreign / "adapter_model.safetensors"
    tensors = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path)
    text = error("import", foreign, "--backbone", bert, "--any-base", "--pool", pool.folder)
    assert "expert 'foreign' is broken" in text
    assert "foreign" not in pool.names()


def test_verify_fails_with_exit_code_one(pool: ExpertPool) -> None:
    card = pool.folder / "word_tone" / "expert.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "sha256": "0"}))
    document = run_json("verify", "word_tone", "--pool", pool.folder, code=1)
    assert document["failed"] == 1
    assert "was changed after it was saved" in document["checks"][0]["found"]
    assert "no such" in run("verify", "nobody", "--pool", pool.folder, code=1).output.lower()


def test_push_and_pull(pool: ExpertPool, tmp_path: Path) -> None:
    place = run_json("push", "word_tone", tmp_path / "repository", "--pool", pool.folder)["place"]
    assert Path(place).is_dir()
    found = run_json("pull", tmp_path / "repository", "word_tone", "--pool", tmp_path / "another")
    assert Expert.load(found["folder"]).card == pool.load("word_tone").card
    assert "has an expert 'word_tone' already" in error(
        "pull", tmp_path / "repository", "word_tone", "--pool", pool.folder
    )


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--coefficients", "linear", "--train-mode", "weights", "--init", "0.7,-0.2"], "linear"),
        (["--coefficients", "sigmoid", "--optimizer", "cma", "--train-mode", "weights"], "sigmoid"),
        (["--train-mode", "merge-then-tune", "--max-error", "0.1", "--granularity", "encoder-decoder"], "softmax"),
        (
            ["--train-mode", "experts", "--weights-to-start", "0.5", "--weights-spread", "0.1", "--temperature", "2"],
            "softmax",
        ),
    ],
)
@pytest.mark.usefixtures("short_search")
def test_how_weights_are_made(
    options: list[str],
    kind: str,
    pool: ExpertPool,
    bert: Path,
    data: Path,
) -> None:
    arguments = ["movie_quotes", "--data", data, "--shots", "4", "--pool", pool.folder, "--backbone", bert]
    experts = ["--experts", "word_tone,pocket_gear"]
    found = run_json("interpolate", *arguments, *experts, *options)
    expert = Expert.load(found["folder"])
    record = expert.card.training["interpolation"]
    chosen = next(c["name"] for c in found["candidates"] if c["chosen"])
    if chosen == "interpolation of the experts":
        assert record["coefficients"] == kind
        assert set(found["weights"]) == {"word_tone", "pocket_gear"}
    assert all(len(row) == len(expert.card.lineage) for row in record["weights"].values())


def test_settings_of_a_method(pool: ExpertPool, bert: Path, data: Path, tmp_path: Path) -> None:
    where = ["movie_quotes", "--data", data, "--pool", pool.folder, "--backbone", bert, "--steps", "1"]
    found = run_json("train", *where, "--set", "r=3", "--set", "use_rslora=true", "--set", 'target_modules=["key"]')
    config = Expert.load(found["folder"]).config
    assert (config["r"], config["use_rslora"], config["target_modules"]) == (3, True, ["key"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"peft_type": "LOHA", "r": 2, "target_modules": ["query"]}))
    found = run_json("train", *where, "--peft-config", file, "--save", "product")
    expert = Expert.load(found["folder"])
    assert (expert.card.method, expert.config["r"]) == ("loha", 2)
    assert "has no setting q" in error("train", *where, "--set", "q=1")
    file.write_text(json.dumps({"peft_type": "LORA", "later": 0.5}))
    assert "no setting later=0.5" in error("train", *where, "--peft-config", file)
    assert "NAME=VALUE" in run("train", *where, "--set", "r", code=2).output
    assert "leave out" in run("train", *where, "--peft-config", file, "--set", "r=1", code=2).output


def test_backbones_in_another_dtype(pool: ExpertPool, bert: Path, data: Path) -> None:
    where = ["movie_quotes", "--data", data, "--pool", pool.folder, "--backbone", bert, "--limit", "4"]
    plain, half = (run_json("eval", *where, "--dtype", d)["metrics"]["log-loss"] for d in ("float32", "bfloat16"))
    assert plain != half
    assert half == pytest.approx(plain, rel=0.1)
    assert "--no-chat is for decoder-only models" in error("eval", *where, "--no-chat")
