"""A Fisher estimate over as many examples as it needs, by as many processes as there are, and resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from accelerate import PartialState
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import DataError
from pituning.example import Example
from pituning.experts.expert import Expert, tensor_hash
from pituning.similarity.fisher import FisherEstimate, fisher_diagonal

FIRST, MOST = 64, 1024
AGREEMENT = 0.95
PARTIAL_FILE = "fisher.partial.safetensors"
Ranking = Callable[[Mapping[str, Tensor]], Sequence[str]]
"""From a Fisher diagonal by tensor to the names of the most similar tasks, the most similar first."""


@dataclass(frozen=True)
class Settled:
    """An estimate, and how it came to rest.

    Attributes:
        history: examples → (the ranking then, cosine between the halves).
        settled: whether the rule of :func:`settled_fisher` was fulfilled; False where the examples ran out first.
    """

    estimate: FisherEstimate
    history: Mapping[int, tuple[tuple[str, ...], float]]
    settled: bool


def settled_fisher(
    backbone: Backbone,
    expert: Expert,
    examples: Sequence[Example],
    ranking: Ranking | None = None,
    *,
    first: int = FIRST,
    most: int = MOST,
    agreement: float = AGREEMENT,
    labels: str = "true",
    batch_size: int = 32,
    folder: str | Path | None = None,
) -> Settled:
    """Double the examples until the ranking rests: unchanged over two doublings, and the two halves agree.

    Args:
        examples: a fixed order; prefixes of it are used.
        ranking: what the embedding is for, such as the three most similar tasks; without it all ``most`` examples are used.
        first, most: examples at first, and at most.
        agreement: least cosine between the estimates from either half of the examples, averaged over tensors.
        folder: where the sums are kept after each doubling; a run that is begun again there goes on from them. They are of no
            use to another expert, other examples or other labels, and are not taken then.

    Raises:
        DataError, RefusedError, ExpertError: as :func:`pituning.similarity.fisher.fisher_diagonal`.
    """
    if not examples:
        raise DataError("there are no examples to estimate the Fisher information on")
    most = min(most, len(examples))
    identity = _identity(expert, examples[:most], labels)
    total = _read(folder, identity)
    history: dict[int, tuple[tuple[str, ...], float]] = {}
    size = min(first, most)
    while True:
        if total is None or total.samples < size:
            done = 0 if total is None else total.samples
            numbers = range(done, size)
            part = fisher_across_processes(
                backbone, expert, [examples[n] for n in numbers], labels=labels, batch_size=batch_size, offset=done
            )
            total = part if total is None else total + part
            _write(folder, identity, total)
        history[total.samples] = tuple(ranking(total.mean())) if ranking is not None else (), total.split_half()
        rankings = [r for r, _ in list(history.values())[-3:]]
        at_rest = (
            ranking is not None
            and len(rankings) == 3
            and len(set(rankings)) == 1
            and history[total.samples][1] >= agreement
        )
        if at_rest or total.samples >= most:
            return Settled(total, history, at_rest)
        size = min(2 * max(size, total.samples), most)


def fisher_across_processes(
    backbone: Backbone,
    expert: Expert,
    examples: Sequence[Example],
    *,
    labels: str = "true",
    batch_size: int = 32,
    offset: int = 0,
) -> FisherEstimate:
    """The Fisher diagonal over all examples, each process of a distributed run taking its own share of them.

    Process r of R takes examples r, r + R, …, so none is counted twice or left out. All processes get the sum, in float64,
    which does not depend on R but for rounding.

    Args:
        offset: place of the first example in a larger sample.
    """
    state = PartialState()
    mine = range(state.process_index, len(examples), state.num_processes)
    if mine:
        own = fisher_diagonal(
            backbone, expert, [examples[n] for n in mine],
            labels=labels, batch_size=batch_size, numbers=[offset + n for n in mine],
        )  # fmt: skip
    else:
        zeros = {
            k: torch.zeros(t.shape, dtype=torch.float64, device=backbone.device) for k, t in expert.tensors.items()
        }
        own = FisherEstimate(zeros, {k: z.clone() for k, z in zeros.items()}, 0, 0.0)
    if state.num_processes == 1:
        return own
    counts = torch.tensor([own.samples, own.loss], dtype=torch.float64, device=backbone.device)
    for tensor in (*(half[k] for half in (own.even, own.odd) for k in sorted(half)), counts):
        torch.distributed.all_reduce(tensor)
    return FisherEstimate(own.even, own.odd, int(counts[0]), float(counts[1]))


def _identity(expert: Expert, examples: Sequence[Example], labels: str) -> str:
    digest = hashlib.sha256(f"{tensor_hash(expert.tensors)} {labels}".encode())
    for example in examples:
        digest.update(repr((example.id, example.prompt, example.target, example.choices)).encode())
    return digest.hexdigest()[:16]


def _read(folder: str | Path | None, identity: str) -> FisherEstimate | None:
    """Kept sums of the very same estimate; ``None`` where there are none that can be used."""
    path = Path(folder) / PARTIAL_FILE if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["pituning"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError):
        return None
    if record.get("identity") != identity:
        return None
    halves = [
        {k.removeprefix(f"{h}/"): t for k, t in tensors.items() if k.startswith(f"{h}/")} for h in ("even", "odd")
    ]
    return FisherEstimate(halves[0], halves[1], int(record["samples"]), float(record["loss"]))


def _write(folder: str | Path | None, identity: str, estimate: FisherEstimate) -> None:
    if folder is None or not PartialState().is_main_process:
        return
    path = Path(folder) / PARTIAL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = (("even", estimate.even), ("odd", estimate.odd))
    tensors = {f"{half}/{k}": t.cpu().contiguous() for half, sums in halves for k, t in sums.items()}
    record = {"identity": identity, "samples": estimate.samples, "loss": estimate.loss}
    temporary = path.with_suffix(".writing")
    safetensors.torch.save_file(tensors, temporary, metadata={"pituning": json.dumps(record)})
    temporary.replace(path)
