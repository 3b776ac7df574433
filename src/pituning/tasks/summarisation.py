"""Summarisation: an article in, its headline out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from pituning.data.cleaning import clean_sentence
from pituning.data.records import Records
from pituning.example import Example
from pituning.tasks.kind import Kind, filled

MAX_WORDS = 512
MAX_SUMMARY_WORDS = 64


@dataclass(frozen=True)
class Summarisation(Kind):
    """Gigaword headlines.

    OFA's script also replaces a fifth of the decoder's inputs by random words in training (``--noise-ratio``); that is
    not done here.

    Source: Rush et al., "A neural attention model for abstractive sentence summarization", EMNLP 2015.
    """

    title = "summarisation"
    columns = MappingProxyType({"source": 0, "target": 1})
    aliases = MappingProxyType({"source": ("document", "article"), "target": ("summary", "headline")})
    metrics = ("ROUGE-L", "ROUGE-1", "ROUGE-2")
    generation = MappingProxyType(
        {"num_beams": 6, "length_penalty": 0.7, "max_new_tokens": 32, "no_repeat_ngram_size": 3}
    )

    def example(self, records: Records, row: int, identifier: str) -> Example:
        """See :meth:`Kind.example`."""
        article = filled(records, row, "source")
        summary = clean_summary(records.text(row, "target"), MAX_SUMMARY_WORDS)
        return Example(identifier, (article,), summary_prompt(article), summary, before_target="")


def summary_prompt(article: str) -> str:
    """The question to a generative backbone.

    >>> summary_prompt("Some Article <unk> text -- here")
    ' what is the summary of article " some article unk text here "?'
    """
    return f' what is the summary of article " {clean_summary(article, MAX_WORDS)} "?'


def clean_summary(text: str, max_words: int) -> str:
    """Lower case, ``<unk>`` as a word, no dashes, at most ``max_words`` words.

    >>> clean_summary("A Summary of <unk>", 64)
    'a summary of unk'
    """
    return clean_sentence(re.sub(r"--+", " ", text.replace("<unk>", "unk")), max_words)
