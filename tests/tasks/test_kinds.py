"""Kinds of tasks: what a row becomes, and what is wrong with a row that cannot become anything."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pituning.data.records import TableRecords
from pituning.errors import DataError, UnknownNameError
from pituning.example import Example
from pituning.tasks import KINDS, VQA, Captioning, Grounding, ImageClassification, Kind, Summarisation, VisualEntailment
from pituning.tasks.glue import MNLI, MRPC, QNLI, QQP, RTE, CoLA
from pituning.tasks.kind import decoder_prompt
from pituning.tasks.vqa import best_answer, confidences


def records(*rows: dict[str, str]) -> TableRecords:
    return TableRecords([(f"rows.csv:{n}", row) for n, row in enumerate(rows, start=2)], Path("pictures"))


def example(kind: Kind, **row: str) -> Example:
    return kind.example(records(row), 0, "t/train/0")


def refused(kind: Kind, **row: str) -> str:
    with pytest.raises(DataError) as caught:
        example(kind, **row)
    assert str(caught.value).startswith("rows.csv:2")
    return str(caught.value)


class TestVQA:
    row: ClassVar[dict[str, str]] = {
        "key": "79",
        "image": "a.png",
        "question": "What color-is it?",
        "answer": "0.6|!+red&&1.0|!+blue",
    }

    def test_an_example(self) -> None:
        found = example(VQA(("red", "blue", "green")), **self.row)
        assert found.prompt == " what color is it?"
        assert (found.target, found.weight, found.key) == ("blue", 1.0, "79")
        assert found.answers == (("red", 0.6), ("blue", 1.0))
        assert found.choices == ("red", "blue", "green")
        assert found.decoder_prompt == "source_without_end"
        assert found.image == Path("pictures/a.png")

    def test_the_best_answer_that_may_be_given_is_learned_with_its_confidence(self) -> None:
        found = example(VQA(("red", "green")), **self.row)
        assert (found.target, found.weight) == ("red", 0.6)
        assert best_answer((("a", 0.3), ("b", 0.3)), ()) == ("a", 0.3)

    def test_objects_stand_behind_the_question_when_asked_for(self) -> None:
        row = {**self.row, "objects": "house&&short&&back"}
        assert example(VQA(), **row).prompt == " what color is it?"
        assert example(VQA(objects=True), **row).prompt == " what color is it? object: house short back"

    def test_a_question_without_an_answer_can_be_asked(self) -> None:
        found = example(VQA(("red",)), **{**self.row, "answer": ""})
        assert (found.target, found.answers) == ("", ())

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ("1.2|!+red", "'1.2|!+red'"),
            ("x|!+red", "a confidence of 0 to 1"),
            ("0.5|!+", "'0.5|!+'"),
            ("0.5|!+red&&blue", "'blue'"),
        ],
    )
    def test_a_wrong_answer_is_named(self, answer: str, said: str) -> None:
        message = refused(VQA(("red",)), **{**self.row, "answer": answer})
        assert said in message
        assert "(answer)" in message

    def test_a_question_whose_answers_may_not_be_given_has_nothing_to_learn(self) -> None:
        found = example(VQA(("red",)), **{**self.row, "answer": "1.0|!+teal"})
        assert (found.target, found.answers) == ("", (("teal", 1.0),))

    def test_a_shot_is_one_question(self) -> None:
        rows = [{**self.row, "answer": a} for a in ("1.0|!+red", "1.0|!+teal", "1.0|!+blue", "1.0|!+red")]
        task = VQA(("red", "blue")).task("t", {"train": records(*rows)}).few_shot(3)
        assert sorted(e.id for e in task.split("train")) == ["t/train/0", "t/train/2", "t/train/3"]

    def test_a_plain_answer_is_certain(self) -> None:
        assert confidences(" red ", "here") == (("red", 1.0),)

    def test_what_ten_annotators_said_is_weighed(self) -> None:
        said = "&&".join(["Two"] * 3 + ["3"] * 2 + ["many"] + ["the 4"] * 4)
        found = example(VQA(), **{**self.row, "answer": said})
        assert dict(found.answers) == pytest.approx({"2": 0.9, "3": 0.6, "many": 0.3, "4": 1.0})
        assert (found.target, found.weight) == ("4", 1.0)


class TestVisualEntailment:
    row: ClassVar[dict[str, str]] = {
        "image": "a.png",
        "hypothesis": "Two men-talk",
        "premise": "A man",
        "label": "neutral",
    }

    def test_without_and_with_the_premise(self) -> None:
        plain, with_premise = (
            example(VisualEntailment(), **self.row),
            example(VisualEntailment(premise=True), **self.row),
        )
        assert plain.prompt == ' does the image describe " two men talk "?'
        assert with_premise.prompt == ' can image and text1 " a man " imply text2 " two men talk "?'
        assert plain.texts == ("Two men-talk",)
        assert with_premise.texts == ("A man", "Two men-talk")
        assert (plain.target, plain.choices) == ("maybe", ("no", "yes", "maybe"))

    def test_a_premise_that_is_wanted_must_be_there(self) -> None:
        assert "premise is empty" in refused(VisualEntailment(premise=True), **{**self.row, "premise": " "})

    def test_an_unknown_label_is_named(self) -> None:
        assert "label 'yes' is not one of contradiction, entailment, neutral" in refused(
            VisualEntailment(), **{**self.row, "label": "yes"}
        )


def test_captions_are_references_and_the_first_is_learned() -> None:
    found = example(Captioning(), image="a.png", caption="A man, riding.&&Two  words!&&")
    assert (found.prompt, found.target) == (" what does the image describe?", "A man riding")
    assert found.answers == (("A man riding", 1.0), ("Two words", 1.0))
    long = example(Captioning(), image="a.png", caption=" ".join("abcdefghijklmnopqrstuvwxyz"))
    assert long.target.split() == list("abcdefghijklmnopqrst")
    assert "nothing is left" in refused(Captioning(), image="a.png", caption="...")


def test_a_summary_is_cleaned_like_its_article() -> None:
    found = example(Summarisation(), source="Some <unk>  text -- here", target="A <unk> Summary")
    assert found.prompt == ' what is the summary of article " some unk text here "?'
    assert (found.target, found.before_target) == ("a unk summary", "")


class TestGrounding:
    def test_an_example(self) -> None:
        found = example(Grounding(), key="9", image="a.png", text="The man in-red", box="1,2,3.5,4")
        assert found.box == (1.0, 2.0, 3.5, 4.0)
        assert (found.target, found.key) == ("1.0,2.0,3.5,4.0", "9")
        assert found.prompt == ' which region does the text " the man in red " describe?'

    @pytest.mark.parametrize(
        "box", ["1,2,3", "a,b,c,d", "3,2,1,4", "1,4,3,4", "-1,2,3,4", "1,2,nan,4", "1,2,inf,4", ""]
    )
    def test_a_wrong_box_is_named(self, box: str) -> None:
        assert "(box)" in refused(Grounding(), image="a.png", text="it", box=box)

    def test_a_rounding_error_at_the_edge_is_cut(self) -> None:
        assert example(Grounding(), image="a.png", text="it", box="-0.001,0,3,4").box == (0.0, 0.0, 3.0, 4.0)


def test_class_names_are_answers() -> None:
    kind = ImageClassification(("apple pie", "tiramisu"))
    found = example(kind, image="a.png", label="apple_pie")
    assert (found.target, found.label, found.augmentation) == ("apple pie", 0, "image-classification")
    assert "'pizza' is not one of the 2 classes" in refused(kind, image="a.png", label="pizza")


class TestGlue:
    @pytest.mark.parametrize(
        ("kind", "row", "answers"),
        [
            (CoLA(), {"sentence": "a"}, {"0": "no", "1": "yes", "unacceptable": "no", "acceptable": "yes"}),
            (MNLI(), {"premise": "a", "hypothesis": "b"}, {"0": "maybe", "1": "yes", "2": "no", "entailment": "yes"}),
            (MRPC(), {"first": "a", "second": "b"}, {"0": "no", "1": "yes", "not_equivalent": "no"}),
            (QNLI(), {"question": "a", "sentence": "b"}, {"0": "no", "1": "yes", "entailment": "yes"}),
            (QQP(), {"first": "a", "second": "b"}, {"0": "no", "1": "yes", "duplicate": "yes"}),
            (RTE(), {"premise": "a", "hypothesis": "b"}, {"entailment": "yes", "not_entailment": "no"}),
        ],
    )
    def test_labels(self, kind: Kind, row: dict[str, str], answers: dict[str, str]) -> None:
        for label, answer in answers.items():
            found = example(kind, **row, label=label)
            assert found.target == answer
            assert found.choices[found.label] == answer
        assert "label 'perhaps'" in refused(kind, **row, label="perhaps")

    def test_long_texts_are_cut_by_words_and_the_question_stays(self) -> None:
        prompt = example(RTE(), premise="A " * 600, hypothesis="b", label="entailment").prompt
        assert prompt.endswith(' imply text2 " b "?')
        assert len(re.findall(r"\ba\b", prompt)) == 512

    def test_texts_stay_as_they_are_for_encoders(self) -> None:
        assert example(QNLI(), question="What?", sentence="It IS.", label="0").texts == ("What?", "It IS.")


def test_prompt_types() -> None:
    assert [decoder_prompt(p) for p in ("none", "src", "prev_output")] == ["none", "source", "source_without_end"]
    with pytest.raises(UnknownNameError, match="did you mean 'src'"):
        decoder_prompt("srcs")


class TestSplits:
    def test_examples_are_made_when_they_are_asked_for(self) -> None:
        bad = {"image": "a.png", "text": "it", "box": "broken"}
        good = {"image": "a.png", "text": "it", "box": "1,2,3,4"}
        task = Grounding().task("refs", {"train": records(good, bad, good)})
        examples = task.split("train")
        assert len(examples) == 3
        assert (examples[0].id, examples[-1].id) == ("refs/train/0", "refs/train/2")
        assert [e.id for e in examples[::2]] == ["refs/train/0", "refs/train/2"]
        with pytest.raises(DataError, match=r"rows\.csv:3 \(box\)"):
            examples[1]
        with pytest.raises(IndexError):
            examples[3]

    def test_a_limited_split_is_the_sample_that_eager_tasks_take(self) -> None:
        rows = [{"sentence": f"s{i}", "label": str(i % 2)} for i in range(50)]
        lazy = CoLA().task("t", {"test": records(*rows)})
        eager = type(lazy)("t", lazy.choices, {"test": tuple(lazy.split("test"))})
        assert [e.id for e in lazy.split("test", 7)] == [e.id for e in eager.split("test", 7)]

    def test_few_shots_keep_the_other_splits_but_dev(self) -> None:
        rows = [{"sentence": f"s{i}", "label": str(i % 2)} for i in range(20)]
        splits = {name: records(*rows) for name in ("train", "dev", "testA")}
        task = CoLA().task("t", splits).few_shot(3, seed=1)
        assert {name: len(examples) for name, examples in task.splits.items()} == {"train": 6, "test": 0, "testA": 20}
        assert [e.target for e in task.split("train")].count("yes") == 3

    def test_a_missing_column_is_named(self) -> None:
        with pytest.raises(DataError, match="split 'train': no column 'box'; there are image, text"):
            Grounding().task("refs", {"train": records({"image": "a", "text": "b"})})

    def test_splits_go_to_other_processes(self) -> None:
        task = CoLA().task("t", {"train": records({"sentence": "a", "label": "1"})})
        assert pickle.loads(pickle.dumps(task.split("train")))[0] == task.split("train")[0]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_complete(name: str) -> None:
    from pituning.metrics.registry import metric_named

    kind: Any = KINDS[name]()
    assert set(kind.optional) <= set(kind.columns)
    assert len(set(kind.columns.values())) == len(kind.columns)
    for metric in kind.metrics:
        assert metric_named(metric).name == metric
