"""Similarities between tasks: a number for (target, candidate), larger = more helpful.

:data:`MEASURES` holds every kind under its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import kendalltau, rankdata
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, PituningError, RefusedError, unknown_name
from pituning.example import Example
from pituning.experts.expert import Expert, initial_of, tensor_hash
from pituning.experts.pool import ExpertPool
from pituning.interpolation.build import common_start, is_lora, lora_factors
from pituning.interpolation.changes import has_natural_start
from pituning.interpolation.mixture import LowRank
from pituning.methods.attach import attached
from pituning.methods.bitfit import PEFT_TYPE as BITFIT
from pituning.similarity.compact import ANCHORED, anchor_of, compact_similarity
from pituning.similarity.embedding import TaskEmbedding, embed_task, pool_embedding, shared_reference
from pituning.similarity.gradient import loss_slopes
from pituning.similarity.settling import FIRST, MOST
from pituning.tasks.task import Task
from pituning.training.crossfit import Search, cross_fit
from pituning.training.evaluation import bias_calibrated_loss, log_loss, log_probabilities
from pituning.training.train_expert import start_from

FISHER_KINDS = ("fisher", "fisher-paper", "fisher-cosine")
SETTLED_TOP = 3
"""A target's embedding takes more examples until so many of the most similar candidates stay the same."""
SCORES: Mapping[str, Callable[[Tensor, Sequence[Example]], float]] = {
    "score": log_loss,
    "calibrated-score": bias_calibrated_loss,
}
"""The kinds that read what an expert says of the examples: (log p ``[examples, choices]``, examples) → loss in nats."""
TUNED = Search(learning_rates=(3e-4,), steps=30, batch_size=8)
"""The warm start that ``tuned-score`` judges an expert by."""
AVERAGED = ("score", "gradient")
"""What ``average`` averages where nothing is said: the kinds that need nothing but the target's examples."""


@dataclass(frozen=True)
class Comparison:
    """A target task and the candidates that a measure compares it with.

    Attributes:
        candidates: the experts, none of which has seen the target's examples.
        own: the target's own expert, where there is one.
        reference: where the Fisher kinds embed tasks, ``"shared"`` or ``"own"``.
        data: folder with the data of the candidates' tasks, for embeddings that are not stored yet.
        average_of: the kinds whose ranks ``average`` averages.
    """

    backbone: Backbone
    task: Task
    pool: ExpertPool
    candidates: Sequence[Expert]
    own: Expert | None = None
    reference: str = "shared"
    data: str | Path | None = None
    average_of: Sequence[str] = AVERAGED


@dataclass(frozen=True)
class Measure:
    """A kind of similarity.

    Attributes:
        needs: what it looks at besides the candidates' tensors: ``"own"`` (the target's own expert), ``"examples"`` (the
            target's training examples), ``"embeddings"`` (of the candidates' tasks; at the ``own`` reference point also
            the own expert).
        similarities: a :class:`Comparison` to one number for each candidate, larger = more helpful.
    """

    name: str
    needs: frozenset[str]
    similarities: Callable[[Comparison], list[float]]

    def __call__(self, comparison: Comparison) -> list[float]:
        """The similarity of each candidate.

        Raises:
            PituningError: if what it needs is missing.
            ExpertError: if a similarity is not a finite number: it would stand anywhere in an order, and move others.
        """
        needs_own = "own" in self.needs or ("embeddings" in self.needs and comparison.reference == "own")
        if needs_own and comparison.own is None:
            raise PituningError(f"similarity {self.name!r} needs the target's own expert: train one and pass own=…")
        values = self.similarities(comparison)
        found = zip(comparison.candidates, values, strict=True)
        if wrong := [f"{e.name!r} ({v:+})" for e, v in found if not math.isfinite(v)]:
            raise ExpertError(
                f"similarity {self.name!r} to task {comparison.task.name!r} is not a finite number for {', '.join(wrong)}: "
                "leave these experts out, or use another similarity"
            )
        return values


def fisher_similarity(target: TaskEmbedding, candidate: TaskEmbedding, kind: str = "fisher") -> float:
    """Similarity of two task embeddings, averaged over the tensors in which both have a non-zero Fisher.

    ``fisher``: cos(F_t / (F_t + F_i + ε), F_i / (F_t + F_i + ε)), with ε a millionth of the tensor's mean, so that
    the value does not depend on the scale of the loss; ``fisher-paper``: the same with ε = 1e-6; ``fisher-cosine``:
    cos(F_t, F_i).

    Source: π-Tuning eq. 3 and its similarity notebook; Task2Vec's normalised cosine.

    Raises:
        ExpertError: if the embeddings are of different tensors or reference points, or the cosine of a tensor is not finite.
    """
    if kind not in FISHER_KINDS:
        raise RefusedError(f"kind must be one of {', '.join(FISHER_KINDS)}, not {kind!r}")
    require_comparable(target, candidate)
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
        if not values[-1].isfinite():
            raise ExpertError(
                f"embeddings of {target.task!r} and {candidate.task!r} have no finite cosine in tensor {key} "
                f"{list(left.shape)}: embed the experts again"
            )
    return float(torch.stack(values).mean()) if values else 0.0


def compact_agreement(embeddings: Sequence[TaskEmbedding]) -> float:
    """Kendall's τ between the rankings by ``compact_similarity`` and by ``fisher-cosine``, averaged over the targets.

    The anchor is the mean of the first of them, as in a pool's index. Every embedding is the target once, and the others are
    ranked for it. 1 is the same order, 0 none in common.

    Raises:
        PituningError: for fewer than three embeddings, where nothing is ranked.
        ExpertError: as :func:`fisher_similarity`.
    """
    if len(embeddings) < 3:
        raise PituningError(f"{len(embeddings)} embeddings cannot be ranked for one another: three or more can")
    anchor = anchor_of(e.fisher for e in embeddings[:ANCHORED])
    short = [e.compact(anchor) for e in embeddings]
    values = []
    for i, target in enumerate(embeddings):
        others = [j for j in range(len(embeddings)) if j != i]
        full = [fisher_similarity(target, embeddings[j], "fisher-cosine") for j in others]
        values.append(float(kendalltau(full, [compact_similarity(short[i], short[j]) for j in others]).statistic))
    return sum(values) / len(values)


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
    _require_start((target, candidate), initial, "weights")
    cosines = []
    for key, z in initial.items():
        mine = target.tensors[key]
        changes = [(t.to(mine) - z.to(mine)).flatten() for t in (mine, candidate.tensors[key])]
        cosines.append(F.cosine_similarity(changes[0], changes[1], dim=0))
    return float(torch.stack(cosines).mean())


def score_similarity(backbone: Backbone, expert: Expert, task: Task, kind: str = "score") -> float:
    """Minus the expert's mean log-loss on the target's training examples, in nats; the expert has never seen them.

    ``score``: as it is; ``calibrated-score``: after a temperature and one bias per answer
    (:func:`pituning.training.evaluation.bias_calibrated_losses`).

    Raises:
        PituningError: if the scores of an example are NaN or infinite.
    """
    return _scored(backbone, expert, task, kind, finite=True)


def _scored(backbone: Backbone, expert: Expert, task: Task, kind: str, *, finite: bool) -> float:
    examples = task.split("train")
    with attached(backbone, expert.config, expert.tensors):
        return -SCORES[kind](log_probabilities(backbone, examples, finite=finite), examples)


def tuned_score_similarity(backbone: Backbone, expert: Expert, task: Task, search: Search = TUNED) -> float:
    """Minus the log-loss that a warm start from the expert reaches on examples that it was not tuned on, in nats.

    The expert is tuned without each fold of the target's training examples, for all steps of ``search`` at its lowest rate; the
    predictions of the folds left out are pooled and read after one temperature (:func:`pituning.training.crossfit.cross_fit`).

    Raises:
        DataError: if there are fewer examples than folds.
    """
    one_rate = replace(search, learning_rates=(min(search.learning_rates),), eval_every=search.steps)
    found = cross_fit(
        backbone,
        lambda _: start_from(expert.tensors, expert.config),
        task.split("train"),
        one_rate,
        seed=search.fold_seed,
    )
    return -found.curves[one_rate.learning_rates[0]][search.steps]


def gradient_similarities(backbone: Backbone, experts: Sequence[Expert], examples: Sequence[Example]) -> list[float]:
    """−⟨∇L(φ_0), φ_k − φ_0⟩ / ‖φ_k − φ_0‖: how steeply the examples' mean loss falls from φ_0 towards each expert.

    In nats per unit of length (for LoRA: of ‖ΔW‖). Ranks as the cosine with −∇L does, since all experts share ∇L. An expert
    that changes nothing gets 0.

    Raises:
        RefusedError: if an expert did not start from φ_0, or its card does not say so; LoRA, BitFit and IA3, whose start is
            known, need no such record.
        DataError: as :func:`pituning.similarity.gradient.loss_slopes`.
        ExpertError: if the loss is not finite.
    """
    initial = None
    if not has_natural_start(experts[0]):
        initial = initial_of(backbone, experts[0])
        _require_start(experts, initial, "gradient")
    slopes = loss_slopes(backbone, experts, examples, initial)
    if not all(map(math.isfinite, slopes)):
        raise ExpertError("similarity 'gradient': the gradient of the loss at the experts' start is not finite")
    lengths = [_change_length(e, initial) for e in experts]
    return [-slope / length if length else 0.0 for slope, length in zip(slopes, lengths, strict=True)]


def average_ranks(values: Sequence[Sequence[float]]) -> list[float]:
    """Similarities ``[kinds, candidates]`` to one per candidate: the share of the others that it beats, averaged over kinds.

    A tie counts half. 1 is the best candidate of every kind, 0 the worst of every kind.

    Raises:
        PituningError: for a NaN, which has no rank.

    >>> average_ranks([[0.3, 0.1, 0.2], [-5.0, -7.0, -9.0]])
    [1.0, 0.25, 0.25]
    """
    if wrong := [place for row in values for place, value in enumerate(row) if math.isnan(value)]:
        raise PituningError(
            f"the similarity of candidate {wrong[0]} is NaN, so it has no rank: leave the candidate out"
        )
    beaten = sum(rankdata(row) - 1 for row in values) / len(values)
    return [float(b) / (len(beaten) - 1) if len(beaten) > 1 else 1.0 for b in beaten]


def delta_inner(left: LowRank, right: LowRank) -> float:
    """Frobenius inner product of two ΔW: tr((B_lᵀ B_r)(A_r A_lᵀ)) s_l s_r, in float64 and without forming either ΔW.

    Where both modules have a LoRA bias, the inner product of the scaled biases is added.
    """
    place = left.a.device  # one may come from a pool, the other from training
    b, a = right.b.double().to(place), right.a.double().to(place)
    product = float(((left.b.double().T @ b) * (left.a.double() @ a.T)).sum())
    if left.bias is not None and right.bias is not None:
        product += float(left.bias.double() @ right.bias.double().to(place))
    return product * left.scaling * right.scaling


def _delta_cosine(left: LowRank, right: LowRank) -> float:
    norm = (delta_inner(left, left) * delta_inner(right, right)) ** 0.5
    return delta_inner(left, right) / norm if norm else 0.0


def _change_length(expert: Expert, initial: Mapping[str, Tensor] | None) -> float:
    """‖φ − φ_0‖, for LoRA that of all its ΔW together, in float64."""
    if is_lora(expert):
        return math.sqrt(sum(delta_inner(f, f) for f in lora_factors(expert).values()))
    start = common_start([expert], initial)
    return math.sqrt(sum(float((t.double() - start[k].double()).square().sum()) for k, t in expert.tensors.items()))


def _require_start(experts: Sequence[Expert], initial: Mapping[str, Tensor], kind: str) -> None:
    """Proof by the experts' own records that all were trained from φ_0."""
    start = tensor_hash(initial)
    for expert in experts:
        if expert.card.init_hash != start and expert.config.get("peft_type") != BITFIT:
            known = "is another" if expert.card.init_hash else "is not known"
            raise RefusedError(
                f"the initialisation from which expert {expert.name!r} was trained {known}, so what it changes cannot be "
                f"compared with similarity {kind!r}: use another similarity, such as 'score', or leave the expert out"
            )


def require_comparable(target: TaskEmbedding, candidate: TaskEmbedding) -> None:
    """Raise unless two embeddings are of the same tensors at the same kind of reference point.

    Raises:
        ExpertError: names both tasks, and the tensor with its shapes.
    """
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


def _fisher(kind: str, comparison: Comparison) -> list[float]:
    c = comparison
    at = c.own if c.reference == "own" and c.own is not None else shared_reference(c.pool, c.candidates[0].card.method)

    def similarities(target: TaskEmbedding) -> list[float]:  # one candidate at a time is in memory
        return [
            fisher_similarity(target, pool_embedding(c.backbone, c.pool, e.name, c.reference, data=c.data), kind)
            for e in c.candidates
        ]

    def nearest(fisher: Mapping[str, Tensor]) -> list[str]:
        sums = {k: f.cpu() for k, f in fisher.items()}  # where the candidates' embeddings are
        found = TaskEmbedding(sums, c.task.name, 0, "true", c.reference, tensor_hash(at.tensors), 0.0, 0.0)
        values = similarities(found)
        return [c.candidates[i].name for i in sorted(range(len(values)), key=lambda i: -values[i])[:SETTLED_TOP]]

    many = len(c.task.split("train")) > FIRST
    return similarities(
        embed_task(c.backbone, at, c.task, reference=c.reference, max_examples=MOST, ranking=nearest if many else None)
    )


def _weights(comparison: Comparison) -> list[float]:
    own = comparison.own
    assert own is not None
    initial = None if is_lora(own) else initial_of(comparison.backbone, own)
    return [weight_similarity(own, e, initial) for e in comparison.candidates]


def _score(kind: str, comparison: Comparison) -> list[float]:
    c = comparison  # an expert whose scores are no numbers is named with the others
    return [_scored(c.backbone, e, c.task, kind, finite=False) for e in c.candidates]


def _tuned_score(comparison: Comparison) -> list[float]:
    return [tuned_score_similarity(comparison.backbone, e, comparison.task) for e in comparison.candidates]


def _gradient(comparison: Comparison) -> list[float]:
    return gradient_similarities(comparison.backbone, comparison.candidates, comparison.task.split("train"))


def _average(comparison: Comparison) -> list[float]:
    kinds = list(dict.fromkeys(comparison.average_of))
    known = [kind for kind in MEASURES if kind != "average"]
    if unknown := [kind for kind in kinds if kind not in known]:
        raise unknown_name("similarity", unknown[0], known, "average_of names the kinds to average.")
    if not kinds:
        raise PituningError(f"average_of names no similarity; it may have {', '.join(known)}")
    return average_ranks([MEASURES[kind](comparison) for kind in kinds])


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        *(Measure(kind, frozenset({"examples", "embeddings"}), partial(_fisher, kind)) for kind in FISHER_KINDS),
        Measure("weights", frozenset({"own"}), _weights),
        Measure("gradient", frozenset({"examples"}), _gradient),
        *(Measure(kind, frozenset({"examples"}), partial(_score, kind)) for kind in SCORES),
        Measure("tuned-score", frozenset({"examples"}), _tuned_score),
        Measure("average", frozenset(), _average),  # what the averaged kinds need, each says itself
    )
}
"""Every kind of similarity by name."""

KINDS = tuple(MEASURES)
