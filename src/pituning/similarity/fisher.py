"""The diagonal Fisher information of an expert's tensors, exact per example.

F = 1/N Σ_n E_y[(∂/∂φ log p(y | x_n; θ, φ))²]. Squaring the gradient of a *batch* is not this; running one example after
the other is, but slow. Here forward hooks on the expert's own Linear layers keep their inputs, hooks on the outputs
see the gradients, and an einsum over the two gives every example's gradient in one backward pass of the whole batch.

Source: Achille et al., "Task2Vec", ICCV 2019; Wu et al., "π-Tuning", ICML 2023, §3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pituning.backbones.base import Backbone, common_choices
from pituning.errors import DataError, RefusedError
from pituning.example import Example
from pituning.experts.expert import Expert
from pituning.methods.attach import Attached, attached

LABEL_SOURCES = ("true", "model")


@dataclass(frozen=True)
class FisherEstimate:
    """Sums over examples, in float64.

    Attributes:
        even, odd: Σ_n E_y[g²] per tensor over every other example; their agreement says how settled the estimate is.
        samples: number of examples in both.
        loss: Σ_n −log p(target | x_n).
    """

    even: Mapping[str, Tensor]
    odd: Mapping[str, Tensor]
    samples: int
    loss: float

    def mean(self) -> dict[str, Tensor]:
        """F per tensor, float64."""
        return {k: (self.even[k] + self.odd[k]) / self.samples for k in self.even}

    def split_half(self) -> float:
        """Mean over tensors of the cosine between the two halves; 1 where every tensor has settled."""
        alive = [k for k in self.even if self.even[k].any() or self.odd[k].any()]
        cosines = [F.cosine_similarity(self.even[k].flatten(), self.odd[k].flatten(), dim=0) for k in alive]
        return float(torch.stack(cosines).mean()) if cosines else 0.0


def fisher_diagonal(
    backbone: Backbone, expert: Expert, examples: Sequence[Example], *, labels: str = "true", batch_size: int = 32
) -> FisherEstimate:
    """Exact per-example Fisher diagonal of an expert's tensors.

    Args:
        labels: ``"true"`` uses the examples' targets (the paper's code); ``"model"`` takes the expectation under the
            model: exactly over closed choices, with one sampled answer (seeded by the example's id) otherwise.

    Returns:
        sums per tensor under PEFT's file key names, shapes as the tensors'.

    Raises:
        DataError: if there are no examples.
        RefusedError: if a tensor does not belong to a Linear layer, or a layer mixes the examples of a batch.
    """
    if labels not in LABEL_SOURCES:
        raise RefusedError(f"labels must be one of {', '.join(LABEL_SOURCES)}, not {labels!r}")
    if not examples:
        raise DataError("there are no examples to estimate the Fisher information on")
    expert.require_backbone(backbone)
    with attached(backbone, expert.config, expert.tensors) as site:
        zeros = {k: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for k, p in site.parameters.items()}
        halves = [zeros, {k: z.clone() for k, z in zeros.items()}]
        loss = 0.0
        for start in range(0, len(examples), batch_size):
            batch = list(examples[start : start + batch_size])
            if labels == "model" and not common_choices(batch):
                batch = [_sampled(backbone, e) for e in batch]
            parity = (torch.arange(len(batch), device=backbone.device) + start) % 2
            with _squares(site, len(batch)) as squares:
                loss += _backward(backbone, batch, labels, squares)
                for key, total in squares.total.items():
                    for half in (0, 1):
                        halves[half][key] += total[parity == half].sum(0)
    return FisherEstimate(halves[0], halves[1], len(examples), loss)


def _backward(backbone: Backbone, examples: Sequence[Example], labels: str, squares: _Squares) -> float:
    choices = common_choices(examples)
    if labels == "true" or not choices:
        losses = backbone.loss(backbone.collate(examples))
        torch.autograd.backward(losses.sum())
        squares.close(torch.ones_like(losses))
        return float(losses.detach().double().sum())
    squares.repeats = len(choices)
    log_p = F.log_softmax(backbone.score(backbone.collate(examples), choices), dim=1)
    for index in range(len(choices)):
        torch.autograd.backward(log_p[:, index].sum(), retain_graph=index + 1 < len(choices))
        squares.close(log_p[:, index].detach().exp())
    truth = torch.tensor([e.label for e in examples], device=log_p.device)
    return float(-log_p.detach().double().gather(1, truth[:, None]).sum())


def _sampled(backbone: Backbone, example: Example) -> Example:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:7], "big"))
        answer = backbone.generate(backbone.collate([example]), do_sample=True, num_beams=1)
    return replace(example, target=answer[0])


class _Squares:
    """Collects per-example gradients of Linear layers during one backward pass and squares them when complete."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.repeats = 1  # a decoder that scores C choices sees up to C·B rows, row c·B + n for example n
        self.total: dict[str, Tensor] = {}
        self._open: dict[str, Tensor] = {}

    def add(self, key: str, gradient: Tensor) -> None:
        """A layer called twice accumulates before squaring."""
        self._open[key] = self._open[key] + gradient if key in self._open else gradient

    def close(self, weights: Tensor) -> None:
        """End of a backward pass: square what came in, weighted per example."""
        for key, gradient in self._open.items():
            square = gradient.double().square() * weights.double().view(-1, *[1] * (gradient.dim() - 1))
            self.total[key] = self.total[key] + square if key in self.total else square
        self._open.clear()


@contextmanager
def _squares(site: Attached, batch: int) -> Iterator[_Squares]:
    squares = _Squares(batch)
    handles = [_watch(module, names, squares) for module, names in _linear_owners(site).items()]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()
        for parameter in site.parameters.values():
            parameter.grad = None


def _watch(module: nn.Linear, names: Mapping[str, str], squares: _Squares) -> torch.utils.hooks.RemovableHandle:
    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        repeats, rest = divmod(x.shape[0], squares.batch)
        if rest or not 1 <= repeats <= squares.repeats:
            raise RefusedError(
                f"layer of {next(iter(names.values()))} sees a first dimension of {x.shape[0]} for {squares.batch} "
                "examples: per-example gradients are not defined there"
            )
        if output.requires_grad:
            output.register_hook(lambda g: backward(x, g))  # type: ignore[no-untyped-call]

    def backward(x: Tensor, gradient: Tensor) -> None:
        x, gradient = _by_example(x, squares.batch), _by_example(gradient.detach(), squares.batch)
        if "weight" in names:
            squares.add(names["weight"], torch.einsum("bto,bti->boi", gradient, x.to(gradient.dtype)))
        if "bias" in names:
            squares.add(names["bias"], gradient.sum(1))

    return module.register_forward_hook(forward)


def _by_example(x: Tensor, batch: int) -> Tensor:
    """``[C·B, …, d]`` → ``[B, C·…, d]``: all rows of an example add up to its gradient."""
    return x.reshape(-1, batch, x[0].numel() // x.shape[-1], x.shape[-1]).transpose(0, 1).flatten(1, 2)


def _linear_owners(site: Attached) -> dict[nn.Linear, dict[str, str]]:
    owners: dict[nn.Linear, dict[str, str]] = {}
    for key, name in site.live_names.items():
        path, _, attribute = name.rpartition(".")
        owner = site.backbone.model.get_submodule(path)
        if not isinstance(owner, nn.Linear):
            raise RefusedError(
                f"tensor {key} {list(site.parameters[key].shape)} belongs to a {type(owner).__name__}; exact "
                "per-example gradients are implemented for Linear layers"
            )
        owners.setdefault(owner, {})[attribute] = key
    return owners
