"""Experts that are there from earlier: which of them a recipe may use, and whether they are what it asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pituning.experts.expert import CONFIG_FILE, TENSOR_FILE, Expert, file_hash, read_card
from pituning.experts.pool import ExpertPool

STAGE_3 = "stage 3"
"""Entry of a blend's ``training`` that says how a table's recipe chose and blended, and of which experts."""


class Only(ExpertPool):
    """A pool seen through the recipe: only the experts it names."""

    def __init__(self, pool: ExpertPool, names: Sequence[str]) -> None:
        super().__init__(pool.folder)
        self._allowed = set(names)

    def names(self) -> list[str]:
        """Names of those that are there."""
        return [n for n in super().names() if n in self._allowed]


def without_blends(pool: ExpertPool) -> Only:
    """The pool without experts that were blended from others, which would make a result depend on what ran before."""
    return Only(pool, [name for name in pool.names() if not read_card(pool.folder / name).lineage])


def state_of(folder: Path) -> str:
    """Hash of an expert's tensors and configuration as they lie in its folder; its card may change."""
    files = [folder / CONFIG_FILE, folder / TENSOR_FILE]
    return digest_of([file_hash(file) if file.is_file() else "" for file in files])


def digest_of(values: Any) -> str:
    """Ten hexadecimal digits of SHA-256 over plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def differences(expert: Expert, settings: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Where an expert was trained otherwise than a recipe says, each as what was found and what the recipe says.

    What the recipe leaves out, or the card, is not compared: an expert may come from elsewhere.

    Args:
        settings: fields of :class:`pituning.TrainSettings`.
        options: fields of the method's PEFT configuration.
    """
    training = expert.card.training
    if "learning_rate" not in training:  # imported or converted: nobody knows how it was trained
        return []
    config = {**expert.config, **training.get("projection", {})}
    pairs = [(name, training[name], said) for name, said in settings.items() if name in training]
    pairs += [(name, config[name], said) for name, said in options.items() if name in config]
    return [
        f"{name} {_shown(found)}, the recipe says {_shown(said)}" for name, found, said in pairs if _differ(found, said)
    ]


def blend_differences(expert: Expert, section: Mapping[str, Any], members: Mapping[str, str]) -> list[str]:
    """Where a blend was chosen or made otherwise than a recipe says, or of experts that are others by now.

    Args:
        section: the settings of stage 3.
        members: name → :func:`state_of`, of the experts that are there.
    """
    record = expert.card.training.get(STAGE_3, {})
    pairs = [(name, record[name], said) for name, said in section.items() if name in record]
    found = [f"{name} {_shown(there)}, the recipe says {_shown(said)}" for name, there, said in pairs if there != said]
    stale = [name for name, state in record.get("members", {}).items() if members.get(name, state) != state]
    return found + [f"expert {name!r} as it was then; it was trained again since" for name in stale]


def _differ(found: Any, said: Any) -> bool:
    """Module names are stored in an order of their own."""
    if isinstance(found, list) and isinstance(said, list | tuple):
        return sorted(map(str, found)) != sorted(map(str, said))
    return bool(found != said)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)
