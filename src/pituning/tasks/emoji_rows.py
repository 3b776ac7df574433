"""Rows of the emoji tasks: what is asked about scene number n, with the right answer.

What is to be answered is fixed before the scene is made (in blocks in which every answer occurs equally often), and the
scene is then made to fit, so that neither a question nor a statement gives its answer away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

from pituning.data.emoji import COLOURS, EMOJI, GROUPS
from pituning.data.scenes import SIDES, Draws, Scene, Thing, Vocabulary, Wish, draws_for, names_of, scene, styles_of
from pituning.data.tables import JOINT
from pituning.errors import DataError
from pituning.tasks.emoji_language import (
    ANYTHING,
    NEAR_COLOURS,
    NUMBERS,
    OPPOSITE,
    PLACES,
    RELATIONS,
    SIZE_WORDS,
    Description,
    counted,
    denoted,
    describe,
    larger_verdict,
    long_expression,
    most,
    name_expression,
    plain_expression,
    plural_of,
    relation_verdict,
    short_expression,
    side_verdict,
    with_article,
)

ATTEMPTS = 300  # scenes made for one row at most; the first or second nearly always serves
PROPOSALS = 32  # things said of one scene before another one is made
MOST_THINGS = 6
VQA_ANSWERS = ("yes", "no", *map(str, range(MOST_THINGS + 1)), *COLOURS, *GROUPS)
LABELS = ("entailment", "contradiction", "neutral")


@dataclass(frozen=True)
class Source:
    """Where the scenes of a split come from, see :func:`pituning.data.scenes.scene`."""

    split: str
    seed: int = 0
    side: int = 96
    vocabulary: Vocabulary = "full"

    @property
    def names(self) -> tuple[str, ...]:
        """The names that may occur."""
        return names_of(self.split, self.vocabulary)

    def scene(self, index: int, wishes: Sequence[Wish] | None = None, cover: str = "") -> Scene:
        """A scene of this source."""
        return scene(
            self.split,
            index,
            seed=self.seed,
            side=self.side,
            vocabulary=self.vocabulary,
            wishes=wishes,
            cover=cover,
        )

    def draws(self, index: int, purpose: str) -> Draws:
        """Random numbers for what is said of a scene."""
        return draws_for(self.split, index, self.seed, crc32(purpose.encode()) + 1)

    def balanced(self, index: int, purpose: str, cells: int) -> int:
        """One of so many cells; in each block of as many indices every cell occurs once, in any order."""
        return self.draws(index // cells, f"{purpose}/balance").shuffled(range(cells))[index % cells]


@dataclass(frozen=True)
class Row:
    """A scene, and the columns that its kind of task reads."""

    scene: Scene
    columns: Mapping[str, str]


RowMaker = Callable[[Source, int], Row]
Expression = Callable[[Draws, Scene], tuple[Thing, str] | None]


def _attempts(index: int, what: str) -> range:
    """Indices of the scenes that may serve a row: its own number first; rows have no scene in common."""
    if not 0 <= index < 1 << 32:
        raise DataError(f"{what}: rows are numbered from 0 below 2**32, not {index}")
    return range(index, index + (ATTEMPTS << 32), 1 << 32)


def _nothing(what: str, index: int) -> DataError:
    return DataError(
        f"{what}: nothing could be said of {ATTEMPTS} scenes for row {index}; use another seed or more names"
    )


# grounding


def _grounding(purpose: str, *expressions: Expression) -> RowMaker:
    def row(source: Source, index: int) -> Row:
        draws = source.draws(index, purpose)
        for number in _attempts(index, purpose):
            made = source.scene(number)
            expression = draws.pick(expressions)
            for _ in range(PROPOSALS):
                if found := expression(draws, made):
                    thing, text = found
                    return Row(made, {"text": text, "box": ",".join(map(str, thing.box))})
        raise _nothing(purpose, index)

    return row


# captions


def _caption_row(source: Source, index: int) -> Row:
    """One to four names, up to six things; the caption counts them from left to right."""
    draws = source.draws(index, "caption")
    names = _other_names(draws, source.names, 1 + draws.below(4))
    counts = [1] * len(names)
    while sum(counts) < MOST_THINGS and draws.unit() < 0.4:
        counts[draws.below(len(counts))] += 1
    made = source.scene(index, [Wish(n) for n, c in zip(names, counts, strict=True) for _ in range(c)])
    return Row(made, {"caption": JOINT.join(captions(made))})


def captions(scene: Scene) -> list[str]:
    """Captions of a scene: counted from left to right (two of them), and counted with the most frequent first."""
    ordered = sorted(scene.things, key=lambda t: t.centre)
    counts = {t.name: sum(o.name == t.name for o in ordered) for t in ordered}
    first = " and ".join(counted(count, name) for name, count in counts.items())
    by_count = sorted(counts.items(), key=lambda item: -item[1])
    last = " and ".join(counted(count, name) for name, count in by_count)
    return [first, f"a picture of {first}", f"there {'are' if by_count[0][1] > 1 else 'is'} {last}"]


# classification: one thing, or a number of things


def _object_row(source: Source, index: int) -> Row:
    name = source.names[source.balanced(index, "object", len(source.names))]
    return Row(source.scene(index, [Wish(name, size="large")]), {"label": name})


def _group_row(source: Source, index: int) -> Row:
    group = GROUPS[source.balanced(index, "group", len(GROUPS))]
    name = source.draws(index, "group").pick(_members(source.names, group))
    return Row(source.scene(index, [Wish(name, size="large")]), {"label": group})


def _style_row(source: Source, index: int) -> Row:
    styles = styles_of(source.split)
    style = styles[source.balanced(index, "style", len(styles))]
    name = source.draws(index, "style").pick(source.names)
    return Row(source.scene(index, [Wish(name, style, "large")]), {"label": style})


def _count_row(source: Source, index: int) -> Row:
    count = 1 + source.balanced(index, "count", MOST_THINGS)
    draws = source.draws(index, "count")
    alike = 1 + draws.below(count)
    names = [draws.pick(source.names)] * alike + [draws.pick(source.names) for _ in range(count - alike)]
    return Row(source.scene(index, [Wish(n) for n in names]), {"label": NUMBERS[count]})


# questions


def _vqa_row(source: Source, index: int) -> Row:
    kinds = tuple(QUESTIONS)
    kind = kinds[source.balanced(index, "vqa", len(kinds))]
    answers, ask = QUESTIONS[kind](source)
    answer = answers[source.balanced(index // len(kinds), f"vqa/{kind}", len(answers))]
    draws = source.draws(index, "vqa")
    for number in _attempts(index, "emoji-vqa"):
        if found := ask(source, draws, number, answer):
            made, question = found
            return Row(made, {"key": f"{kind}/{index}", "question": question, "answer": answer})
    raise _nothing("emoji-vqa", index)


Asked = tuple[Scene, str] | None
Ask = Callable[[Source, Draws, int, str], Asked]
YES_NO = ("yes", "no")


def _how_many(source: Source, draws: Draws, number: int, answer: str) -> Asked:
    """A number of things of one name or, every other time, of one group."""
    count, by_group = int(answer), draws.unit() < 0.5
    noun = draws.pick(GROUPS if by_group else source.names)
    names = [draws.pick(_members(source.names, noun)) if by_group else noun for _ in range(count)]
    total = max(count, 2) + draws.below(MOST_THINGS + 1 - max(count, 2))
    names += _crowd(draws, source.names, total - count, noun)
    return source.scene(number, [Wish(n) for n in names]), f"how many {plural_of(noun)} are there?"


def _how_many_in_all(source: Source, draws: Draws, number: int, answer: str) -> Asked:
    names = _crowd(draws, source.names, int(answer), "")
    return source.scene(number, [Wish(n) for n in names]), "how many things are there?"


def _is_there(source: Source, draws: Draws, number: int, answer: str) -> Asked:
    noun = draws.pick(GROUPS if draws.unit() < 0.4 else source.names)
    names = [draws.pick(_members(source.names, noun))] if answer == "yes" else []
    names += _crowd(draws, source.names, 2 + draws.below(4) - len(names), noun)
    asked = f"is there {with_article(Description(noun).text)}?"
    return source.scene(number, [Wish(n) for n in names]), asked


def _is_there_such(source: Source, draws: Draws, number: int, answer: str) -> Asked:
    """A small or big one of a name, or one of a group in a colour; if not, there is another one of that name or group."""
    if draws.unit() < 0.5:
        name, size = draws.pick(source.names), draws.pick(("small", "large"))
        shown = size if answer == "yes" else "large" if size == "small" else "small"
        described, wish = Description(name, size), Wish(name, size=shown)
    else:
        asked, different = draws.pick(_contrasting(source.names, styles_of(source.split)))
        described = Description(EMOJI[asked.name].group, colour=_colour_of(asked))
        wish = asked if answer == "yes" else draws.pick(different)
    wishes = [wish, *map(Wish, _crowd(draws, source.names, 1 + draws.below(4), described.noun))]
    return source.scene(number, wishes), f"is there {with_article(described.text)}?"


def _is_it_there(source: Source, draws: Draws, number: int, answer: str) -> Asked:
    """Is one thing to the left of (…) another? If not, it is on the opposite side of it."""
    made, where = source.scene(number), draws.pick(SIDES)
    holds = where if answer == "yes" else OPPOSITE[where]
    for _ in range(PROPOSALS):
        if pair := _two_described(draws, made):
            (thing, first), (landmark, second) = pair
            if relation_verdict(thing, landmark, holds, made.side):
                return made, f"is the {first.text} {RELATIONS[where]} the {second.text}?"
    return None


def _is_it_bigger(source: Source, draws: Draws, number: int, answer: str) -> Asked:
    made, word = source.scene(number), draws.pick(("bigger", "smaller"))
    for _ in range(PROPOSALS):
        if pair := _two_described(draws, made, adjectives=False):
            (thing, first), (other, second) = pair
            larger = larger_verdict(thing, other)
            if larger is not None and (larger is (word == "bigger")) is (answer == "yes"):
                return made, f"is the {first.text} {word} than the {second.text}?"
    return None


def _what_kind(source: Source, draws: Draws, number: int, answer: str) -> Asked:
    """The group of the thing at a place, of a size, or beside another one."""
    others = _crowd(draws, source.names, 1 + draws.below(4), answer)
    target = draws.pick(_members(source.names, answer))
    made = source.scene(number, [Wish(n) for n in draws.shuffled([target, *others])])
    return _generic(draws, made, lambda t: t.group == answer, "what kind of thing is {}?")


def _what_colour(source: Source, draws: Draws, number: int, answer: str) -> Asked:
    items = [i for i in _coloured(source.names, styles_of(source.split)) if _colour_of(i) == answer]
    others = _crowd(draws, source.names, 1 + draws.below(4), "")
    made = source.scene(number, draws.shuffled([draws.pick(items), *map(Wish, others)]))
    return _generic(draws, made, lambda t: t.colour == answer, "what color is {}?")


def _generic(draws: Draws, made: Scene, wanted: Callable[[Thing], bool], question: str) -> Asked:
    """A question about a wanted thing that does not say what it is."""
    anything = Description(ANYTHING)
    for _ in range(PROPOSALS):
        form, where = draws.pick(("side", "size", "relation")), draws.pick(SIDES)
        if form == "side":
            found = denoted(made, lambda t: side_verdict(t, where, made.side))  # noqa: B023
            text = f"the thing {PLACES[where]}"
        elif form == "size":
            size = draws.pick(("small", "large"))
            found, text = most(made, anything, size), f"the {'smallest' if size == 'small' else 'biggest'} thing"
        else:
            mark = draws.pick(made.things)
            if denoted(made, Description(mark.name).verdict) is not mark:
                continue
            found = denoted(
                made,
                lambda t: t is not mark and relation_verdict(t, mark, where, made.side),  # noqa: B023
            )
            text = f"the thing {RELATIONS[where]} the {mark.name}"
        if found is not None and wanted(found):
            return made, question.format(text)
    return None


Question = Callable[["Source"], tuple[tuple[str, ...], Ask]]

QUESTIONS: Mapping[str, Question] = {
    "count": lambda source: (("0", "1", "2", "3", "4"), _how_many),
    "count-all": lambda source: (("1", "2", "3", "4", "5", "6"), _how_many_in_all),
    "existence": lambda source: (YES_NO, _is_there),
    "appearance": lambda source: (YES_NO, _is_there_such),
    "relation": lambda source: (YES_NO, _is_it_there),
    "comparison": lambda source: (YES_NO, _is_it_bigger),
    "group": lambda source: (GROUPS, _what_kind),
    "colour": lambda source: (common_colours(source), _what_colour),
}
"""Type of question → its answers, which are equally frequent, and how it is asked."""


# statements


def _entailment_row(source: Source, index: int) -> Row:
    cells = [(template, label) for template in STATEMENTS for label in LABELS]
    template, label = cells[source.balanced(index, "entailment", len(cells))]
    draws = source.draws(index, "entailment")
    for number in _attempts(index, "emoji-entailment"):
        if found := STATEMENTS[template](source, draws, number, label):
            made, text = found
            return Row(made, {"key": f"{template}/{index}", "hypothesis": text, "label": label})
    raise _nothing("emoji-entailment", index)


def _covered(draws: Draws, label: str) -> str:
    """The half that is hidden: always where nobody can know, sometimes where it is true, never where it is not."""
    hidden = label == "neutral" or (label == "entailment" and draws.unit() < 0.5)
    return draws.pick(SIDES) if hidden else ""


def _company(draws: Draws, source: Source, count: int, *nouns: str) -> list[Wish]:
    """Further things, none of which is one of these; so many that there are up to four things."""
    most_others = max(0, 4 - count)
    return [Wish(n) for n in _crowd(draws, source.names, max(0, 1 - count) + draws.below(most_others + 1), *nouns)]


def _there_is(source: Source, draws: Draws, number: int, label: str) -> Asked:
    noun = draws.pick(GROUPS if draws.unit() < 0.4 else source.names)
    wishes = [Wish(draws.pick(_members(source.names, noun)))] if label == "entailment" else []
    wishes += _company(draws, source, len(wishes), noun)
    made = source.scene(number, wishes, _covered(draws, label))
    return made, f"there is {with_article(Description(noun).text)}"


def _there_are_at_least(source: Source, draws: Draws, number: int, label: str) -> Asked:
    noun, least = draws.pick(source.names), 2 + draws.below(2)
    count = least + draws.below(2) if label == "entailment" else draws.below(least)
    wishes = [Wish(noun)] * count
    wishes += _company(draws, source, count, noun)
    made = source.scene(number, wishes, _covered(draws, label))
    return made, f"there are at least {NUMBERS[least]} {plural_of(noun)}"


def _there_are_exactly(source: Source, draws: Draws, number: int, label: str) -> Asked:
    noun, exact = draws.pick(source.names), 1 + draws.below(3)
    cover = draws.pick(SIDES) if label == "neutral" else ""
    if label == "entailment":
        count = exact
    elif label == "neutral":
        count = draws.below(exact + 1)
    else:
        count = draws.pick([c for c in range(5) if c != exact])
        if count > exact and draws.unit() < 0.6:
            cover = draws.pick(SIDES)
    wishes = [Wish(noun)] * count
    wishes += _company(draws, source, count, noun)
    verb = "is" if exact == 1 else "are"
    noun = noun if exact == 1 else plural_of(noun)
    return source.scene(number, wishes, cover), f"there {verb} exactly {NUMBERS[exact]} {noun}"


def _there_is_at(source: Source, draws: Draws, number: int, label: str) -> Asked:
    """A thing at one side of the picture; what the curtain hides of that side counts."""
    name, where = draws.pick(source.names), draws.pick(SIDES)
    across = [s for s in SIDES if s not in (where, OPPOSITE[where])]
    shown, cover = True, ""
    if label == "entailment":
        cover = draws.pick(("", "", OPPOSITE[where], *across))
    elif label == "neutral":
        cover, shown = draws.pick((where, *across)), draws.unit() < 0.5
    elif draws.unit() < 0.4:
        cover, shown = OPPOSITE[where], False
    else:
        shown = draws.unit() < 0.7
    wishes = [Wish(name)] * shown
    wishes += _company(draws, source, len(wishes), name)
    made = source.scene(number, wishes, cover)
    wanted = label == "entailment"
    if any(t.name == name and side_verdict(t, where, made.side) is not wanted for t in made.things):
        return None
    return made, f"there is {with_article(name)} {PLACES[where]}"


def _there_is_such(source: Source, draws: Draws, number: int, label: str) -> Asked:
    name, size = draws.pick(source.names), draws.pick(("small", "large"))
    shown = size if label == "entailment" else "large" if size == "small" else "small"
    wishes = [Wish(name, size=shown)] if label == "entailment" or draws.unit() < 0.7 else []
    wishes += _company(draws, source, 1 + len(wishes), name)
    if not wishes:
        return None
    text = f"there is {with_article(f'{SIZE_WORDS[size]} {name}')}"
    return source.scene(number, wishes, _covered(draws, label)), text


def _is_beside(source: Source, draws: Draws, number: int, label: str) -> Asked:
    first, second = _other_names(draws, source.names, 2)
    where, u = draws.pick(SIDES), draws.unit()
    shown: tuple[str, ...] = (first, second)
    if label == "contradiction" and u < 0.25:
        shown = draws.pick(((first,), (second,)))
    elif label == "neutral":
        shown = (first, second) if u < 0.3 else draws.pick(((first,), (second,), ()))
    wishes = [Wish(n) for n in shown]
    wishes += _company(draws, source, 1 + len(wishes), first, second)
    if not wishes:
        return None
    made = source.scene(number, wishes, _covered(draws, label))
    if len(shown) == 2:
        thing, landmark = (next(t for t in made.things if t.name == n) for n in (first, second))
        if relation_verdict(thing, landmark, where, made.side) is not (label == "entailment"):
            return None
    return made, f"{with_article(first)} is {RELATIONS[where]} {with_article(second)}"


STATEMENTS: Mapping[str, Callable[[Source, Draws, int, str], Asked]] = {
    "existence": _there_is,
    "at-least": _there_are_at_least,
    "exactly": _there_are_exactly,
    "place": _there_is_at,
    "size": _there_is_such,
    "relation": _is_beside,
}
"""Type of statement → how it is made for a label, all of which are equally frequent in each."""


# names


@lru_cache(maxsize=256)
def _members(names: tuple[str, ...], noun: str) -> tuple[str, ...]:
    """The names that a noun, a name or a group, stands for."""
    return tuple(n for n in names if noun in (n, EMOJI[n].group))


def _crowd(draws: Draws, names: tuple[str, ...], count: int, *without: str) -> list[str]:
    """So many names, some of them twice, of things that none of these nouns fits."""
    found: list[str] = []
    while len(found) < count:
        name = draws.pick(found) if found and draws.unit() < 0.2 else draws.pick(names)
        if name not in without and EMOJI[name].group not in without:
            found.append(name)
    return found


def _other_names(draws: Draws, names: tuple[str, ...], count: int) -> list[str]:
    """So many different names."""
    found: list[str] = []
    while len(found) < count:
        if (name := draws.pick(names)) not in found:
            found.append(name)
    return found


def _colour_of(item: Wish) -> str:
    return EMOJI[item.name].colours[item.style]


@lru_cache(maxsize=64)
def _coloured(names: tuple[str, ...], styles: tuple[str, ...]) -> tuple[Wish, ...]:
    """All names and styles whose picture has a colour."""
    items = (Wish(n, s) for n in names for s in styles)
    return tuple(i for i in items if _colour_of(i))


@lru_cache(maxsize=64)
def _contrasting(names: tuple[str, ...], styles: tuple[str, ...]) -> tuple[tuple[Wish, tuple[Wish, ...]], ...]:
    """Coloured pictures, each with those of its group that clearly have another colour, where there are any."""
    items = _coloured(names, styles)
    pairs = (
        (
            i,
            tuple(
                o for o in items if EMOJI[o.name].group == EMOJI[i.name].group and _differ(_colour_of(o), _colour_of(i))
            ),
        )
        for i in items
    )
    return tuple((item, others) for item, others in pairs if others)


def _differ(one: str, other: str) -> bool:
    """Whether everybody calls two colours different."""
    return one != other and frozenset((one, other)) not in NEAR_COLOURS


def common_colours(source: Source) -> tuple[str, ...]:
    """Colours that at least five pictures have."""
    items = _coloured(source.names, styles_of(source.split))
    return tuple(c for c in COLOURS if sum(_colour_of(i) == c for i in items) >= 5)


def _two_described(
    draws: Draws, made: Scene, adjectives: bool = True
) -> tuple[tuple[Thing, Description], tuple[Thing, Description]] | None:
    """Two things with a description each that denotes them."""
    pair = draws.shuffled(made.things)[:2]
    found = [(t, describe(draws, t, generic=0.1, adjectives=0.3 if adjectives else 0.0)) for t in pair]
    if any(denoted(made, d.verdict) is not t for t, d in found):
        return None
    return found[0], found[1]


def _needed_long(draws: Draws, made: Scene) -> tuple[Thing, str] | None:
    """A long expression whose relation is needed, nine times out of ten."""
    return long_expression(draws, made, needed=draws.unit() < 0.9)


ROWS: Mapping[str, RowMaker] = {
    "refemoji": _grounding("refemoji", short_expression),
    "refemoji+": _grounding("refemoji+", plain_expression),
    "refemojig": _grounding("refemojig", _needed_long),
    "detection": _grounding("detection", name_expression),
    "grounding": _grounding("grounding", name_expression, short_expression, plain_expression),
    "caption": _caption_row,
    "vqa": _vqa_row,
    "entailment": _entailment_row,
    "object": _object_row,
    "group": _group_row,
    "style": _style_row,
    "count": _count_row,
}
"""Every kind of row by name."""
