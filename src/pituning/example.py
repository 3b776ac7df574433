"""`Example`: the one thing that passes from tasks to backbones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class LazyImage:
    """An image that lies somewhere in a large file and is read when it is opened.

    Attributes:
        place: where that is, for messages.
        read: gives the image as any other :data:`ImageSource`; can be pickled wherever examples go to other processes.
    """

    place: str
    read: Callable[[], Path | str | bytes | Image] = field(compare=False, repr=False)


ImageSource: TypeAlias = "Path | str | bytes | Image | LazyImage"
"""An image as a path, as the bytes of an encoded file, as a PIL image, or as something that is one when it is read; a
backbone opens it when it collates."""

Box: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image as it is stored; (0, 0) is its upper left corner."""


DecoderPrompt: TypeAlias = Literal["none", "source", "source_without_end"]
"""What the decoder reads before its answer: the start symbol; or the whole source, with or without its end symbol."""


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled item of a task.

    Attributes:
        id: stable identifier within the task, such as ``"sst2/train/17"``.
        texts: the raw inputs, one string or a pair; what an encoder backbone reads.
        prompt: the same inputs rendered for a generative backbone.
        target: the right answer; where ``choices`` is not empty, one of them.
        choices: the closed set of answers in label order; empty for open-ended tasks.
        image: the picture that the texts are about.
        box: where in the picture the answer lies, for grounding; ``target`` is then the same box as text.
        answers: all right answers with their confidence in [0, 1]: what annotators said of a question, or the reference
            captions of a picture. Empty where ``target`` alone is right.
        weight: by which the example's loss counts in training; the log-loss of an evaluation leaves it out.
        decoder_prompt: what the decoder of a generative backbone reads before the answer: nothing, or the whole source
            with or without its end symbol (OFA's prompt types ``none``, ``src`` and ``prev_output``). Only OFA's decoder is
            used to it: other models answer without.
        before_target: what stands in front of an open-ended target in OFA's tokens: a space, but for summaries.
        augmentation: how training may change the picture, a name of :data:`pituning.data.augment.AUGMENTATIONS`.
        key: what the data's own evaluation calls the item, such as a question id; several examples may share it.
    """

    id: str
    texts: tuple[str, ...]
    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    image: ImageSource | None = field(default=None, hash=False, repr=False)  # PIL images have no hash
    box: Box | None = None
    answers: tuple[tuple[str, float], ...] = ()
    weight: float = 1.0
    decoder_prompt: DecoderPrompt = "none"
    before_target: str = " "
    augmentation: str = ""
    key: str = ""

    @property
    def label(self) -> int:
        """Position of the target among the choices."""
        return self.choices.index(self.target)
