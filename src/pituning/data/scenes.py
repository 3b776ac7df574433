"""Scenes: pictures composed of emoji, each a function of a split, a number and a seed.

They stand in for photographs where a laptop is to try what otherwise takes a cluster: what is in a scene, where, how
large and in what colour is known exactly, so that tasks on scenes (:mod:`pituning.tasks.emoji`) have exact answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pituning.data.emoji import EMOJI, PRETRAINING_STYLES, SMALL, SMALL_NEW, STYLES, Sprite, emoji_named, sprite
from pituning.errors import DataError, unknown_name
from pituning.example import Box

T = TypeVar("T")
Colour: TypeAlias = tuple[int, int, int]
Vocabulary = Literal["small", "full"]
Pixels: TypeAlias = NDArray[np.uint8]

SPLITS = ("pretrain", "pretrain-val", "train", "val", "test")
SIDE = 96
SIZES = {"small": (0.21, 0.23, 0.25), "medium": (0.31, 0.345), "large": (0.44, 0.48)}
"""Size class → lengths of the longer side, as shares of the picture's."""

VISIBLE = 0.9
"""The least share of a thing's pixels that other things leave in sight."""

SIDES = ("left", "right", "top", "bottom")
_TRIES = 40  # places tried for a thing before the scene is begun anew
_COVERED = -2  # in the map of owners
_SAME = 60.0  # distance of two RGB colours, summed over channels, below which an edge is lost
_LOST = 0.3  # share of an edge that may be lost
_PALETTE: tuple[Colour, ...] = (
    (250, 248, 240), (222, 238, 250), (226, 244, 222), (252, 236, 214), (240, 226, 246), (252, 224, 228), (206, 226, 220),
    (238, 230, 200), (176, 206, 232), (170, 206, 170), (206, 186, 222), (226, 190, 160), (150, 160, 176), (104, 132, 156),
    (84, 112, 96), (122, 96, 124), (72, 76, 104), (52, 58, 66), (44, 62, 88), (70, 52, 48),
)  # fmt: skip


@dataclass(frozen=True)
class Background:
    """What things stand on: ``plain``, ``gradient``, ``stripes`` or ``noise`` of two colours.

    Attributes:
        angle: direction of a gradient or of what crosses stripes, in radians.
        period: width of two stripes as a share of the side.
        seed: of the noise.
    """

    kind: str
    colours: tuple[Colour, Colour]
    angle: float = 0.0
    period: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Thing:
    """An emoji in a scene.

    Attributes:
        colour: the colour word of its picture in this style; empty where no colour prevails.
        size: ``small``, ``medium`` or ``large``.
        longer: length of the longer side in pixels, as drawn.
        at: column and row of the upper left corner, as drawn.
        box: x0, y0, x1, y1 of what of it is visible, in pixels; (x1, y1) is one past the last pixel.
        visible: share of its pixels that nothing else hides.
    """

    name: str
    group: str
    style: str
    colour: str
    size: str
    longer: int
    at: tuple[int, int]
    box: Box
    visible: float = 1.0

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    Attributes:
        things: in the order in which they are drawn; later ones may hide parts of earlier ones.
        cover: where a hatched curtain hides a half of the picture; nothing else is there.
    """

    split: str
    index: int
    seed: int
    side: int
    background: Background
    things: tuple[Thing, ...]
    cover: Box | None = None


@dataclass(frozen=True)
class Wish:
    """A thing that a scene is to have; what is empty is drawn by lot."""

    name: str
    style: str = ""
    size: str = ""


class Draws:
    """Random numbers that depend on a key alone, whatever process or platform draws them (Philox).

    Args:
        key: integers from 0 below 2**64.

    >>> Draws(1, 2).below(100) == Draws(1, 2).below(100)
    True
    """

    def __init__(self, *key: int) -> None:
        if not all(0 <= part < 1 << 64 for part in key):
            raise DataError(f"expected integers from 0 below 2**64 as seed and index, found {key}")
        words = [word for part in key for word in (part & 0xFFFFFFFF, part >> 32)]
        self._bits = np.random.Philox(np.random.SeedSequence(words))
        self._left: list[float] = []

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        if not self._left:
            self._left = ((self._bits.random_raw(128) >> np.uint64(11)) * 2.0**-53).tolist()
        return self._left.pop()

    def below(self, number: int) -> int:
        """Uniform among 0 … ``number`` − 1."""
        return int(self.unit() * number)

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.below(len(options))]

    def shuffled(self, options: Iterable[T]) -> list[T]:
        """All of them in any order."""
        items = list(options)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items


def draws_for(split: str, index: int, seed: int, purpose: int = 0) -> Draws:
    """The random numbers of one scene (``purpose`` 0), or of what is said about it.

    Raises:
        UnknownNameError: for another split.
        DataError: if index or seed is negative or too large.
    """
    if split not in SPLITS:
        raise unknown_name("split of scenes", split, SPLITS)
    return Draws(SPLITS.index(split), seed, index, purpose)


@lru_cache(maxsize=64)
def names_of(split: str, vocabulary: str = "full") -> tuple[str, ...]:
    """Names that may occur in a split: in pretraining the known ones, later the new ones, too.

    Raises:
        UnknownNameError: for another split or vocabulary.
    """
    if split not in SPLITS:
        raise unknown_name("split of scenes", split, SPLITS)
    if vocabulary not in ("small", "full"):
        raise unknown_name("vocabulary", vocabulary, ("small", "full"))
    allowed = EMOJI if vocabulary == "full" else {*SMALL, *SMALL_NEW}
    return tuple(e.name for e in EMOJI.values() if e.name in allowed and (e.known or not split.startswith("pretrain")))


def styles_of(split: str) -> tuple[str, ...]:
    """Styles that occur in a split: two of the three in pretraining."""
    return PRETRAINING_STYLES if split.startswith("pretrain") else STYLES


def scene(
    split: str,
    index: int,
    *,
    seed: int = 0,
    side: int = SIDE,
    vocabulary: Vocabulary = "full",
    names: Sequence[str] | None = None,
    wishes: Sequence[Wish] | None = None,
    cover: str = "",
) -> Scene:
    """A scene, the same one for the same arguments.

    Args:
        split: one of :data:`SPLITS`; no two of them share a scene.
        index: 0 … 2**64 − 1.
        side: of the picture, in pixels, at least 48.
        vocabulary: which names may occur, see :func:`names_of`.
        names: the names that may occur, in place of a vocabulary.
        wishes: what the scene is to have, in place of 2 to 6 things drawn by lot.
        cover: ``left``, ``right``, ``top`` or ``bottom``: hide that half.

    Raises:
        UnknownNameError: for another split, vocabulary, name or cover.
        DataError: if the wishes have no room, or an argument is out of range.
    """
    if side < 48:
        raise DataError(f"a scene needs a side of at least 48 pixels to show anything, not {side}")
    if cover and cover not in SIDES:
        raise unknown_name("half to cover", cover, SIDES)
    draws = draws_for(split, index, seed)
    if wishes is None:
        allowed = names_of(split, vocabulary) if names is None else tuple(emoji_named(n).name for n in names)
        wishes = drawn_wishes(draws, allowed, styles_of(split))
    whole = with_styles(draws, wishes, styles_of(split))
    hidden = _half(cover, side) if cover else None
    for attempt in range(100):
        placed = _placed(draws, _with_sizes(draws, whole, bool(cover), attempt), side, hidden)
        if placed is not None:
            break
    else:
        raise DataError(f"{len(whole)} things with sizes {[w.size or 'any' for w in whole]} have no room in a scene")
    return Scene(split, index, seed, side, _background(draws, placed), placed, hidden)


def drawn_wishes(draws: Draws, names: Sequence[str], styles: Sequence[str]) -> list[Wish]:
    """What a scene has unless something is wished for: 2 to 6 things, often several of a kind or of a group."""
    count, mode = 2 + draws.below(5), draws.unit()
    first = draws.pick(names)
    repeated = 1 if mode < 0.35 else 2 if mode < 0.7 else 2 + draws.below(min(3, count - 1))
    chosen = [first] * min(repeated, count)
    related = [n for n in names if EMOJI[n].group == EMOJI[first].group and n != first] if draws.unit() < 0.4 else []
    while len(chosen) < count:
        chosen.append(draws.pick(related or names) if draws.unit() < 0.6 else draws.pick(names))
    return [Wish(name) for name in chosen]


def with_styles(draws: Draws, wishes: Sequence[Wish], styles: Sequence[str]) -> list[Wish]:
    """The wishes with a style each: half of the scenes have one for all, the others any."""
    common = draws.pick(styles) if draws.unit() < 0.5 else ""
    return [Wish(w.name, w.style or common or draws.pick(styles), w.size) for w in wishes]


def _with_sizes(draws: Draws, wishes: Sequence[Wish], covered: bool, attempt: int) -> list[Wish]:
    """The wishes with a size each; after some failures whatever may be small is small."""
    room = len(wishes) * (2 if covered else 1)
    medium, large = (0.35, 0.35) if room <= 3 else (0.45, 0.2) if room == 4 else (0.4, 0.06)
    found = []
    for wish in wishes:
        u = draws.unit()
        size = "large" if u < large else "medium" if u < large + medium else "small"
        found.append(Wish(wish.name, wish.style, wish.size or (size if attempt < 12 else "small")))
    return found


def _half(cover: str, side: int) -> Box:
    middle = side / 2
    x0, y0 = (math.ceil(middle) if cover == "right" else 0), (math.ceil(middle) if cover == "bottom" else 0)
    x1, y1 = (math.floor(middle) if cover == "left" else side), (math.floor(middle) if cover == "top" else side)
    return float(x0), float(y0), float(x1), float(y1)


def _placed(draws: Draws, wishes: Sequence[Wish], side: int, hidden: Box | None) -> tuple[Thing, ...] | None:
    """The things at places where at least :data:`VISIBLE` of each is in sight, the largest first; None: no room."""
    owner = np.full((side, side), -1, dtype=np.int8)
    if hidden is not None:
        x0, y0, x1, y1 = map(int, hidden)
        owner[y0:y1, x0:x1] = _COVERED
    lengths = [round(draws.pick(SIZES[w.size]) * side) for w in wishes]
    order = sorted(range(len(wishes)), key=lambda n: -lengths[n])
    sprites: list[Sprite] = []
    corners: list[tuple[int, int]] = []
    hiding: list[int] = []  # pixels of each thing that later ones hide
    for number, n in enumerate(order):
        drawn = sprite(wishes[n].name, wishes[n].style, lengths[n])
        height, width = drawn.mask.shape
        for attempt in range(_TRIES):
            x, y = draws.below(side - width + 1), draws.below(side - height + 1)
            below = owner[y : y + height, x : x + width]
            lost = np.bincount(below[drawn.mask] + 2, minlength=number + 2)
            if lost[0] or (attempt < _TRIES / 2 and lost[2:].any()):
                continue
            if all(s.area - h - int(k) >= VISIBLE * s.area for s, h, k in zip(sprites, hiding, lost[2:], strict=True)):
                break
        else:
            return None
        hiding = [h + int(k) for h, k in zip(hiding, lost[2:], strict=True)] + [0]
        below[drawn.mask] = number
        sprites.append(drawn)
        corners.append((x, y))
    things = []
    for number, n in enumerate(order):
        (x, y), drawn, entry = corners[number], sprites[number], emoji_named(wishes[n].name)
        box = (x, y, x + drawn.mask.shape[1], y + drawn.mask.shape[0])
        if hiding[number]:
            box = _bounds(owner, number, box)
        things.append(
            Thing(
                entry.name,
                entry.group,
                wishes[n].style,
                entry.colours[wishes[n].style],
                wishes[n].size,
                lengths[n],
                (x, y),
                (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                1 - hiding[number] / drawn.area,
            )
        )
    return tuple(things)


def _bounds(owner: NDArray[np.int8], number: int, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The box of the pixels that one thing owns, all of which lie inside ``box``."""
    x0, y0, x1, y1 = box
    owned = owner[y0:y1, x0:x1] == number
    columns, rows = np.flatnonzero(owned.any(0)), np.flatnonzero(owned.any(1))
    return x0 + int(columns[0]), y0 + int(rows[0]), x0 + int(columns[-1]) + 1, y0 + int(rows[-1]) + 1


def _background(draws: Draws, things: Sequence[Thing]) -> Background:
    """A background that the edges of all things stand out from."""
    lost = np.max([_lost(t.name, t.style) for t in things], axis=0).tolist()
    order = draws.shuffled(range(len(_PALETTE)))
    clear = [n for n in order if lost[n] < _LOST] or [min(order, key=lambda n: lost[n])]
    first, second = _PALETTE[clear[0]], _PALETTE[draws.pick(clear)]
    kind = draws.pick(("plain", "gradient", "stripes", "noise"))
    near = tuple(round(a + 0.35 * (b - a)) for a, b in zip(first, second, strict=True))
    if kind == "gradient":
        # what lies between two clear colours need not be clear: go only part of the way
        near = tuple(round(a + 0.6 * (b - a)) for a, b in zip(first, second, strict=True))
    return Background(
        kind,
        (first, (near[0], near[1], near[2])),
        angle=draws.below(8) * math.pi / 4 if kind == "stripes" else draws.unit() * 2 * math.pi,
        period=0.08 + 0.16 * draws.unit(),
        seed=draws.below(1 << 31),
    )


@lru_cache(maxsize=1024)
def _lost(name: str, style: str) -> NDArray[np.float64]:
    """For each colour of the palette, the share of an emoji's edge that would not stand out from it."""
    rim = sprite(name, style, round(SIZES["medium"][0] * SIDE)).rim
    distances = np.abs(rim[:, None, :] - np.array(_PALETTE, dtype=np.float64)).sum(-1)
    return np.asarray((distances < _SAME).mean(0))


def render(scene: Scene) -> Pixels:
    """Draw a scene: ``uint8 [side, side, 3]``, RGB."""
    pixels = _drawn_background(scene.background, scene.side)
    if scene.cover is not None:
        x0, y0, x1, y1 = map(int, scene.cover)
        pixels[y0:y1, x0:x1] = _hatching(scene.side)[y0:y1, x0:x1]
    for thing in scene.things:
        drawn = sprite(thing.name, thing.style, thing.longer)
        (x, y), (height, width) = thing.at, drawn.mask.shape
        below = pixels[y : y + height, x : x + width]
        below[...] = (drawn.colour + below * drawn.rest + 127) // 255
    return pixels


def image(scene: Scene) -> Image.Image:
    """A scene as a picture."""
    return Image.fromarray(render(scene))


def _drawn_background(background: Background, side: int) -> Pixels:
    first, second = (np.array(c, dtype=np.float32) for c in background.colours)
    if background.kind == "plain":
        return np.full((side, side, 3), background.colours[0], dtype=np.uint8)
    if background.kind == "noise":
        bits = np.random.Philox(np.random.SeedSequence(background.seed)).random_raw(8)
        grid = Image.fromarray(bits.view(np.uint8).reshape(8, 8))
        share = np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    else:
        steps = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
        along = math.cos(background.angle) * steps[None, :] + math.sin(background.angle) * steps[:, None]
        if background.kind == "stripes":
            share = (np.floor(along * (2 / background.period)) % 2).astype(np.float32)
        else:
            share = along / (abs(math.cos(background.angle)) + abs(math.sin(background.angle))) + 0.5
    return (first + share[..., None] * (second - first) + 0.5).astype(np.uint8)


@lru_cache(maxsize=8)
def _hatching(side: int) -> Pixels:
    steps = np.arange(side)
    dark = (steps[None, :] + steps[:, None]) * 96 // side % 12 < 4
    return np.where(dark[..., None], np.uint8(60), np.uint8(160)).repeat(3, axis=-1)
