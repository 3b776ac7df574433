"""Visual entailment: does a picture (and, where it is used, its caption) entail a sentence?"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from pituning.data.cleaning import clean_caption
from pituning.data.records import Records
from pituning.example import Example
from pituning.tasks.kind import Kind, PromptType, decoder_prompt, filled, key_of, label_text

MAX_WORDS = 80
ANSWERS = ("no", "yes", "maybe")
LABELS = MappingProxyType({"contradiction": "no", "entailment": "yes", "neutral": "maybe"})


@dataclass(frozen=True)
class VisualEntailment(Kind):
    """SNLI-VE.

    Attributes:
        premise: also read the sentence that the picture was captioned with (OFA's ``--add-caption``).
        prompt_type: OFA's ``--prompt-type``.

    Source: Xie et al., "Visual Entailment", arXiv 1901.06706.
    """

    title = "visual entailment"
    columns = MappingProxyType({"key": 0, "image": 2, "hypothesis": 3, "premise": 4, "label": 5})
    optional = frozenset({"key", "premise"})
    aliases = MappingProxyType({"hypothesis": ("sentence",), "premise": ("caption",)})
    metrics = ("accuracy",)

    premise: bool = False
    prompt_type: PromptType = "prev_output"

    @property
    def choices(self) -> tuple[str, ...]:
        """See :attr:`Kind.choices`."""
        return ANSWERS

    def example(self, records: Records, row: int, identifier: str) -> Example:
        """See :meth:`Kind.example`."""
        hypothesis = filled(records, row, "hypothesis")
        premise = filled(records, row, "premise") if self.premise else ""
        return Example(
            identifier,
            (premise, hypothesis) if self.premise else (hypothesis,),
            entailment_prompt(hypothesis, premise),
            label_text(LABELS, records, row),
            ANSWERS,
            image=records.image(row, "image"),
            decoder_prompt=decoder_prompt(self.prompt_type),
            key=key_of(records, row),
        )


def entailment_prompt(hypothesis: str, premise: str = "") -> str:
    """The question to a generative backbone.

    >>> entailment_prompt("Two men are-talking")
    ' does the image describe " two men are talking "?'
    >>> entailment_prompt("Two men are talking", "A man in blue")
    ' can image and text1 " a man in blue " imply text2 " two men are talking "?'
    """
    second = clean_caption(hypothesis, MAX_WORDS)
    if not premise:
        return f' does the image describe " {second} "?'
    return f' can image and text1 " {clean_caption(premise, MAX_WORDS)} " imply text2 " {second} "?'
