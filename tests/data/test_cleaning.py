"""Cleaning of texts, rule by rule; the reference's own outputs are in tests/parity/test_ofa_tokens.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pituning.data.cleaning import clean_answer, clean_caption, clean_question, clean_sentence

CLEANERS = [clean_caption, clean_question, clean_sentence, clean_answer]
words = st.lists(st.text(st.characters(categories=["Ll"], max_codepoint=0x2FF), min_size=1), min_size=1, max_size=12)


def test_captions_and_questions_differ_in_the_person_tag() -> None:
    assert clean_caption("Left <PERSON>") == "left person"
    assert clean_question("Left <PERSON>") == "left <person>"


def test_punctuation_goes_in_front_only_and_line_ends_before_spaces() -> None:
    assert clean_caption("?! two-tone/red dog, yes!") == "two tone red dog, yes!"
    assert clean_caption(" ?kept behind a space") == "?kept behind a space"
    assert clean_caption("end \n") == "end"
    assert clean_caption("end\n ") == "end"
    assert clean_caption("\ta\tb") == "\ta\tb"


def test_answers_keep_case_and_lose_punctuation() -> None:
    assert clean_answer(" A man, riding  a horse.&&") == "A man riding a horse"


@pytest.mark.parametrize("clean", CLEANERS)
@given(words=words, limit=st.integers(1, 14))
def test_cut_after_the_first_words(clean: Callable[[str, int | None], str], words: list[str], limit: int) -> None:
    words = [w.lower() for w in words]
    assert clean(" ".join(words), limit) == " ".join(words[:limit])
    assert clean(" ".join(words), None) == " ".join(words)


@pytest.mark.parametrize("clean", CLEANERS)
def test_nothing_stays_nothing(clean: Callable[..., str]) -> None:
    assert clean("") == clean("  ") == clean("\n\n", 3) == ""
