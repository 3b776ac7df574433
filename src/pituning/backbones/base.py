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

from pituning.errors import DataError, PituningError, RefusedError
from pituning.example import Box, Example

if TYPE_CHECKING:
    from peft import PeftModel

Batch = Mapping[str, Any]
"""A collated batch: tensors by name, first dimension = examples, plus what the family needs besides."""

IMAGE_BATCH_SIZE = 16  # 64 pictures of 480 pixels would take gigabytes in the first convolutions


PACKAGED: Mapping[str, Path] = {"ofa-nano": Path(__file__).parents[1] / "data" / "ofa_nano" / "model"}
"""Backbones whose weights are part of this package, and on no hub: name → folder."""


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

    searches_choices: bool = False
    """Whether :meth:`generate` takes ``choices=``, and then writes nothing but one of them."""

    hub_names: Mapping[str, str] = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, *, device: str | torch.device = "cpu") -> None:
        self.name = name
        # Any: transformers adds methods that nn.Module does not declare
        placed = (
            model if hasattr(model, "hf_device_map") else model.to(device)
        )  # accelerate has placed it where it may be
        self.model: Any = placed.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint_of(self.model)
        self._occupant: PeftModel | None = None

    @property
    def hub_name(self) -> str:
        """The id by which a user of transformers loads the same model; for a local folder, its last part."""
        return self.hub_names.get(self.name, Path(self.name).name if Path(self.name).is_dir() else self.name)

    @property
    def prompting(self) -> dict[str, Any]:
        """Settings besides model and tokenizer that shape what the model reads: an expert is right under these only."""
        return {}

    @property
    def record(self) -> dict[str, Any]:
        """What an expert's card says of the backbone besides its name and fingerprint."""
        prompting = {"prompting": self.prompting} if self.prompting else {}
        return {"family": self.family, "architecture": self.model.config.model_type, **prompting}

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
    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Per-example −log p(target | input), shape ``[batch]``, in nats, summed over target tokens.

        Args:
            label_smoothing: ε: each token's loss is (1 − ε) times this, plus ε times the mean over the other tokens that
                can stand there. For training; everything else is measured with 0.

        Raises:
            DataError: if an example has no target.
        """

    @abstractmethod
    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """Unnormalised log-probability of every choice, shape ``[batch, choices]``; softmax over it gives p(choice)."""

    def generate(self, batch: Batch, **options: Any) -> list[str]:
        """Free-form answers, one per example.

        Raises:
            RefusedError: for families that cannot generate.
        """
        raise RefusedError(f"backbone {self.name!r} is of the {self.family!r} family and cannot generate text")

    def locate(self, batch: Batch, **options: Any) -> list[Box | None]:
        """One box per example, in pixels of its own image, or ``None`` where the answer is no box.

        Raises:
            RefusedError: for families that cannot.
        """
        raise RefusedError(f"backbone {self.name!r} cannot locate anything in a picture; an OFA backbone can")

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


def require_text_only(backbone: Backbone, examples: Sequence[Example]) -> None:
    """Raise if an example has an image, for backbones that would leave it unseen.

    Raises:
        RefusedError: names the first example with an image.
    """
    for example in examples:
        if example.image is not None:
            raise RefusedError(
                f"example {example.id!r} has an image, and backbone {backbone.name!r} reads text alone; use an OFA backbone"
            )


def require_targets(examples: Sequence[Example]) -> None:
    """Raise if an example has no right answer: some backbones would take that for an empty one.

    Raises:
        DataError: names the first such example.
    """
    for example in examples:
        if not example.target:
            raise DataError(f"example {example.id!r} has no answer, so it can be answered, but not learned or scored")


def common_choices(examples: Sequence[Example]) -> tuple[str, ...]:
    """The closed answer set that all examples of a batch share; empty where they have none.

    Raises:
        RefusedError: if the examples come from tasks with different answer sets.
    """
    sets = {example.choices for example in examples}
    if len(sets) > 1:
        raise RefusedError("a batch mixes examples with different answer choices; batch the tasks separately")
    return next(iter(sets), ())


def bias_width(module: nn.Module) -> int | None:
    """Length of the bias that a Linear (GPT-2: Conv1D) or norm module has or could have; ``None`` for any other module.

    Norms over channels (BatchNorm, GroupNorm, InstanceNorm) do not count: their bias is not along the last dimension, and
    BatchNorm belongs to a frozen image stem.
    """
    if isinstance(module, nn.Linear):
        return module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's Linear
        return int(module.nf)  # type: ignore[arg-type]
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return None
    weight = getattr(module, "weight", None)
    if type(module).__name__.endswith("Norm") and isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return len(weight)
    return None


def normed_and_linear(model: nn.Module, skip: Sequence[str] = ()) -> list[str]:
    """The Linear and norm modules that have a bias, by the shortest suffixes of their names that select no others.

    Args:
        skip: suffixes of names to leave out, such as modules that take no part in what is computed.

    Raises:
        PituningError: if a module has no such suffix.
    """
    modules = dict(_bare_modules(model))
    inside = [f"{n}." for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)]  # reads its weights itself
    chosen = [
        name
        for name, module in modules.items()
        if bias_width(module) is not None
        and getattr(module, "bias", None) is not None
        and not any(name == s or name.endswith(f".{s}") for s in skip)
        and not any(name.startswith(i) for i in inside)
    ]
    others = {suffix for name in modules.keys() - set(chosen) for suffix in _suffixes(name)}
    return list(dict.fromkeys(_only_suffix(name, others) for name in chosen))


def biased_modules(backbone: Backbone, skip: Sequence[str] = ()) -> list[str]:
    """What BitFit adapts: :func:`normed_and_linear` of a backbone's model.

    Raises:
        RefusedError: for models that have no bias anywhere, such as T5.
    """
    names = normed_and_linear(backbone.model, skip)
    if not names:
        raise RefusedError(
            f"backbone {backbone.name!r} ({type(backbone.model).__name__}) has no bias that BitFit could train: none of its "
            "Linear and norm modules has one; use lora or bottleneck, or name modules to give a bias to in "
            "target_modules=[...]"
        )
    return names


def _bare_modules(module: Any, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` as they are without an expert: a tuner layer stands for what it wraps."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for child_name, child in module.named_children():
        yield from _bare_modules(child, f"{name}.{child_name}" if name else child_name, seen)


def _only_suffix(name: str, others: set[str]) -> str:
    for suffix in _suffixes(name):
        if suffix not in others:
            return suffix
    raise PituningError(
        f"module {name!r} has no suffix that selects it alone; give target_modules as a regular expression"
    )


def _suffixes(name: str) -> list[str]:
    """``"a.b.c"`` to ``["c", "b.c", "a.b.c"]``."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
