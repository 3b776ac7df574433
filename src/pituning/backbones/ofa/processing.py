"""`OFAProcessor`: text, images and boxes to what the model reads, and what it writes back to text and boxes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pituning.backbones.loss import IGNORED
from pituning.backbones.ofa.boxes import Numbers, bins_to_boxes, boxes_to_bins, resize_ratios
from pituning.backbones.ofa.images import normalise, resize
from pituning.backbones.ofa.settings import ProcessorSettings
from pituning.backbones.ofa.tokens import OFATokenizer
from pituning.backbones.ofa.vocabulary import (
    NUM_BINS,
    NUM_CODES,
    TOKENIZER_FILE,
    Merges,
    read_fairseq,
    read_pretrained,
)
from pituning.data.cleaning import clean_answer, clean_caption, clean_question, clean_sentence
from pituning.data.images import open_image
from pituning.errors import DataError
from pituning.example import Box, DecoderPrompt, ImageSource

SETTINGS_FILE = "preprocessor_config.json"


class OFAProcessor:
    """Everything between a user's text, images and boxes and an OFA model.

    Args:
        tokenizer: text and symbols to ids.
        settings: image size, statistics and limits.

    Attributes:
        bos_id, pad_id, eos_id, unk_id, mask_id: ids of ``<s>``, ``<pad>``, ``</s>``, ``<unk>`` and ``<mask>``.
        bin_range, code_range: first id of the location bins (image codes), and one past the last.
        num_bins, num_codes, vocab_size: how many there are; all derive from the vocabulary.

    Raises:
        DataError: if the settings contradict the vocabulary.
    """

    def __init__(self, tokenizer: OFATokenizer, settings: ProcessorSettings | None = None) -> None:
        self.tokenizer = tokenizer
        found = {"num_codes": tokenizer.num_codes, "num_bins": tokenizer.num_bins, "vocab_size": tokenizer.vocab_size}
        given = (settings or ProcessorSettings()).model_dump()
        for name, number in found.items():
            if given[name] not in (None, number):
                raise DataError(f"the settings have {name} = {given[name]}, but the vocabulary has {number}")
        self.settings = ProcessorSettings.checked({**given, **found}, "processor settings")
        self.bos_id, self.pad_id, self.eos_id = tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id
        self.unk_id, self.mask_id = tokenizer.unk_id, tokenizer.mask_id
        self.bin_range, self.code_range = tokenizer.bin_range, tokenizer.code_range
        self.num_bins, self.num_codes, self.vocab_size = tokenizer.num_bins, tokenizer.num_codes, tokenizer.vocab_size

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **changes: Any) -> OFAProcessor:
        """Load from a folder in Hugging Face's format.

        Args:
            folder: with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt`` (BART's vocabulary agrees with OFA's, and
                the codes and bins that it lacks are appended), and optionally ``preprocessor_config.json``.
            changes: settings that replace the stored ones; see :class:`ProcessorSettings`.

        Raises:
            DataError: if files are missing or malformed.
        """
        path = Path(folder)
        settings = ProcessorSettings.checked({**_stored_settings(path / SETTINGS_FILE), **changes}, str(path))
        core, size = read_pretrained(path, settings.num_codes, settings.num_bins, settings.vocab_size)
        return cls(OFATokenizer(core, size), settings)

    @classmethod
    def from_fairseq(
        cls,
        files: str | Path | Mapping[str, str | Path],
        *,
        num_codes: int = NUM_CODES,
        num_bins: int = NUM_BINS,
        **settings: Any,
    ) -> OFAProcessor:
        """Load from the files of OFA's own code.

        Args:
            files: a folder with ``encoder.json``, ``vocab.bpe`` and ``dict.txt``, or their paths by these names.
            num_codes, num_bins: image codes and location bins behind the dictionary's words.
            settings: see :class:`ProcessorSettings`.

        Raises:
            DataError: if files are missing or malformed.
        """
        core, size = read_fairseq(files, num_codes, num_bins)
        return cls(OFATokenizer(core, size), ProcessorSettings.checked(settings, "processor settings"))

    @classmethod
    def from_symbols(cls, symbols: Sequence[str], merges: Merges, **settings: Any) -> OFAProcessor:
        """A processor with a byte-level BPE vocabulary of one's own.

        Args:
            symbols: all symbols in the order of their ids: ``<s>``, ``<pad>``, ``</s>``, ``<unk>``, BPE pieces, ``<mask>``,
                ``<code_0>`` … and ``<bin_0>`` … (either may be left out altogether).
            merges: BPE merges in their order. Pieces that are not among the symbols become ``<unk>``.
            settings: see :class:`ProcessorSettings`.

        Raises:
            DataError: if the symbols or merges do not fit together.

        >>> symbols = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "ab", "<mask>", "<bin_0>", "<bin_1>"]
        >>> OFAProcessor.from_symbols(symbols, [("a", "b")]).encode("abba")
        [6, 5, 4]
        """
        return cls(
            OFATokenizer.from_symbols(symbols, merges), ProcessorSettings.checked(settings, "processor settings")
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and ``preprocessor_config.json`` into a folder, which is created if need be."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        stored = {"processor_class": type(self).__name__, **self.settings.model_dump()}
        unfinished = path / f".{TOKENIZER_FILE}.{os.getpid()}"
        self.tokenizer.save(unfinished)
        unfinished.replace(path / TOKENIZER_FILE)
        unfinished = path / f".{SETTINGS_FILE}.{os.getpid()}"
        unfinished.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path / SETTINGS_FILE)

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[ImageSource | None] | None = None,
        targets: Sequence[str | Sequence[int]] | None = None,
        *,
        max_length: int | None = None,
        decoder_prompt: DecoderPrompt = "none",
        end: bool = True,
    ) -> dict[str, Tensor]:
        """A batch, padded on the right.

        Args:
            texts: whole prompts, taken literally; OFA's begin with a space.
            images: one per text, None for a text without an image. Left out, or all None: a batch of text only.
            targets: what is to be learned: text, or ids (of a box from :meth:`encode_box`, say).
            max_length: tokens kept of each prompt, besides start and end; see :meth:`source`.
            decoder_prompt: what the decoder reads before the target.
            end: whether the end symbol is part of the target. (OFA's GLUE tasks learn a single token without it.)

        Returns:
            ``input_ids`` and ``attention_mask``, ``[batch, length]``; with an image, ``patch_images`` ``[batch, 3, side,
            side]`` (zeros where there is none) and ``patch_masks`` ``[batch]`` (bool); with targets,
            ``decoder_input_ids`` and ``labels``, ``[batch, target length]``, the latter −100 at padding and prompt.

        Raises:
            DataError: if the lists are empty or differ in length, or an image cannot be read.
        """
        if isinstance(texts, str) or not texts:
            raise DataError(f"expected a list of at least one text, found {texts!r}")
        for name, values in (("images", images), ("targets", targets)):
            if values is not None and len(values) != len(texts):
                raise DataError(f"{len(texts)} texts, but {len(values)} {name}")
        sources = [self.source(text, max_length=max_length) for text in texts]
        batch = {
            "input_ids": _padded(sources, self.pad_id),
            "attention_mask": _padded([[1] * len(source) for source in sources], 0),
        }
        if images is not None and any(image is not None for image in images):
            side = self.settings.image_size
            blank = torch.zeros(3, side, side)
            batch["patch_images"] = torch.stack(
                [blank if i is None else self.image(i, f"image {n}") for n, i in enumerate(images)]
            )
            batch["patch_masks"] = torch.tensor([i is not None for i in images])
        if targets is not None:
            rows = [
                self.target(target, self.decoder_prompt(source, decoder_prompt), end=end)
                for target, source in zip(targets, sources, strict=True)
            ]
            batch["decoder_input_ids"] = _padded([inputs for inputs, _ in rows], self.pad_id)
            batch["labels"] = _padded([labels for _, labels in rows], IGNORED)
        return batch

    def encode(self, text: str, *, max_length: int | None = None) -> list[int]:
        """Ids of a text, without start and end; see :meth:`OFATokenizer.encode`."""
        return self.tokenizer.encode(text, max_length=max_length)

    def encode_locations(self, locations: str | Iterable[int]) -> list[int]:
        """Ids of location bins; see :meth:`OFATokenizer.encode_locations`."""
        return self.tokenizer.encode_locations(locations)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; see :meth:`OFATokenizer.decode`."""
        return self.tokenizer.decode(ids)

    def source(self, text: str, *, max_length: int | None = None) -> list[int]:
        """What the encoder reads: start, the text's pieces, end.

        OFA's tasks bound the *words* that go into a prompt (:meth:`clean_caption` and its siblings), and the prompt itself
        stays whole. Only its summarisation task cuts the prompt's tokens: that is ``max_length``, which counts
        neither start nor end.
        """
        return [self.bos_id, *self.encode(text, max_length=max_length), self.eos_id]

    def decoder_prompt(self, source: Sequence[int], kind: DecoderPrompt = "none") -> list[int]:
        """What the decoder reads before the first token of its answer.

        Raises:
            DataError: for another kind than ``"none"``, ``"source"`` and ``"source_without_end"``.
        """
        prompts = {"none": [self.bos_id], "source": list(source), "source_without_end": list(source[:-1])}
        if kind not in prompts:
            raise DataError(f"there is no decoder prompt {kind!r}; known: {', '.join(prompts)}")
        return prompts[kind]

    def target(
        self, target: str | Sequence[int], prompt: Sequence[int] | None = None, *, end: bool = True
    ) -> tuple[list[int], list[int]]:
        """What the decoder reads and what it learns, of equal length.

        Args:
            target: text, or ids.
            prompt: what the decoder reads before it (default: the start symbol).
            end: whether the end symbol is part of the target.

        Returns:
            ``decoder_input_ids``, and ``labels`` with −100 for the prompt.
        """
        start = [self.bos_id] if prompt is None else list(prompt)
        answer = self.encode(target) if isinstance(target, str) else list(target)
        answer += [self.eos_id] * end
        return (start + answer)[:-1], [IGNORED] * (len(start) - 1) + answer

    def clean_caption(self, text: str) -> str:
        """A caption or referring expression for a prompt: :func:`clean_caption`, at most ``max_source_length`` words."""
        return clean_caption(text, self.settings.max_source_length)

    def clean_question(self, text: str) -> str:
        """A question for a prompt: :func:`clean_question`, at most ``max_source_length`` words."""
        return clean_question(text, self.settings.max_source_length)

    def clean_sentence(self, text: str) -> str:
        """A sentence for a prompt: :func:`clean_sentence`, at most ``max_source_length`` words."""
        return clean_sentence(text, self.settings.max_source_length)

    def clean_answer(self, text: str) -> str:
        """A caption to be learned: :func:`clean_answer`, at most ``max_target_length`` words."""
        return clean_answer(text, self.settings.max_target_length)

    def image(self, source: ImageSource, name: str = "image") -> Tensor:
        """A picture as the model reads it: RGB, resized to a square, normalised, float32 ``[3, side, side]``.

        Args:
            source: path, content of an image file, or PIL image.
            name: what an error calls a picture that has no path.

        Raises:
            DataError: if it cannot be read; see :func:`open_image`.
        """
        settings = self.settings
        picture = resize(open_image(source, name), settings.image_size)
        return normalise(picture, settings.image_mean, settings.image_std)

    def resize_ratios(self, sizes: Numbers) -> Tensor:
        """Resized over original width and height, ``[..., 2]`` pixels to float32 ``[..., 2]``."""
        return resize_ratios(sizes, self.settings.image_size)

    def boxes_to_bins(self, boxes: Numbers, sizes: Numbers) -> Tensor:
        """Numbers of bins, int64 ``[..., 4]``, of boxes ``[..., 4]`` in pixels; see :func:`boxes_to_bins`.

        Args:
            boxes: x0, y0, x1, y1 in pixels of the original images.
            sizes: ``[..., 2]``: width and height of the original images.

        Raises:
            DataError: if a coordinate lies where no bin is.
        """
        return boxes_to_bins(boxes, sizes, **self._grid())

    def bins_to_boxes(self, bins: Numbers, sizes: Numbers) -> Tensor:
        """Boxes in pixels of the original images, float32 ``[..., 4]``, of numbers of bins; see :func:`bins_to_boxes`.

        Raises:
            DataError: if a bin is not one of ``0 … num_bins − 1``.
        """
        return bins_to_boxes(bins, sizes, **self._grid())

    def encode_box(self, box: Sequence[float], size: Sequence[float]) -> list[int]:
        """Ids of the four bins of a box, to be learned.

        Args:
            box: x0, y0, x1, y1 in pixels of the original image.
            size: width and height of the original image.

        Raises:
            DataError: if a coordinate lies where no bin is.
        """
        return self.encode_locations(self.boxes_to_bins(box, size).tolist())

    def decode_box(self, ids: Iterable[int], size: Sequence[float]) -> Box | None:
        """The box that generated ids stand for, in pixels of an original image; None where they are no box.

        A start symbol in front, and the end symbol and whatever follows it, do not count; the rest must be exactly four
        bins. Anything else (text, three bins, five) is no box, and a metric counts it as a miss.

        Args:
            ids: a generated sequence.
            size: width and height of the original image.
        """
        kept = [int(i) for i in ids]
        if kept[:1] == [self.bos_id]:
            kept = kept[1:]
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id)]
        first, past = self.bin_range
        if len(kept) != 4 or not all(first <= i < past for i in kept):
            return None
        x0, y0, x1, y1 = self.bins_to_boxes([i - first for i in kept], size).tolist()
        return x0, y0, x1, y1

    def _grid(self) -> dict[str, int]:
        if not self.num_bins:
            raise DataError("this vocabulary has no location bins, so it has no boxes")
        settings = self.settings
        return {"side": settings.image_size, "num_bins": self.num_bins, "max_image_size": settings.max_image_size}

    def __repr__(self) -> str:
        side = self.settings.image_size
        return f"{type(self).__name__}({self.vocab_size} symbols, {self.num_bins} bins, images of {side} × {side})"


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(r, dtype=torch.long) for r in rows], batch_first=True, padding_value=value)


def _stored_settings(path: Path) -> dict[str, Any]:
    """What a settings file says; entries that other libraries wrote are left out."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return {name: value for name, value in content.items() if name in ProcessorSettings.model_fields}
