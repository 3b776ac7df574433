"""Near-duplicate sentences between data sets: a transfer figure over leaked sentences is worth nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pituning.example import Example

_KEY_LENGTH = 40
_SHINGLE = 4
_MIN_WORDS = 6


@dataclass(frozen=True)
class Overlap:
    """One pair of near-duplicates: the ids, the texts, and their similarity (1.0 = same letters)."""

    left: str
    right: str
    left_text: str
    right_text: str
    similarity: float


def find_overlaps(left: Iterable[Example], right: Iterable[Example], threshold: float = 0.7) -> list[Overlap]:
    """Near-duplicates between two sets of examples, most similar first.

    Two texts are reported when their first 40 letters and digits agree, or when the Jaccard index of their sets of
    4-word shingles reaches ``threshold`` (texts of six words or more). Each field of a pair is compared by itself.
    """
    fields_left, fields_right = list(_fields(left)), list(_fields(right))
    by_key: dict[str, list[int]] = {}
    by_shingle: dict[tuple[str, ...], list[int]] = {}
    shingles_right = [_shingles(text) for _, text in fields_right]
    for index, (_, text) in enumerate(fields_right):
        by_key.setdefault(_letters(text)[:_KEY_LENGTH], []).append(index)
        for shingle in shingles_right[index]:
            by_shingle.setdefault(shingle, []).append(index)
    found: dict[tuple[str, str], Overlap] = {}
    for identifier, text in fields_left:
        shingles = _shingles(text)
        candidates = dict.fromkeys(by_key.get(_letters(text)[:_KEY_LENGTH], ()), 1.0)
        shared: dict[int, int] = {}
        for shingle in shingles:
            for index in by_shingle.get(shingle, ()):
                shared[index] = shared.get(index, 0) + 1
        for index, count in shared.items():
            jaccard = count / (len(shingles) + len(shingles_right[index]) - count)
            if jaccard >= threshold:
                candidates.setdefault(index, jaccard)
        for index, similarity in candidates.items():
            other, other_text = fields_right[index]
            known = found.get((identifier, other))
            if known is None or similarity > known.similarity:
                found[identifier, other] = Overlap(identifier, other, text, other_text, similarity)
    return sorted(found.values(), key=lambda o: (-o.similarity, o.left, o.right))


def _fields(examples: Iterable[Example]) -> Iterable[tuple[str, str]]:
    return ((e.id, text) for e in examples for text in e.texts if _letters(text))


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def _shingles(text: str) -> set[tuple[str, ...]]:
    words: Sequence[str] = ["".join(c for c in w if c.isalnum()) for w in text.lower().split()]
    words = [w for w in words if w]
    if len(words) < _MIN_WORDS:
        return set()
    return {tuple(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1)}
