"""φ̄ = Σ_k w_k φ_k with w = softmax(α): arithmetic on named tensors, which knows nothing of experts, tasks or models.

Two spaces. *Parameter space* averages tensors name by name: exact for every method whose output is what the paper mixes
(bottleneck adapters, prefixes, BitFit). *Product space* averages ΔW = s B A, which is what LoRA experts mean: mixing A
and B separately would add the cross terms A_i B_j. It stacks the factors, so that ranks and scalings may differ.

Source: Wu et al., "π-Tuning", ICML 2023, §3.3; the reference code mixes LoRA in product space, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TRAIN_MODES = ("experts", "shared", "weights", "none")


@dataclass(frozen=True)
class LowRank:
    """One LoRA module: ΔW = scaling · B A, with A ``[r, in]`` and B ``[out, r]``."""

    a: Tensor
    b: Tensor
    scaling: float


class Mixture(nn.Module):
    """Base of both mixtures: the coefficients α, one row per group, and what of it is trained.

    Args:
        weights: initial weights ``[groups, experts]``; rows are non-negative and sum to one. A weight of exactly 0 or 1
            is kept exactly: its α is −∞ and never moves.
        train: ``"experts"`` (α and all φ_k, the paper), ``"shared"`` (frozen φ_k; α and one trainable δ),
            ``"weights"`` (α only) or ``"none"`` (a soup).
        temperature: w = softmax(α / temperature).
        train_weights: set False to hold the weights at their start in the modes that would train them.
    """

    def __init__(self, weights: Tensor, train: str, temperature: float = 1.0, train_weights: bool = True) -> None:
        super().__init__()
        if train not in TRAIN_MODES:
            raise ValueError(f"train must be one of {', '.join(TRAIN_MODES)}, not {train!r}")
        if (
            weights.dim() != 2
            or (weights < 0).any()
            or not torch.allclose(weights.sum(1), weights.new_ones(len(weights)))
        ):
            raise ValueError(f"weights must be [groups, experts], non-negative, rows summing to one; got {weights}")
        # the only weight of a single expert is 1 and has no gradient
        trained = train != "none" and train_weights and weights.shape[1] > 1
        self.train_mode = train
        self.temperature = temperature
        self.alpha = nn.Parameter(weights.log() * temperature, requires_grad=trained)

    def weights(self) -> Tensor:
        """Current weights, shape ``[groups, experts]``."""
        return torch.softmax(self.alpha / self.temperature, dim=1)

    def forward(self) -> dict[str, Tensor]:
        """φ̄ by tensor name, differentiable in whatever is trained."""
        raise NotImplementedError

    def _hold(self, tensor: Tensor, trainable: bool) -> nn.Parameter:
        return nn.Parameter(tensor.detach().clone(), requires_grad=trainable)


class ParameterMixture(Mixture):
    """φ̄ in parameter space: one matrix–vector product per group of tensors.

    Args:
        experts: K mappings with equal names and shapes.
        groups: the index of the weights' row that each tensor uses.
        weights, train, temperature, train_weights: see :class:`Mixture`.
    """

    def __init__(
        self,
        experts: Sequence[Mapping[str, Tensor]],
        groups: Mapping[str, int],
        weights: Tensor,
        train: str = "experts",
        temperature: float = 1.0,
        train_weights: bool = True,
    ) -> None:
        super().__init__(weights, train, temperature, train_weights)
        self._members: list[list[str]] = [[n for n in experts[0] if groups[n] == g] for g in range(len(weights))]
        self._shapes = {name: tensor.shape for name, tensor in experts[0].items()}
        stacked = [torch.stack([_flatten(e, names) for e in experts]) for names in self._members]
        # All tensors of a group lie in one [K, n] matrix, so that mixing and the optimizer's step are a few large operations.
        self.experts = nn.ParameterList(self._hold(s, train == "experts") for s in stacked)
        self.delta = nn.ParameterList(self._hold(torch.zeros_like(s[0]), True) for s in stacked if train == "shared")

    def forward(self) -> dict[str, Tensor]:
        """φ̄ by tensor name; with one expert, its own values bit by bit."""
        weights = self.weights()
        mixed: dict[str, Tensor] = {}
        for group, names in enumerate(self._members):
            stack = self.experts[group]
            flat = stack[0] if len(stack) == 1 else weights[group].to(stack.dtype) @ stack
            if self.train_mode == "shared":
                flat = flat + self.delta[group]
            pieces = flat.split([self._shapes[n].numel() for n in names])
            mixed.update((n, p.view(self._shapes[n])) for n, p in zip(names, pieces, strict=True))
        return mixed


class ProductMixture(Mixture):
    """φ̄ for LoRA: ΔW = Σ_k w_k s_k B_k A_k as the factors [A_1; …; A_K] and [w_1 s_1 B_1, …, w_K s_K B_K].

    Args:
        experts: K mappings from module name to its factors; a module may be missing in some experts.
        groups: the index of the weights' row that each module uses.
        delta: for ``train="shared"``, the new factor pair per module (B = 0 starts at the mixture itself).
        weights, train, temperature, train_weights: see :class:`Mixture`.
    """

    def __init__(
        self,
        experts: Sequence[Mapping[str, LowRank]],
        groups: Mapping[str, int],
        weights: Tensor,
        train: str = "experts",
        temperature: float = 1.0,
        train_weights: bool = True,
        delta: Mapping[str, LowRank] | None = None,
    ) -> None:
        super().__init__(weights, train, temperature, train_weights)
        if (train == "shared") != (delta is not None):
            raise ValueError("train='shared' needs a delta factor pair per module, the other modes take none")
        self.modules_mixed = list(dict.fromkeys(name for expert in experts for name in expert))
        self._groups = [groups[name] for name in self.modules_mixed]
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        self.delta_a, self.delta_b = nn.ParameterList(), nn.ParameterList()
        for index, name in enumerate(self.modules_mixed):
            held = [(k, e[name]) for k, e in enumerate(experts) if name in e]
            self.a.append(self._hold(torch.cat([f.a for _, f in held]), train == "experts"))
            self.b.append(self._hold(torch.cat([f.b for _, f in held], dim=1), train == "experts"))
            ranks = torch.tensor([f.a.shape[0] for _, f in held])
            owner = torch.tensor([k for k, _ in held]).repeat_interleave(ranks)
            scaling = torch.tensor([f.scaling for _, f in held], dtype=torch.float64).repeat_interleave(ranks)
            self.register_buffer(f"owner_{index}", owner, persistent=False)
            self.register_buffer(f"scaling_{index}", scaling.to(self.b[-1]), persistent=False)
            if delta is not None:
                self.delta_a.append(self._hold(delta[name].a, True))
                self.delta_b.append(self._hold(delta[name].b * delta[name].scaling, True))
        # One expert alone runs with its own tensors and its own scaling, so that not a bit changes.
        self.single = len(experts) == 1 and train != "shared"

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A ``[R, in]`` and B ``[out, R]`` of each module, with weights and scalings folded into B: ΔW = B A."""
        weights = self.weights()
        mixed = {}
        for index, name in enumerate(self.modules_mixed):
            a, b = self.a[index], self.b[index]
            owner, scaling = getattr(self, f"owner_{index}"), getattr(self, f"scaling_{index}")
            b = b * (weights[self._groups[index]].to(b.dtype)[owner] * scaling)
            if self.train_mode == "shared":
                a = torch.cat([a, self.delta_a[index]])
                b = torch.cat([b, self.delta_b[index]], dim=1)
            mixed[name] = (a, b)
        return mixed

    def forward(self) -> dict[str, Tensor]:
        """The factors to run with, under PEFT's LoRA names; a single expert's own, unscaled, bit by bit."""
        named = {}
        own = {n: (a, b) for n, a, b in zip(self.modules_mixed, self.a, self.b, strict=True)}
        for module, (a, b) in (own if self.single else self.factors()).items():
            named[f"{module}.lora_A.weight"] = a
            named[f"{module}.lora_B.weight"] = b
        return named


def _flatten(expert: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([expert[n].detach().flatten() for n in names]) if names else torch.zeros(0)
