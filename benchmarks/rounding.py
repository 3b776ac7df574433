"""Products of bfloat16 tensors on a processor that has no instructions for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pituning.training.precision import has_fast_bf16

PRODUCTS = {
    F.linear, torch.addmm, torch.baddbmm, torch.bmm, torch.einsum, torch.matmul, torch.mm, Tensor.addmm, Tensor.baddbmm,
    Tensor.bmm, Tensor.matmul, Tensor.mm,
}  # fmt: skip


class RoundedProducts(TorchFunctionMode):
    """In its block a matrix product of bfloat16 tensors is computed in float32 and rounded once, forwards and backwards.

    That is what a processor with instructions for bfloat16 does, up to the order of the sums. Without them PyTorch takes some
    twenty times as long as in float32. Fused attention stays as it is.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The product; anything else as it would be."""
        kwargs = dict(kwargs or {})
        if func in PRODUCTS and _all_bf16((*args, *kwargs.values())):
            args, kwargs = [_float(a) for a in args], {key: _float(value) for key, value in kwargs.items()}
            return func(*args, **kwargs).bfloat16()
        return func(*args, **kwargs)


def bf16_products(device: torch.device) -> AbstractContextManager[object]:
    """A block in which bfloat16 is not slower than float32 by much, whatever the processor."""
    return nullcontext() if has_fast_bf16(device) else RoundedProducts()


def _all_bf16(values: Sequence[Any]) -> bool:
    tensors = [
        v for value in values for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)
    ]
    return bool(tensors) and all(t.dtype == torch.bfloat16 for t in tensors)


def _float(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_float(v) for v in value]
    return value.float() if isinstance(value, Tensor) else value
