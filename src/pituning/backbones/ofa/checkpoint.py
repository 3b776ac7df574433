"""OFA from a checkpoint: fairseq's `.pt` files, folders in the Hugging Face format, and our own folders.

Everything is strict: a tensor that is missing, extra, misshaped or not finite is reported by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pituning.backbones.ofa.configuration import MAX_RELATIVE_POSITION, OFAConfig
from pituning.backbones.ofa.fairseq import FairseqCheckpoint, load_pickled, read_fairseq
from pituning.backbones.ofa.flags import config_from_fairseq, config_from_hf, parse_fairseq_flags, unsaid
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.names import (
    EMBEDDING,
    TIED,
    FairseqParts,
    split_fairseq,
    state_from_fairseq,
    state_from_hf,
    state_to_fairseq,
)
from pituning.backbones.ofa.positions import image_bucket_matrix, token_bucket_matrix
from pituning.errors import PituningError
from pituning.problems import listed, tensor_problems

__all__ = [
    "Checkpoint",
    "FairseqCheckpoint",
    "FairseqParts",
    "config_from_fairseq",
    "config_from_hf",
    "load_state",
    "model_from",
    "open_checkpoint",
    "parse_fairseq_flags",
    "read_fairseq",
    "split_fairseq",
    "state_from_fairseq",
    "state_from_hf",
    "state_to_fairseq",
]

Format = Literal["fairseq", "huggingface", "pituning"]
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_MAY_DIFFER = 0.01  # of a table of indices: a rounding here and there, not another scheme


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any format, read but not yet a model.

    Attributes:
        config: the backbone's.
        state: the backbone's tensors under our names; for an expert of interpolated LoRA without the projections.
        format: what it was.
        fairseq: the file's own contents, where it was a fairseq checkpoint.
        notes: what a user should know of it.
    """

    path: Path
    config: OFAConfig
    state: Mapping[str, Tensor]
    format: Format
    fairseq: FairseqCheckpoint | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def expert(self) -> Mapping[str, Tensor]:
        """The expert's tensors under fairseq's names; empty where there is none."""
        return {} if self.fairseq is None else self.fairseq.parts().expert


def open_checkpoint(path: str | Path, *, ema: bool | None = None) -> Checkpoint:
    """Read a checkpoint of OFA: a fairseq file, or a folder in the Hugging Face format or ours.

    Args:
        ema: see :func:`read_fairseq`.

    Raises:
        PituningError: if it cannot be read, is not OFA's, or contradicts itself.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    read = read_fairseq(path, ema=ema)
    parts = read.parts()
    config = config_from_fairseq(read.args, read.state)
    notes = [*_unsaid_notes(read.args), *_table_notes(parts.tables, config, path)]
    return Checkpoint(path, config, parts.backbone, "fairseq", read, tuple(notes))


def model_from(
    config: OFAConfig, state: Mapping[str, Tensor], where: str = "the checkpoint"
) -> OFAForConditionalGeneration:
    """A float32 model in eval mode with the given tensors; see :func:`load_state`."""
    model = OFAForConditionalGeneration(config)
    load_state(model, state, where)
    model.eval()
    return model


def load_state(model: OFAForConditionalGeneration, state: Mapping[str, Tensor], where: str = "the checkpoint") -> None:
    """Put tensors into a model, all or none.

    Args:
        state: under our names, without the tied copies.

    Raises:
        PituningError: names every tensor that is missing, extra, misshaped or not finite.
    """
    expected = {k: tuple(t.shape) for k, t in model.state_dict().items() if k not in TIED}
    if problems := tensor_problems(expected, state):
        raise PituningError(f"{where} does not fit the model that its configuration describes:" + listed(problems))
    model.load_state_dict({**state, **dict.fromkeys(TIED, state[EMBEDDING])}, strict=True)


def _open_folder(folder: Path) -> Checkpoint:
    values = _json(folder / "config.json")
    if values.get("model_type") != "ofa":
        raise PituningError(f"{folder / 'config.json'}: model_type is {values.get('model_type')!r}, expected 'ofa'")
    raw = _weights(folder)
    state = state_from_hf(raw)
    if "decoder_entangle_position_embedding" in values:  # no other format has this setting
        return Checkpoint(folder, OFAConfig.from_pretrained(folder), state, "pituning")
    return Checkpoint(folder, config_from_hf(values, raw), state, "huggingface")


def _weights(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors, from one file or from the parts that an index lists."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            places = _json(index).get("weight_map")
            if not isinstance(places, dict):
                raise PituningError(f"{index}: weight_map should be an object, found {type(places).__name__}")
            if strange := [n for n in places.values() if not isinstance(n, str) or Path(n).name != n]:
                raise PituningError(f"{index}: {strange[0]!r} in weight_map is not a file name")
            files = [folder / n for n in sorted(set(places.values()))]
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= _tensors(file)
        return tensors
    raise PituningError(f"{folder} has no weights: expected {' or '.join(WEIGHT_FILES)}, or an index of their parts")


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            loaded: dict[str, Tensor] = safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise PituningError(
                f"{file} cannot be read, it is truncated or not a safetensors file ({error})"
            ) from error
        return loaded
    content = load_pickled(file)
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise PituningError(f"{file} should hold tensors by name and nothing else")
    return {str(k): t.detach() for k, t in content.items()}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PituningError(f"no such file: {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PituningError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise PituningError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _unsaid_notes(args: Mapping[str, Any]) -> list[str]:
    missing = unsaid(args)
    if not missing:
        return []
    return [
        f"the file's arguments lack {', '.join(missing)}; as in the reference, the architecture's defaults were taken"
    ]


def _table_notes(tables: Mapping[str, Tensor], config: OFAConfig, path: Path) -> list[str]:
    """Compare stored tables of indices with those that the model computes.

    Raises:
        PituningError: if the file's are of another scheme.
    """
    notes = []
    for name, table in tables.items():
        kind = name.rpartition(".")[2]
        if kind == "token_rp_bucket":
            size = min(len(table), MAX_RELATIVE_POSITION)
            stored, computed = (
                table[:size, :size],
                token_bucket_matrix(size, config.token_bucket_size, torch.device("cpu")),
            )
        elif kind == "image_rp_bucket":
            side = config.image_bucket_size
            stored, computed = table[1:, 1:], image_bucket_matrix(side, side, side, torch.device("cpu"))
        else:
            continue
        if stored.shape != computed.shape:
            raise PituningError(f"{path}: {name} has shape {list(table.shape)}, which does not fit the position tables")
        wrong = int((stored != computed).sum())
        if wrong > _MAY_DIFFER * computed.numel():
            raise PituningError(
                f"{path}: {wrong} of {computed.numel()} entries of {name} differ from OFA's relative positions, so the "
                "model would compute something else here"
            )
        if wrong:
            notes.append(f"{wrong} of {computed.numel()} entries of {name} are rounded differently here")
    return notes
