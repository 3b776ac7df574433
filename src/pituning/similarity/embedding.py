"""Task embeddings: the Fisher diagonal of an expert on its task, with what is needed to trust and compare it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import DataError, ExpertError
from pituning.experts.expert import Expert, tensor_hash
from pituning.experts.pool import ExpertPool
from pituning.interpolation.build import build_mixture, prompting_of
from pituning.interpolation.collapse import collapse
from pituning.similarity.compact import Anchor, Compact, compact_fisher
from pituning.similarity.settling import PARTIAL_FILE, Ranking, settled_fisher
from pituning.tasks.task import Task, load_task, task_names

REFERENCES = ("own", "shared")
MAX_EXAMPLES = 256
_REFERENCE_FOLDER = ".reference"


@dataclass(frozen=True)
class TaskEmbedding:
    """Diagonal Fisher information per tensor.

    Attributes:
        fisher: float32 tensors under PEFT's file key names.
        samples: number of examples it was estimated on.
        labels: label source, ``"true"`` or ``"model"``.
        reference: reference point: ``"own"`` (the task's own expert, the paper) or ``"shared"`` (one expert for all).
        reference_hash: hash of the reference point's tensors; shared embeddings compare only if it is equal.
        mean_loss: −log p(target) at the reference point, in nats per example; NaN where an example has no target.
        split_half: cosine between the estimates from either half of the examples, averaged over tensors.
        settled: whether the ranking that it is for had come to rest before the examples ran out; None where there was none.
    """

    fisher: Mapping[str, Tensor]
    task: str
    samples: int
    labels: str
    reference: str
    reference_hash: str
    mean_loss: float
    split_half: float
    settled: bool | None = None

    def compact(self, anchor: Anchor | None = None) -> Compact:
        """The embedding in 1 KB, uint8 ``[1024]``; see :func:`compact_fisher`."""
        return compact_fisher(self.fisher, anchor)

    def save(self, folder: Path) -> Path:
        """Write into an expert's folder.

        Raises:
            ExpertError: if a tensor is not finite.
        """
        path = folder / _file_name(self.reference)
        _require_finite(self.fisher, f"the task embedding of {self.task!r}")
        record = {k: v for k, v in asdict(self).items() if k != "fisher"}
        temporary = path.with_suffix(".partial")
        tensors = {k: t.float().contiguous() for k, t in self.fisher.items()}
        safetensors.torch.save_file(tensors, temporary, metadata={"pituning": json.dumps(record)})
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, folder: Path, reference: str = "own") -> TaskEmbedding:
        """Read an embedding from an expert's folder.

        Raises:
            ExpertError: if it is missing or broken, or a tensor is not finite.
        """
        path = folder / _file_name(reference)
        if not path.is_file():
            raise ExpertError(f"{folder.name!r} has no task embedding at the {reference} reference point ({path.name})")
        try:
            with safetensors.safe_open(path, "pt") as file:
                record = json.loads((file.metadata() or {})["pituning"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            known = {f.name for f in fields(cls)}
            embedding = cls(fisher=tensors, **{k: v for k, v in record.items() if k in known})
        except (safetensors.SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ExpertError(f"{path} cannot be read ({error}); embed the expert again") from error
        _require_finite(tensors, str(path))
        return embedding


@dataclass(frozen=True)
class FlatFisher:
    """All tensors of an embedding in one array, for many comparisons: a few operations each, and not a few per tensor.

    Attributes:
        values: float64, tensor after tensor in the order of their keys.
        shapes: the tensors' shapes by key, in that order.
        starts: place in ``values`` where each tensor begins.
    """

    values: npt.NDArray[np.float64]
    shapes: Mapping[str, tuple[int, ...]]
    starts: npt.NDArray[np.intp]

    @classmethod
    def load(cls, folder: Path, reference: str = "own") -> FlatFisher:
        """Read the tensors alone of an embedding from an expert's folder.

        Raises:
            ExpertError: if it is missing or broken.
        """
        path = folder / _file_name(reference)
        try:
            tensors = safetensors.numpy.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ExpertError(f"{path} cannot be read ({error})") from error
        parts = [tensors[key] for key in sorted(tensors)]
        if not all(part.size for part in parts) or not parts:
            raise ExpertError(f"{path} holds no tensor, or an empty one; embed the expert again")
        starts = np.cumsum([0, *(part.size for part in parts[:-1])])
        values = np.concatenate([part.ravel() for part in parts]).astype(np.float64)
        return cls(values, {key: tensors[key].shape for key in sorted(tensors)}, starts)

    def cosine(self, other: FlatFisher) -> float:
        """``fisher-cosine``: the cosine of each tensor, averaged over those that are zero on neither side.

        Raises:
            ExpertError: if they are of different tensors, or the cosine is not finite.
        """
        if self.shapes != other.shapes:
            raise ExpertError(f"embeddings of tensors {dict(self.shapes)} and {dict(other.shapes)} cannot be compared")
        products = ((self.values, other.values), (self.values, self.values), (other.values, other.values))
        inner, left, right = (np.add.reduceat(a * b, self.starts) for a, b in products)
        both = (left != 0) & (right != 0)
        value = float((inner[both] / np.sqrt(left[both] * right[both])).mean()) if both.any() else 0.0
        if not np.isfinite(value):
            raise ExpertError("an embedding holds values that are NaN or infinite; embed the expert again")
        return value


def embed_task(
    backbone: Backbone,
    expert: Expert,
    task: Task,
    *,
    reference: str = "own",
    labels: str = "true",
    max_examples: int = MAX_EXAMPLES,
    ranking: Ranking | None = None,
    folder: Path | None = None,
) -> TaskEmbedding:
    """Embed a task at an expert: the task's own one, or the shared reference.

    In a distributed run (``accelerate launch``) each process takes its share of the examples.

    Args:
        max_examples: at most so many training examples, a fixed sample.
        ranking: from a Fisher diagonal to the names of the most similar tasks: the sample is doubled until they stay the same,
            as in :func:`pituning.similarity.settling.settled_fisher`.
        folder: where unfinished sums are kept, so that a run that is begun again goes on.

    Raises:
        DataError, RefusedError, ExpertError: as :func:`pituning.similarity.fisher.fisher_diagonal`; ExpertError also if the
            Fisher of a tensor is not finite.
    """
    examples = task.split("train", max_examples)
    if ranking is not None:  # prefixes are used, and a file may be sorted
        examples = sorted(examples, key=lambda e: hashlib.sha256(e.id.encode()).digest())
    with torch.autocast(backbone.device.type, enabled=False):  # a Fisher in mixed precision would not be exact
        found = settled_fisher(backbone, expert, examples, ranking, labels=labels, most=max_examples, folder=folder)
    estimate = found.estimate
    fisher = {k: f.float().cpu() for k, f in estimate.mean().items()}
    _require_finite(fisher, f"the Fisher information of expert {expert.name!r} on task {task.name!r}")
    return TaskEmbedding(
        fisher=fisher,
        task=task.name,
        samples=estimate.samples,
        labels=labels,
        reference=reference,
        reference_hash=tensor_hash(expert.tensors),
        mean_loss=estimate.loss / estimate.samples,
        split_half=estimate.split_half(),
        settled=found.settled if ranking is not None else None,
    )


def shared_reference(pool: ExpertPool, method: str) -> Expert:
    """The pool's stored reference expert: the mean of its experts of one method, made once and then kept.

    The mean is not zero, so that no gradient vanishes identically there (at a zero-initialised LoRA those of A do).

    Raises:
        ExpertError: if the pool has no expert of the method.
    """
    folder = pool.folder / _REFERENCE_FOLDER / method
    if folder.is_dir():
        return Expert.load(folder)
    experts = [e for e in pool if e.card.method == method]
    if not experts:
        raise ExpertError(f"pool {pool.folder} has no {method!r} expert to make a reference from")
    mixture, config = build_mixture(experts, train="none", granularity="model")
    card = experts[0].card
    model = {k: v for e in experts for k, v in e.card.training.items() if k in ("family", "architecture")}
    model |= prompting_of(experts)
    starts, licences = ({getattr(e.card, name) for e in experts} for name in ("init_hash", "licence"))
    kept = len(starts) == 1 and config == experts[0].config  # LoRA's factors are stacked, in coordinates of their own
    mean = collapse(mixture, config, card).expert.with_card(
        name=f"mean of {len(experts)} experts", task="", metrics={}, training=model, choices=(), shots=None,
        init_hash=card.init_hash if kept else "", licence=card.licence if len(licences) == 1 else "",
        lineage=tuple({"name": e.name, "weight": 1 / len(experts)} for e in experts),
    )  # fmt: skip
    mean.save(folder)
    return mean


def pool_embedding(
    backbone: Backbone,
    pool: ExpertPool,
    name: str,
    reference: str,
    *,
    data: str | Path | None = None,
    refresh: bool = False,
) -> TaskEmbedding:
    """The embedding of one of the pool's experts, computed from its task's data where it is not stored yet.

    Raises:
        DataError: if it is not stored and the task is none that :func:`load_task` knows.
    """
    expert = pool.load(name)
    at, folder = _reference_point(pool, expert, reference), pool.folder / name
    if not refresh and (stored := _stored(folder, reference, at)) is not None:
        return stored
    if expert.card.task not in task_names():
        point = "" if reference == "shared" else f" --reference {reference}"
        raise DataError(
            f"expert {name!r} has no stored embedding at the {reference} reference point, and the data of its task "
            f"{expert.card.task!r} are unknown here: run `pituning embed {name}{point} --train-file … [--task-kind grounding]` "
            "first"
        )
    unfinished = pool.folder / _REFERENCE_FOLDER / "unfinished" / f"{name}.{reference}"
    embedding = embed_task(backbone, at, load_task(expert.card.task, data=data), reference=reference, folder=unfinished)
    embedding.save(folder)
    (unfinished / PARTIAL_FILE).unlink(missing_ok=True)
    return embedding


def has_embedding(pool: ExpertPool, name: str, reference: str) -> bool:
    """Whether :func:`pool_embedding` of one of the pool's experts is stored, and has nothing to compute."""
    expert = pool.load(name)
    if reference == "shared" and not (pool.folder / _REFERENCE_FOLDER / expert.card.method).is_dir():
        return False  # to look must not make the reference, which is made of the experts that are there
    return _stored(pool.folder / name, reference, _reference_point(pool, expert, reference)) is not None


def _reference_point(pool: ExpertPool, expert: Expert, reference: str) -> Expert:
    return expert if reference == "own" else shared_reference(pool, expert.card.method)


def _stored(folder: Path, reference: str, at: Expert) -> TaskEmbedding | None:
    """The embedding in an expert's folder, if there is one and it was made at this reference point."""
    if not (folder / _file_name(reference)).is_file():
        return None
    stored = TaskEmbedding.load(folder, reference)
    return stored if stored.reference_hash == tensor_hash(at.tensors) else None


def _require_finite(fisher: Mapping[str, Tensor], what: str) -> None:
    for key, tensor in fisher.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise ExpertError(
                f"{what} is not finite in tensor {key} {list(tensor.shape)}: {bad} values are NaN or infinite; check the "
                "expert, and embed it again"
            )


def _file_name(reference: str) -> str:
    return "task_embedding.safetensors" if reference == "own" else f"task_embedding.{reference}.safetensors"
