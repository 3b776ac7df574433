"""`import`, `export`, `verify`, `push`, `pull`, and the options of `train` and `interpolate` that reach the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from transformers import BertModel

from pituning.backbones import load_backbone
from pituning.cli.train import _typed
from pituning.experts import Expert, ExpertPool
from pituning.experts.sharing import push
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


def test_what_comes_or_goes_replaces_nothing(foreign: Path, pool: ExpertPool, bert: Path, tmp_path: Path) -> None:
    at = ["--pool", pool.folder]
    (pool.folder / "word_tone" / "embedding.json").write_text("{}")
    before = {path: path.read_bytes() for path in pool.folder.rglob("*") if path.is_file()}
    taken = ["--backbone", bert, *at, "--any-base", "--name", "word_tone"]
    assert "has an expert 'word_tone' already" in error("import", foreign, *taken)
    assert "has an expert 'word_tone' already" in error("push", "word_tone", pool.folder, *at)
    run("push", "word_tone", tmp_path / "repository", *at)
    assert "has an expert 'word_tone' already" in error("push", "word_tone", tmp_path / "repository", *at)
    assert before == {path: path.read_bytes() for path in pool.folder.rglob("*") if path.is_file()}


def test_the_backbone_of_a_proof_in_its_experts_dtype(
    pool: ExpertPool, backbone_of: BackboneOf, random_expert: RandomExpert, bert: Path
) -> None:
    for name in pool.names():
        shutil.rmtree(pool.folder / name)
    half = load_backbone(str(bert), dtype=torch.bfloat16)
    pool.add(random_expert(half, "lora", 1), "half")
    where = ["--pool", pool.folder, "--backbone", bert, "--dtype", "bfloat16"]
    assert run_json("verify", "half", *where)["failed"] == 0
    assert run_json("pool", "verify", *where)["broken"] == 0
    assert run_json("pool", "verify", *where[:4], code=1)["broken"] == 1
    for verb in (["verify", "half"], ["pool", "verify"], ["graph"]):
        assert "--dtype" in run(*verb, "--help").stdout
        assert "--backbone" in run(*verb, *where[:2], "--dtype", "bfloat16", code=2).stderr


def test_a_merged_encoder_encodes_labels_itself_and_the_help_says_so() -> None:
    assert "encodes those texts itself" in " ".join(run("export", "--help").stdout.split())


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


def test_a_push_to_the_hub_takes_the_place_of_an_earlier_one(pool: ExpertPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it stays, such as an embedding that the new one does not have."""
    sent: dict[str, object] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **options: sent.update(options))
    assert push(pool, "word_tone", "someone/experts") == "someone/experts/word_tone"
    assert sent["path_in_repo"] == "word_tone"
    assert sent["delete_patterns"] == sent["allow_patterns"]


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
    for wrong in ("r=abc", "r=1.5", "r=None", "r=true", "use_rslora=5", "target_modules=[1]", "bias=some"):
        assert f"--set {wrong}: expected" in " ".join(run("train", *where, "--set", wrong, code=2).output.split())
    assert "leave out" in run("train", *where, "--peft-config", file, "--set", "r=1", code=2).output


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("use_rslora", "False", False), ("use_rslora", "TRUE", True), ("layers_to_transform", "None", None),
     ("bias", "none", "none"), ("init_lora_weights", "pissa_niter_4", "pissa_niter_4"), ("lora_dropout", "0", 0),
     ("lora_dropout", ".1", 0.1), ("r", "1e1", 10), ("lora_alpha", "16.0", 16), ("lora_alpha", "0.5", 0.5),
     ("target_modules", "query", "query"), ("alpha_pattern", '{"query": 3}', {"query": 3})],
)  # fmt: skip
def test_a_setting_is_read_as_its_fields_type(name: str, text: str, value: object) -> None:
    assert _typed({name: text}, get_type_hints(LoraConfig)) == {name: value}


def test_backbones_in_another_dtype(pool: ExpertPool, bert: Path, data: Path) -> None:
    where = ["movie_quotes", "--data", data, "--pool", pool.folder, "--backbone", bert, "--limit", "4"]
    plain, half = (run_json("eval", *where, "--dtype", d)["metrics"]["log-loss"] for d in ("float32", "bfloat16"))
    assert plain != half
    assert half == pytest.approx(plain, rel=0.1)
    assert "--no-chat is for decoder-only models" in error("eval", *where, "--no-chat")
