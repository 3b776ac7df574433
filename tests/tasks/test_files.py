"""The files that people have on disk, and what a named task makes of them."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from pituning.data.images import open_image
from pituning.errors import DataError, RefusedError, UnknownNameError
from pituning.tasks import VQA, Grounding, ImageClassification, VisualEntailment, load_task, task_from_records
from pituning.tasks.files import coop_split, image_folder, read_answer_set, records_from_file
from pituning.tasks.glue import QQP, CoLA

COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}


def picture(colour: str) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (20, 10), COLOURS[colour]).save(held, "PNG")
    return held.getvalue()


def encoded(colour: str) -> str:
    return base64.urlsafe_b64encode(picture(colour)).decode()


def write(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


REFS = [["7", "img1", "the man", "1,2,10,9", encoded("red")], ["8", "img2", "it", "0,0,5.5,5", encoded("blue")]]
QUESTIONS = [
    ["11", "img1", "What colour?", "1.0|!+red&&0.3|!+pink", "man&&hat", encoded("red")],
    ["12", "img2", "what colour", "0.9|!+blue", "", encoded("blue")],
]
PAIRS = [
    ["1.jpg#0", "1", encoded("red"), "It is red", "A red thing", "entailment"],
    ["2.jpg#0", "2", encoded("blue"), "It is red", "A blue thing", "contradiction"],
]


class TestNamedTasks:
    def test_refcoco_as_ofa_has_it(self, tmp_path: Path) -> None:
        for split in ("train", "val", "testA", "testB"):
            write(tmp_path / "refcoco_data" / f"refcoco_{split}.tsv", REFS)
        task = load_task("refcoco", data=tmp_path)
        assert {name: len(examples) for name, examples in task.splits.items()} == dict.fromkeys(
            ("train", "dev", "testA", "testB"), 2
        )
        example = task.split("testA")[1]
        assert (example.key, example.texts, example.box) == ("8", ("it",), (0.0, 0.0, 5.5, 5.0))
        assert open_image(example.image or "").getpixel((0, 0)) == COLOURS["blue"]
        assert load_task("refcoco", data=tmp_path / "refcoco_data").split("train")[0].box == (1.0, 2.0, 10.0, 9.0)

    def test_vqa_with_ofas_answer_set_and_without(self, tmp_path: Path) -> None:
        folder = tmp_path / "vqa_data"
        write(folder / "vqa_train.tsv", QUESTIONS)
        write(folder / "vqa_val.tsv", QUESTIONS)
        write(folder / "vqa_test.tsv", [[*QUESTIONS[0][:3], "", *QUESTIONS[0][4:]]])
        assert load_task("vqa", data=tmp_path).choices == ("blue", "pink", "red")
        with (folder / "trainval_ans2label.pkl").open("wb") as file:
            pickle.dump({"red": 0, "teal": 1, "blue": 2}, file)
        task = load_task("vqa", data=tmp_path)
        assert task.choices == ("red", "teal", "blue")
        assert task.metric == "vqa-accuracy"
        assert task.split("test")[0].target == ""
        assert load_task("vqa-objects", data=tmp_path).split("train")[0].prompt.endswith(" object: man hat")

    def test_snli_ve_with_and_without_the_premise(self, tmp_path: Path) -> None:
        write(tmp_path / "snli_ve_data" / "snli_ve_train.tsv", PAIRS)
        plain, premise = (load_task(n, data=tmp_path).split("train")[0] for n in ("snli_ve", "snli_ve-premise"))
        assert plain.prompt == ' does the image describe " it is red "?'
        assert premise.prompt == ' can image and text1 " a red thing " imply text2 " it is red "?'

    def test_captions_images_and_summaries(self, tmp_path: Path) -> None:
        write(tmp_path / "caption_data" / "caption_stage1_train.tsv", [["1", "img9", "A dog.", "", encoded("red")]])
        write(tmp_path / "gigaword_data" / "gigaword_train.tsv", [["an article", "a headline"]])
        write(tmp_path / "imagenet_1k_data" / "imagenet_1k_train.tsv", [[encoded("red"), "3", "red_thing"]])
        assert load_task("caption", data=tmp_path).split("train")[0].key == "img9"
        assert load_task("gigaword", data=tmp_path).split("train")[0].target == "a headline"
        assert load_task("imagenet", data=tmp_path).choices == ("red thing",)

    def test_glue_with_ofas_names_with_glues_and_with_a_header(self, tmp_path: Path) -> None:
        rows = [["0", "10", "11", "a?", "b?", "1"], ["1", "12", "13", "c?", "d?", "0"]]
        header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
        write(tmp_path / "ofa" / "glue_data" / "qqp_train.tsv", rows)
        write(tmp_path / "ofa" / "glue_data" / "qqp_dev.tsv", rows[:1])
        write(tmp_path / "glue" / "QQP" / "train.tsv", [header, *rows])
        write(tmp_path / "glue" / "QQP" / "dev.tsv", [header, *rows[:1]])
        for data in ("ofa", "glue"):
            task = load_task("glue-qqp", data=tmp_path / data)
            assert [e.texts for e in task.split("train")] == [("a?", "b?"), ("c?", "d?")]
            assert [e.target for e in task.split("train")] == ["yes", "no"]
            assert len(task.split("test")) == 1
        assert task.more_metrics == ("F1",)

    def test_glues_own_files(self, tmp_path: Path) -> None:
        cola = [["gj04", "1", "", "Fine it is."], ["gj04", "0", "*", "It fine is."]]
        mrpc = [["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "70", "71", "A b.", "B a."]]
        mnli = [
            ["index", "genre", "sentence1", "sentence2", "label1", "gold_label"],
            ["0", "g", "p", "h", "x", "neutral"],
        ]
        sst2 = [["sentence", "label"], ["good", "1"]]
        qnli = [["index", "question", "sentence", "label"], ["0", "q?", "s.", "not_entailment"]]
        rte = [["index", "sentence1", "sentence2", "label"], ["0", "p", "h", "entailment"]]
        rows = {"CoLA": cola, "MRPC": mrpc, "MNLI": mnli, "SST-2": sst2, "QNLI": qnli, "RTE": rte}
        found = {}
        for name, content in rows.items():
            write(tmp_path / name / "train.tsv", content)
            task = load_task(f"glue-{name.lower().replace('-', '')}", data=tmp_path)
            found[name] = [(*e.texts, e.target) for e in task.split("train")]
        assert found == {
            "CoLA": [("Fine it is.", "yes"), ("It fine is.", "no")],
            "MRPC": [("A b.", "B a.", "yes")],
            "MNLI": [("p", "h", "maybe")],
            "SST-2": [("good", "positive")],
            "QNLI": [("q?", "s.", "no")],
            "RTE": [("p", "h", "yes")],
        }

    def test_a_folder_of_another_data_set_is_not_taken_for_the_tasks(self, tmp_path: Path) -> None:
        folder = tmp_path / "food-101"
        (folder / "pie").mkdir(parents=True)
        (folder / "pie" / "1.jpg").write_bytes(picture("red"))
        (folder / "split_zhou_Food101.json").write_text(json.dumps({"train": [["pie/1.jpg", 0, "pie"]]}))
        write(tmp_path / "RTE" / "dev.tsv", [["0", "a", "b", "entailment"]])
        assert load_task("glue-rte", data=tmp_path).split("test")
        with pytest.raises(DataError, match="there is no folder"):
            load_task("glue-qnli", data=tmp_path / "RTE")
        assert load_task("food101", data=folder).choices == ("pie",)
        with pytest.raises(DataError, match="there is no folder"):
            load_task("dtd", data=folder)

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "refcoco_data").mkdir()
        with pytest.raises(DataError, match=r"holds none of refcoco_train\.tsv, refcoco_val\.tsv"):
            load_task("refcoco", data=tmp_path)
        with pytest.raises(DataError, match="there is no folder"):
            load_task("snli_ve", data=tmp_path)


class TestImages:
    def test_class_folders(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            for colour in COLOURS:
                path = tmp_path / "dtd" / split / f"{colour}_thing" / "1.png"
                path.parent.mkdir(parents=True)
                path.write_bytes(picture(colour))
        task = load_task("dtd", data=tmp_path)
        assert task.choices == ("blue thing", "red thing")
        assert [e.target for e in task.split("dev")] == ["blue thing", "red thing"]
        assert open_image(task.split("train")[1].image or "").getpixel((0, 0)) == COLOURS["red"]
        with pytest.raises(DataError, match="found no picture such as"):
            image_folder(tmp_path)

    def test_coop_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "food-101"
        (folder / "images" / "pie").mkdir(parents=True)
        (folder / "images" / "pie" / "1.jpg").write_bytes(picture("red"))
        items = [["pie/1.jpg", 0, "apple_pie"]]
        (folder / "split_zhou_Food101.json").write_text(json.dumps({"train": items, "val": items, "test": items}))
        task = load_task("food101", data=tmp_path)
        assert (task.choices, {n: len(e) for n, e in task.splits.items()}) == (
            ("apple pie",),
            {"train": 1, "dev": 1, "test": 1},
        )
        assert open_image(task.split("test")[0].image or "").size == (20, 10)
        (folder / "split_zhou_Food101.json").write_text(json.dumps({"train": [["gone.jpg", 0, "pie"]]}))
        with pytest.raises(DataError, match=r"train\[0\]: there is no picture gone.jpg"):
            coop_split(folder / "split_zhou_Food101.json")
        (folder / "split_zhou_Food101.json").write_text(json.dumps({"train": [["pie/1.jpg", 0]]}))
        with pytest.raises(DataError, match=r"expected \[picture, label number, class name\]"):
            coop_split(folder / "split_zhou_Food101.json")

    def test_aircraft_as_published(self, tmp_path: Path) -> None:
        folder = tmp_path / "fgvc_aircraft"
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "0034309.jpg").write_bytes(picture("red"))
        for split in ("train", "val", "test"):
            (folder / f"images_variant_{split}.txt").write_text("0034309 Boeing 707\n")
        task = load_task("fgvc_aircraft", data=tmp_path)
        assert task.split("test")[0].target == "Boeing 707"
        assert open_image(task.split("test")[0].image or "").size == (20, 10)


class TestOwnFiles:
    def test_csv_jsonl_parquet_and_datasets_give_the_same_examples(self, tmp_path: Path) -> None:
        (tmp_path / "red.png").write_bytes(picture("red"))
        row = {"image": "red.png", "question": "What, then?", "answers": "red", "question_id": "5"}
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / "a.csv").write_text('image,question,answers,question_id\nred.png,"What, then?",red,5\n')
        texts = dict.fromkeys(("question", "answers", "question_id"), datasets.Value("string"))
        features = datasets.Features({"image": datasets.Image(), **texts})
        whole = {**row, "image": {"bytes": picture("red"), "path": None}}
        dataset = datasets.Dataset.from_list([whole], features=features)
        dataset.to_parquet(tmp_path / "a.parquet")
        sources: list[Any] = [tmp_path / "a.jsonl", tmp_path / "a.csv", tmp_path / "a.parquet", dataset]
        for source in sources:
            (example,) = task_from_records("own", "vqa", {"train": source}).split("train")
            assert (example.prompt, example.target, example.key) == (" what, then?", "red", "5")
            assert open_image(example.image or "").getpixel((0, 0)) == COLOURS["red"]

    def test_class_labels_of_datasets_go_by_their_names(self) -> None:
        """The hub numbers RTE's and MNLI's labels differently from OFA's files."""
        features = datasets.Features(
            {
                "sentence1": datasets.Value("string"),
                "sentence2": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
            }
        )
        rows = [{"sentence1": "a", "sentence2": "b", "label": n} for n in (0, 1, -1)]
        dataset = datasets.Dataset.from_list(rows, features=features)
        examples = task_from_records("rte", "rte", {"train": dataset}).split("train")
        assert [e.target for e in examples] == ["yes", "no", ""]

    def test_a_layout_that_does_not_fit_is_explained(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tsv", [["1", "2", "3"]])
        with pytest.raises(DataError, match="no column for image, box: found 3 columns") as caught:
            records_from_file(path, Grounding())
        assert "key (0), text (2), box (3), image (4)" in str(caught.value)
        (tmp_path / "a.csv").write_text("a,b\n1,2\n")
        with pytest.raises(DataError, match="found the columns a, b"):
            records_from_file(tmp_path / "a.csv", CoLA())
        with pytest.raises(UnknownNameError, match="did you mean 'vqa'"):
            task_from_records("own", "vqaa", {"train": path})

    def test_a_header_that_lacks_a_name_is_no_row(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tsv", [["text", "summary"], ["an article", "a headline"]])
        with pytest.raises(
            DataError, match=r"a\.tsv:1: a header with summary, but without a column for source"
        ) as caught:
            task_from_records("own", "summarisation", {"train": path})
        assert "source/document/article" in str(caught.value)

    def test_columns_are_those_of_all_rows(self, tmp_path: Path) -> None:
        asked = {"question": "What?", "image": "a.png"}
        rows = [{**asked, "answer": "red"}, {**asked, "answer": "blue", "question_id": 5}, asked]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        examples = task_from_records("own", "vqa", {"train": tmp_path / "a.jsonl"}, answers=["red"]).split("train")
        assert [examples[n].key for n in (0, 1)] == ["", "5"]
        with pytest.raises(DataError, match=r"a\.jsonl:3: no column 'answer'"):
            examples[2]

    def test_lists_in_jsonl(self, tmp_path: Path) -> None:
        (tmp_path / "red.png").write_bytes(picture("red"))
        row = {"image": "red.png", "captions": ["A cat.", "Two dogs run."], "question": "What?", "answers": ["red"] * 3}
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        (caption,) = task_from_records("own", "captioning", {"train": tmp_path / "a.jsonl"}).split("train")
        assert [answer for answer, _ in caption.answers] == ["A cat", "Two dogs run"]
        (asked,) = task_from_records("own", "vqa", {"train": tmp_path / "a.jsonl"}).split("train")
        assert (asked.target, asked.choices) == ("red", ("red",))
        (tmp_path / "a.jsonl").write_text(json.dumps({**row, "captions": {"en": "A cat."}}) + "\n")
        with pytest.raises(DataError, match=r"a\.jsonl:1 \(captions\): expected a text, found dict"):
            task_from_records("own", "captioning", {"train": tmp_path / "a.jsonl"})
        assert task_from_records("own", "vqa", {"train": tmp_path / "a.jsonl"}).split("train")[0].target == "red"

    def test_a_broken_row_names_file_line_and_column(self, tmp_path: Path) -> None:
        broken = [REFS[0], ["9", "img", "it", "1,2,3", REFS[0][4]], ["9", "img", "it", "1,2,3,4", "????"]]
        task = task_from_records("own", Grounding(), {"train": write(tmp_path / "a.tsv", broken)})
        with pytest.raises(DataError, match=r"a\.tsv:2, column 3 \(box\)"):
            task.split("train")[1]
        with pytest.raises(DataError, match=r"a\.tsv:3, column 4.*base64"):
            open_image(task.split("train")[2].image or "")

    def test_a_header_makes_the_order_free(self, tmp_path: Path) -> None:
        rows = [["label", "premise", "image", "hypothesis"], ["neutral", "p", encoded("red"), "h"]]
        task = task_from_records("own", VisualEntailment(premise=True), {"test": write(tmp_path / "a.tsv", rows)})
        assert len(task.split("test")) == 1
        assert task.split("test")[0].texts == ("p", "h")
        assert (
            records_from_file(tmp_path / "a.tsv", VisualEntailment())
            .place(0, "label")
            .endswith("a.tsv:2, column 0 (label)")
        )
        assert "QQP" in repr(QQP())


class TestAnswerSets:
    @pytest.mark.parametrize("suffix", [".pkl", ".json", ".txt"])
    def test_formats(self, tmp_path: Path, suffix: str) -> None:
        path, answers = tmp_path / f"a{suffix}", {"no": 1, "yes": 0, "red and white": 2}
        if suffix == ".pkl":
            path.write_bytes(pickle.dumps(answers))
        else:
            path.write_text(json.dumps(answers) if suffix == ".json" else "yes\nno\nred and white\n")
        assert read_answer_set(path) == ("yes", "no", "red and white")

    def test_a_pickle_that_asks_for_more_is_refused_and_nothing_runs(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "ran",)

        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"yes": Evil()}))
        with pytest.raises(DataError, match="only text and numbers are expected"):
            read_answer_set(tmp_path / "a.pkl")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", ["", "yes\nyes\n", "yes\n\nno\n"])
    def test_a_broken_list_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(DataError, match=r"a\.txt"):
            read_answer_set(tmp_path / "a.txt")
        (tmp_path / "a.json").write_text('{"yes": "no"}')
        with pytest.raises(DataError, match="answers with their numbers"):
            read_answer_set(tmp_path / "a.json")

    def test_answers_come_from_somewhere(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tsv", QUESTIONS)
        assert task_from_records("own", VQA(), {"test": path}, answers=["red", "blue"]).choices == ("red", "blue")
        assert task_from_records("own", VQA(("blue", "red")), {"test": path}).choices == ("blue", "red")
        with pytest.raises(DataError, match="give a file of answers"):
            task_from_records("own", VQA(), {"test": path})
        images = write(tmp_path / "b.tsv", [[encoded("red"), "0", "red"]])
        found = task_from_records("own", ImageClassification(), {"test": images}, answers=("red", "blue"))
        assert found.choices == ("red", "blue")

    def test_classes_with_underscores(self, tmp_path: Path) -> None:
        write(tmp_path / "imagenet_1k_data" / "imagenet_1k_train.tsv", [[encoded("red"), "3", "apple_pie"]])
        (tmp_path / "imagenet_1k_data" / "classes.txt").write_text("apple_pie\nblue_thing\n")
        task = load_task("imagenet", data=tmp_path)
        assert (task.choices, task.split("train")[0].target) == (("apple pie", "blue thing"), "apple pie")
        images = tmp_path / "imagenet_1k_data" / "imagenet_1k_train.tsv"
        with pytest.raises(DataError, match="the class 'apple pie' is there twice"):
            task_from_records("own", "image-classification", {"train": images}, answers=["apple_pie", "apple pie"])

    def test_answers_are_refused_where_there_is_no_closed_set(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tsv", [["0", "a text", "1"]])
        with pytest.raises(RefusedError, match="CoLA has no answer set of its own to give"):
            task_from_records("own", CoLA(), {"test": path}, answers=["yes", "no"])
