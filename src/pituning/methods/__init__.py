"""How a backbone is adapted. Importing this package enters pituning's own methods into PEFT's tables."""

from pituning.methods.attach import Attached, attached, config_dict, initial_tensors, peft_config
from pituning.methods.bitfit import BitFitConfig
from pituning.methods.bottleneck import BottleneckConfig
from pituning.methods.prefix import PrefixConfig, folded
from pituning.methods.presets import make_config, method_names
from pituning.methods.prompt import PromptConfig

__all__ = [
    "Attached",
    "BitFitConfig",
    "BottleneckConfig",
    "PrefixConfig",
    "PromptConfig",
    "attached",
    "config_dict",
    "folded",
    "initial_tensors",
    "make_config",
    "method_names",
    "peft_config",
]
