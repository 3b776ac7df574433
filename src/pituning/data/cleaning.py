"""Cleaning of captions, questions, sentences and answers, and where each is cut.

OFA cuts *words* before it puts a text into its prompt, so that the prompt's own words are never lost. A word is what
stands between two single spaces in captions and questions, and between any white space in sentences and answers.
"""

from __future__ import annotations

import re
import string

_LEADING = ",.!?*#:;~"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_caption(text: str, max_words: int | None = None) -> str:
    """A caption or referring expression as OFA's prompts want it, cut after ``max_words`` words.

    >>> clean_caption("A man, in-red/shirt  <person>")
    'a man, in red shirt person'
    """
    return _first_words(_clean(text).replace("<person>", "person"), max_words)


def clean_question(text: str, max_words: int | None = None) -> str:
    """A question as OFA's prompts want it, cut after ``max_words`` words; a missing question mark stays missing.

    >>> clean_question("  What colour-is it?", max_words=3)
    'what colour is'
    """
    return _first_words(_clean(text), max_words)


def clean_sentence(text: str, max_words: int | None = None) -> str:
    r"""A sentence of a text task: lower case, single spaces, cut after ``max_words`` words.

    >>> clean_sentence("A  Man\teats. ", max_words=2)
    'a man'
    """
    return " ".join(text.lower().split()[:max_words])


def clean_answer(text: str, max_words: int | None = None) -> str:
    """A caption to be learned: without ASCII punctuation, single spaces, cut after ``max_words`` words, case kept.

    >>> clean_answer("A man, riding a horse.")
    'A man riding a horse'
    """
    return " ".join(text.translate(_NO_PUNCTUATION).split()[:max_words])


def _clean(text: str) -> str:
    # The order matters: punctuation behind leading spaces stays, and only line ends, then spaces, are taken off the end.
    text = re.sub(r"[-/]", " ", text.lower().lstrip(_LEADING))
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


def _first_words(text: str, max_words: int | None) -> str:
    return text if max_words is None else " ".join(text.split(" ")[:max_words])
