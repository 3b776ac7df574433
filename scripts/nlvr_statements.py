"""Statements about NLVR's drawings, each with drawings that it is true and false of, and drawings in the manner of NLVR's.

NLVR (Suhr et al., ACL 2017) shows three grey boxes: with a tower of squares each, or with scattered things. A tiny model that
has never seen anything needs more of them, and simpler ones, than the data set has; what is made here shares no drawing
with what people saw. Of NLVR's drawings that a sentence is false of, many hold the same things as one that it is
true of, in other places: who only looks for colours and shapes is right about half of the time. So some of the drawings here
are rearranged ones, too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from build_grounding_data import BOX_STEP, COLOURS, SCALE, SIDES, SIZES, Thing, things
from PIL import Image, ImageDraw

BOX_SIDE = 100  # units
BLOCK = 20  # units; blocks of a tower stand one unit apart
HIGHEST, MOST = 4, 7  # blocks of a tower; things in another box
ENDS = {"top": -1, "base": 0}
TRIES = 8  # drawings among which a statement is true of one and false of another
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
SHAPES = ("circle", "square", "triangle")
PAPER, BETWEEN = (211, 211, 211), (128, 128, 128)
INKS = {"Yellow": (255, 255, 0), "#0099ff": (0, 153, 255), "Black": (0, 0, 0)}

Contents = Sequence[Sequence[Thing]]
"""The things in each of NLVR's three boxes, the lowest first."""
Claim = tuple[str, bool]
"""A sentence about a drawing, and whether it is true of it."""
Maker = Callable[[Contents, random.Random], "Counting"]


@dataclass(frozen=True)
class Counting:
    """How many things of a kind there are: ``noun`` and ``tail`` say which.

    Attributes:
        whole: how many there are at most, where a sentence may speak of each of them.
    """

    count: int
    noun: str
    tail: str
    whole: int = 0

    def exists(self, rng: random.Random) -> Claim:
        """That there is one, and whether that is so."""
        return f"there is a {self.noun}{self.tail}", self.count >= 1

    def claim(self, rng: random.Random) -> Claim:
        """How many of them a sentence says there are, and whether that is so."""
        if self.whole and rng.random() < 0.2:
            return f"each {self.noun} is a box{self.tail}", self.count == self.whole
        how = rng.choice(("a", "a", "a", "exactly ", "at least ", ""))
        if how == "a":
            return self.exists(rng)
        n = rng.choice((1, 1, 2, 2, 3))
        verb = "is" if n == 1 else "are"
        claimed = f"there {verb} {how}{_number(n, rng)} {_plural(self.noun, n)}{self.tail}"
        return claimed, _enough(self.count, n, how)


def invented(count: int, rng: random.Random, *, sparse: bool = False) -> list[dict[str, Any]]:
    """Records of drawings in the manner of NLVR's, half of them towers.

    Args:
        sparse: of one or two colours and shapes each, so that a drawing often lacks a kind of thing altogether.
    """
    found = []
    for _ in range(count):
        inks = rng.sample(list(INKS), rng.choice((1, 2, 2))) if sparse else list(INKS)
        shapes = rng.sample(SHAPES, rng.choice((1, 2, 2))) if sparse else list(SHAPES)
        most = rng.choice((2, 4, MOST)) if sparse else MOST
        towers = rng.random() < 0.5
        boxes = [_stacked(inks, rng) if towers else _scattered(inks, shapes, rng.randint(1, most), rng) for _ in SIDES]
        found.append({"rep": boxes, "perm": 0})
    return found


def drawing(record: Mapping[str, Any]) -> Image.Image:
    """The picture of an invented record, of the size of NLVR's as stored."""
    image = Image.new("RGB", (2 * BOX_STEP + BOX_SIDE, BOX_SIDE), BETWEEN)
    pen = ImageDraw.Draw(image)
    for place, box in enumerate(record["rep"]):
        left = place * BOX_STEP
        pen.rectangle((left, 0, left + BOX_SIDE - 1, BOX_SIDE - 1), fill=PAPER)
        for thing in box:
            x, y, size, ink = left + thing["x_loc"], thing["y_loc"], thing["size"] - 1, INKS[thing["color"]]
            if thing["type"] == "triangle":
                pen.polygon([(x, y + size), (x + size, y + size), (x + size / 2, y)], fill=ink)
            else:
                (pen.rectangle if thing["type"] == "square" else pen.ellipse)((x, y, x + size, y + size), fill=ink)
    return image.resize((round(image.width * SCALE), round(image.height * SCALE)), Image.Resampling.BOX)


def _stacked(inks: Sequence[str], rng: random.Random) -> list[dict[str, Any]]:
    return [
        {"type": "square", "size": BLOCK, "x_loc": 40, "y_loc": 80 - (BLOCK + 1) * n, "color": rng.choice(inks)}
        for n in range(rng.randint(1, HIGHEST))
    ]


def _scattered(inks: Sequence[str], shapes: Sequence[str], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Up to so many things that do not overlap; about a third of them touch an edge."""
    found: list[dict[str, Any]] = []
    for _ in range(60):
        if len(found) == count:
            break
        size = rng.choice(tuple(SIZES))
        if place := _free_place(size, found, rng):
            x, y = place
            found.append({"type": rng.choice(shapes), "size": size, "x_loc": x, "y_loc": y, "color": rng.choice(inks)})
    return found


def _free_place(size: int, others: Sequence[Mapping[str, Any]], rng: random.Random) -> tuple[int, int] | None:
    """A place at random, if a thing of this size would overlap none there."""
    x, y = (rng.randint(1, BOX_SIDE - 1 - size) for _ in range(2))
    if rng.random() < 0.35:
        x, y = rng.choice(((rng.choice((0, BOX_SIDE - size)), y), (x, rng.choice((0, BOX_SIDE - size)))))
    apart = (
        x + size < o["x_loc"] or o["x_loc"] + o["size"] < x or y + size < o["y_loc"] or o["y_loc"] + o["size"] < y
        for o in others
    )
    return (x, y) if all(apart) else None


def contents(record: Mapping[str, Any]) -> Contents:
    """What is in the left, middle and right box of a record."""
    shown = sorted(things(record["rep"], record["perm"]), key=lambda t: -t.box[3])
    return [[t for t in shown if t.side == side] for side in SIDES]


def are_towers(boxes: Contents) -> bool:
    """Whether each box holds squares of one size that stand on each other."""
    return all(
        all(t.shape == "square" and t.size == "medium" and t.box[0] == box[0].box[0] for t in box) for box in boxes
    )


def touches(thing: Thing, where: str = "edge") -> bool:
    """Whether a thing touches an edge of its box; its top or bottom edge; two edges at once, which is a corner."""
    x0, y0, x1, y1 = (c / SCALE for c in thing.box)
    left = SIDES.index(thing.side) * BOX_STEP
    beside = x0 <= left or x1 >= left + BOX_SIDE
    top, bottom = y0 <= 0, y1 >= BOX_SIDE
    found = {"top": top, "bottom": bottom, "base": bottom, "corner": beside and (top or bottom)}
    return found.get(where, beside or top or bottom)


def premise(record: Mapping[str, Any]) -> str:
    """What is in each box, from left to right, in words; a tower from its base to its top."""
    boxes, parts = contents(record), []
    for box in boxes:
        if are_towers(boxes):
            parts.append("tower " + " ".join(t.colour for t in box))
        else:
            counts = Counter((t.colour, t.shape, " edge" * touches(t)) for t in box)
            parts.append(" ".join(f"{n} {c} {s}{edge}" for (c, s, edge), n in sorted(counts.items())))
    return " . ".join(parts)


def statements_about(
    records: Sequence[Mapping[str, Any]], count: int, rng: random.Random, lesson: str = "all"
) -> list[tuple[Mapping[str, Any], str, bool]]:
    """Sentences, each with a drawing that it is true of and one that it is not, as NLVR has them.

    Sentences that are true or false of nearly all drawings are left out, so that words alone give nothing away.

    Args:
        lesson: a name of `LESSONS`.

    Raises:
        ValueError: if there are too few drawings.
    """
    makers, say = LESSONS[lesson]
    known = [(record, contents(record)) for record in records]
    kinds = {wanted: [k for k in known if are_towers(k[1]) == wanted] for wanted in makers}
    if min(map(len, kinds.values())) < TRIES:
        raise ValueError(f"{len(records)} drawings are left for statements, and those are too few: ask for fewer rows")
    found: list[tuple[Mapping[str, Any], str, bool]] = []
    while len(found) < count:
        are = rng.choice(tuple(kinds))
        make, number, text, by_truth = rng.choice(makers[are]), rng.getrandbits(32), "", dict[bool, Mapping[str, Any]]()
        for record, boxes in rng.sample(kinds[are], TRIES):
            same = random.Random(number)  # the same words for all of them
            text, truth = say(make(boxes, same), same)
            by_truth.setdefault(truth, record)
            if len(by_truth) == 2:
                break
        if len(by_truth) == 2:
            found += [(record, text, truth) for truth, record in sorted(by_truth.items(), key=lambda item: item[0])]
    return found[:count]


def simple_statements(
    records: Sequence[Mapping[str, Any]], count: int, rng: random.Random
) -> list[tuple[Mapping[str, Any], str, bool]]:
    """Sentences which say that there is a thing of some kind; half of them are true.

    Unlike :func:`statements_about`, words alone give something away, since some kinds are rarer than others. That helps a model
    that cannot see yet to begin.
    """
    known = [(record, contents(record)) for record in records]
    found: list[tuple[Mapping[str, Any], str, bool]] = []
    while len(found) < count:
        record, boxes = rng.choice(known)
        text, truth = _there_is(boxes, rng)
        if truth == (len(found) % 2 == 0):
            found.append((record, text, truth))
    return found


def _there_is(boxes: Contents, rng: random.Random) -> Claim:
    noun, fits = _kind(rng)
    if are_towers(boxes):
        colour = _colour(rng)
        noun, fits = f"{colour} {rng.choice(('block', 'item', 'square'))}", lambda t: t.colour == colour
    return f"there is {rng.choice(('a', 'at least one'))} {noun}", any(fits(t) for box in boxes for t in box)


def _ends(boxes: Contents, rng: random.Random) -> Counting:
    """Of what colour a tower's top or base is."""
    return _tower(boxes, rng, *_some_end(rng))


def _heights(boxes: Contents, rng: random.Random) -> Counting:
    """How many blocks a tower has."""
    tail, fits = _some_height(rng)
    return Counting(sum(fits(c) for c in _stacks(boxes)), "tower", tail)


def _ends_and_heights(boxes: Contents, rng: random.Random) -> Counting:
    (colour, end), (high, fits) = _some_end(rng), _some_height(rng)
    return _tower(boxes, rng, colour, end, high, fits)


def _tower(
    boxes: Contents,
    rng: random.Random,
    colour: str,
    end: str,
    high: str = "",
    fits: Callable[[list[str]], bool] = lambda stack: True,
) -> Counting:
    """Towers of a height with a block of a colour at one end, or such blocks."""
    count = sum(fits(stack) and stack[ENDS[end]] == colour for stack in _stacks(boxes))
    with_one, block = "and" if high else "with", rng.choice(("block", "block", "block", "item"))
    noun, tail = rng.choice(
        (
            ("tower", f"{high} {with_one} a {colour} {block} at the {end}"),
            ("tower", f"{high}{' which' if high else ' that'} has a {colour} {end}"),
            (f"{colour} {block}", f" as the {end} of a tower{high}"),
            (f"{colour} {block}", f" at the {end} of a tower{high}"),
        )
    )
    return Counting(count, noun, tail)


def _some_end(rng: random.Random) -> tuple[str, str]:
    return _colour(rng), rng.choice(tuple(ENDS))


def _some_height(rng: random.Random) -> tuple[str, Callable[[list[str]], bool]]:
    n, least = rng.randint(1, HIGHEST), rng.choice(("exactly ", "only ", "at least ", "", ""))
    return f" with {least}{_number(n, rng)} {_plural('block', n)}", lambda stack: _enough(len(stack), n, least)


def _stacks(boxes: Contents) -> list[list[str]]:
    """The colours of each tower, its base first."""
    return [[t.colour for t in box] for box in boxes if box]


def _colours(boxes: Contents, rng: random.Random) -> Counting:
    """Which colours a tower has, how often, and in which order."""
    colour, other, n, least = _colour(rng), _colour(rng), rng.randint(1, 3), rng.choice(("exactly ", "at least ", ""))
    above = rng.random() < 0.5
    pair = (other, colour) if above else (colour, other)  # the lower one first
    block = rng.choice(("block", "block", "item"))
    both = colour if colour == other else f"{colour} and {other}"
    all_three = rng.choice(("all three colors", "3 different colors"))
    tail, fits = rng.choice(
        (
            (
                f" with a {colour} {block} {rng.choice(('over', 'above') if above else ('below', 'under'))} a {other} {block}",
                lambda stack: pair in pairwise(stack),
            ),
            (
                f" with {least}{_number(n, rng)} {colour} {_plural(block, n)}",
                lambda stack: _enough(stack.count(colour), n, least),
            ),
            (f" which has only {colour} {_plural(block, 2)}", lambda stack: set(stack) == {colour}),
            (f" with only {both} {_plural(block, 2)}", lambda stack: set(stack) == {colour, other}),
            (f" with {_plural(block, 2)} of {all_three}", lambda stack: len(set(stack)) == 3),
        )
    )
    return Counting(sum(map(fits, _stacks(boxes))), "tower", tail)


def _blocks(boxes: Contents, rng: random.Random) -> Counting:
    """How many blocks of a colour there are, or how many of them lie next to one of another."""
    colour, other = _colour(rng), _colour(rng)
    if rng.random() < 0.6:
        above = rng.random() < 0.5
        word = rng.choice(("on", "over", "above", "on top of") if above else ("below", "under"))
        pair = (other, colour) if above else (colour, other)  # the lower one first
        count = sum(list(pairwise(stack)).count(pair) for stack in _stacks(boxes))
        return Counting(count, f"{colour} block", f" {word} a {other} block")
    count = sum(stack.count(colour) for stack in _stacks(boxes))
    return Counting(count, f"{colour} {rng.choice(('block', 'square', 'item'))}", "")


def _about_things(boxes: Contents, rng: random.Random) -> Counting:
    noun, fits = _kind(rng)
    edge = rng.choice((None, None, True, True, False))
    place = rng.choice(("edge", "edge", "wall", "side", "bottom", "base", "top", "corner"))
    close, article = rng.choice(("", "", "closely ")), rng.choice(("the", "the", "a"))
    touching = f" {close}touching {article} {place}{rng.choice(('', ' of a box'))}"
    tail = {None: "", True: touching, False: f" not{touching}"}[edge]
    return Counting(sum(fits(t) and edge in (None, touches(t, place)) for box in boxes for t in box), noun, tail)


def _about_boxes(boxes: Contents, rng: random.Random) -> Counting:
    (noun, fits), (second, fits_too), n = _kind(rng), _kind(rng), rng.randint(1, 7)
    least = rng.choice(("exactly ", "at least ", ""))
    few, colour, other = rng.randint(1, 3), _colour(rng), _colour(rng)
    be, both = "is" if few == 1 else "are", colour if colour == other else f"{colour} and {other}"
    tail, holds = rng.choice(
        (
            (f" with {least}{_number(n, rng)} {_plural('item', n)}", lambda box: _enough(len(box), n, least)),
            (
                f" with {least}{_number(few, rng)} {_plural(noun, few)}",
                lambda box: _enough(sum(map(fits, box)), few, least),
            ),
            (f" with a {noun} and a {second}", lambda box: any(map(fits, box)) and any(map(fits_too, box))),
            (f" with only {_plural(noun, 2)}", lambda box: all(map(fits, box))),
            (
                f" with {_number(n, rng)} {_plural('item', n)} of which {_number(few, rng)} {be} {colour}",
                lambda box: len(box) == n and sum(t.colour == colour for t in box) == few,
            ),
            (f" with only {both} items", lambda box: {t.colour for t in box} == {colour, other}),
        )
    )
    count = sum(holds(box) for box in boxes if box)
    return Counting(count, rng.choice(("box", "box", "grey box")), tail, whole=len(boxes))


_TOWERS: Sequence[Maker] = (_ends, _heights, _ends_and_heights, _ends_and_heights, _colours, _colours, _blocks)
LESSONS: Mapping[str, tuple[Mapping[bool, Sequence[Maker]], Callable[[Counting, random.Random], Claim]]] = {
    "ends": ({True: (_ends,)}, Counting.exists),
    "ends-counted": ({True: (_ends,)}, Counting.claim),
    "heights": ({True: (_heights,)}, Counting.exists),
    "numbers": ({True: (_ends, _heights, _ends_and_heights)}, Counting.claim),
    "all": ({True: _TOWERS, False: (_about_things, _about_boxes)}, Counting.claim),
}
"""What there is to count, of towers and of other drawings, and what is said of it."""


def _kind(rng: random.Random) -> tuple[str, Callable[[Thing], bool]]:
    """The name of a kind of thing, and which things are of it."""
    colour = rng.choice((*COLOURS.values(), ""))
    shape = rng.choice(
        ("circle", "square", "triangle", "item", "object") if colour else ("circle", "square", "triangle")
    )
    any_shape = shape in ("item", "object")
    return f"{colour} {shape}".strip(), lambda t: (not colour or t.colour == colour) and (any_shape or t.shape == shape)


def _enough(count: int, n: int, how: str) -> bool:
    """Whether a count is as many as "exactly", "only", "at least" or nothing says, before the number."""
    return count >= n if how == "at least " else count == n


def _colour(rng: random.Random) -> str:
    return rng.choice(tuple(COLOURS.values()))


def _number(n: int, rng: random.Random) -> str:
    return rng.choice((WORDS[n], str(n)))


def _plural(noun: str, n: int) -> str:
    return noun if n == 1 else f"{noun}es" if noun.endswith("x") else f"{noun}s"
