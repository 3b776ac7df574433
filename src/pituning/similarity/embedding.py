"""Task embeddings: the Fisher diagonal of an expert on its task, with what is needed to trust and compare it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import DataError, ExpertError
from pituning.experts.expert import Expert, tensor_hash
from pituning.experts.pool import ExpertPool
from pituning.interpolation.build import build_mixture
from pituning.interpolation.collapse import collapse
from pituning.similarity.compact import Compact, compact_fisher
from pituning.similarity.fisher import fisher_diagonal
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
        mean_loss: −log p(target) at the reference point, in nats per example.
        split_half: cosine between the estimates from either half of the examples, averaged over tensors.
    """

    fisher: Mapping[str, Tensor]
    task: str
    samples: int
    labels: str
    reference: str
    reference_hash: str
    mean_loss: float
    split_half: float

    def compact(self) -> Compact:
        """The embedding as at most 256 numbers, float32, of unit length; see :func:`compact_fisher`."""
        return compact_fisher(self.fisher)

    def save(self, folder: Path) -> Path:
        """Write into an expert's folder, the compact embedding in the file's header beside the full one."""
        path = folder / _file_name(self.reference)
        record = {k: v for k, v in asdict(self).items() if k != "fisher"}
        temporary = path.with_suffix(".partial")
        tensors = {k: t.float().contiguous() for k, t in self.fisher.items()}
        metadata = {"pituning": json.dumps(record), "compact": json.dumps(self.compact().tolist())}
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, folder: Path, reference: str = "own") -> TaskEmbedding:
        """Read an embedding from an expert's folder.

        Raises:
            ExpertError: if it is missing or broken.
        """
        path = folder / _file_name(reference)
        if not path.is_file():
            raise ExpertError(f"{folder.name!r} has no task embedding at the {reference} reference point ({path.name})")
        try:
            with safetensors.safe_open(path, "pt") as file:
                record = json.loads((file.metadata() or {})["pituning"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ExpertError(f"{path} cannot be read ({error})") from error
        known = {f.name for f in fields(cls)}
        return cls(fisher=tensors, **{k: v for k, v in record.items() if k in known})


def load_compact(folder: Path, reference: str = "own") -> Compact:
    """Read the compact embedding of an expert's folder, from the file's header alone where it is stored there.

    Files of versions that did not store it are read as a whole.

    Raises:
        ExpertError: if the embedding is missing or broken.
    """
    path = folder / _file_name(reference)
    if path.is_file():
        try:
            with safetensors.safe_open(path, "pt") as file:
                stored = (file.metadata() or {}).get("compact")
            if stored is not None:
                return np.asarray(json.loads(stored), dtype=np.float32)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ExpertError(f"{path} cannot be read ({error})") from error
    return TaskEmbedding.load(folder, reference).compact()


def embed_task(
    backbone: Backbone,
    expert: Expert,
    task: Task,
    *,
    reference: str = "own",
    labels: str = "true",
    max_examples: int = MAX_EXAMPLES,
) -> TaskEmbedding:
    """Embed a task at an expert: the task's own one, or the shared reference.

    Args:
        max_examples: at most so many training examples, a fixed sample.

    Raises:
        DataError, RefusedError, ExpertError: as :func:`pituning.similarity.fisher.fisher_diagonal`.
    """
    examples = task.split("train", max_examples)
    with torch.autocast(backbone.device.type, enabled=False):  # a Fisher in mixed precision would not be exact
        estimate = fisher_diagonal(backbone, expert, examples, labels=labels)
    return TaskEmbedding(
        fisher={k: f.float().cpu() for k, f in estimate.mean().items()},
        task=task.name,
        samples=estimate.samples,
        labels=labels,
        reference=reference,
        reference_hash=tensor_hash(expert.tensors),
        mean_loss=estimate.loss / estimate.samples,
        split_half=estimate.split_half(),
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
    mean = collapse(mixture, config, card).expert.with_card(
        name=f"mean of {len(experts)} experts", task="", metrics={}, training=model, choices=(), shots=None,
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
    at = expert if reference == "own" else shared_reference(pool, expert.card.method)
    folder = pool.folder / name
    if not refresh and (folder / _file_name(reference)).is_file():
        stored = TaskEmbedding.load(folder, reference)
        if stored.reference_hash == tensor_hash(at.tensors):
            return stored
    if expert.card.task not in task_names():
        point = "" if reference == "shared" else f" --reference {reference}"
        raise DataError(
            f"expert {name!r} has no stored embedding at the {reference} reference point, and the data of its task "
            f"{expert.card.task!r} are unknown here: run `pituning embed {name}{point} --train-file … [--task-kind grounding]` "
            "first"
        )
    embedding = embed_task(backbone, at, load_task(expert.card.task, data=data), reference=reference)
    embedding.save(folder)
    return embedding


def _file_name(reference: str) -> str:
    return "task_embedding.safetensors" if reference == "own" else f"task_embedding.{reference}.safetensors"
