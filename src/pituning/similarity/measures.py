"""Similarities between tasks: a number for (target, candidate), larger = more helpful."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pituning.errors import ExpertError, RefusedError
from pituning.experts.expert import Expert, tensor_hash
from pituning.interpolation.build import is_lora, lora_factors
from pituning.interpolation.mixture import LowRank
from pituning.methods.bitfit import PEFT_TYPE as BITFIT
from pituning.similarity.embedding import TaskEmbedding

FISHER_KINDS = ("fisher", "fisher-paper", "fisher-cosine")
KINDS = (*FISHER_KINDS, "weights", "score")


def fisher_similarity(target: TaskEmbedding, candidate: TaskEmbedding, kind: str = "fisher") -> float:
    """Similarity of two task embeddings, averaged over the tensors in which both have a non-zero Fisher.

    ``fisher``: cos(F_t / (F_t + F_i + ε), F_i / (F_t + F_i + ε)), with ε a millionth of the tensor's mean, so that
    the value does not depend on the scale of the loss; ``fisher-paper``: the same with ε = 1e-6; ``fisher-cosine``:
    cos(F_t, F_i).

    Source: π-Tuning eq. 3 and its similarity notebook; Task2Vec's normalised cosine.

    Raises:
        ExpertError: if the embeddings are of different tensors or reference points.
    """
    if kind not in FISHER_KINDS:
        raise RefusedError(f"kind must be one of {', '.join(FISHER_KINDS)}, not {kind!r}")
    _require_comparable(target, candidate)
    values = []
    for key, left in target.fisher.items():
        right = candidate.fisher[key]
        if not left.any() or not right.any():
            continue
        a, b = left.double().flatten(), right.double().flatten()
        if kind != "fisher-cosine":
            epsilon = 1e-6 if kind == "fisher-paper" else 1e-6 * float((a + b).mean())
            a, b = a / (a + b + epsilon), b / (a + b + epsilon)
        values.append(F.cosine_similarity(a, b, dim=0, eps=0.0))
    return float(torch.stack(values).mean()) if values else 0.0


def zero_tensors(embedding: TaskEmbedding) -> list[str]:
    """Names of the tensors that the similarities skip because their Fisher is zero throughout."""
    return [key for key, f in embedding.fisher.items() if not f.any()]


def weight_similarity(target: Expert, candidate: Expert, initial: Mapping[str, Tensor] | None = None) -> float:
    """Data-free: the cosine between what two experts change, averaged over modules (LoRA: ΔW) or tensors (φ − φ_0).

    Args:
        initial: the common initialisation φ_0, for methods other than LoRA.

    Raises:
        RefusedError: if one of the experts did not start from φ_0, or its card does not say so; a BitFit expert, whose
            start is zero, needs no such record.
        ExpertError: if the experts have no module or not the same tensors in common.
    """
    if is_lora(target) and is_lora(candidate):
        left, right = lora_factors(target), lora_factors(candidate)
        shared = [m for m in left if m in right]
        if not shared:
            raise ExpertError(f"experts {target.name!r} and {candidate.name!r} adapt no module in common")
        return sum(_delta_cosine(left[m], right[m]) for m in shared) / len(shared)
    if initial is None:
        raise RefusedError("this method needs the common initialisation to compare weights")
    missing = sorted(initial.keys() ^ candidate.tensors.keys()) or sorted(initial.keys() ^ target.tensors.keys())
    if missing:
        raise ExpertError(f"experts {target.name!r} and {candidate.name!r} differ in tensor {missing[0]}")
    start = tensor_hash(initial)
    for expert in (target, candidate):
        if expert.card.init_hash != start and expert.config.get("peft_type") != BITFIT:
            known = "is another" if expert.card.init_hash else "is not known"
            raise RefusedError(
                f"the initialisation from which expert {expert.name!r} was trained {known}, so what it changes cannot be "
                "compared with similarity 'weights': use another similarity, such as 'score', or leave the expert out"
            )
    cosines = []
    for key, z in initial.items():
        mine = target.tensors[key]
        changes = [(t.to(mine) - z.to(mine)).flatten() for t in (mine, candidate.tensors[key])]
        cosines.append(F.cosine_similarity(changes[0], changes[1], dim=0))
    return float(torch.stack(cosines).mean())


def delta_inner(left: LowRank, right: LowRank) -> float:
    """Frobenius inner product of two ΔW: tr((B_lᵀ B_r)(A_r A_lᵀ)) s_l s_r, in float64 and without forming either ΔW.

    Where both modules have a LoRA bias, the inner product of the scaled biases is added.
    """
    product = float(((left.b.double().T @ right.b.double()) * (left.a.double() @ right.a.double().T)).sum())
    if left.bias is not None and right.bias is not None:
        product += float(left.bias.double() @ right.bias.double())
    return product * left.scaling * right.scaling


def _delta_cosine(left: LowRank, right: LowRank) -> float:
    norm = (delta_inner(left, left) * delta_inner(right, right)) ** 0.5
    return delta_inner(left, right) / norm if norm else 0.0


def _require_comparable(target: TaskEmbedding, candidate: TaskEmbedding) -> None:
    if target.reference != candidate.reference:
        raise ExpertError(
            f"embeddings of {target.task!r} and {candidate.task!r} have different reference points "
            f"({target.reference}, {candidate.reference})"
        )
    if target.reference == "shared" and target.reference_hash != candidate.reference_hash:
        raise ExpertError(f"embeddings of {target.task!r} and {candidate.task!r} were made at different shared experts")
    for key in sorted(target.fisher.keys() | candidate.fisher.keys()):
        shapes = [e.fisher[key].shape if key in e.fisher else None for e in (target, candidate)]
        if shapes[0] != shapes[1]:
            raise ExpertError(
                f"embeddings of {target.task!r} and {candidate.task!r} differ in tensor {key}: {shapes[0]} and {shapes[1]}"
            )
