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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
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

    def claim(self, rng: random.Random) -> Claim:
        """How many of them a sentence says there are, and whether that is so."""
        if self.whole and rng.random() < 0.2:
            return f"each {self.noun} is a box{self.tail}", self.count == self.whole
        how = rng.choice(("a", "a", "a", "exactly ", "at least ", ""))
        if how == "a":
            return f"there is a {self.noun}{self.tail}", self.count >= 1
        n = rng.choice((1, 1, 2, 2, 3))
        verb = "is" if n == 1 else "are"
        claimed = f"there {verb} {how}{_number(n, rng)} {_plural(self.noun, n)}{self.tail}"
        return claimed, _enough(self.count, n, how)

    def question(self) -> str:
        """One whose answer is the count."""
        return f"how many {_plural(self.noun, 2)}{self.tail} are there?"


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
        boxes = [_tower(inks, rng) if towers else _scattered(inks, shapes, rng.randint(1, most), rng) for _ in SIDES]
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


def _tower(inks: Sequence[str], rng: random.Random) -> list[dict[str, Any]]:
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


def rearranged(record: Mapping[str, Any], rng: random.Random) -> dict[str, Any] | None:
    """The same things, dealt anew to the boxes and placed anew; ``None`` if they found no room.

    Half of the time the boxes hold as many as before, in another order.
    """
    boxes, towers = record["rep"], are_towers(contents(record))
    everything = [thing for box in boxes for thing in box]
    rng.shuffle(everything)
    counts = [len(box) for box in boxes]
    if rng.random() < 0.5:
        rng.shuffle(counts)
    else:
        most = HIGHEST if towers else MOST
        counts = [1] * len(boxes)
        while sum(counts) < len(everything):
            n = rng.randrange(len(boxes))
            counts[n] += counts[n] < most
    ends = list(accumulate(counts))
    dealt = [everything[end - count : end] for end, count in zip(ends, counts, strict=True)]
    place = _stacked if towers else _placed
    placed = [place(box, rng) for box in dealt]
    return None if None in placed else {"rep": placed, "perm": 0}


def _stacked(blocks: Sequence[Mapping[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    return [{**block, "y_loc": 80 - (BLOCK + 1) * n} for n, block in enumerate(blocks)]


def _placed(all_things: Sequence[Mapping[str, Any]], rng: random.Random) -> list[dict[str, Any]] | None:
    found: list[dict[str, Any]] = []
    for thing in sorted(all_things, key=lambda t: -int(t["size"])):
        places = (_free_place(thing["size"], found, rng) for _ in range(40))
        place = next((p for p in places if p), None)
        if place is None:
            return None
        found.append({**thing, "x_loc": place[0], "y_loc": place[1]})
    return found


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
    records: Sequence[Mapping[str, Any]],
    count: int,
    rng: random.Random,
    *,
    alike: float = 0.0,
    usable: Callable[[Mapping[str, Any]], bool] = lambda record: True,
) -> list[tuple[Mapping[str, Any], str, bool]]:
    """Sentences, each with a drawing that it is true of and one that it is not, as NLVR has them.

    Sentences that are true or false of nearly all drawings are left out, so that words alone give nothing away.

    Args:
        alike: share of the sentences whose second drawing is the first one, rearranged.
        usable: whether a rearranged drawing may be shown.

    Raises:
        ValueError: if there are too few drawings.
    """
    known = [(record, contents(record)) for record in records]
    kinds = [[k for k in known if are_towers(k[1]) == wanted] for wanted in (True, False)]
    if min(map(len, kinds)) < TRIES:
        raise ValueError(f"{len(records)} drawings are left for statements, and those are too few: ask for fewer rows")
    found: list[tuple[Mapping[str, Any], str, bool]] = []
    while len(found) < count:
        is_tower = rng.random() < len(kinds[0]) / len(records)
        make = rng.choice(MAKERS[is_tower])
        drawn: Iterable[tuple[Mapping[str, Any], Contents]] = rng.sample(kinds[0 if is_tower else 1], TRIES)
        if rng.random() < alike:
            first, *rest = drawn
            others = (rearranged(first[0], rng) for _ in rest)  # made as they are asked for
            drawn = chain([first], ((r, contents(r)) for r in others if r is not None and usable(r)))
        number, text, by_truth = rng.getrandbits(32), "", dict[bool, Mapping[str, Any]]()
        for record, boxes in drawn:
            same = random.Random(number)  # the same words for all of them
            text, truth = make(boxes, same).claim(same)
            by_truth.setdefault(truth, record)
            if len(by_truth) == 2:
                break
        if len(by_truth) == 2:
            found += [(record, text, truth) for truth, record in sorted(by_truth.items(), key=lambda item: item[0])]
    return found[:count]


def questions_about(
    records: Sequence[Mapping[str, Any]], count: int, rng: random.Random
) -> list[tuple[Mapping[str, Any], str, str]]:
    """Questions how many there are of something, with their answers; of two thirds of those that say none, nothing is asked."""
    known = [(record, contents(record)) for record in records]
    found: list[tuple[Mapping[str, Any], str, str]] = []
    while len(found) < count:
        record, boxes = rng.choice(known)
        counting = rng.choice(MAKERS[are_towers(boxes)])(boxes, rng)
        if counting.count or rng.random() < 1 / 3:
            found.append((record, counting.question(), str(counting.count)))
    return found


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


def _about_towers(boxes: Contents, rng: random.Random) -> Counting:
    colour, other, n, least = _colour(rng), _colour(rng), rng.randint(1, 4), rng.choice(("exactly ", "at least ", ""))
    end = rng.choice(tuple(ENDS))
    above = rng.random() < 0.5
    pairs = (colour, other) if above else (other, colour)
    block = rng.choice(("block", "block", "item"))
    both = colour if colour == other else f"{colour} and {other}"
    all_three = rng.choice(("all three colors", "3 different colors"))
    high: tuple[str, Callable[[list[str]], bool]] = (
        f" with {least}{_number(n, rng)} {_plural(block, n)}",
        lambda c: len(c) >= n if least == "at least " else len(c) == n,
    )
    ended: tuple[str, Callable[[list[str]], bool]] = (
        f" with a {colour} {block} at the {end}",
        lambda c: c[ENDS[end]] == colour,
    )
    tail, fits = rng.choice(
        (
            high,
            ended,
            ended,
            (high[0] + f" and a {colour} {block} at the {end}", lambda c: high[1](c) and ended[1](c)),
            (f" that has a {colour} {end}", ended[1]),
            (
                f" with a {colour} {block} {rng.choice(('over', 'above') if above else ('below', 'under'))} a {other} {block}",
                lambda c: pairs in zip(c[1:], c, strict=False),
            ),
            (
                f" with {least}{_number(n, rng)} {colour} {_plural(block, n)}",
                lambda c: _enough(c.count(colour), n, least),
            ),
            (f" which has only {colour} {_plural(block, 2)}", lambda c: set(c) == {colour}),
            (f" with only {both} {_plural(block, 2)}", lambda c: set(c) == {colour, other}),
            (
                f" with {_plural(block, 2)} of {all_three}",
                lambda c: len(set(c)) == 3,
            ),
        )
    )
    count = sum(fits([t.colour for t in box]) for box in boxes if box)
    return Counting(count, rng.choice(("tower", "tower", "tower", "box")), tail)


def _about_blocks(boxes: Contents, rng: random.Random) -> Counting:
    colour, other, end = _colour(rng), _colour(rng), rng.choice(tuple(ENDS))
    n, least, kind = rng.randint(1, HIGHEST), rng.choice(("exactly ", "at least ", "")), rng.random()
    if kind < 0.5:
        of_so_many = rng.random() < 0.5
        count = sum(
            box[ENDS[end]].colour == colour and (not of_so_many or _enough(len(box), n, least)) for box in boxes if box
        )
        high = f" with {least}{_number(n, rng)} {_plural('block', n)}" if of_so_many else ""
        return Counting(count, f"{colour} block", f" {rng.choice(('as', 'at'))} the {end} of a tower{high}")
    if kind < 0.7:
        above = rng.random() < 0.5
        word = rng.choice(("on", "over", "above", "on top of") if above else ("below", "under"))
        pair = (other, colour) if above else (colour, other)  # the lower one first
        count = sum(list(pairwise(t.colour for t in box)).count(pair) for box in boxes)
        return Counting(count, f"{colour} block", f" {word} a {other} block")
    count = sum(t.colour == colour for box in boxes for t in box)
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


MAKERS: Mapping[bool, Sequence[Maker]] = {True: (_about_towers, _about_blocks), False: (_about_things, _about_boxes)}
"""What there is to count, of towers and of other drawings."""


def _kind(rng: random.Random) -> tuple[str, Callable[[Thing], bool]]:
    """The name of a kind of thing, and which things are of it."""
    colour = rng.choice((*COLOURS.values(), ""))
    shape = rng.choice(
        ("circle", "square", "triangle", "item", "object") if colour else ("circle", "square", "triangle")
    )
    any_shape = shape in ("item", "object")
    return f"{colour} {shape}".strip(), lambda t: (not colour or t.colour == colour) and (any_shape or t.shape == shape)


def _enough(count: int, n: int, how: str) -> bool:
    return count >= n if how == "at least " else count == n


def _colour(rng: random.Random) -> str:
    return rng.choice(tuple(COLOURS.values()))


def _number(n: int, rng: random.Random) -> str:
    return rng.choice((WORDS[n], str(n)))


def _plural(noun: str, n: int) -> str:
    return noun if n == 1 else f"{noun}es" if noun.endswith("x") else f"{noun}s"
