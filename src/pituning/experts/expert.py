"""An expert as a value: named tensors, a PEFT configuration and a card; on disk an ordinary PEFT adapter folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pituning.backbones.base import PACKAGED, Backbone
from pituning.data.tsv import is_alive
from pituning.errors import BackboneMismatchError, ExpertError
from pituning.methods.attach import attached, check_tensors, initial_tensors
from pituning.methods.prefix import folded
from pituning.methods.tuner import OWN_TYPES
from pituning.version import __version__

SCHEMA = 1
_OLD = ".old"
_KEPT = re.compile(r"\.(?P<name>.+)\.(?P<mark>[^.]+)" + re.escape(_OLD))
_ABANDONED = 3600.0  # seconds after which nobody is in the middle of replacing a folder
_MARK = re.compile(r"([0-9a-f]{8})-(\d+)-.*")  # host, process, and what tells its saves apart
_saving: set[str] = set()  # marks of this process's unfinished saves
CONFIG_FILE, TENSOR_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "expert.json"


@dataclass(frozen=True)
class ExpertCard:
    """What is known of an expert besides its tensors.

    Attributes:
        backbone: id of the backbone, as a user would load it with transformers.
        fingerprint: of the backbone; empty for a foreign PEFT folder.
        init_hash: hash of the common initialisation; equal hashes share coordinates.
        licence: SPDX identifier of the licence the tensors are under, such as ``apache-2.0``; empty where unknown.
        lineage: the experts it was blended from, each with its mean weight.
        metrics: held-out figures by name, such as ``{"dev log-loss": 0.31}``.
        training: learning rate, steps and whatever else reproduces it.
    """

    name: str
    backbone: str = ""
    fingerprint: str = ""
    task: str = ""
    method: str = ""
    init_hash: str = ""
    shots: int | None = None
    seed: int = 0
    parameters: int = 0
    choices: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    lineage: tuple[Mapping[str, Any], ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    version: str = __version__

    @property
    def shots_per_class(self) -> bool:
        """Whether a shot is one example of every answer; of VQA it is one question, though its answers are closed."""
        if self.shots is None or not self.choices:
            return False
        expected = self.shots * len(self.choices)
        return bool(self.training.get("examples", expected) == expected)


@dataclass(frozen=True)
class Expert:
    """The adaptation's tensors for one task, under PEFT's file key names.

    Attributes:
        tensors: name → tensor; treated as immutable.
        config: the PEFT configuration as plain JSON values.
        card: see :class:`ExpertCard`.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    card: ExpertCard

    @property
    def name(self) -> str:
        """The card's name."""
        return self.card.name

    def with_card(self, **changes: Any) -> Expert:
        """The same tensors under a changed card."""
        return replace(self, card=replace(self.card, **changes))

    def require_backbone(self, backbone: Backbone) -> None:
        """Raise unless this expert was trained on that backbone.

        Raises:
            BackboneMismatchError: names both backbones.
        """
        if self.card.fingerprint and self.card.fingerprint != backbone.fingerprint:
            raise BackboneMismatchError(
                f"expert {self.name!r} was trained on backbone {self.card.backbone!r} "
                f"(fingerprint {self.card.fingerprint}), but this is {backbone.name!r} ({backbone.fingerprint}); "
                "load the backbone it was trained on"
            )
        prompting = self.card.training.get("prompting", backbone.prompting)
        if prompting != backbone.prompting:
            wanted = ", ".join(f"{k}={v!r}" for k, v in prompting.items())
            found = ", ".join(f"{k}={v!r}" for k, v in backbone.prompting.items())
            raise BackboneMismatchError(
                f"expert {self.name!r} was trained on prompts made with {wanted}, and this backbone makes them with {found}; "
                f"load_backbone(…, {wanted})"
            )

    def verify(self, backbone: Backbone | None = None) -> None:
        """Prove that the tensors are finite and, given a backbone, that every one of them fits it.

        Raises:
            ExpertError: names every tensor at fault.
        """
        check_tensors({k: tuple(t.shape) for k, t in self.tensors.items()}, self.tensors, f"expert {self.name!r}")
        if not self.tensors:
            raise ExpertError(f"expert {self.name!r} holds no tensors")
        if backbone is not None:
            self.require_backbone(backbone)
            with attached(backbone, self.config, self.tensors):
                pass

    def save(self, folder: str | Path) -> Path:
        """Write the expert as a PEFT adapter folder, all or nothing.

        Returns:
            the folder.

        Raises:
            ExpertError: if the tensors are not finite or the disk refuses; nothing half-written is left behind.
        """
        self.verify()
        folder = Path(folder)
        tensors = {k: t.detach().cpu().contiguous() for k, t in sorted(self.tensors.items())}
        with atomic_folder(folder) as target:
            config = {**self.config, "base_model_name_or_path": self.card.backbone or None}
            (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            safetensors.torch.save_file(tensors, target / TENSOR_FILE, metadata={"format": "pt"})
            card = {
                "schema": SCHEMA,
                **asdict(self.card),
                "sha256": file_hash(target / TENSOR_FILE),
                "config_sha256": file_hash(target / CONFIG_FILE),
                "tensors": {k: list(t.shape) for k, t in tensors.items()},
            }
            (target / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
            (target / "README.md").write_text(_model_card(self), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Expert:
        """Read an expert folder, or any PEFT adapter folder, and check it against its own record.

        Raises:
            ExpertError: if a file is missing, truncated or altered, or a tensor is missing, extra, misshaped or not
                finite; the message names it.
        """
        folder = Path(folder)
        config = read_config(folder / CONFIG_FILE)
        tensors = read_tensors(folder / TENSOR_FILE)
        if not (folder / CARD_FILE).is_file():
            expert = cls(tensors, config, _foreign_card(folder, config, sum(t.numel() for t in tensors.values())))
            expert.verify()
            return expert
        config["base_model_name_or_path"] = None  # the card says it, with the fingerprint
        record, card, shapes = _read_record(folder)
        check_tensors(shapes, tensors, f"expert in {folder}")
        if record.get("sha256") != file_hash(folder / TENSOR_FILE):
            raise ExpertError(
                f"{folder / TENSOR_FILE} was changed after it was saved: its hash differs from the card's"
            )
        if record.get("config_sha256") != file_hash(folder / CONFIG_FILE):
            raise ExpertError(
                f"{folder / CONFIG_FILE} was changed after it was saved: its hash differs from the card's"
            )
        return cls(tensors, config, card)


def read_card(folder: Path) -> ExpertCard:
    """The card of an expert folder, or of any PEFT adapter folder, without reading its tensors.

    Names and shapes in the tensor file are compared with the card's, and a truncated file is found out; whether the
    values are those that were saved, only :meth:`Expert.load` can tell.

    Raises:
        ExpertError: if a file is missing or truncated, or a tensor is missing, extra or misshaped.
    """
    config = read_config(folder / CONFIG_FILE)
    found = read_shapes(folder / TENSOR_FILE)
    if not (folder / CARD_FILE).is_file():
        return _foreign_card(folder, config, sum(math.prod(shape) for shape in found.values()))
    _, card, shapes = _read_record(folder)
    for key in sorted(found.keys() | shapes.keys()):
        if found.get(key) != shapes.get(key):
            there, said = (list(s[key]) if key in s else "absent" for s in (found, shapes))
            raise ExpertError(f"expert in {folder}: tensor {key} is {there} in {TENSOR_FILE}, and {said} in its card")
    return replace(card, name=folder.name)


def start_of(backbone: Backbone, expert: Expert) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and common initialisation from which an expert was trained, as far as its card tells.

    A prefix that was trained with a projection started from that network;
    :func:`initial_of` is the start in the expert's own coordinates.
    """
    config = {**expert.config, **expert.card.training.get("projection", {})}
    return config, initial_tensors(backbone, config)


def initial_of(backbone: Backbone, expert: Expert) -> dict[str, Tensor]:
    """φ_0: the common start of an expert, in the expert's own coordinates."""
    return folded(*start_of(backbone, expert))[1]


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash of named tensors: 16 hexadecimal digits of SHA-256 over names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recover_interrupted(folder: Path) -> None:
    """Finish a save that died half-way: bring back an earlier version whose place is empty, drop a replaced one.

    What another process is about to replace is left alone: it is in the middle of a save.
    """
    for kept in folder.glob(f".*{_OLD}"):
        if (parts := _KEPT.fullmatch(kept.name)) is None:
            continue
        with suppress(FileNotFoundError):  # another process may be faster
            if not _is_abandoned(kept, parts["mark"]):
                continue
            if (folder / parts["name"]).exists():
                shutil.rmtree(kept, ignore_errors=True)
            else:
                kept.rename(folder / parts["name"])


def _is_abandoned(kept: Path, mark: str) -> bool:
    """Whether nobody is at work on a folder: its process is dead, or it has lain there for long."""
    found = kept.lstat()
    if time.time() - max(found.st_mtime, found.st_ctime) > _ABANDONED:  # a rename changes the latter
        return True
    written = _MARK.fullmatch(mark)
    if written is None or written[1] != _host():
        return False
    process = int(written[2])
    return mark not in _saving if process == os.getpid() else not is_alive(process)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` when the block succeeds; its name starts with a dot."""
    if folder.exists() and not (folder / CONFIG_FILE).is_file():
        raise ExpertError(f"{folder} exists and is not an expert; it is not replaced")
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{folder.name}.{_host()}-{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=folder.parent))
        _saving.add(temporary.name.split(".")[-2])
        temporary.chmod(0o755)
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        if folder.exists():
            old = temporary.with_suffix(_OLD)
            folder.rename(old)
            try:
                temporary.rename(folder)
            except OSError:
                old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)  # the new one is in its place: this cannot fail the save
        else:
            temporary.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise ExpertError(f"could not save {folder}: {error}; nothing was written") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            _saving.discard(temporary.name.split(".")[-2])


def later_schema(folder: Path) -> int | None:
    """The schema of an expert's card if a later version of pituning has written it, otherwise ``None``."""
    try:
        schema = _read_json(folder / CARD_FILE, "").get("schema")
    except ExpertError:
        return None
    return schema if isinstance(schema, int) and schema > SCHEMA else None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_config(path: Path) -> dict[str, Any]:
    """A PEFT configuration file as plain values.

    Raises:
        ExpertError: if there is no such file, or it is no JSON object.
    """
    return _read_json(path, "this is not an expert folder")


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    if not path.is_file():
        raise ExpertError(f"no such file: {path}; {problem}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ExpertError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ExpertError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _foreign_card(folder: Path, config: Mapping[str, Any], parameters: int) -> ExpertCard:
    return ExpertCard(
        name=folder.name,
        backbone=config.get("base_model_name_or_path") or "",
        method=str(config.get("peft_type", "")).lower(),
        parameters=parameters,
    )


def _read_record(folder: Path) -> tuple[dict[str, Any], ExpertCard, dict[str, tuple[int, ...]]]:
    """The card's file as it is, the card in it, and the shapes that it records."""
    record = _read_json(folder / CARD_FILE, "the expert's card is missing")
    if record.get("schema") != SCHEMA:
        raise ExpertError(f"{folder / CARD_FILE}: schema {record.get('schema')!r}, this version reads {SCHEMA}")
    return record, *_read_card(record, folder / CARD_FILE)


def _read_card(record: Mapping[str, Any], path: Path) -> tuple[ExpertCard, dict[str, tuple[int, ...]]]:
    """The card and the recorded shapes; entries of a later version are ignored."""
    known = {f.name for f in fields(ExpertCard)}
    values = {k: v for k, v in record.items() if k in known}
    try:
        shapes = {str(k): tuple(map(int, v)) for k, v in record["tensors"].items()}
        for key in ("choices", "lineage"):
            values[key] = tuple(values.get(key, ()))
        if not isinstance(values["name"], str):
            raise TypeError(f"name is {values['name']!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExpertError(f"{path} is not a valid card: {error}") from error
    return ExpertCard(**values), shapes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ExpertError: if there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise ExpertError(f"no such file: {path}; only safetensors are read, never pickles")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ExpertError(f"{path} cannot be read, it is truncated or not a safetensors file ({error})") from error
    return tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by name, from its header alone.

    Raises:
        ExpertError: if there is no such file, or it is truncated or none.
    """
    if not path.is_file():
        raise ExpertError(f"no such file: {path}; only safetensors are read, never pickles")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise ExpertError(f"{path} cannot be read, it is truncated or not a safetensors file ({error})") from error


def _model_card(expert: Expert) -> str:
    card = expert.card
    generative = {"seq2seq": "AutoModelForSeq2SeqLM", "causal": "AutoModelForCausalLM"}
    auto = generative.get(str(card.training.get("family")), "AutoModel")
    foreign = expert.config.get("peft_type") not in OWN_TYPES
    packaged = card.backbone in PACKAGED
    loading = [] if foreign else ["import pituning.methods  # enters the method into PEFT"]
    if packaged:
        loading += ["import pituning", f"model = pituning.load_backbone({card.backbone!r}).model"]
    else:
        loading = [f"from transformers import {auto}", *loading]
        if card.training.get("architecture") == "ofa":
            loading.append("import pituning.backbones.ofa.modeling  # enters OFA into transformers")
        loading.append(f"model = {auto}.from_pretrained({card.backbone!r})")
    lines = [
        "---",
        "library_name: peft",
        *([] if packaged else [f"base_model: {card.backbone}"]),
        *([f"license: {card.licence}"] if card.licence else []),
        "tags: [pituning, peft]",
        "---",
        f"# {card.name}",
        "",
        f"A `{card.method}` expert ({card.parameters:,} parameters) for the task `{card.task}`"
        + (f", from {card.shots} labelled examples{' per class' * card.shots_per_class}." if card.shots else "."),
        "",
        "```python",
        "from peft import PeftModel",
        *loading,
        'model = PeftModel.from_pretrained(model, "PATH/TO/THIS/FOLDER")',
        "```",
    ]
    if card.choices:
        lines += ["", "Answers: " + "; ".join(f"`{c}`" for c in card.choices) + "."]
    if card.lineage:
        lines += ["", "| blended from | mean weight |", "|---|---|"]
        lines += [f"| {parent['name']} | {parent['weight']:.3f} |" for parent in card.lineage]
    if card.metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in card.metrics.items()]
    return "\n".join(lines) + "\n"
