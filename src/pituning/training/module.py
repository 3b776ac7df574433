"""A mixture running on a backbone: φ̄ is computed once per step and takes the place of the attached expert's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from pituning.backbones.base import Backbone, Batch
from pituning.interpolation.mixture import Mixture
from pituning.methods.attach import Attached, attached


class MixtureModel(nn.Module):
    """``forward(**batch)`` gives the per-example loss ``[batch]`` of the backbone under φ̄.

    The frozen backbone is not a sub-module: parameters, state and checkpoints hold only what belongs to the mixture.
    """

    def __init__(self, site: Attached, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture
        self._outside = _Outside(
            _Caller(site.backbone),
            {k: f"model.{n}" for k, n in site.live_names.items()},
            {k: p.dtype for k, p in site.parameters.items()},
            [m for layer in site.peft_model.modules() if isinstance(layer, BaseTunerLayer) for m in _dropouts(layer)],
        )

    def train(self, mode: bool = True) -> MixtureModel:
        """Training mode for the expert's own dropout; the backbone always stays in eval mode."""
        super().train(mode)
        for module in self._outside.dropouts:
            module.train(mode)
        return self

    def forward(self, label_smoothing: float = 0.0, parts: Sequence[Batch] = (), **batch: Any) -> Tensor:
        """Per-example loss, shape ``[batch]``; see :meth:`Backbone.loss`.

        Args:
            parts: in place of one batch, several whose losses are given one after the other; φ̄ is computed once for all.
        """
        return torch.cat(self._run("loss", [(part, label_smoothing) for part in parts or (batch,)]))

    def loss(self, batch: Batch) -> Tensor:
        """Per-example loss, shape ``[batch]``."""
        return self._run("loss", [(batch,)])[0]

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """Choice scores, shape ``[batch, choices]``."""
        return self._run("score", [(batch, choices)])[0]

    def _run(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
        outside = self._outside
        # as attaching does: an expert that is stored in another dtype runs in the backbone's
        replaced = {outside.names[key]: t.to(outside.dtypes[key]) for key, t in self.mixture().items()}
        results: list[Tensor] = functional_call(outside.caller, replaced, (method, calls))
        return results


@contextmanager
def running(backbone: Backbone, mixture: Mixture, config: Mapping[str, Any]) -> Iterator[MixtureModel]:
    """Attach the configuration and run the mixture on it for the length of the block."""
    with attached(backbone, config) as site:
        for parameter in site.parameters.values():
            parameter.requires_grad_(False)
            # φ̄ takes its place in every call; until then one number stands for all of them, and no memory is taken
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
        yield MixtureModel(site, mixture.to(backbone.device))


class _Caller(nn.Module):
    """Makes a backbone's methods callable through ``functional_call``."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = backbone.model
        self._methods: dict[str, Callable[..., Tensor]] = {"loss": backbone.loss, "score": backbone.score}
        self.eval()

    def forward(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
        return [self._methods[method](*arguments) for arguments in calls]


class _Outside:
    """Holds modules where ``nn.Module`` does not look for sub-modules."""

    def __init__(
        self, caller: _Caller, names: dict[str, str], dtypes: dict[str, torch.dtype], dropouts: list[nn.Module]
    ) -> None:
        self.caller = caller
        self.names = names
        self.dtypes = dtypes
        self.dropouts = dropouts


def _dropouts(layer: Any) -> Iterator[nn.Module]:
    """Dropout modules of a tuner layer, but none of the base layer it wraps."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Dropout) and not name.startswith("base_layer"):
            yield module
