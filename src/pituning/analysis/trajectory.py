"""The weights of an interpolation over its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pituning.errors import PituningError
from pituning.training.blend import Interpolation


@dataclass(frozen=True)
class Trajectory:
    """Weights by step.

    Attributes:
        groups: names of the groups that have weights of their own.
        steps: when the weights were read; 0 is before the first step.
        weights: ``[steps][groups][experts]``.
    """

    task: str
    experts: tuple[str, ...]
    groups: tuple[str, ...]
    steps: tuple[int, ...]
    weights: tuple[tuple[tuple[float, ...], ...], ...]

    @classmethod
    def of(cls, interpolation: Interpolation) -> Trajectory:
        """What an interpolation recorded of its own training.

        Raises:
            PituningError: if nothing was trained, so that there are no steps.
        """
        return cls.read(
            interpolation.expert.card.task, interpolation.experts, list(interpolation.weights), interpolation.trajectory
        )

    @classmethod
    def read(
        cls, task: str, experts: Sequence[str], groups: Sequence[str], by_step: Mapping[int, Sequence[Sequence[float]]]
    ) -> Trajectory:
        """From weights ``[groups, experts]`` by step.

        Raises:
            PituningError: if there are none, or their shape does not fit the names.
        """
        if not by_step:
            raise PituningError("no weights were recorded: nothing was trained, neither weights nor experts")
        shape = (len(groups), len(experts))
        for step, rows in by_step.items():
            if (found := tuple(torch.tensor(rows).shape)) != shape:
                raise PituningError(f"weights at step {step} have shape {list(found)}, expected {list(shape)}")
        steps = tuple(sorted(by_step))
        return cls(
            task, tuple(experts), tuple(groups), steps, tuple(tuple(map(tuple, by_step[step])) for step in steps)
        )

    def mean(self) -> Tensor:
        """Weights averaged over groups, ``[steps, experts]``."""
        return torch.tensor(self.weights, dtype=torch.float64).mean(1)

    def moved(self) -> dict[str, float]:
        """By expert, how far its mean weight went from the first step to the last."""
        mean = self.mean()
        return dict(zip(self.experts, (mean[-1] - mean[0]).tolist(), strict=True))
