"""An expert on disk: bit-equal, all or nothing, and an ordinary PEFT adapter to everybody else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, ExpertError
from pituning.experts import Expert, ExpertPool
from pituning.experts.expert import CARD_FILE, CONFIG_FILE, TENSOR_FILE
from pituning.interpolation import build_mixture, collapse

QUERY = "base_model.model.encoder.layer.0.attention.self.query"


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; ``None`` removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_comes_back_bit_by_bit(
    bert: Backbone, random_expert: Any, tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    expert = random_expert(bert, method, 1).with_card(
        choices=("ba", "de fi"), lineage=({"name": "a", "weight": 0.25},), metrics={"dev log-loss": 0.5}, shots=4
    )
    expert = replace(expert, tensors={k: t.to(dtype) for k, t in expert.tensors.items()})
    folder = expert.save(tmp_path / "deep" / "expert")
    assert listing(folder) == ["README.md", CONFIG_FILE, TENSOR_FILE, CARD_FILE]
    loaded = Expert.load(folder)
    assert loaded.tensors.keys() == expert.tensors.keys()
    assert all(
        torch.equal(loaded.tensors[k], t) and loaded.tensors[k].dtype == dtype for k, t in expert.tensors.items()
    )
    assert loaded.card == expert.card
    assert loaded.config == expert.config
    assert os.listdir(tmp_path / "deep") == ["expert"], "no temporary folder stays"


def test_the_card_tells_a_stranger_how_to_load_it(bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
    expert = random_expert(bert, "bottleneck", 1, name="soup").with_card(
        backbone="org/bert",
        lineage=({"name": "cr", "weight": 0.25},),
        choices=("yes", "no"),
        shots=16,
        metrics={"m": 0.5},
    )
    text = (expert.save(tmp_path / "e") / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    for said in (
        "base_model: org/bert",
        "library_name: peft",
        "| cr | 0.250 |",
        "`yes`; `no`",
        "16 labelled",
        "| m | 0.5000 |",
    ):
        assert said in text
    assert "import pituning.methods" in code
    plain = (random_expert(bert, "lora", 1).save(tmp_path / "l") / "README.md").read_text()
    assert "import pituning" not in plain


def test_reads_any_peft_folder(bert: Backbone, random_expert: Any, random_examples: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(bert.model, LoraConfig(r=2, target_modules=["key"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "theirs")
    batch = bert.collate(random_examples())
    expected = bert.loss(batch)
    model.unload()
    bert.model.requires_grad_(False)
    expert = Expert.load(tmp_path / "theirs")
    assert (expert.name, expert.card.method, expert.card.fingerprint) == ("theirs", "lora", "")
    expert.verify(bert)
    from pituning.methods import attached

    with attached(bert, expert.config, expert.tensors):
        assert torch.equal(bert.loss(batch), expected)


LOAD = """
import sys
import torch, safetensors.torch
{extra}
from peft import PeftModel
from transformers import {auto}
folder = sys.argv[1]
inputs = safetensors.torch.load_file(folder + "/inputs.safetensors")
found = {{}}
for name in sys.argv[2:]:
    model = {auto}.from_pretrained(folder + "/base").eval()
    with torch.no_grad():
        found["bare"] = model(**inputs)[0]
        found[name] = PeftModel.from_pretrained(model, folder + "/" + name).eval()(**inputs)[0]
assert {known}, sorted(m for m in sys.modules if "pituning" in m)
safetensors.torch.save_file({{k: v.contiguous() for k, v in found.items()}}, folder + "/found.safetensors")
"""


def elsewhere(
    backbone: Backbone, experts: dict[str, Expert], batch: dict[str, Tensor], folder: Path, own: bool
) -> None:
    """Load saved experts in another process with PEFT alone, and compare the outputs with ours."""
    from pituning.methods import attached

    backbone.model.save_pretrained(folder / "base")
    safetensors.torch.save_file({k: v.contiguous() for k, v in batch.items()}, folder / "inputs.safetensors")
    expected = {}
    for name, expert in experts.items():
        expert.save(folder / name)
        with torch.no_grad(), attached(backbone, expert.config, expert.tensors):
            expected[name] = backbone.model(**batch)[0]
    script = LOAD.format(
        auto="AutoModel" if backbone.family == "encoder" else "AutoModelForSeq2SeqLM",
        extra="import pituning.methods" if own else "",
        known="True" if own else "not [m for m in sys.modules if 'pituning' in m]",
    )
    subprocess.run([sys.executable, "-c", script, str(folder), *experts], check=True, cwd=folder)
    found = safetensors.torch.load_file(folder / "found.safetensors")
    for name, output in expected.items():
        assert float((found[name] - output).abs().max()) <= 1e-6, name
        assert float((found["bare"] - output).abs().max()) > 1e-3, name


def blends(backbone: Backbone, experts: list[Expert]) -> dict[str, Expert]:
    """A single expert, a collapsed interpolation and, for LoRA, a truncated one."""
    mixture, config = build_mixture(experts, [0.2, 0.3, 0.5], train="none")
    card = experts[0].card
    blended = {"single": experts[0], "collapsed": collapse(mixture, config, card).expert}
    if card.method == "lora":
        blended["truncated"] = collapse(mixture, config, card, rank=2).expert
    return blended


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_an_encoders_experts_load_with_peft_alone(
    bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path, method: str
) -> None:
    encoded = bert.collate(random_examples())
    batch = {k: encoded[k] for k in ("input_ids", "attention_mask")}
    elsewhere(bert, blends(bert, random_experts(bert, method, 3, 3)), batch, tmp_path, own=method == "bottleneck")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_an_encoder_decoders_experts_load_with_peft_alone(
    t5: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path, method: str
) -> None:
    batch = {k: v for k, v in t5.collate(random_examples()).items() if k != "labels"}
    batch["decoder_input_ids"] = torch.tensor([[0, 7, 9]] * len(batch["input_ids"]))
    elsewhere(t5, blends(t5, random_experts(t5, method, 3, 4)), batch, tmp_path, own=method == "bottleneck")


class TestBrokenFolders:
    @pytest.fixture
    def folder(self, bert: Backbone, random_expert: Any, tmp_path: Path) -> Path:
        saved: Path = random_expert(bert, "lora", 1).save(tmp_path / "expert")
        return saved

    def rewrite(self, folder: Path, **changes: Tensor | None) -> None:
        """Change tensors of the file; the hash on the card is brought up to date, so that only the tensors differ."""
        tensors = safetensors.torch.load_file(folder / TENSOR_FILE) | {
            f"{QUERY}.{k}.weight": t for k, t in changes.items()
        }
        kept = {k: t for k, t in tensors.items() if t is not None}
        safetensors.torch.save_file(kept, folder / TENSOR_FILE, metadata={"format": "pt"})
        import hashlib

        edit(folder / CARD_FILE, sha256=hashlib.sha256((folder / TENSOR_FILE).read_bytes()).hexdigest())

    def test_missing_tensor(self, folder: Path, message: Any) -> None:
        self.rewrite(folder, lora_A=None)
        assert f"missing tensor {QUERY}.lora_A.weight [3, 16]" in message(Expert.load, folder)

    def test_extra_tensor(self, folder: Path, message: Any) -> None:
        self.rewrite(folder, lora_C=torch.zeros(2, 5))
        assert f"extra tensor {QUERY}.lora_C.weight [2, 5]" in message(Expert.load, folder)

    def test_misshaped_tensor(self, folder: Path, message: Any) -> None:
        self.rewrite(folder, lora_B=torch.zeros(16, 4))
        text = message(Expert.load, folder)
        assert f"tensor {QUERY}.lora_B.weight has shape [16, 4], expected [16, 3]" in text
        assert str(folder) in text

    def test_nan(self, folder: Path, message: Any) -> None:
        self.rewrite(folder, lora_B=torch.full((16, 3), float("nan")))
        assert f"{QUERY}.lora_B.weight [16, 3] holds 48 values that are NaN" in message(Expert.load, folder)

    @pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
    def test_truncated_file(self, folder: Path, message: Any, kept: float) -> None:
        data = (folder / TENSOR_FILE).read_bytes()
        (folder / TENSOR_FILE).write_bytes(data[: int(kept * len(data))])
        text = message(Expert.load, folder)
        assert str(folder / TENSOR_FILE) in text
        assert "truncated" in text

    def test_changed_file(self, folder: Path, message: Any) -> None:
        tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
        tensors[f"{QUERY}.lora_A.weight"][0, 0] += 1
        safetensors.torch.save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        text = message(Expert.load, folder)
        assert str(folder / TENSOR_FILE) in text
        assert "changed after it was saved" in text

    def test_changed_configuration(self, folder: Path, message: Any) -> None:
        """Another lora_alpha is another expert, although every tensor is as it was."""
        edit(folder / CONFIG_FILE, lora_alpha=99)
        assert CONFIG_FILE in message(Expert.load, folder)

    @pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
    def test_missing_file(self, folder: Path, message: Any, name: str) -> None:
        (folder / name).unlink()
        assert f"no such file: {folder / name}" in message(Expert.load, folder)

    def test_no_folder(self, tmp_path: Path, message: Any) -> None:
        assert "this is not an expert folder" in message(Expert.load, tmp_path / "nothing")

    def test_only_a_pickle(self, folder: Path, message: Any) -> None:
        (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")
        assert "only safetensors are read, never pickles" in message(Expert.load, folder)

    @pytest.mark.parametrize("name", [CONFIG_FILE, CARD_FILE])
    @pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list")])
    def test_broken_json(self, folder: Path, message: Any, name: str, text: str, said: str) -> None:
        (folder / name).write_text(text)
        found = message(Expert.load, folder)
        assert said in found
        assert str(folder / name) in found

    def test_a_card_of_another_schema(self, folder: Path, message: Any) -> None:
        edit(folder / CARD_FILE, schema=7)
        assert "schema 7, this version reads 1" in message(Expert.load, folder)

    @pytest.mark.parametrize("changes", [{"name": None}, {"tensors": [1, 2]}, {"tensors": {"x": 3}}, {"lineage": 4}])
    def test_a_card_with_wrong_entries(self, folder: Path, message: Any, changes: dict[str, Any]) -> None:
        edit(folder / CARD_FILE, **changes)
        assert str(folder / CARD_FILE) in message(Expert.load, folder)

    def test_an_entry_of_a_later_version_is_ignored(self, folder: Path) -> None:
        before = Expert.load(folder).card
        edit(folder / CARD_FILE, mood="sunny")
        assert Expert.load(folder).card == before


def test_an_expert_of_another_backbone_is_refused(
    bert: Backbone, t5: Backbone, random_expert: Any, message: Any
) -> None:
    text = message(random_expert(bert, "lora", 1, name="mine").verify, t5)
    for said in ("'mine'", "'tiny-bert'", bert.fingerprint, "'tiny-t5'", t5.fingerprint, "load the backbone"):
        assert said in text
    with pytest.raises(BackboneMismatchError):
        random_expert(bert).require_backbone(t5)


def test_what_is_not_finite_or_empty_is_not_saved(bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
    expert = random_expert(bert)
    bad = {**expert.tensors, f"{QUERY}.lora_A.weight": torch.full((3, 16), float("nan"))}
    with pytest.raises(ExpertError, match=r"query.lora_A.weight \[3, 16\] holds 48 values"):
        replace(expert, tensors=bad).save(tmp_path / "bad")
    with pytest.raises(ExpertError, match="holds no tensors"):
        replace(expert, tensors={}).save(tmp_path / "bad")
    assert os.listdir(tmp_path) == []


def half_written(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Stands in for ``save_file``: the disk is full half-way."""
    data = safetensors.torch.save(tensors, metadata)
    Path(path).write_bytes(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_pool_as_it_was(
    bert: Backbone, random_expert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: Any
) -> None:
    pool = ExpertPool(tmp_path)
    old = random_expert(bert, "lora", 1, name="kept")
    pool.add(old)
    before = {p: (tmp_path / p).read_bytes() for p in listing(tmp_path)}
    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    for name in ("kept", "new"):
        text = message(pool.add, random_expert(bert, "lora", 2), name)
        assert "No space left on device" in text
        assert str(tmp_path / name) in text
        assert {p: (tmp_path / p).read_bytes() for p in listing(tmp_path)} == before
        assert pool.names() == ["kept"]
    monkeypatch.undo()
    assert all(torch.equal(pool.load("kept").tensors[k], t) for k, t in old.tensors.items())


KILLED = """
import os, sys
from pathlib import Path
import safetensors.torch
from pituning.experts import Expert

def dies(tensors, path, metadata=None):
    data = safetensors.torch.save(tensors, metadata)
    Path(path).write_bytes(data[: len(data) // 2])
    os._exit(9)

source, target, moment = sys.argv[1:]
expert = Expert.load(source)
rename, count = Path.rename, [0]

def counted(self, to):
    if count[0] == int(moment):
        os._exit(9)
    count[0] += 1
    return rename(self, to)

if moment == "-1":
    safetensors.torch.save_file = dies
else:
    Path.rename = counted
expert.save(target)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("moment", [-1, 0, 1], ids=["writing", "before renaming", "between renames"])
def test_a_kill_during_a_save_leaves_no_half_expert(
    bert: Backbone, random_expert: Any, tmp_path: Path, moment: int, earlier: bool
) -> None:
    """The process dies at once, without any clean-up: whole experts are listed, and an earlier version survives."""
    old, new = random_expert(bert, "lora", 1, name="e"), random_expert(bert, "lora", 2, name="e")
    source = new.save(tmp_path / "source")
    pool = ExpertPool(tmp_path / "pool")
    pool.folder.mkdir()
    if earlier:
        pool.add(old)
    run = subprocess.run([sys.executable, "-c", KILLED, str(source), str(pool.folder / "e"), str(moment)], check=False)
    finished = moment == 1 and not earlier  # without an earlier version there is only one rename
    assert run.returncode == (0 if finished else 9)
    assert pool.names() == (["e"] if earlier or finished else [])
    assert set(pool.verify(bert).values()) <= {""}
    if earlier:
        assert all(torch.equal(pool.load("e").tensors[k], t) for k, t in old.tensors.items())
    pool.add(new)
    assert all(torch.equal(pool.load("e").tensors[k], t) for k, t in new.tensors.items())


class TestAnotherProcess:
    """A pool is read while an expert in it is replaced: the reader takes nothing away, and the save does not fail."""

    @pytest.fixture
    def replacing(self, bert: Backbone, random_expert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """``replacing(then)``: replace an expert, with ``then`` called after the earlier version is out of the way."""
        pool = ExpertPool(tmp_path)
        pool.add(random_expert(bert, "lora", 1), "e")
        new = random_expert(bert, "lora", 2)
        rename = Path.rename

        def replace_it(then: Any) -> None:
            def renamed(path: Path, to: Path) -> Path:
                done = rename(path, to)
                if path.name == "e":
                    then()
                return done

            with monkeypatch.context() as patch:
                patch.setattr(Path, "rename", renamed)
                pool.add(new, "e")
            assert all(torch.equal(pool.load("e").tensors[k], t) for k, t in new.tensors.items())
            assert os.listdir(tmp_path) == ["e"]

        return replace_it

    def test_reads_between_the_two_renames(
        self, replacing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def as_another_process() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                assert ExpertPool(tmp_path).names() == []

        replacing(as_another_process)
        replacing(lambda: ExpertPool(tmp_path).names())

    def test_takes_the_earlier_version_away(self, replacing: Any, tmp_path: Path) -> None:
        replacing(lambda: [shutil.rmtree(path) for path in tmp_path.glob(".*.old")])


@pytest.mark.parametrize("mark", ["abcd1234", "01234567-1-abcd1234"], ids=["of an earlier version", "of another host"])
def test_what_was_left_long_ago_comes_back(
    bert: Backbone, random_expert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    random_expert(bert, "lora", 1).save(tmp_path / "e")
    (tmp_path / "e").rename(tmp_path / f".e.{mark}.old")
    (tmp_path / ".bashrc.old").write_text("mine")
    assert ExpertPool(tmp_path).names() == []
    later = time.time() + 4000
    monkeypatch.setattr(time, "time", lambda: later)
    assert ExpertPool(tmp_path).names() == ["e"]
    assert (tmp_path / ".bashrc.old").is_file()


def test_saving_never_replaces_what_is_no_expert(
    bert: Backbone, random_expert: Any, tmp_path: Path, message: Any
) -> None:
    """A slip such as ``expert.save(pool_folder)`` must not delete the pool."""
    pool = ExpertPool(tmp_path / "pool")
    pool.add(random_expert(bert, "lora", 1))
    (tmp_path / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    for folder in (pool.folder, tmp_path, tmp_path / "notes.txt"):
        assert str(folder) in message(random_expert(bert, "lora", 2).save, folder)
        assert listing(tmp_path) == before


def test_tensors_that_share_memory_are_saved(bert: Backbone, random_expert: Any, tmp_path: Path) -> None:
    """Views of one storage, as an optimizer or a mixture may hold them."""
    expert = random_expert(bert, "bottleneck", 1)
    flat = torch.cat([t.flatten() for t in expert.tensors.values()])
    pieces = flat.split([t.numel() for t in expert.tensors.values()])
    views = {k: p.view(t.shape) for (k, t), p in zip(expert.tensors.items(), pieces, strict=True)}
    loaded = Expert.load(replace(expert, tensors=views).save(tmp_path / "views"))
    assert all(torch.equal(loaded.tensors[k], t) for k, t in expert.tensors.items())
