"""Every example's own gradient from one backward pass of a whole batch, by hooks on the expert's layers.

A hook on a layer's forward pass keeps what is needed of it, a hook on its output sees the gradient; the two together give
the gradient of each example. :data:`WATCHERS` says how, for each kind of layer that holds an expert's tensors.

Rows belong to examples in order: where a decoder scores C answers for each of B examples, row b · C + c is example b's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.ia3 import IA3Layer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pituning.errors import RefusedError
from pituning.methods.attach import Attached
from pituning.methods.bitfit import BitFitLayer
from pituning.methods.prefix import PrefixLayer
from pituning.methods.prompt import PromptLayer

_SMALL = 1e-24
"""Squares without a larger sum than this are made again in float64: float32's least is 1e-38."""

_CHUNK, _MOST = 1 << 18, 64
"""Entries of per-example gradients that are squared at once: 1 MB in float32, which stays in a core's own cache; and of how
many examples. Their squares are summed in their own precision, and these sums in float64."""


class Observer(Protocol):
    """What a watcher reports to."""

    def sees(self, names: Mapping[str, str], rows: int) -> None:
        """A layer is called with so many rows."""

    def add_outer(self, key: str, gradient: Tensor, x: Tensor) -> None:
        """Of one call of a linear layer: gradients of its output and its input, ``[examples, positions, d]`` each."""

    def add(self, key: str, gradient: Tensor) -> None:
        """Gradients of one call, ``[examples, tensor's shape]``."""

    def by_example(self, x: Tensor) -> Tensor:
        """``[rows, …, d]`` to ``[examples, …, d]``: all rows of an example add up to its gradient."""


Names = Mapping[str, str]
"""From a parameter's name in its layer (``weight``, ``prefix_key`` …) to its file key."""

Watcher = Callable[[Any, Names, Observer], "RemovableHandle | _Handles | _Forward"]


class Squares:
    """Collects per-example gradients during a backward pass and squares each when it is complete.

    It is complete when every call of its layer has reported. Where that cannot be told, as under gradient checkpointing,
    which calls layers again, it is squared when the pass ends.

    Attributes:
        repeats: most rows that an example may have; a decoder that scores C choices sees up to C for each.
        totals: sums of squares over the even and over the odd examples, by file key, in float64.

    Args:
        parity: 0 or 1 for each example of the batch.
        totals: to be added to.
    """

    def __init__(self, parity: Tensor, totals: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None) -> None:
        self.batch = len(parity)
        self.repeats = 1
        self.totals = ({}, {}) if totals is None else totals
        self._rows = [_slices_of((parity == half).nonzero()[:, 0].tolist()) for half in (0, 1)]
        self._weights: Tensor | None = None
        self._calls: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._open: dict[str, Tensor] = {}

    def sees(self, names: Names, rows: int) -> None:
        """Raise unless the rows can be told apart by example; in a batch of one all of them are its own."""
        repeats, rest = divmod(rows, self.batch)
        if self.batch > 1 and (rest or not 1 <= repeats <= self.repeats):
            raise RefusedError(
                f"layer of {next(iter(names.values()))} sees a first dimension of {rows} for {self.batch} "
                "examples: per-example gradients are not defined there; use batch_size=1"
            )
        self._calls.update(names.values())

    def by_example(self, x: Tensor) -> Tensor:
        """``[rows, …, d]`` to ``[batch, …, d]``."""
        return full_precision(x).reshape(self.batch, -1, x.shape[-1])

    def begin(self, weights: Tensor | None = None) -> None:
        """A backward pass is to come, whose squares are weighted per example; :meth:`close` ends it."""
        self._weights = None if weights is None or bool((weights == 1).all()) else weights

    def add_outer(self, key: str, gradient: Tensor, x: Tensor) -> None:
        """Σ_t g_t x_tᵀ per example. Where this is all of it, few examples' gradients are in memory at a time."""
        if self._calls[key] != 1:
            self.add(key, _outer(gradient, x))
            return
        for half, part in self._parts(gradient.shape[-1] * x.shape[-1]):
            self._total(half, key, partial(_outer, gradient, x, part), part)

    def add(self, key: str, gradient: Tensor) -> None:
        """A layer called twice accumulates before squaring."""
        self._open[key] = self._open[key] + gradient if key in self._open else gradient
        self._reported[key] += 1
        if self._reported[key] == self._calls[key]:
            self._square(key)

    def close(self) -> None:
        """End of a backward pass: square what is left."""
        while self._open:
            self._square(next(iter(self._open)))
        self._reported.clear()

    def _square(self, key: str) -> None:
        gradient = self._open.pop(key)
        for half, part in self._parts(gradient[0].numel()):
            self._total(half, key, partial(_copied, gradient, part), part)

    def _parts(self, entries: int) -> Iterator[tuple[int, slice | list[int]]]:
        """Half and rows of some examples at a time, each of whose gradients has so many entries."""
        step = min(_MOST, max(1, _CHUNK // entries))
        for half, rows in enumerate(self._rows):
            for start in range(0, _length(rows), step):
                yield half, _part(rows, start, step)

    def _total(self, half: int, key: str, made: Callable[[], Tensor], rows: slice | list[int]) -> None:
        """Add the squares of some examples' gradients."""
        square = self._squared(made(), rows)
        if square.dtype == torch.float32 and float(square.max()) < _SMALL:  # too small, it may be, to be told apart
            square = self._squared(made().double(), rows)
        totals = self.totals[half]
        if key in totals:
            totals[key] += square
        else:
            totals[key] = square.double()

    def _squared(self, gradient: Tensor, rows: slice | list[int]) -> Tensor:
        """Σ w_n g_n², in the place of the gradients."""
        gradient *= gradient
        if self._weights is not None:
            gradient *= self._weights[rows].to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))
        return gradient.sum(0)


def _outer(gradient: Tensor, x: Tensor, rows: slice | list[int] = slice(None)) -> Tensor:
    """Σ_t g_t x_tᵀ of some of the examples."""
    return gradient[rows].transpose(1, 2) @ x[rows].to(gradient.dtype)


def _copied(gradient: Tensor, rows: slice | list[int]) -> Tensor:
    return gradient[rows].clone()


def _slices_of(rows: list[int]) -> slice | list[int]:
    """The same rows as a slice where they are evenly spaced, which copies nothing."""
    if not rows:
        return slice(0, 0)
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    even = slice(rows[0], rows[-1] + 1, step)
    return even if list(range(rows[-1] + 1))[even] == rows else rows


def _length(rows: slice | list[int]) -> int:
    return len(range(rows.start, rows.stop, rows.step or 1)) if isinstance(rows, slice) else len(rows)


def _part(rows: slice | list[int], start: int, count: int) -> slice | list[int]:
    """``count`` of the rows from the ``start``-th."""
    if not isinstance(rows, slice):
        return rows[start : start + count]
    part = range(rows.start, rows.stop, rows.step or 1)[start : start + count]
    return slice(part.start, part.stop, part.step)


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

    def add_outer(self, key: str, gradient: Tensor, x: Tensor) -> None:
        """Nothing: rows are counted without a backward pass."""

    def add(self, key: str, gradient: Tensor) -> None:
        """Nothing likewise."""

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


class _WatchedLinear(torch.autograd.Function):
    """``F.linear`` whose backward pass reports instead of computing the gradients of weight and bias over the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, report: Callable[..., None]) -> Tensor:
        """As ``F.linear``."""
        ctx.save_for_backward(x, weight)
        ctx.report = report
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        """The gradient of x alone."""
        x, weight = ctx.saved_tensors
        ctx.report(x, gradients[0])
        return gradients[0] @ weight if ctx.needs_input_grad[0] else None, None, None, None


class _Forward:
    """A function in the place of a module's forward."""

    def __init__(self, module: nn.Module, function: Callable[..., Tensor]) -> None:
        self.module = module
        module.forward = function

    def remove(self) -> None:
        """Put the module's own forward back."""
        del self.module.forward


def _watch_linear(module: nn.Linear, names: Names, observer: Observer) -> RemovableHandle | _Forward:
    def report(x: Tensor, gradient: Tensor) -> None:
        x, gradient = observer.by_example(x.detach()), observer.by_example(gradient.detach())
        if "weight" in names:
            observer.add_outer(names["weight"], gradient, x)
        if "bias" in names:
            observer.add(names["bias"], gradient.sum(1))

    def forward(x: Tensor) -> Tensor:
        observer.sees(names, len(x))
        return _WatchedLinear.apply(x, module.weight, module.bias, report)  # type: ignore[no-any-return,no-untyped-call]

    def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        observer.sees(names, len(inputs[0]))
        if output.requires_grad:
            output.register_hook(partial(report, inputs[0].detach()))  # type: ignore[no-untyped-call]

    is_plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    if is_plain and not torch.is_autocast_enabled(module.weight.device.type):
        return _Forward(module, forward)
    return module.register_forward_hook(after)


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
