"""Every example's own gradient from one backward pass of a whole batch, by hooks on the expert's layers.

A hook on a layer's forward pass keeps what is needed of it, a hook on its output sees the gradient; the two together give
the gradient of each example. :data:`WATCHERS` says how, for each kind of layer that holds an expert's tensors.

Rows belong to examples in order: where a decoder scores C answers for each of B examples, row b · C + c is example b's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft.tuners.ia3 import IA3Layer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pituning.errors import RefusedError
from pituning.methods.attach import Attached
from pituning.methods.bitfit import BitFitLayer
from pituning.methods.prefix import PrefixLayer
from pituning.methods.prompt import PromptLayer

_SMALL = 1e-12
"""A gradient without a larger entry than this is squared in float64: 1e-12 squared is 1e-24, far from float32's least 1e-38."""


class Observer(Protocol):
    """What a watcher reports to."""

    def sees(self, names: Mapping[str, str], rows: int) -> None:
        """A layer is called with so many rows."""

    def add(self, key: str, gradient: Tensor) -> None:
        """Gradients of one call, ``[rows, positions …, tensor's shape]`` summed by :meth:`by_example`."""

    def by_example(self, x: Tensor) -> Tensor:
        """``[rows, …, d]`` to ``[examples, …, d]``: all rows of an example add up to its gradient."""


Names = Mapping[str, str]
"""From a parameter's name in its layer (``weight``, ``prefix_key`` …) to its file key."""

Watcher = Callable[[Any, Names, Observer], "RemovableHandle | _Handles"]


class Squares:
    """Collects per-example gradients during one backward pass and squares them when complete.

    Attributes:
        repeats: most rows that an example may have; a decoder that scores C choices sees up to C for each.
        totals: sums of squares over the even and over the odd examples, by file key, in float64.

    Args:
        parity: 0 or 1 for each example of the batch.
    """

    def __init__(self, parity: Tensor) -> None:
        self.batch = len(parity)
        self.repeats = 1
        self.totals: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._rows = [_slice_of((parity == half).nonzero()[:, 0].tolist()) for half in (0, 1)]
        self._open: dict[str, Tensor] = {}

    def sees(self, names: Names, rows: int) -> None:
        """Raise unless the rows can be told apart by example; in a batch of one all of them are its own."""
        repeats, rest = divmod(rows, self.batch)
        if self.batch > 1 and (rest or not 1 <= repeats <= self.repeats):
            raise RefusedError(
                f"layer of {next(iter(names.values()))} sees a first dimension of {rows} for {self.batch} "
                "examples: per-example gradients are not defined there; use batch_size=1"
            )

    def by_example(self, x: Tensor) -> Tensor:
        """``[rows, …, d]`` to ``[batch, …, d]``."""
        return full_precision(x).reshape(self.batch, -1, x.shape[-1])

    def add(self, key: str, gradient: Tensor) -> None:
        """A layer called twice accumulates before squaring. The gradient is used up: its memory takes the squares."""
        self._open[key] = self._open[key] + gradient if key in self._open else gradient

    def close(self, weights: Tensor) -> None:
        """End of a backward pass: square what came in, weighted per example; no more than sums is kept."""
        while self._open:
            key, gradient = self._open.popitem()
            squares = _squared(gradient)
            if (weights != 1).any():
                squares *= weights.to(squares.dtype).view(-1, *[1] * (squares.dim() - 1))
            for half, total in enumerate(self.totals):
                square = squares[self._rows[half]].sum(0, dtype=torch.float64)
                total[key] = total[key] + square if key in total else square


def _slice_of(rows: list[int]) -> slice | list[int]:
    """The same rows as a slice where they are evenly spaced, which copies nothing."""
    if not rows:
        return slice(0, 0)
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    even = slice(rows[0], rows[-1] + 1, step)
    return even if list(range(rows[-1] + 1))[even] == rows else rows


def _squared(gradient: Tensor) -> Tensor:
    """Squares in the gradient's own precision and place; in float64 where float32 would lose small ones to underflow."""
    smallest, largest = gradient.aminmax()
    if gradient.dtype == torch.float32 and max(-smallest, largest) < _SMALL:
        return gradient.double().square_()
    return gradient.square_()


def full_precision(x: Tensor) -> Tensor:
    """Half precision to float32, in which an example's positions and rows are summed; anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RowCount:
    """Records the first dimensions that the expert's layers see."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def sees(self, names: Names, rows: int) -> None:
        """Note it."""
        self.rows.append(rows)

    def add(self, key: str, gradient: Tensor) -> None:
        """Nothing: rows are counted without a backward pass."""

    def by_example(self, x: Tensor) -> Tensor:
        """As it is."""
        return x


@contextmanager
def watched(site: Attached, observer: Observer) -> Iterator[None]:
    """Report to the observer for the length of the block; no hook and no gradient stays behind.

    Raises:
        RefusedError: names a tensor of a layer that has no watcher.
    """
    handles = [_watcher(site, owner, names)(owner, names, observer) for owner, names in _owners(site).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in site.parameters.values():
            parameter.grad = None


def _watch_linear(module: nn.Linear, names: Names, observer: Observer) -> RemovableHandle:
    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        observer.sees(names, len(x))
        if output.requires_grad:
            output.register_hook(lambda g: backward(x, g))  # type: ignore[no-untyped-call]

    def backward(x: Tensor, gradient: Tensor) -> None:
        x, gradient = observer.by_example(x), observer.by_example(gradient.detach())
        if "weight" in names:
            observer.add(names["weight"], torch.einsum("bto,bti->boi", gradient, x.to(gradient.dtype)))
        if "bias" in names:
            observer.add(names["bias"], gradient.sum(1))

    return module.register_forward_hook(forward)


def _watch_bitfit(layer: BitFitLayer, names: Names, observer: Observer) -> RemovableHandle:
    """∂/∂δ is the gradient of the output, summed over positions."""

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if layer.disable_adapters:  # the bare backbone runs, for label texts
            return
        observer.sees(names, len(output))
        if output.requires_grad:
            output.register_hook(backward)  # type: ignore[no-untyped-call]

    def backward(gradient: Tensor) -> None:
        observer.add(names["bitfit_bias"], observer.by_example(gradient.detach()).sum(1))

    return layer.register_forward_hook(forward)


def _watch_prefix(layer: PrefixLayer, names: Names, observer: Observer) -> RemovableHandle:
    """Every row has its own copy of the keys and values; an example's gradient is the sum over its rows."""

    def forward(_: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        observer.sees(names, len(output[0]))
        for name, rows in zip(("prefix_key", "prefix_value"), output, strict=True):
            if rows.requires_grad:
                rows.register_hook(lambda g, name=name: backward(name, g))  # type: ignore[no-untyped-call]

    def backward(name: str, gradient: Tensor) -> None:
        rows = observer.by_example(gradient.detach().flatten(1))
        observer.add(names[name], rows.sum(1).view(-1, *gradient.shape[1:]))

    (active,) = layer.active_adapters  # type: ignore[misc]
    return layer.prefix_rows[active].register_forward_hook(forward)


def _watch_prompt(layer: PromptLayer, names: Names, observer: Observer) -> RemovableHandle:
    """Every row has its own copy of the prompt."""

    def forward(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        observer.sees(names, len(output))
        if output.requires_grad:
            output.register_hook(backward)  # type: ignore[no-untyped-call]

    def backward(gradient: Tensor) -> None:
        rows = observer.by_example(gradient.detach().flatten(1))
        observer.add(names["prompt_embedding"], rows.sum(1).view(-1, *gradient.shape[1:]))

    (active,) = layer.active_adapters
    return layer.prompt_rows[active].register_forward_hook(forward)


class _Handles:
    """Several hooks that are taken off together."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Take all of them off."""
        for handle in self.handles:
            handle.remove()


def _watch_ia3(layer: Any, names: Names, observer: Observer) -> _Handles:
    """l scales what goes into the base layer (feed-forward) or comes out of it: ∂/∂l = Σ x · ∂/∂(l x) over positions."""
    scaled_input = layer.is_feedforward
    (active,) = layer.active_adapters
    shape = layer.ia3_l[active].shape
    unscaled: list[Tensor] = []

    def backward(x: Tensor, gradient: Tensor) -> None:
        product = observer.by_example(full_precision(gradient.detach()) * full_precision(x))
        observer.add(names["ia3_l"], product.sum(1).view(-1, *shape))

    def hooked(x: Tensor, product: Tensor) -> None:
        observer.sees(names, len(x))
        if product.requires_grad:
            product.register_hook(lambda g: backward(x, g))  # type: ignore[no-untyped-call]

    def base(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        unscaled.append(inputs[0] if scaled_input else output.detach())

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        inside = unscaled.pop()
        if layer.disable_adapters:
            return
        if scaled_input:
            hooked(inputs[0].detach(), inside)
        else:
            hooked(inside, output)

    return _Handles(layer.get_base_layer().register_forward_hook(base), layer.register_forward_hook(forward))


WATCHERS: dict[type, Watcher] = {
    nn.Linear: _watch_linear,
    BitFitLayer: _watch_bitfit,
    PrefixLayer: _watch_prefix,
    PromptLayer: _watch_prompt,
    IA3Layer: _watch_ia3,
}


def _watcher(site: Attached, owner: nn.Module, names: Names) -> Watcher:
    for kind, watcher in WATCHERS.items():
        if isinstance(owner, kind):
            return watcher
    key = next(iter(names.values()))
    raise RefusedError(
        f"tensor {key} {list(site.parameters[key].shape)} belongs to a {type(owner).__name__}; exact per-example gradients "
        "are implemented for Linear layers, plain prefixes, soft prompts, IA3 and BitFit"
    )


def _owners(site: Attached) -> dict[nn.Module, dict[str, str]]:
    """The layers that hold the expert's tensors, each with their names there."""
    owners: dict[nn.Module, dict[str, str]] = {}
    for key, name in site.live_names.items():
        path, _, attribute = name.rpartition(".")
        owner = site.backbone.model.get_submodule(path)
        if isinstance(owner, nn.ParameterDict):  # …layer.prefix_key.default: the layer is two steps up
            path, _, attribute = path.rpartition(".")
            owner = site.backbone.model.get_submodule(path)
        owners.setdefault(owner, {})[attribute] = key
    return owners
