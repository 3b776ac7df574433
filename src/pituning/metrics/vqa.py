"""VQA accuracy: an answer is right to the degree that annotators gave it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pituning.errors import DataError

ENOUGH = 3  # annotators who agree make an answer wholly right

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(n) for n, word in enumerate(_NUMBERS.split())}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
you'd you'd've you'll you're you've
"""  # not those that are words without their apostrophe, such as "id" and "shed"
_APOSTROPHES = {
    whole[: mark.start()] + whole[mark.end() :]: whole
    for whole in _CONTRACTED.split()
    for mark in re.finditer("'", whole)
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # not the decimal point
_COMMA_IN_NUMBER = re.compile(r"\d,\d")


def vqa_accuracy(truth: Sequence[Mapping[str, float]], found: Sequence[str]) -> float:
    """Mean confidence of the found answers, as they are or as :func:`normalise_answer` writes them; others count 0.

    >>> vqa_accuracy([{"red": 1.0, "pink": 0.3}, {"two": 0.6}], ["pink", "three"])
    0.15

    Source: Antol et al., "VQA", ICCV 2015, §3; the confidences as in OFA's files or from :func:`soft_answers`.

    Raises:
        DataError: if there are no examples.
    """
    if not truth:
        raise DataError("vqa-accuracy needs at least one example")
    pairs = zip(truth, found, strict=True)
    return sum(max(t.get(f.strip(), 0.0), t.get(normalise_answer(f), 0.0)) for t, f in pairs) / len(truth)


def soft_answers(human: Sequence[str]) -> dict[str, float]:
    """The accuracy that each answer has, given what the annotators (ten in VQAv2) said.

    An answer is compared with all of them but one, for every one: min(1, matches / 3), averaged.

    >>> soft_answers(["red"] * 9 + ["Two."])["red"], soft_answers(["red"] * 9 + ["Two."])["2"]
    (1.0, 0.3)

    Source: Goyal et al., "Making the V in VQA matter", CVPR 2017; the published evaluation averages like this.

    Raises:
        DataError: for fewer than two answers.
    """
    if len(human) < 2:
        raise DataError(f"soft accuracies need the answers of several annotators, not of {len(human)}")
    counts = Counter(map(normalise_answer, human))
    total = len(human)
    return {
        answer: (count * min(1.0, (count - 1) / ENOUGH) + (total - count) * min(1.0, count / ENOUGH)) / total
        for answer, count in counts.items()
    }


def normalise_answer(text: str) -> str:
    """An answer as VQA's evaluation compares it.

    Lower case; periods taken out, but for decimal points; other punctuation taken out where it stands beside a space or
    where the answer has a comma between digits, and otherwise made a space; numbers up to ten as digits; no articles;
    apostrophes of contractions put back.

    >>> normalise_answer("The two dogs."), normalise_answer("dont  know"), normalise_answer("1,000")
    ('2 dogs', "don't know", '1000')

    Source: the rules of the published VQA evaluation.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or _COMMA_IN_NUMBER.search(text) else " ")
    words = (_DIGITS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


METRICS: Mapping[str, Callable[[Sequence[Mapping[str, float]], Sequence[str]], float]] = {"vqa-accuracy": vqa_accuracy}
