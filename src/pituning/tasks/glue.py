"""GLUE with OFA's questions and answers, as in the paper's Table 3.

``sst2``, ``rte`` … (without ``glue-``) are the same data with label texts that describe themselves, which an encoder needs
and which no two tasks share; these here are for comparisons with the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from pituning.data.cleaning import clean_sentence
from pituning.data.records import Records
from pituning.example import Example
from pituning.tasks.kind import Kind, PromptType, decoder_prompt, filled, label_text

MAX_WORDS = 512
YES_NO = ("no", "yes")
ENTAILED = MappingProxyType({"0": "no", "1": "yes", "not_entailment": "no", "entailment": "yes"})


@dataclass(frozen=True)
class _Glue(Kind):
    """A GLUE task.

    Attributes:
        texts: the input columns.
        question: template over the input columns.
        labels: label values in files (OFA's numbers, GLUE's words) → answers. `datasets` numbers some of them the other
            way round, so of those only the names are read.
        answers: the answers in label order; of two, the second is the positive class of F1.
    """

    aliases = MappingProxyType(
        {
            "sentence": ("text",),
            "premise": ("sentence1",),
            "hypothesis": ("sentence2",),
            "first": ("sentence1", "s1", "question1", "#1 String"),
            "second": ("sentence2", "s2", "question2", "#2 String"),
            "label": ("is_duplicate", "gold_label", "Quality"),
        }
    )
    texts: ClassVar[tuple[str, ...]]
    question: ClassVar[str]
    labels: ClassVar[Mapping[str, str]]
    answers: ClassVar[tuple[str, ...]] = YES_NO

    prompt_type: PromptType = field(default="src")

    @property
    def choices(self) -> tuple[str, ...]:
        """See :attr:`Kind.choices`."""
        return self.answers

    def example(self, records: Records, row: int, identifier: str) -> Example:
        """See :meth:`Kind.example`."""
        texts = {c: filled(records, row, c) for c in self.texts}
        prompt = self.question.format(**{c: clean_sentence(t, MAX_WORDS) for c, t in texts.items()})
        target = label_text(self.labels, records, row)
        return Example(
            identifier,
            tuple(texts.values()),
            prompt,
            target,
            self.answers,
            decoder_prompt=decoder_prompt(self.prompt_type),
        )


@dataclass(frozen=True)
class CoLA(_Glue):
    """Acceptability (Warstadt et al., TACL 2019)."""

    title = "acceptability"
    columns = MappingProxyType({"sentence": 1, "label": 2})
    metrics = ("Matthews", "accuracy")
    texts = ("sentence",)
    question = ' is the text " {sentence} " grammatically correct?'
    labels = MappingProxyType({"0": "no", "1": "yes", "unacceptable": "no", "acceptable": "yes"})

    def positions(self, row: Sequence[str]) -> Mapping[str, int]:
        """See :meth:`Kind.positions`. GLUE's own files have no header either: source, label, star, sentence."""
        glue = len(row) == 4 and row[1] in self.labels and row[2] not in self.labels
        return {"sentence": 3, "label": 1} if glue else self.columns


@dataclass(frozen=True)
class MNLI(_Glue):
    """Entailment over many genres (Williams et al., NAACL 2018)."""

    title = "sentence pairs"
    columns = MappingProxyType({"premise": 0, "hypothesis": 1, "label": 2})
    metrics = ("accuracy",)
    texts = ("premise", "hypothesis")
    question = ' can text1 " {premise} " imply text2 " {hypothesis} "?'
    labels = MappingProxyType(
        {"0": "maybe", "1": "yes", "2": "no", "neutral": "maybe", "entailment": "yes", "contradiction": "no"}
    )
    answers = ("no", "yes", "maybe")


@dataclass(frozen=True)
class MRPC(_Glue):
    """Paraphrases in the news (Dolan and Brockett, 2005)."""

    title = "sentence pairs"
    columns = MappingProxyType({"first": 0, "second": 1, "label": 2})
    metrics = ("accuracy", "F1")
    texts = ("first", "second")
    question = ' does text1 " {first} " and text2 " {second} " have the same semantics?'
    labels = MappingProxyType({"0": "no", "1": "yes", "not_equivalent": "no", "equivalent": "yes"})


@dataclass(frozen=True)
class QNLI(_Glue):
    """Does a sentence answer a question? (Rajpurkar et al., EMNLP 2016, as recast by GLUE)."""

    title = "sentence pairs"
    columns = MappingProxyType({"question": 1, "sentence": 2, "label": 3})
    metrics = ("accuracy",)
    texts = ("question", "sentence")
    question = ' does " {sentence} " contain the answer to question " {question} "?'
    labels = ENTAILED


@dataclass(frozen=True)
class QQP(_Glue):
    """Duplicate questions (Quora)."""

    title = "sentence pairs"
    columns = MappingProxyType({"first": 3, "second": 4, "label": 5})
    metrics = ("accuracy", "F1")
    texts = ("first", "second")
    question = ' is question " {first} " and question " {second} " equivalent?'
    labels = MappingProxyType({"0": "no", "1": "yes", "not_duplicate": "no", "duplicate": "yes"})


@dataclass(frozen=True)
class RTE(_Glue):
    """Recognising textual entailment (Dagan et al., and the challenges that followed, as merged by GLUE)."""

    title = "sentence pairs"
    columns = MappingProxyType({"premise": 1, "hypothesis": 2, "label": 3})
    metrics = ("accuracy",)
    texts = ("premise", "hypothesis")
    question = ' can text1 " {premise} " imply text2 " {hypothesis} "?'
    labels = ENTAILED


@dataclass(frozen=True)
class SST2(_Glue):
    """Sentiment of film reviews (Socher et al., EMNLP 2013)."""

    title = "sentiment"
    columns = MappingProxyType({"sentence": 0, "label": 1})
    metrics = ("accuracy",)
    texts = ("sentence",)
    question = ' is the sentiment of text " {sentence} " positive or negative?'
    labels = MappingProxyType({"0": "negative", "1": "positive", "negative": "negative", "positive": "positive"})
    answers = ("negative", "positive")
