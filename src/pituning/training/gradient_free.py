"""Learning the weights without gradients: CMA-ES over α, which needs forward passes only.

Source: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, in the author's package ``cma``. LoraHub (Huang et
al., COLM 2024) learns the weights of LoRA experts gradient-free in this way, with another optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pituning.errors import MissingDependencyError, PituningError
from pituning.interpolation.mixture import Mixture

SIGMA = 0.5  # first standard deviation of α, where the settings name none


def minimise(
    mixture: Mixture,
    objective: Callable[[], float],
    *,
    generations: int,
    sigma: float = SIGMA,
    seed: int = 0,
    after: Callable[[int], None] = lambda generation: None,
) -> None:
    """Move α to where the objective is lowest; nothing else of the mixture changes.

    Args:
        mixture: with trainable α, and nothing else trainable; an infinite α (a weight of exactly 0 or 1) stays.
        objective: called with the mixture at a candidate α.
        generations: each evaluates 4 + ⌊3 ln(n + 1)⌋ candidates, n being the count of numbers in α.
        sigma: standard deviation of the first generation around the start.
        after: called with 0 before the first generation and with its number after each; α is then the strategy's mean.

    Raises:
        PituningError: if something other than α is trainable, or α is not.
        MissingDependencyError: if ``cma`` is not installed.
    """
    free = [n for n, p in mixture.named_parameters() if p.requires_grad]
    if free != ["alpha"]:
        raise PituningError(
            f"gradient-free learning moves the weights alone, but {', '.join(free) or 'nothing'} would be trained; use "
            "train='weights'"
        )
    try:
        import cma
    except ImportError as error:
        raise MissingDependencyError("gradient-free learning needs cma: pip install 'pituning[cma]'") from error
    moving = torch.isfinite(mixture.alpha)
    start = mixture.alpha[moving].detach().double().cpu().numpy()
    if len(start) == 0 or generations == 0:
        after(0)
        return
    padded = np.append(start, 0.0)  # the strategy wants two dimensions; one more does not harm
    before = np.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cma's remarks on its options
            options = {
                "seed": seed + 1,
                "maxiter": generations,
                "verbose": -9,
                "tolfun": 0,
                "tolx": 0,
                "tolflatfitness": 10**9,
            }
            strategy = cma.CMAEvolutionStrategy(padded, sigma, options)
        after(0)
        for generation in range(1, generations + 1):
            candidates = strategy.ask()
            values = []
            for candidate in candidates:
                _set(mixture, moving, candidate)
                values.append(objective())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                strategy.tell(candidates, values)
            _set(mixture, moving, strategy.mean)
            after(generation)
    finally:
        np.random.set_state(before)


@torch.no_grad()
def _set(mixture: Mixture, moving: Tensor, values: NDArray[np.float64]) -> None:
    mixture.alpha[moving] = torch.as_tensor(values[:-1]).to(mixture.alpha)
