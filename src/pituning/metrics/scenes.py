"""What a caption of an emoji scene names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from pituning.errors import DataError


def objects_named(references: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """Share of the things in the first reference that a caption names, in whatever number; the mean over the captions.

    Things are what "and" separates, without their article or number: "two cherries and a dog" names cherry and dog.

    Raises:
        DataError: if a first reference names nothing; it is in the message.

    >>> objects_named([["two cherries and a dog"]], ["a dog and a cherry and a cat"])
    1.0
    """
    shares = []
    for (first, *_), text in zip(references, found, strict=True):
        wanted = names_in(first)
        if not wanted:
            raise DataError(
                f"metric 'objects-named': the reference {first!r} names nothing; it expects things with an article or a "
                "number, such as 'two cherries and a dog'. Take another metric for other captions"
            )
        shares.append(len(wanted & names_in(text)) / len(wanted))
    return sum(shares) / len(shares)


def names_in(caption: str) -> frozenset[str]:
    """The names in a caption, in the singular.

    >>> sorted(names_in("a picture of two cherries and an orange"))
    ['cherry', 'orange']
    """
    for opening in ("a picture of ", "there is ", "there are "):
        caption = caption.removeprefix(opening)
    parts = (part.strip().partition(" ")[2] for part in caption.lower().strip(" .").split(" and "))
    return frozenset(_singular().get(part, part) for part in parts if part)


@lru_cache(maxsize=1)
def _singular() -> Mapping[str, str]:
    from pituning.data.emoji import EMOJI

    return {emoji.plural: emoji.name for emoji in EMOJI.values()}


METRICS: Mapping[str, Callable[[Sequence[Sequence[str]], Sequence[str]], float]] = {"objects-named": objects_named}
"""Metrics of answers with references, by name."""
