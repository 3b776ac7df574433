"""φ̄ = Σ_k w_k φ_k with w = softmax(α): arithmetic on named tensors, which knows nothing of experts, tasks or models.

Two spaces. *Parameter space* averages tensors name by name: exact for every method whose output is what the paper mixes
(bottleneck adapters, prefixes, BitFit). *Product space* averages ΔW = s B A, which is what LoRA experts mean: mixing A
and B separately would add the cross terms A_i B_j. It stacks the factors, so that ranks and scalings may differ.

Where the weights of a group do not sum to one, φ̄ = φ_0 + Σ_k w_k (φ_k − φ_0), with the experts' common start φ_0; LoRA's
is ΔW = 0 and drops out.

Source: Wu et al., "π-Tuning", ICML 2023, §3.3; the reference code mixes LoRA in product space, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from pituning.errors import RefusedError
from pituning.interpolation.coefficients import Coefficients, entropy

TRAIN_MODES = ("experts", "shared", "weights", "none", "merge-then-tune")
_FROZEN = ("weights", "none")


@dataclass(frozen=True)
class LowRank:
    """One LoRA module: ΔW = scaling · B A, with A ``[r, in]`` and B ``[out, r]``; a bias ``[out]`` is scaled as well."""

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None = None


class Mixture(nn.Module):
    """Base of both mixtures: the coefficients α, one row per group, and what of it is trained.

    Args:
        weights: initial weights ``[groups, experts]``, such as the kind of coefficients can have.
        train: ``"experts"`` (α and all φ_k, the paper), ``"shared"`` (frozen φ_k; α and one trainable δ), ``"weights"``
            (α only), ``"none"`` (a soup) or ``"merge-then-tune"`` (one trainable φ̄ that starts at the soup).
        coefficients: how α becomes weights.
        train_weights: set False to hold the weights at their start in the modes that would train them.
    """

    start: Tensor

    def __init__(
        self,
        weights: Tensor,
        train: str,
        coefficients: Coefficients = Coefficients(),  # noqa: B008 - immutable
        train_weights: bool = True,
    ) -> None:
        super().__init__()
        if train not in TRAIN_MODES:
            raise ValueError(f"train must be one of {', '.join(TRAIN_MODES)}, not {train!r}")
        if weights.dim() != 2:
            raise ValueError(f"weights must be [groups, experts], not {list(weights.shape)}")
        # the only softmax weight of a single expert stays as it is and has no gradient
        free = weights.shape[1] > 1 or not coefficients.sums_to_scale
        self.train_mode = train
        self.coefficients = coefficients
        self.alpha = nn.Parameter(
            coefficients.alpha(weights),
            requires_grad=train in ("experts", "shared", "weights") and train_weights and free,
        )
        self.register_buffer("start", self.weights().detach().clone(), persistent=False)

    def weights(self) -> Tensor:
        """Current weights, shape ``[groups, experts]``."""
        return self.coefficients.weights(self.alpha)

    def penalty(self, to_start: float = 0.0, spread: float = 0.0) -> Tensor:
        """What regularisers of the weights add to a loss, averaged over the groups.

        Args:
            to_start: times ‖w − w_0‖², the squared distance to the initial weights.
            spread: times −H(w), the negative entropy in nats; pulls softmax weights apart from one-hot, or, where
                negative, towards it.
        """
        weights = self.weights()
        total = weights.new_zeros(())
        if to_start:
            total = total + to_start * (weights - self.start).square().sum(1).mean()
        if spread:
            if not self.coefficients.sums_to_scale:
                raise RefusedError(f"{self.coefficients.kind} weights are no distribution and have no entropy")
            total = total - spread * entropy(weights / self.coefficients.scale)
        return total

    def forward(self) -> dict[str, Tensor]:
        """φ̄ by tensor name, differentiable in whatever is trained."""
        raise NotImplementedError

    def _hold(self, tensor: Tensor, trainable: bool) -> nn.Parameter:
        """A parameter on the very storage of a tensor that nobody else has."""
        return nn.Parameter(tensor.detach(), requires_grad=trainable)

    def _runs_alone(self) -> bool:
        """Whether there is one expert whose weight is 1 and stays so: it runs with its own tensors, bit by bit."""
        return self.alpha.shape[1] == 1 and not self.alpha.requires_grad and bool((self.weights() == 1).all())


class ParameterMixture(Mixture):
    """φ̄ in parameter space: one matrix–vector product per group of tensors.

    Args:
        experts: K mappings with equal names and shapes.
        groups: the index of the weights' row that each tensor uses.
        base: φ_0 by tensor name, for weights that need not sum to one.
        weights, train, coefficients, train_weights: see :class:`Mixture`.
    """

    def __init__(
        self,
        experts: Sequence[Mapping[str, Tensor]],
        groups: Mapping[str, int],
        weights: Tensor,
        train: str = "experts",
        coefficients: Coefficients = Coefficients(),  # noqa: B008 - immutable
        train_weights: bool = True,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(weights, train, coefficients, train_weights)
        if (base is None) != (coefficients.sums_to_one or (train == "none" and sums_to_one(weights))):
            raise ValueError(
                "weights that need not sum to one need the experts' common start, softmax weights need none"
            )
        self._members: list[list[str]] = [[n for n in experts[0] if groups[n] == g] for g in range(len(weights))]
        self._shapes = {name: tensor.shape for name, tensor in experts[0].items()}
        self.single = self._runs_alone()
        as_it_is = self.single and train in _FROZEN
        stacked = [torch.stack(_one_dtype([_flatten(e, names) for e in experts], as_it_is)) for names in self._members]
        for index, names in enumerate(self._members):
            origin = None if base is None else _flatten(base, names).to(stacked[index])
            self.register_buffer(f"base_{index}", origin, persistent=False)
        if train == "merge-then-tune":
            stacked = [self._mix(g, s, self.weights().detach()).unsqueeze(0) for g, s in enumerate(stacked)]
        # All tensors of a group lie in one [K, n] matrix, so that mixing and the optimizer's step are a few large operations.
        self.experts = nn.ParameterList(self._hold(s, train in ("experts", "merge-then-tune")) for s in stacked)
        self.delta = nn.ParameterList(self._hold(torch.zeros_like(s[0]), True) for s in stacked if train == "shared")

    def forward(self) -> dict[str, Tensor]:
        """φ̄ by tensor name; with one expert of weight 1, its own values bit by bit."""
        weights = self.weights()
        mixed: dict[str, Tensor] = {}
        for group, names in enumerate(self._members):
            stack = self.experts[group]
            flat = stack[0] if self.train_mode == "merge-then-tune" else self._mix(group, stack, weights)
            if self.train_mode == "shared":
                flat = flat + self.delta[group]
            pieces = flat.split([self._shapes[n].numel() for n in names])
            mixed.update((n, p.view(self._shapes[n])) for n, p in zip(names, pieces, strict=True))
        return mixed

    def _mix(self, group: int, stack: Tensor, weights: Tensor) -> Tensor:
        """One group's tensors ``[K, n]`` to ``[n]``."""
        if self.single:
            return stack[0]
        row = weights[group].to(stack.dtype)
        base: Tensor | None = getattr(self, f"base_{group}")
        # under autocast φ̄, which is held and saved, would be rounded to half precision
        with torch.autocast(stack.device.type, enabled=False):
            mixed = row @ stack
        return mixed if base is None else mixed + (1 - row.sum()) * base


class ProductMixture(Mixture):
    """φ̄ for LoRA: ΔW = Σ_k w_k s_k B_k A_k as the factors [A_1; …; A_K] and [w_1 s_1 B_1, …, w_K s_K B_K].

    Args:
        experts: K mappings from module name to its factors; a module may be missing in some experts.
        groups: the index of the weights' row that each module uses.
        delta: for ``train="shared"``, the new factor pair per module (B = 0 starts at the mixture itself).
        weights, train, coefficients, train_weights: see :class:`Mixture`.
    """

    def __init__(
        self,
        experts: Sequence[Mapping[str, LowRank]],
        groups: Mapping[str, int],
        weights: Tensor,
        train: str = "experts",
        coefficients: Coefficients = Coefficients(),  # noqa: B008 - immutable
        train_weights: bool = True,
        delta: Mapping[str, LowRank] | None = None,
    ) -> None:
        super().__init__(weights, train, coefficients, train_weights)
        if (train == "shared") != (delta is not None):
            raise ValueError("train='shared' needs a delta factor pair per module, the other modes take none")
        self.modules_mixed = list(dict.fromkeys(name for expert in experts for name in expert))
        self._groups = [groups[name] for name in self.modules_mixed]
        self.has_bias = any(f.bias is not None for e in experts for f in e.values())
        self.a, self.b, self.bias = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.delta_a, self.delta_b = nn.ParameterList(), nn.ParameterList()
        # One expert alone runs with its own tensors and its own scaling, so that not a bit changes;
        # where it is trained, then in float32 at least.
        self.single = self._runs_alone() and train != "shared"
        as_it_is = self.single and train in _FROZEN
        fold = train == "merge-then-tune" and not self.single
        start = self.weights().detach()
        for index, name in enumerate(self.modules_mixed):
            held = [(k, e[name]) for k, e in enumerate(experts) if name in e]
            a = torch.cat(_one_dtype([f.a for _, f in held], as_it_is))
            b = torch.cat(_one_dtype([f.b for _, f in held], as_it_is), dim=1)
            dtype = torch.promote_types(a.dtype, b.dtype)
            owner = torch.tensor([k for k, _ in held])
            ranks = torch.tensor([f.a.shape[0] for _, f in held])
            scaling = torch.tensor([f.scaling for _, f in held], dtype=torch.float64).to(dtype)
            self.register_buffer(f"owner_{index}", owner.repeat_interleave(ranks), persistent=False)
            self.register_buffer(f"scaling_{index}", scaling.repeat_interleave(ranks), persistent=False)
            self.register_buffer(f"bias_owner_{index}", owner, persistent=False)
            self.register_buffer(f"bias_scaling_{index}", scaling, persistent=False)
            biases = torch.stack([f.bias if f.bias is not None else f.b.new_zeros(len(f.b)) for _, f in held]).to(dtype)
            if fold:
                b = self._weighted(index, b.to(dtype), start)
                biases = self._weighted(index, biases.T, start, "bias_").sum(1, keepdim=True).T
            trained = train in ("experts", "merge-then-tune")
            self.a.append(self._hold(a.to(dtype), trained))
            self.b.append(self._hold(b.to(dtype), trained))
            if self.has_bias:
                self.bias.append(self._hold(biases, trained))
            if delta is not None:
                self.delta_a.append(self._hold(delta[name].a.to(dtype, copy=True), True))
                self.delta_b.append(self._hold(delta[name].b.to(dtype) * delta[name].scaling, True))
                for parameter in (self.delta_a[-1], self.delta_b[-1]):
                    # or its gradient would keep all of the stacked factors' alive, of which it is a part
                    parameter.register_hook(torch.clone)

    def ranks(self) -> dict[str, int]:
        """R of each module's factors."""
        extra = [len(a) for a in self.delta_a] or [0] * len(self.a)
        return {name: len(a) + more for name, a, more in zip(self.modules_mixed, self.a, extra, strict=True)}

    def factors(self) -> dict[str, LowRank]:
        """A ``[R, in]`` and B ``[out, R]`` of each module, with weights and scalings folded into B: ΔW = B A, scaling 1."""
        weights = self.weights()
        folded = self.train_mode == "merge-then-tune" and not self.single
        mixed = {}
        for index, name in enumerate(self.modules_mixed):
            a, b = self.a[index], self.b[index]
            b = b if folded else self._weighted(index, b, weights)
            bias = None
            if self.has_bias:
                rows = self.bias[index]
                bias = rows[0] if folded else self._weighted(index, rows.T, weights, "bias_").sum(1)
            if self.train_mode == "shared":
                a = torch.cat([a, self.delta_a[index]])
                b = torch.cat([b, self.delta_b[index]], dim=1)
            mixed[name] = LowRank(a, b, 1.0, bias)
        return mixed

    def forward(self) -> dict[str, Tensor]:
        """The factors to run with, under PEFT's LoRA names; a single expert's own, unscaled, bit by bit."""
        if self.single:
            biases = [b[0] for b in self.bias] if self.has_bias else [None] * len(self.a)
            rows = zip(self.modules_mixed, self.a, self.b, biases, strict=True)
            return lora_tensors({n: LowRank(a, b, 1.0, bias) for n, a, b, bias in rows})
        return lora_tensors(self.factors())

    def _weighted(self, index: int, columns: Tensor, weights: Tensor, kind: str = "") -> Tensor:
        """Columns ``[out, R]``, each times the weight and the scaling of the expert that it comes from."""
        owner, scaling = getattr(self, f"{kind}owner_{index}"), getattr(self, f"{kind}scaling_{index}")
        weighted: Tensor = columns * (weights[self._groups[index]].to(columns.dtype)[owner] * scaling)
        return weighted


def lora_tensors(factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Factors by module as tensors under PEFT's file key names; their scaling is left out."""
    named = {}
    for module, factor in factors.items():
        named[f"{module}.lora_A.weight"] = factor.a
        named[f"{module}.lora_B.weight"] = factor.b
        if factor.bias is not None:
            named[f"{module}.lora_B.bias"] = factor.bias
    return named


def sums_to_one(weights: Tensor) -> bool:
    """Whether every row of weights ``[groups, experts]`` does, up to rounding: then no starting point takes part."""
    return torch.allclose(weights.sum(1), weights.new_ones(len(weights)), rtol=0, atol=1e-5)


def _flatten(expert: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([expert[n].detach().flatten() for n in names]) if names else torch.zeros(0)


def _one_dtype(tensors: Sequence[Tensor], as_they_are: bool) -> list[Tensor]:
    """Tensors in one dtype that holds all of them, and at least float32: in half precision most of an optimizer's steps
    would be rounded away.
    """
    if as_they_are:
        return list(tensors)
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [t.to(dtype) for t in tensors]
