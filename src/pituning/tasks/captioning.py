"""Image captioning: a picture in, a sentence out."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from pituning.data.cleaning import clean_answer
from pituning.data.records import Records
from pituning.data.tables import JOINT
from pituning.errors import DataError
from pituning.example import Example
from pituning.tasks.kind import Kind, key_of

PROMPT = " what does the image describe?"
MAX_WORDS = 20  # of a caption that is learned


@dataclass(frozen=True)
class Captioning(Kind):
    """COCO captions: all captions of a row (``&&`` between them) are references; the first is the one to be learned.

    ``BLEU-4`` and ``CIDEr-D`` are reported; METEOR and SPICE, which need Java, where they are asked for.

    Source: Chen et al., "Microsoft COCO Captions", arXiv 1504.00325; the split of Karpathy and Fei-Fei, CVPR 2015.
    """

    title = "captioning"
    columns = MappingProxyType({"key": 1, "image": 4, "caption": 2})
    optional = frozenset({"key"})
    aliases = MappingProxyType({"key": ("image_id",), "caption": ("captions", "text")})
    metrics: ClassVar[tuple[str, ...]] = ("CIDEr-D", "BLEU-4")
    generation = MappingProxyType({"num_beams": 5, "max_new_tokens": 16, "no_repeat_ngram_size": 3})
    submission = ("image_id", "caption")

    def example(self, records: Records, row: int, identifier: str) -> Example:
        """See :meth:`Kind.example`."""
        written = records.text(row, "caption").split(JOINT)
        captions = [cleaned for c in written if (cleaned := clean_answer(c))]
        if any(c.strip() for c in written) and not captions:
            raise DataError(f"{records.place(row, 'caption')}: nothing is left of the caption without its punctuation")
        return Example(
            identifier,
            ("",),
            PROMPT,
            clean_answer(captions[0], MAX_WORDS) if captions else "",
            image=records.image(row, "image"),
            answers=tuple((caption, 1.0) for caption in captions),
            key=key_of(records, row),
        )
