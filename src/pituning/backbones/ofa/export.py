"""Write a backbone's folder: weights, configuration and, where there is a vocabulary, its processor. All or nothing."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from pituning.backbones.ofa.checkpoint import Checkpoint
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.processing import OFAProcessor
from pituning.backbones.ofa.vocabulary import FAIRSEQ_FILES, TOKENIZER_FILE
from pituning.errors import PituningError, RefusedError

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_SETTINGS = {
    "patch_image_size": "image_size", "max_image_size": "max_image_size", "max_src_length": "max_source_length",
    "max_tgt_length": "max_target_length", "code_dict_size": "num_codes", "num_bins": "num_bins",
}  # fmt: skip


@contextmanager
def new_folders(*targets: Path) -> Iterator[list[Path]]:
    """Folders of the targets' names in hidden places beside them; they get to the targets when the block succeeds.

    Raises:
        RefusedError: if a target exists.
    """
    if len({t.resolve() for t in targets}) < len(targets):
        raise RefusedError(f"{', '.join(map(str, targets))}: two of these are the same folder")
    moved: list[Path] = []
    with ExitStack() as stack:
        places = []
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            hidden = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
            stack.callback(shutil.rmtree, hidden, ignore_errors=True)
            places.append(Path(hidden) / target.resolve().name)
        yield places
        try:
            for place, target in zip(places, targets, strict=True):
                _settle(place)
                if target.exists():
                    raise RefusedError(f"{target} exists and is not replaced")
                place.rename(target)
                moved.append(target)
        except BaseException:
            for target in moved:
                shutil.rmtree(target, ignore_errors=True)
            raise


def _settle(folder: Path) -> None:
    """Everything is on the disk, and readable for whom the user's new files are; safetensors writes for the owner only."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    mode = max(stat.S_IMODE(p.stat().st_mode) for p in files)
    for path in files:
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def write_backbone(
    model: OFAForConditionalGeneration, folder: Path, dtype: str = "float32", processor: OFAProcessor | None = None
) -> None:
    """Write weights in a dtype, configuration and processor. The model stays in float32, with its values in that dtype."""
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    model.to(torch.float32)
    if processor is not None:
        processor.save_pretrained(folder)


def processor_for(source: Checkpoint, tokenizer: Path | None) -> OFAProcessor | None:
    """The processor of a checkpoint, with the sizes of pictures and texts that its training's arguments say.

    Args:
        tokenizer: folder of a vocabulary, fairseq's or Hugging Face's; by default the checkpoint's own folder, if it has one.

    Raises:
        PituningError: if the vocabulary is not of the model's size, or cannot be read.
    """
    folder = tokenizer
    if folder is None:
        own = source.path / TOKENIZER_FILE, source.path / "vocab.json"
        folder = source.path if source.path.is_dir() and any(p.is_file() for p in own) else None
    if folder is None:
        return None
    args = {} if source.fairseq is None else source.fairseq.args
    settings: dict[str, Any] = {ours: args[name] for name, ours in _SETTINGS.items() if args.get(name) is not None}
    if args.get("imagenet_default_mean_and_std"):
        settings |= IMAGENET
    fairseq = any((folder / name).is_file() for name in FAIRSEQ_FILES)
    make = OFAProcessor.from_fairseq if fairseq else OFAProcessor.from_pretrained
    processor = make(folder, **settings)
    if processor.vocab_size != source.config.vocab_size:
        raise PituningError(
            f"the vocabulary in {folder} has {processor.vocab_size} symbols ({processor.num_codes} image codes and "
            f"{processor.num_bins} location bins among them), but the model has {source.config.vocab_size}"
        )
    return processor
