"""Visual question answering: a closed set of answers, each right to the degree that annotators gave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pituning.data.cleaning import clean_question
from pituning.data.records import Records
from pituning.data.tables import JOINT, shortened
from pituning.errors import DataError
from pituning.example import Example
from pituning.metrics.vqa import soft_answers
from pituning.tasks.kind import Kind, PromptType, decoder_prompt, filled, key_of

MAX_WORDS = 80
MAX_OBJECTS = 30


@dataclass(frozen=True)
class VQA(Kind):
    """Questions about pictures, as in OFA's ``vqa_gen``.

    The answer to be learned is the one with the highest confidence, which is also the example's weight in training (OFA's
    training file has one row for each answer of a question). The metric gives every answer its confidence. A question none of
    whose answers may be given has no target: it counts as missed in an evaluation, and there is nothing to learn from it.

    Attributes:
        answer_set: the answers that may be given (OFA's ``trainval_ans2label.pkl`` has 3,129); empty: any text.
        objects: put the detected objects behind the question (``--add-object``).
        prompt_type: OFA's ``--prompt-type``.

    Source: Goyal et al., "Making the V in VQA matter", CVPR 2017; Wang et al., "OFA", ICML 2022, §4.
    """

    title = "visual question answering"
    columns = MappingProxyType({"key": 0, "image": 5, "question": 2, "answer": 3, "objects": 4})
    optional = frozenset({"key", "objects"})
    aliases = MappingProxyType({"key": ("question_id",), "answer": ("answers",)})
    metrics = ("vqa-accuracy",)
    generation = MappingProxyType({"num_beams": 5, "normalize": False, "max_new_tokens": 30})
    submission = ("question_id", "answer")

    answer_set: tuple[str, ...] = ()
    objects: bool = False
    prompt_type: PromptType = "prev_output"

    @property
    def choices(self) -> tuple[str, ...]:
        """See :attr:`Kind.choices`."""
        return self.answer_set

    def example(self, records: Records, row: int, identifier: str) -> Example:
        """See :meth:`Kind.example`."""
        question = filled(records, row, "question")
        answers = confidences(records.text(row, "answer"), records.place(row, "answer"))
        target, weight = best_answer(answers, self.answer_set)
        return Example(
            identifier,
            (question,),
            vqa_prompt(question, records.text(row, "objects") if self.objects else ""),
            target,
            self.answer_set,
            image=records.image(row, "image"),
            answers=answers,
            weight=weight,
            decoder_prompt=decoder_prompt(self.prompt_type),
            key=key_of(records, row),
        )


def vqa_prompt(question: str, objects: str = "") -> str:
    """A question for a generative backbone, with the detected objects (``&&`` between them) behind it if there are any.

    >>> vqa_prompt("What color-is the  bike?", "house&&short")
    ' what color is the bike? object: house short'
    """
    asked = clean_question(question, MAX_WORDS)
    prompt = f" {asked}" if asked.endswith("?") else f" {asked}?"
    names = " ".join(objects.strip().split(JOINT)[:MAX_OBJECTS]).strip()
    return f"{prompt} object: {names}" if names else prompt


def confidences(text: str, place: str) -> tuple[tuple[str, float], ...]:
    """Answers and their confidence, as OFA writes them.

    Several answers without ``|!+`` are what the annotators said, as VQAv2 has them: :func:`soft_answers` weighs them. One
    such answer is certain.

    >>> confidences("0.6|!+red&&1.0|!+red and white", "a.tsv:1")
    (('red', 0.6), ('red and white', 1.0))
    >>> confidences("&&".join(["red"] * 9 + ["pink"]), "a.tsv:1")
    (('red', 1.0), ('pink', 0.3))

    Raises:
        DataError: names the place of a confidence that is no number of 0 to 1, or of an answer that is empty.
    """
    if not text.strip():
        return ()
    if "|!+" not in text:
        said = text.split(JOINT)
        return tuple(soft_answers(said).items()) if len(said) > 1 else ((text.strip(), 1.0),)
    found = []
    for part in text.split(JOINT):
        confidence, mark, answer = part.partition("|!+")
        try:
            value = float(confidence)
        except ValueError:
            value = -1.0
        if not mark or not answer.strip() or not 0 <= value <= 1:
            raise DataError(
                f"{place}: expected 'confidence|!+answer' with a confidence of 0 to 1, found {shortened(part)!r}"
            )
        found.append((answer.strip(), value))
    return tuple(found)


def best_answer(answers: Sequence[tuple[str, float]], answer_set: Sequence[str]) -> tuple[str, float]:
    """The answer of the highest confidence among those that may be given, the first of several; empty if there is none."""
    allowed = [(a, c) for a, c in answers if not answer_set or a in answer_set]
    return max(allowed, key=lambda pair: pair[1]) if allowed else ("", 1.0)
