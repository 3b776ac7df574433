"""OFA (One For All, Wang et al., ICML 2022): configuration, model, processor, checkpoints and generation.

>>> from pituning.backbones.ofa import OFAConfig, OFAForConditionalGeneration
>>> OFAConfig.of_size("base").encoder_layers
6
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pituning.backbones.ofa.backbone import OFABackbone as OFABackbone
    from pituning.backbones.ofa.configuration import OFAConfig as OFAConfig
    from pituning.backbones.ofa.constraints import TokenTrie as TokenTrie
    from pituning.backbones.ofa.generation import BeamSettings as BeamSettings
    from pituning.backbones.ofa.generation import beam_search as beam_search
    from pituning.backbones.ofa.modeling import OFAForConditionalGeneration as OFAForConditionalGeneration
    from pituning.backbones.ofa.modeling import OFAModel as OFAModel
    from pituning.backbones.ofa.processing import OFAProcessor as OFAProcessor

_HOMES = {
    "OFABackbone": "backbone",
    "OFAConfig": "configuration",
    "BeamSettings": "generation",
    "TokenTrie": "constraints",
    "beam_search": "generation",
    "OFAForConditionalGeneration": "modeling",
    "OFAModel": "modeling",
    "OFAProcessor": "processing",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
