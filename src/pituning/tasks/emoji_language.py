"""What can be said of the things in a scene, and whether it is true.

A verdict is True, False, or None where people might disagree (a thing a little to the left, a colour between red and
orange, a size between small and big). An expression denotes a thing if its verdict is True for that thing and False for
all others, so that what is unclear is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pituning.data.emoji import GROUPS, emoji_named
from pituning.data.scenes import SIDES, Draws, Scene, Thing

Verdict = bool | None

ANYTHING = "thing"
SIZE_WORDS = {"small": "small", "large": "big"}
RELATIONS = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
EXTREMES = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "lowest"}
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
GROUP_NOUNS = {
    "sky": ("thing of the sky", "things of the sky"),
    "household": ("household item", "household items"),
    "stationery": ("stationery item", "stationery items"),
    "dish": ("dish", "dishes"),
}  # fmt: skip

NEAR_COLOURS = frozenset(
    frozenset(pair.split())
    for pair in (
        "red orange", "orange yellow", "orange brown", "red pink", "red brown", "pink purple", "blue purple", "white grey",
        "black grey", "yellow brown", "pink orange", "blue grey", "green yellow", "red purple", "pink brown",
    )
)  # fmt: skip
"""Pairs of colour words that not everybody divides at the same place."""

BESIDE = 0.12  # distances as shares of the side: so far to the left is to the left,
LEVEL = 0.02  # and so little is certainly not
FIRM, MIDDLE = 0.42, 0.5  # a centre short of the one is on the left, beyond the other it is not
LARGER = 1.25  # ratio of sizes that is seen


@dataclass(frozen=True)
class Description:
    """A noun with its adjectives, such as "small red apple"; the noun is a name, a group or "thing"."""

    noun: str
    size: str = ""
    colour: str = ""

    @property
    def text(self) -> str:
        """The words."""
        noun = GROUP_NOUNS.get(self.noun, (self.noun,))[0]
        return " ".join(w for w in (SIZE_WORDS.get(self.size, ""), self.colour, noun) if w)

    def verdict(self, thing: Thing) -> Verdict:
        """Whether a thing is one."""
        if not is_a(thing, self.noun):
            return False
        return all_of(
            size_verdict(thing, self.size) if self.size else True,
            colour_verdict(thing, self.colour) if self.colour else True,
        )


def all_of(*verdicts: Verdict) -> Verdict:
    """Whether all hold: False if one does not, else None if one is unclear."""
    return False if False in verdicts else None if None in verdicts else True


def is_a(thing: Thing, noun: str) -> bool:
    """Whether a thing has that name or belongs to that group."""
    return noun in (thing.name, thing.group, ANYTHING)


def size_verdict(thing: Thing, size: str) -> Verdict:
    """Whether a thing is small or large; the medium ones are neither here nor there."""
    return None if thing.size == "medium" else thing.size == size


def colour_verdict(thing: Thing, colour: str) -> Verdict:
    """Whether a thing has a colour; unclear where none prevails or a similar one does."""
    if not thing.colour or frozenset((thing.colour, colour)) in NEAR_COLOURS:
        return None
    return thing.colour == colour


def side_verdict(thing: Thing, where: str, side: int) -> Verdict:
    """Whether a thing is on the left (right, top, bottom) of the picture, by its centre."""
    x, y = (c / side for c in thing.centre)
    position = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[where]
    return True if position < FIRM else False if position > MIDDLE else None


def middle_verdict(thing: Thing, side: int) -> Verdict:
    """Whether a thing is in the middle of the picture."""
    off = max(abs(c / side - 0.5) for c in thing.centre)
    return True if off < 0.12 else False if off > 0.22 else None


def relation_verdict(thing: Thing, landmark: Thing, where: str, side: int) -> Verdict:
    """Whether a thing is to the left of (to the right of, above, below) another one: there, and mainly there."""
    dx, dy = ((a - b) / side for a, b in zip(thing.centre, landmark.centre, strict=True))
    along, across = {"left": (-dx, dy), "right": (dx, dy), "top": (-dy, dx), "bottom": (dy, dx)}[where]
    if along <= LEVEL:
        return False
    return True if along >= BESIDE and along >= abs(across) else None


def larger_verdict(thing: Thing, other: Thing) -> Verdict:
    """Whether a thing is larger than another one."""
    ratio = thing.longer / other.longer
    return True if ratio >= LARGER else False if ratio <= 1 / LARGER else None


def denoted(scene: Scene, verdict: Callable[[Thing], Verdict]) -> Thing | None:
    """The one thing of which a verdict is True, where it is False of all others."""
    found = None
    for thing in scene.things:
        v = verdict(thing)
        if v is None or (v and found is not None):
            return None
        if v:
            found = thing
    return found


def extreme(scene: Scene, description: Description, where: str) -> Thing | None:
    """The leftmost (rightmost, topmost, lowest) of two or more that a description fits, where it clearly is."""
    axis, sign = (0 if where in ("left", "right") else 1), (1 if where in ("left", "top") else -1)
    return _first(scene, description, lambda t: sign * t.centre[axis] / scene.side, lambda a, b: b - a >= BESIDE)


def most(scene: Scene, description: Description, size: str) -> Thing | None:
    """The biggest or smallest of two or more that a description fits, where it clearly is."""
    sign = -1 if size == "large" else 1
    key = lambda t: t.longer**sign  # noqa: E731
    return _first(scene, description, key, lambda a, b: b / a >= LARGER)


def nearest(scene: Scene, description: Description, landmark: Thing) -> Thing | None:
    """The one nearest to a landmark of two or more that a description fits, where it clearly is."""

    def distance(thing: Thing) -> float:
        x, y = (a - b for a, b in zip(thing.centre, landmark.centre, strict=True))
        return float((x * x + y * y) ** 0.5) / scene.side

    return _first(scene, description, distance, lambda a, b: b - a >= BESIDE, without=landmark)


def _first(
    scene: Scene,
    description: Description,
    key: Callable[[Thing], float],
    clear: Callable[[float, float], bool],
    without: Thing | None = None,
) -> Thing | None:
    others = [t for t in scene.things if t is not without]
    verdicts = [description.verdict(t) for t in others]
    fitting = sorted((t for t, v in zip(others, verdicts, strict=True) if v), key=key)
    if None in verdicts or len(fitting) < 2:
        return None
    return fitting[0] if clear(key(fitting[0]), key(fitting[1])) else None


def describe(draws: Draws, thing: Thing, generic: float = 0.2, adjectives: float = 0.4) -> Description:
    """One of the descriptions that fit a thing.

    Args:
        generic: chance of its group in place of its name.
        adjectives: chance of each adjective that fits.
    """
    noun = thing.group if draws.unit() < generic else thing.name
    size = thing.size if thing.size in SIZE_WORDS and draws.unit() < adjectives else ""
    colour = thing.colour if draws.unit() < adjectives else ""
    return Description(noun, size, colour)


def short_expression(draws: Draws, scene: Scene) -> tuple[Thing, str] | None:
    """A thing and a short expression for it, mostly by its place, as in RefCOCO; None: this draw denotes nothing."""
    thing = draws.pick(scene.things)
    form = draws.pick(("bare", "side", "side", "extreme", "corner", "middle"))
    described = describe(draws, thing, adjectives=0.25)
    the = "the " if draws.unit() < 0.4 else ""
    if form == "bare":
        return _if_it(thing, denoted(scene, described.verdict), the + described.text)
    if form == "middle":
        found = denoted(scene, lambda t: all_of(described.verdict(t), middle_verdict(t, scene.side)))
        return _if_it(thing, found, f"{the}{described.text} in the middle")
    where = draws.pick(SIDES)
    if form == "extreme":
        return _if_it(thing, extreme(scene, described, where), f"{the}{EXTREMES[where]} {described.text}")
    wheres = (where,) if form == "side" else (draws.pick(("top", "bottom")), draws.pick(("left", "right")))
    found = denoted(scene, lambda t: all_of(described.verdict(t), *(side_verdict(t, w, scene.side) for w in wheres)))
    words = " ".join(wheres)
    place = PLACES[where] if form == "side" else f"in the {words} corner"
    text = f"{the}{words} {described.text}" if draws.unit() < 0.4 else f"{the}{described.text} {place}"
    return _if_it(thing, found, text)


def plain_expression(draws: Draws, scene: Scene) -> tuple[Thing, str] | None:
    """A thing and an expression for it by its looks alone, as in RefCOCO+; None: this draw denotes nothing."""
    thing = draws.pick(scene.things)
    the = "the " if draws.unit() < 0.4 else ""
    form = draws.unit()
    if form < 0.2:
        described, size = describe(draws, thing, generic=0.5, adjectives=0.0), draws.pick(("small", "large"))
        word = {"small": "smallest", "large": "biggest"}[size]
        return _if_it(thing, most(scene, described, size), f"{the}{word} {described.text}")
    described = describe(draws, thing, generic=0.25, adjectives=0.7)
    if form > 0.3 and not (described.size or described.colour):
        return None
    return _if_it(thing, denoted(scene, described.verdict), the + described.text)


def name_expression(draws: Draws, scene: Scene) -> tuple[Thing, str] | None:
    """A thing that is the only one of its name, and that name."""
    thing = draws.pick(scene.things)
    return _if_it(thing, denoted(scene, Description(thing.name).verdict), thing.name)


def long_expression(draws: Draws, scene: Scene, needed: bool = True) -> tuple[Thing, str] | None:
    """A thing and a long expression for it by its relation to others, as in RefCOCOg; None: this draw denotes nothing.

    Args:
        needed: whether the first noun, without the relation, must fit other things, too.
    """
    thing, *landmarks = draws.shuffled(scene.things)
    described = describe(draws, thing, generic=0.35, adjectives=0.35)
    if needed:
        alike = {o.name: o for o in landmarks if o.group == thing.group}
        if not alike:
            return None
        noun = thing.name if thing.name in alike and draws.unit() < 0.7 else thing.group
        described = Description(noun, described.size, described.colour)
        if all(described.verdict(o) is False for o in landmarks):
            return None
    marks = [describe(draws, m, generic=0.1, adjectives=0.5) for m in landmarks[:2]]
    if any(denoted(scene, d.verdict) is not m for d, m in zip(marks, landmarks, strict=False)):
        return None
    joint = draws.pick(("", "that is "))
    if draws.unit() < 0.25:
        found = nearest(scene, described, landmarks[0])
        return _if_it(thing, found, f"the {described.text} {joint}closest to the {marks[0].text}")
    count = 2 if len(landmarks) > 1 and draws.unit() < 0.35 else 1
    pairs = [(m, [w for w in SIDES if relation_verdict(thing, m, w, scene.side)]) for m in landmarks[:count]]
    if not all(held for _, held in pairs):
        return None
    wheres = [draws.pick(held) for _, held in pairs]

    def verdict(candidate: Thing) -> Verdict:
        return all_of(
            described.verdict(candidate),
            *(
                candidate is not m and relation_verdict(candidate, m, w, scene.side)
                for w, m in zip(wheres, landmarks, strict=False)
            ),
        )

    relations = (f"{RELATIONS[w]} the {d.text}" for w, d in zip(wheres, marks, strict=False))
    return _if_it(thing, denoted(scene, verdict), f"the {described.text} {joint}{' and '.join(relations)}")


def _if_it(thing: Thing, found: Thing | None, text: str) -> tuple[Thing, str] | None:
    return (thing, text) if found is thing else None


def plural_of(noun: str) -> str:
    """The plural of a name, a group or "thing"."""
    if noun in GROUPS:
        return GROUP_NOUNS.get(noun, (noun, f"{noun}s"))[1]
    return f"{ANYTHING}s" if noun == ANYTHING else emoji_named(noun).plural


def with_article(text: str) -> str:
    """A noun with a or an, by its first letter; "unicorn" and "ufo" are spoken with a y.

    >>> with_article("orange cat"), with_article("unicorn")
    ('an orange cat', 'a unicorn')
    """
    return f"{'an' if text[0] in 'aeio' or text.startswith('um') else 'a'} {text}"


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "apple"), counted(3, "cherry")
    ('an apple', 'three cherries')
    """
    return with_article(Description(noun).text) if number == 1 else f"{NUMBERS[number]} {plural_of(noun)}"


NUMBERS: Sequence[str] = ("no", "one", "two", "three", "four", "five", "six")
