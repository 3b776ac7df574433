"""The diagonal Fisher information of an expert's tensors, exact per example.

F = 1/N Σ_n E_y[(∂/∂φ log p(y | x_n; θ, φ))²]. Squaring the gradient of a *batch* is not this; running one example after
the other is, but slow. Hooks on the expert's own layers give every example's gradient in one backward pass of the batch
(:mod:`pituning.similarity.per_example`). Where the expert adapts a layer that works for all examples at once, such as
OFA's position projections, the examples run one after the other all the same.

Source: Achille et al., "Task2Vec", ICCV 2019; Wu et al., "π-Tuning", ICML 2023, §3.2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pituning.backbones.base import IMAGE_BATCH_SIZE, Backbone, common_choices, require_targets
from pituning.errors import DataError, RefusedError
from pituning.example import Example
from pituning.experts.expert import Expert
from pituning.methods.attach import Attached, attached
from pituning.methods.prefix import is_folded
from pituning.similarity.per_example import RowCount, Squares, watched

LABEL_SOURCES = ("true", "model")


@dataclass(frozen=True)
class FisherEstimate:
    """Sums over examples, in float64.

    Attributes:
        even, odd: Σ_n E_y[g²] per tensor over every other example; their agreement says how settled the estimate is.
        samples: number of examples in both.
        loss: Σ_n −log p(target | x_n); NaN where one of closed choices has no target.
    """

    even: Mapping[str, Tensor]
    odd: Mapping[str, Tensor]
    samples: int
    loss: float

    def mean(self) -> dict[str, Tensor]:
        """F per tensor, float64."""
        return {k: (self.even[k] + self.odd[k]) / self.samples for k in self.even}

    def __add__(self, other: FisherEstimate) -> FisherEstimate:
        """The estimate over the examples of both, where the first one's sums are."""
        return FisherEstimate(
            {k: t + other.even[k].to(t.device) for k, t in self.even.items()},
            {k: t + other.odd[k].to(t.device) for k, t in self.odd.items()},
            self.samples + other.samples,
            self.loss + other.loss,
        )

    def split_half(self) -> float:
        """Mean over tensors of the cosine between the two halves; 1 where every tensor has settled."""
        alive = [k for k in self.even if self.even[k].any() or self.odd[k].any()]
        cosines = [F.cosine_similarity(self.even[k].flatten(), self.odd[k].flatten(), dim=0) for k in alive]
        return float(torch.stack(cosines).mean()) if cosines else 0.0


def fisher_diagonal(
    backbone: Backbone,
    expert: Expert,
    examples: Sequence[Example],
    *,
    labels: str = "true",
    batch_size: int = 32,
    numbers: Sequence[int] | None = None,
) -> FisherEstimate:
    """Exact per-example Fisher diagonal of an expert's tensors.

    Under gradient checkpointing it is the same; of a model in half precision the gradients are, and all sums are not.

    Args:
        labels: ``"true"`` uses the examples' targets (the paper's code); ``"model"`` takes the expectation under the
            model: exactly over closed choices, with one sampled answer (seeded by the example's id) otherwise.
        batch_size: for memory and time only; at most :data:`IMAGE_BATCH_SIZE` where an example has an image.
        numbers: the examples' places in a larger sample, of which these are a part: odd ones go into the odd half.

    Returns:
        sums per tensor under PEFT's file key names, shapes as the tensors'.

    Raises:
        DataError: if there are no examples, or one has no answer where ``labels`` are the true ones.
        RefusedError: if a tensor belongs to a kind of layer that has no per-example gradient here, or to a prefix with
            projection; for ``labels="model"`` on examples with boxes.
    """
    if labels not in LABEL_SOURCES:
        raise RefusedError(f"labels must be one of {', '.join(LABEL_SOURCES)}, not {labels!r}")
    if not examples:
        raise DataError("there are no examples to estimate the Fisher information on")
    if labels == "true":
        require_targets(examples)
    expert.require_backbone(backbone)
    if not is_folded(expert.config):
        raise RefusedError(
            f"expert {expert.name!r} is a prefix with projection, whose network's parameters no other task shares; turn it "
            "into keys and values with pituning.methods.folded(config, tensors)"
        )
    if any(e.image is not None for e in examples):
        batch_size = min(batch_size, IMAGE_BATCH_SIZE)
    with attached(backbone, expert.config, expert.tensors) as site:
        zeros = {k: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for k, p in site.parameters.items()}
        halves = (zeros, {k: z.clone() for k, z in zeros.items()})
        loss = 0.0
        pictured = next((e for e in examples if e.image is not None), examples[0])  # it passes through every layer
        if len(examples) > 1 and batch_size > 1 and not _rows_follow_examples(site, pictured, labels):
            batch_size = 1
        places = torch.arange(len(examples)) if numbers is None else torch.tensor(list(numbers))
        for start in range(0, len(examples), batch_size):
            batch = list(examples[start : start + batch_size])
            if labels == "model" and not common_choices(batch):
                batch = [_sampled(backbone, e) for e in batch]
            parity = (places[start : start + batch_size] % 2).to(backbone.device)
            squares = Squares(parity, halves)
            with watched(site, squares):
                loss += _backward(backbone, batch, labels, squares)
    return FisherEstimate(halves[0], halves[1], len(examples), loss)


@torch.no_grad()
def _rows_follow_examples(site: Attached, example: Example, labels: str) -> bool:
    """Whether every adapted layer sees a fixed number of rows per example, from two and three copies of one example.

    A layer whose input has no example dimension can see as many rows as there are examples by coincidence; a second batch
    size tells the two apart.
    """
    choices = common_choices([example]) if labels == "model" else ()
    counts = []
    for copies in (2, 3):
        count = RowCount()
        with watched(site, count):
            batch = site.backbone.collate([example] * copies)
            if choices:
                site.backbone.score(batch, choices)
            else:
                site.backbone.loss(batch)
        counts.append([rows / copies for rows in count.rows])
    return counts[0] == counts[1] and all(r.is_integer() and 1 <= r <= max(len(choices), 1) for r in counts[0])


def _backward(backbone: Backbone, examples: Sequence[Example], labels: str, squares: Squares) -> float:
    choices = common_choices(examples)
    if labels == "true" or not choices:
        losses = backbone.loss(backbone.collate(examples))
        squares.begin()
        if losses.requires_grad:  # not where no layer of the expert takes part, such as image layers in a text
            torch.autograd.backward(losses.sum())
        squares.close()
        return float(losses.detach().double().sum())
    squares.repeats = len(choices)
    log_p = F.log_softmax(backbone.score(backbone.collate(examples), choices), dim=1)
    for index in range(len(choices) if log_p.requires_grad else 0):
        squares.begin(log_p[:, index].detach().exp())
        torch.autograd.backward(log_p[:, index].sum(), retain_graph=index + 1 < len(choices))
        squares.close()
    if not all(e.target for e in examples):
        return math.nan
    truth = torch.tensor([e.label for e in examples], device=log_p.device)
    return float(-log_p.detach().double().gather(1, truth[:, None]).sum())


def _sampled(backbone: Backbone, example: Example) -> Example:
    if example.box is not None:
        raise RefusedError(
            f"example {example.id!r} is answered by a box, and boxes are not sampled: use labels='true' for grounding"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:7], "big"))
        answer = backbone.generate(backbone.collate([example]), do_sample=True, num_beams=1)
    return replace(example, target=answer[0])
