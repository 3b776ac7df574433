"""The emoji of the scenes: names, groups, colours, and their pictures in three styles (sources and licences: NOTICE)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pituning.errors import unknown_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

FOLDER = Path(__file__).parent
STYLES = ("noto", "fluent", "twemoji")
PRETRAINING_STYLES = ("noto", "fluent")
"""What pretraining shows; the third style is new to a pretrained model."""

FAINTEST = 32  # of 255: pixels with less alpha are dropped, so that every pixel of a sprite can be seen
CellBox: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True)
class Emoji:
    """A thing that can be drawn.

    Attributes:
        name: one or two English words, different for every emoji; no colour and no size occurs in it.
        known: whether pretraining shows it.
        small: whether it belongs to the small vocabulary.
        colours: style → the colour word of most of the picture, empty where no colour prevails.
        boxes: style → where on that style's sheet the picture is, in pixels.
    """

    name: str
    plural: str
    group: str
    character: str
    known: bool
    small: bool
    colours: Mapping[str, str]
    boxes: Mapping[str, CellBox]


@dataclass(frozen=True)
class Sprite:
    """An emoji at a size, cut to its visible pixels.

    Attributes:
        colour: red, green and blue times alpha, ``uint16 [height, width, 3]``.
        rest: 255 − alpha, ``uint16 [height, width, 1]``.
        mask: where alpha is not zero, ``bool [height, width]``.
        area: number of those pixels.
        rim: some of the colours along the edge, ``float [samples, 3]``.
    """

    colour: NDArray[np.uint16]
    rest: NDArray[np.uint16]
    mask: NDArray[np.bool_]
    area: int
    rim: NDArray[np.float64]


def _read() -> dict[str, Emoji]:
    entries = json.loads((FOLDER / "atlas.json").read_text(encoding="utf-8"))["emoji"]
    return {
        e["name"]: Emoji(
            e["name"],
            e["plural"],
            e["group"],
            e["emoji"],
            e["known"],
            e["small"],
            {style: looks["colour"] for style, looks in e["styles"].items()},
            {style: tuple(looks["box"]) for style, looks in e["styles"].items()},
        )
        for e in entries
    }


EMOJI: Mapping[str, Emoji] = _read()
"""All emoji by name."""

KNOWN = tuple(e.name for e in EMOJI.values() if e.known)
"""Names that pretraining shows."""

NEW = tuple(e.name for e in EMOJI.values() if not e.known)
"""Names held out from pretraining."""

SMALL = tuple(e.name for e in EMOJI.values() if e.small and e.known)
"""A hundred known names, spread over all groups, for small models."""

SMALL_NEW = tuple(e.name for e in EMOJI.values() if e.small and not e.known)
"""New names that go with :data:`SMALL` in tasks after pretraining."""

GROUPS = tuple(dict.fromkeys(e.group for e in EMOJI.values()))

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")


def emoji_named(name: str) -> Emoji:
    """An emoji by its name.

    >>> emoji_named("cherry").plural, emoji_named("cherry").group
    ('cherries', 'fruit')

    Raises:
        UnknownNameError: for another name.
    """
    if name not in EMOJI:
        raise unknown_name("emoji", name, EMOJI)
    return EMOJI[name]


@lru_cache(maxsize=8192)
def sprite(name: str, style: str, longer: int) -> Sprite:
    """An emoji in a style, its longer side that many pixels long (or one less, where its edge is faint)."""
    import numpy as np
    from PIL import Image

    cut = _sheet(style).crop(emoji_named(name).boxes[style])
    scale = longer / max(cut.size)
    width, height = (max(1, round(s * scale)) for s in cut.size)
    pixels = np.array(cut.resize((width, height), Image.Resampling.LANCZOS), dtype=np.uint16)
    alpha = np.where(pixels[..., 3] < FAINTEST, 0, pixels[..., 3]).astype(np.uint16)
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    inside = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    colour, alpha = pixels[..., :3][inside], alpha[inside][..., None]
    mask = alpha[..., 0] > 0
    inner = np.pad(mask, 1)
    inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    edge = colour[mask & ~inner].astype(np.float64)
    rim = edge[:: max(1, len(edge) // 24)]
    return Sprite(colour * alpha, 255 - alpha, mask, int(mask.sum()), rim)


@lru_cache(maxsize=len(STYLES))
def _sheet(style: str) -> Image:
    from PIL import Image

    with Image.open(FOLDER / f"{style}.webp") as image:
        return image.convert("RGBA")
