"""From a method's name to a PEFT configuration with this project's defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig

from pituning.backbones.base import Backbone
from pituning.errors import PituningError, unknown_name
from pituning.methods.attach import method_type
from pituning.methods.bitfit import BitFitConfig
from pituning.methods.bottleneck import BottleneckConfig
from pituning.methods.prefix import PrefixConfig
from pituning.methods.prompt import PromptConfig

_PRESETS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "lora": (LoraConfig, {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}),
    "bottleneck": (BottleneckConfig, {"r": 64}),
    "prefix": (PrefixConfig, {"length": 32}),
    "bitfit": (BitFitConfig, {}),
    "ia3": (IA3Config, {}),
    "prompt": (PromptConfig, {"length": 20}),
}
_FEEDFORWARD = ("wo", "fc2", "down_proj", "dense_4h_to_h", "lin2", "mlp.c_proj", "fc_out", "output.dense")
"""The second projections of feed-forward blocks: IA3 rescales what goes into them, and what comes out of keys and values."""


def method_names() -> list[str]:
    """Names that :func:`make_config` knows."""
    return sorted(_PRESETS)


def method_of(config: PeftConfig) -> str:
    """The name of a configuration's method: a preset's, or that of PEFT's type in lower case."""
    names = [name for name, (kind, _) in _PRESETS.items() if type(config) is kind]
    return names[0] if names else method_type(config).lower()


def config_type(method: str) -> type[PeftConfig]:
    """The class of a method's PEFT configuration.

    Raises:
        UnknownNameError: for another name than :func:`method_names` has.
    """
    if method not in _PRESETS:
        raise unknown_name("method", method, _PRESETS)
    return _PRESETS[method][0]


def method_fields(method: str) -> list[str]:
    """Fields of a method's PEFT configuration, which :func:`make_config` takes as overrides."""
    return list(config_type(method).__dataclass_fields__)


def make_config(method: str, backbone: Backbone, **overrides: Any) -> PeftConfig:
    """The PEFT configuration of a method on a backbone.

    The defaults are for few examples on models of some hundred million parameters. The paper's experts are larger: LoRA
    ``r=16, lora_alpha=1``, bottleneck ``r=128`` with ``init_std=0.02, dropout="drop-path"``, prefix ``length=100`` with
    ``dropout=0.2``, and BitFit on ``subset="reference"``.

    Args:
        method: ``"lora"``, ``"bottleneck"``, ``"prefix"``, ``"bitfit"``, ``"ia3"`` or ``"prompt"``.
        backbone: gives the modules to adapt, unless ``target_modules`` is among the overrides.
        overrides: fields of the method's PEFT configuration.

    Raises:
        UnknownNameError: for another method name.
        PituningError: for a field the method does not have, a value that has no meaning, or a backbone without modules
            to adapt.
    """
    kind = config_type(method)
    settings = {**_PRESETS[method][1], **overrides}
    if "target_modules" not in settings:
        settings["target_modules"] = backbone.adaptable(method)
    unknown = sorted(set(settings) - set(kind.__dataclass_fields__))
    if unknown:
        raise PituningError(f"method {method!r} has no setting {', '.join(unknown)}")
    if settings.get("r", 1) < 1:
        raise PituningError(f"method {method!r}: r must be at least 1, not {settings['r']}")
    if not settings["target_modules"]:
        raise PituningError(
            f"method {method!r} finds no module to adapt in backbone {backbone.name!r}; give target_modules=[...]"
        )
    if method == "ia3" and settings.get("feedforward_modules") is None:
        settings["feedforward_modules"] = _feedforward(settings["target_modules"])
    if "fan_in_fan_out" in kind.__dataclass_fields__ and _stores_transposed(backbone):
        settings.setdefault("fan_in_fan_out", True)
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise PituningError(f"method {method!r}: {error}") from error


def _stores_transposed(backbone: Backbone) -> bool:
    """Whether a model's layers hold their weights as ``[in, out]``, as GPT-2's do."""
    return any(type(module).__name__ == "Conv1D" for module in backbone.model.modules())


def _feedforward(targets: str | Iterable[str]) -> list[str]:
    """The targets that are second projections of feed-forward blocks.

    Raises:
        PituningError: for a regular expression, whose matches are not known here.
    """
    if isinstance(targets, str):
        raise PituningError(
            "method 'ia3': with target_modules as a regular expression, give feedforward_modules as well"
        )
    return [t for t in targets if t.endswith(_FEEDFORWARD) and "attention" not in t]
