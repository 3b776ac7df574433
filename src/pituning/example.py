"""`Example`: the one thing that passes from tasks to backbones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

ImageSource: TypeAlias = "Path | str | bytes | Image"
"""An image as a path, as the bytes of an encoded file, or as a PIL image; a backbone opens it when it collates."""

Box: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image as it is stored; (0, 0) is its upper left corner."""


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
    """

    id: str
    texts: tuple[str, ...]
    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    image: ImageSource | None = field(default=None, hash=False, repr=False)  # PIL images have no hash
    box: Box | None = None

    @property
    def label(self) -> int:
        """Position of the target among the choices."""
        return self.choices.index(self.target)
