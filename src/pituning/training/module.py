"""A mixture running on a backbone: φ̄ is computed once per step and takes the place of the attached expert's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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
        self._outside = _Outside(_Caller(site.backbone), {k: f"model.{n}" for k, n in site.live_names.items()})

    def forward(self, **batch: Any) -> Tensor:
        """Per-example loss, shape ``[batch]``."""
        return self._run("loss", batch)

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """Choice scores, shape ``[batch, choices]``."""
        return self._run("score", batch, choices)

    def _run(self, method: str, *arguments: Any) -> Tensor:
        outside = self._outside
        replaced = {outside.names[key]: tensor for key, tensor in self.mixture().items()}
        result: Tensor = functional_call(outside.caller, replaced, (method, *arguments))
        return result


@contextmanager
def running(backbone: Backbone, mixture: Mixture, config: Mapping[str, Any]) -> Iterator[MixtureModel]:
    """Attach the configuration and run the mixture on it for the length of the block."""
    with attached(backbone, config) as site:
        for parameter in site.parameters.values():
            parameter.requires_grad_(False)
        yield MixtureModel(site, mixture.to(backbone.device))


class _Caller(nn.Module):
    """Makes a backbone's methods callable through ``functional_call``."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = backbone.model
        self._methods: dict[str, Callable[..., Tensor]] = {"loss": backbone.loss, "score": backbone.score}
        self.eval()

    def forward(self, method: str, *arguments: Any) -> Tensor:
        return self._methods[method](*arguments)


class _Outside:
    """Holds modules where ``nn.Module`` does not look for sub-modules."""

    def __init__(self, caller: _Caller, names: dict[str, str]) -> None:
        self.caller = caller
        self.names = names
