"""What every backbone family offers: per-example loss, choice scoring, generation, and a place to put an expert."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pituning.errors import PituningError, RefusedError
from pituning.example import Example

if TYPE_CHECKING:
    from peft import PeftModel

Batch = Mapping[str, Any]
"""A collated batch: tensors by name, first dimension = examples, plus what the family needs besides."""


class Backbone(ABC):
    """A frozen foundation model with its processor.

    The model is always in eval mode and none of its own parameters requires a gradient. Example n's loss and scores do
    not depend on the other examples of its batch.

    Attributes:
        name: how the backbone was asked for, such as ``"minilm"`` or a hub id.
        model: the frozen ``nn.Module``.
        fingerprint: hash of configuration, weights and dtype (:func:`fingerprint_of`); experts are tied to it.
    """

    family: str = ""

    hub_names: Mapping[str, str] = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, *, device: str | torch.device = "cpu") -> None:
        self.name = name
        # Any: transformers adds methods that nn.Module does not declare
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint_of(self.model)
        self._occupant: PeftModel | None = None

    @property
    def hub_name(self) -> str:
        """The id by which a user of transformers loads the same model; for a local folder, its last part."""
        return self.hub_names.get(self.name, Path(self.name).name if Path(self.name).is_dir() else self.name)

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @abstractmethod
    def adaptable(self, method: str) -> list[str]:
        """Names (suffixes, as PEFT's ``target_modules`` wants them) of the modules that ``method`` adapts by default."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Turn examples into a padded batch on the backbone's device."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Per-example −log p(target | input), shape ``[batch]``, in nats, summed over target tokens."""

    @abstractmethod
    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """Unnormalised log-probability of every choice, shape ``[batch, choices]``; softmax over it gives p(choice)."""

    def generate(self, batch: Batch, **options: Any) -> list[str]:
        """Free-form answers, one per example.

        Raises:
            RefusedError: for families that cannot generate.
        """
        raise RefusedError(f"backbone {self.name!r} is of the {self.family!r} family and cannot generate text")

    @contextmanager
    def occupied_by(self, peft_model: PeftModel) -> Iterator[None]:
        """Mark that an expert's layers sit in the model, so that a second one is refused and labels can avoid it."""
        self.require_free()
        self._occupant = peft_model
        try:
            yield
        finally:
            self._occupant = None

    def require_free(self) -> None:
        """Raise unless the bare model is free of any expert."""
        if self._occupant is not None:
            raise PituningError(
                f"backbone {self.name!r} already carries an expert; leave the first `attached(...)` block before "
                "attaching another one"
            )

    def bare(self) -> Any:
        """Context in which the model runs without the expert that may be attached to it."""
        return nullcontext() if self._occupant is None else self._occupant.disable_adapter()

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        return f"{type(self).__name__}({self.name!r}, {parameters / 1e6:.1f}M parameters, {self.fingerprint})"


def fingerprint_of(model: nn.Module) -> str:
    """Hash of a model's configuration, weights and dtype: 16 hexadecimal digits of SHA-256.

    Only configuration entries that change what the model computes take part, so that a copy in another folder or
    a newer transformers release has the same fingerprint.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    settings = config.to_diff_dict() if config is not None else {}
    for key in (
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "_attn_implementation",
    ):
        settings.pop(key, None)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def common_choices(examples: Sequence[Example]) -> tuple[str, ...]:
    """The closed answer set that all examples of a batch share; empty where they have none.

    Raises:
        RefusedError: if the examples come from tasks with different answer sets.
    """
    sets = {example.choices for example in examples}
    if len(sets) > 1:
        raise RefusedError("a batch mixes examples with different answer choices; batch the tasks separately")
    return next(iter(sets), ())
