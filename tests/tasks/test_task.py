"""Tasks from names, files and data sets; every mistake in the data names its file and line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pituning.data import hub
from pituning.errors import DataError, UnknownNameError
from pituning.example import Example
from pituning.tasks import KINDS, Task, TaskDefinition, load_task, register_task, task_from_files, task_names
from pituning.tasks import task as task_module

LABELS = {"0": "a bad one", "1": "a good one"}
DEMO = ("movie_quotes", "noun_field", "picture_gear", "pocket_gear", "verb_field", "word_tone")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of the test's own."""
    monkeypatch.setattr(task_module, "_REGISTRY", dict(task_module._REGISTRY))


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data in sight but what a test puts there."""
    monkeypatch.delenv("PITUNING_DATA", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def write(folder: Path, split: str = "train", rows: int = 6, suffix: str = ".tsv") -> Path:
    """A file with rows "text i" labelled 0, 1, 0, 1 …"""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}{suffix}"
    gap = "\t" if suffix == ".tsv" else ","
    path.write_text(f"sentence{gap}label\n" + "".join(f"text {i}{gap}{i % 2}\n" for i in range(rows)))
    return path


class TestLoadTask:
    def test_from_a_folder(self, tmp_path: Path) -> None:
        write(tmp_path / "cr")
        write(tmp_path / "cr", "test", 2, ".csv")
        task = load_task("cr", data=tmp_path)
        assert [e.texts for e in task.split("train")] == [(f"text {i}",) for i in range(6)]
        assert [e.label for e in task.split("train")] == [0, 1, 0, 1, 0, 1]
        assert {e.target for e in task.split("train")} == set(task.choices)
        assert len({e.id for s in task.splits.values() for e in s}) == 8
        assert "text 0" in task.split("test")[0].prompt
        assert task.split("test")[0].prompt.endswith("?")
        assert (task.shots, task.metric) == (None, "accuracy")
        assert repr(task) == "Task('cr', 2 choices, train 6, test 2)"

    def test_from_the_variables_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "data" / "cr")
        monkeypatch.setenv("PITUNING_DATA", str(tmp_path / "data"))
        assert len(load_task("cr").split("train")) == 6

    def test_few_shot(self, tmp_path: Path) -> None:
        write(tmp_path / "cr", rows=40)
        write(tmp_path / "cr", "dev", 4)
        write(tmp_path / "cr", "test", 4)
        task = load_task("cr", shots=4, seed=1, data=tmp_path)
        assert Counter(e.label for e in task.split("train")) == {0: 4, 1: 4}
        assert (task.shots, task.seed, len(task.split("test"))) == (4, 1, 4)
        assert not task.splits.get("dev"), "the shots include validation"
        assert set(task.split("train")) <= set(load_task("cr", shots=16, seed=1, data=tmp_path).split("train"))

    def test_fewer_examples_than_shots(self, tmp_path: Path) -> None:
        write(tmp_path / "cr", rows=5)
        with pytest.raises(DataError, match=r"3 shots per class asked for, but class .* has only 2 examples"):
            load_task("cr", shots=3, data=tmp_path)

    def test_unknown_name(self) -> None:
        with pytest.raises(
            UnknownNameError, match=r"unknown task 'sst3': did you mean 'sst2'.*Known: .*task_from_files"
        ):
            load_task("sst3")

    def test_no_data(self, tmp_path: Path, message: Any) -> None:
        assert message(load_task, "cr", data=tmp_path) == f"task 'cr': there is no folder {tmp_path / 'cr'}"
        (tmp_path / "cr").mkdir()
        assert "holds no train, dev or test file" in message(load_task, "cr", data=tmp_path)
        text = message(load_task, "cr")
        assert "no data found" in text
        assert "PITUNING_DATA" in text
        assert "cr/train.tsv" in text

    def test_through_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[Any, ...]] = []

        def fetch(path: str, name: str | None, split: str, columns: list[str]) -> Any:
            asked.append((path, name, split))
            return [(f"{path}[{i}]", {"sentence": f"{split} {i}", "label": str(i % 2)}) for i in range(3)]

        monkeypatch.setattr(task_module, "load_hub_split", fetch)
        assert hub.load_hub_split is not fetch
        task = load_task("sst2")
        assert asked == [("stanfordnlp/sst2", None, "train"), ("stanfordnlp/sst2", None, "validation")]
        assert [e.texts[0] for e in task.split("test")] == ["validation 0", "validation 1", "validation 2"]

    @pytest.mark.parametrize("name", DEMO)
    def test_the_demos_data_are_packaged(self, name: str) -> None:
        task = load_task(name, shots=4)
        assert len(task.split("train")) == 4 * len(task.choices)
        assert {e.target for e in task.split("test")} == set(task.choices)
        train = {e.texts for e in load_task(name).split("train")}
        assert not train & {e.texts for e in task.split("test")}, "a test sentence is among the training sentences"

    def test_tasks_say_of_what_kind_they_are(self) -> None:
        assert load_task("movie_quotes").kind == load_task("pocket_gear").kind == "sentiment"
        assert load_task("noun_field").kind == "topic"
        assert KINDS["vqa"]().title == "visual question answering"
        assert all(kind().title for kind in KINDS.values())

    def test_no_two_tasks_share_a_label_text(self) -> None:
        found = [task_module._REGISTRY[n] for n in task_names()]
        definitions = [d for d in found if isinstance(d, TaskDefinition)]  # the paper's own tasks share "yes" and "no"
        texts = [t for d in definitions for t in d.labels.values()]
        assert len(definitions) >= 15
        assert [t for t, n in Counter(texts).items() if n > 1] == []

    def test_a_task_of_ones_own(self, registry: None, tmp_path: Path) -> None:
        register_task(TaskDefinition("mine", LABELS, texts=("sentence",), prompt="Q: {sentence}"))
        write(tmp_path / "mine")
        assert load_task("mine", data=tmp_path).split("train")[1].prompt == "Q: text 1"
        assert load_task("mine", data=tmp_path).kind == "text classification"
        assert "mine" in task_names()


class TestFromFiles:
    def test_pairs_in_every_format(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"q": "who?", "a": "me {x}", "y": 1}\n')
        (tmp_path / "b.csv").write_text('q,a,y\n"one, two",three,0\n')
        files = {"train": tmp_path / "a.jsonl", "test": str(tmp_path / "b.csv")}
        task = task_from_files("mine", files, {"1": "yes", "0": "no"}, texts=["q", "a"], label="y")
        (train,), (test,) = task.split("train"), task.split("test")
        assert (train.texts, train.target, train.prompt) == (("who?", "me {x}"), "yes", "who?\nme {x}")
        assert (test.texts, test.target, test.label) == (("one, two", "three"), "no", 1)

    def test_a_label_outside_the_choices(self, tmp_path: Path, message: Any) -> None:
        path = write(tmp_path)
        path.write_text(path.read_text() + "what\t2\n")
        text = message(task_from_files, "mine", {"train": path}, LABELS, texts=["sentence"])
        assert text == f"{path}:8: label '2' is not one of task 'mine': 0, 1"

    def test_a_broken_row(self, tmp_path: Path, message: Any) -> None:
        path = write(tmp_path)
        path.write_text(path.read_text() + "no label\n")
        text = message(task_from_files, "mine", {"train": path}, LABELS, texts=["sentence"])
        assert text == f"{path}:8: expected 2 columns (sentence, label), found 1"

    def test_a_missing_column(self, tmp_path: Path, message: Any) -> None:
        path = write(tmp_path)
        assert f"{path}:2: no column 'text'" in message(task_from_files, "mine", {"train": path}, LABELS)

    def test_two_labels_with_one_text(self, tmp_path: Path, message: Any) -> None:
        """Their examples could not be told apart."""
        path = write(tmp_path)
        text = message(task_from_files, "mine", {"train": path}, {"0": "same", "1": "same"}, texts=["sentence"])
        assert "'same'" in text


class TestSplits:
    def task(self, count: int) -> Task:
        made = tuple(Example(f"t/{i}", (str(i),), "", "a", ("a", "b")) for i in range(count))
        return Task("t", ("a", "b"), {"train": made, "dev": ()})

    def test_an_empty_or_missing_split(self, message: Any) -> None:
        for name in ("dev", "test"):
            text = message(self.task(3).split, name)
            assert text == f"task 't' has no examples in split {name!r}; it has train (3)"
        assert message(self.task(0).split, "train").endswith("it has none")

    def test_an_empty_file(self, tmp_path: Path, message: Any) -> None:
        path = write(tmp_path, rows=0)
        task = task_from_files("mine", {"train": path}, LABELS, texts=["sentence"])
        assert "no examples in split 'train'" in message(task.split, "train")
        assert "no examples in split 'train'" in message(task.few_shot, 2)

    def test_a_limit_takes_a_fixed_sample(self) -> None:
        task = self.task(50)
        few, more = task.split("train", 8), task.split("train", 20)
        assert (len(few), len(more)) == (8, 20)
        assert set(few) < set(more)
        assert few == task.split("train", 8)
        assert list(few) != list(task.split("train"))[:8], "files are often sorted by class"
        assert task.split("train", 80) == task.split("train")

    def test_few_shot_keeps_the_test_split(self) -> None:
        made = tuple(Example(f"t/{i}", (str(i),), "", "ab"[i % 2], ("a", "b")) for i in range(20))
        task = Task("t", ("a", "b"), {"train": made, "dev": made[:2], "test": made[:4]}).few_shot(3, seed=5)
        assert (len(task.split("train")), len(task.split("test")), task.shots, task.seed) == (6, 4, 3, 5)
        with pytest.raises(DataError):
            task.split("dev")


def test_a_label_is_the_position_of_the_target() -> None:
    assert Example("i", ("x",), "x", "b", ("a", "b")).label == 1


@pytest.mark.parametrize("texts", [(), ("a", "b", "c")])
def test_one_or_two_text_columns(texts: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=f"expected one or two text columns, found {len(texts)}"):
        TaskDefinition("mine", LABELS, texts)
