"""Products of bfloat16 tensors that are computed in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.rounding import RoundedProducts

BF16 = torch.bfloat16
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda a, b: F.linear(a, b.t()),
    "linear with bias": lambda a, b: F.linear(a, b.t(), bias=b.new_zeros(b.shape[1])),
    "matmul": torch.matmul,
    "@": lambda a, b: a @ b,
    "mm": lambda a, b: a.mm(b),
    "bmm": lambda a, b: torch.bmm(a[None], b[None])[0],
    "addmm": lambda a, b: torch.addmm(b.new_zeros(b.shape[1]), a, b),
    "baddbmm": lambda a, b: torch.baddbmm(b.new_zeros(1, 1, 1), a[None], b[None])[0],
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", [a, b]),
}


class Products(TorchDispatchMode):
    """Keeps the dtypes of whatever is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mul"}:
            self.dtypes |= {a.dtype for a in args if isinstance(a, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
def test_is_the_exact_product_rounded_once(way: str) -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=rng).to(BF16).requires_grad_() for shape in ((7, 300), (300, 11)))
    upstream = torch.randn(7, 11, generator=rng).to(BF16)
    with RoundedProducts(), Products() as seen:
        found = WAYS[way](a, b)
        found.backward(upstream)
    assert seen.dtypes == {torch.float32}
    exact, above = (a.detach().double(), b.detach().double()), upstream.double()
    for value, slow in ((found, exact[0] @ exact[1]), (a.grad, above @ exact[1].T), (b.grad, exact[0].T @ above)):
        assert value is not None
        assert value.dtype == BF16
        assert (value == slow.to(BF16)).float().mean() > 0.99  # sums of float32 may round to the neighbour
        torch.testing.assert_close(value.double(), slow, rtol=2**-8, atol=1e-5)


def test_leaves_other_tensors_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 64, generator=rng), torch.randn(64, 3, generator=rng)
    outside = a @ b
    with RoundedProducts():
        assert torch.equal(a @ b, outside)
        with pytest.raises(RuntimeError, match="dtype"):
            _ = a @ b.to(BF16)
