"""Which run a folder's checkpoints belong to, so that no other run goes on from them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from operator import eq
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import PituningError, RefusedError
from pituning.example import Example
from pituning.interpolation.mixture import Mixture
from pituning.problems import listed

RUN_FILE = "run.json"
"""Beside the checkpoints: what makes the run the one that it is."""
LENGTH = ("steps", "epochs")  # a longer run goes on from a shorter one
_ANY_VERSION = ("peft_version",)
_TENSORS = "tensors"
_ROUNDING = 1e-4
"""Of a tensor's norm."""


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, the latest last."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def steps_of(checkpoint: Path) -> int:
    """The steps that were taken before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def require_folder(folder: str | Path | None, resume: bool) -> None:
    """Raise unless a run can keep its checkpoints there: its own, or none.

    Raises:
        PituningError: for a run that is to be resumed from nowhere.
        RefusedError: if the folder holds checkpoints and the run is not to go on from them.
    """
    if resume and folder is None:
        raise PituningError("resume=True needs the folder with the checkpoints: give folder=…, or leave resume out")
    if folder is not None and not resume and (found := checkpoints(folder)):
        raise RefusedError(
            f"{folder} holds {found[-1].name}: go on from it with resume, take another folder, or delete the checkpoints"
        )


def identity(
    backbone: Backbone,
    mixture: Mixture,
    config: Mapping[str, Any],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run comes from, as plain JSON values: another of these is another run.

    Args:
        mixture: before its first step.
        settings: how it is trained; its length takes no part.
    """
    coefficients, device = mixture.coefficients, backbone.device.type
    tensors = {**dict(mixture.named_parameters()), **dict(mixture.named_buffers())}
    values = {
        "backbone": {
            "fingerprint": backbone.fingerprint,
            "max_length": getattr(backbone, "max_length", None),
            "autocast": torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            **backbone.prompting,
        },
        "training examples": _digest(examples),
        "held-out examples": _digest(held_out),
        "start": {
            "train": mixture.train_mode,
            "coefficients": coefficients.kind,
            "temperature": coefficients.temperature,
            "scale": coefficients.scale,
        },
        _TENSORS: {name: _summary(tensor) for name, tensor in sorted(tensors.items())},
        "adapter configuration": {k: v for k, v in config.items() if k not in _ANY_VERSION},
        "settings": {k: v for k, v in settings.items() if k not in LENGTH},
    }
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def begin(folder: str | Path, run: Mapping[str, Any], defaults: Mapping[str, Any]) -> Path | None:
    """The checkpoint that a run goes on from; where there is none, write down whose the next ones will be.

    Args:
        run: its :func:`identity`.
        defaults: of settings that a run of an earlier version did not know.

    Raises:
        RefusedError: if the checkpoints are another run's; it says in what the two differ.
    """
    folder, path = Path(folder), Path(folder) / RUN_FILE
    found = checkpoints(folder)
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        return None
    if not path.is_file():
        raise RefusedError(
            f"{folder} holds {found[-1].name}, but no {RUN_FILE} that says which run it is of (it is from an earlier version "
            "of pituning, or was copied there): take another folder, or delete the checkpoints"
        )
    recorded = json.loads(path.read_text(encoding="utf-8"))
    recorded["settings"] = {**{k: v for k, v in defaults.items() if k not in LENGTH}, **recorded["settings"]}
    if problems := list(_differences(recorded, run)):
        raise RefusedError(
            f"{folder} holds {found[-1].name} of another run, so that this one cannot go on from it; resume with what that one "
            f"had, or take another folder:{listed(problems)}"
        )
    return found[-1]


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for part in now:
        before, after = then.get(part, {}), now[part]
        same = _alike if part == _TENSORS else eq
        wrong = [key for key in sorted(before.keys() | after.keys()) if not same(before.get(key), after.get(key))]
        if part == _TENSORS and len(wrong) > 1:
            yield f"{len(wrong)} of {len(after)} {part} of the start"
            continue
        for key in wrong:
            yield f"{part}: {key} was {_shown(before.get(key))}, and is {_shown(after.get(key))}"


def _summary(tensor: Tensor) -> dict[str, Any]:
    """What tells tensors apart, and is the same where another machine computed starting weights with other roundings."""
    values = tensor.detach().cpu().double()
    return {"shape": list(tensor.shape), "norm": float(values.norm()), "sum": float(values.sum())}


def _alike(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Whether two summaries of a tensor are equal up to what roundings may do; there may be none."""
    if then is None or now is None:
        return then is now
    tolerance = _ROUNDING * then["norm"]
    close = (math.isclose(then[name], now[name], rel_tol=0, abs_tol=tolerance) for name in ("norm", "sum"))
    return then["shape"] == now["shape"] and all(close)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(examples: Sequence[Example]) -> dict[str, Any]:
    """Count and hash of examples; their pictures, which may be many gigabytes, take part by the examples' ids."""
    digest = hashlib.sha256()
    answers: dict[tuple[str, ...], int] = {}  # thousands of closed answers are hashed once
    for e in examples:
        choices = answers.setdefault(e.choices, len(answers))
        digest.update(repr((e.id, e.texts, e.prompt, e.target, choices, e.box, e.answers, e.weight)).encode())
        digest.update(repr((e.decoder_prompt, e.before_target, e.augmentation)).encode())
    digest.update(repr(list(answers)).encode())
    return {"count": len(examples), "hash": digest.hexdigest()[:16]}
