"""GLUE in OFA's words on every family of backbones, and what each kind of answer is measured by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pituning import blend, evaluate, predict, train_expert
from pituning.backbones.base import Backbone
from pituning.data.records import TableRecords
from pituning.errors import DataError, RefusedError, UnknownNameError
from pituning.tasks import VQA, Summarisation, Task
from pituning.tasks.glue import MNLI, MRPC, CoLA
from pituning.training.evaluation import mean_log_loss
from pituning.training.trainer import TrainSettings
from tests.backbones.ofa.conftest import build_backbone

WORDS = ("ba", "de", "fi", "go", "ku", "la")


def task_of(kind: Any, rows: list[dict[str, str]]) -> Task:
    records = TableRecords([(f"r:{n}", row) for n, row in enumerate(rows)], Path())
    return kind.task("mine", {"train": records, "test": records})  # type: ignore[no-any-return]


def backbone_named(name: str, bert: Backbone, t5: Backbone) -> Backbone:
    return {"encoder": bert, "seq2seq": t5}.get(name) or build_backbone(max_target_positions=128)


@pytest.mark.parametrize("family", ["encoder", "seq2seq", "ofa"])
@pytest.mark.parametrize(
    ("kind", "columns", "metrics"),
    [
        (CoLA(), ("sentence",), ("Matthews", "accuracy")),
        (MNLI(), ("premise", "hypothesis"), ("accuracy",)),
        (MRPC(), ("first", "second"), ("accuracy", "F1")),
    ],
    ids=["cola", "mnli", "mrpc"],
)
def test_glue_trains_and_is_measured_on_every_family(
    bert: Backbone, t5: Backbone, family: str, kind: Any, columns: tuple[str, ...], metrics: tuple[str, ...]
) -> None:
    backbone = backbone_named(family, bert, t5)
    labels = sorted(v for v in kind.labels if v.isdigit())
    rows = [{**dict.fromkeys(columns, w), "label": labels[n % len(labels)]} for n, w in enumerate(WORDS)]
    task = task_of(kind, rows)
    expert = train_expert(backbone, task, "bottleneck", settings=TrainSettings(steps=2, batch_size=4), r=2)
    found = evaluate(backbone, expert, task)
    assert set(found.metrics) == {*metrics, "log-loss"}
    assert found.metric == metrics[0]
    positions = [int(p or 0) for p in found.predictions]
    right = [e.label == p for e, p in zip(task.split("test"), positions, strict=True)]
    assert found.metrics["accuracy"] == sum(right) / 6
    assert [a for _, a in predict(backbone, expert, task)] == [task.choices[p] for p in positions]


def test_a_family_that_cannot_search_among_choices_says_so(bert: Backbone) -> None:
    task = task_of(CoLA(), [{"sentence": "ba", "label": "1"}])
    with pytest.raises(RefusedError, match="by='score' always works"):
        evaluate(bert, None, task, by="beam")
    with pytest.raises(UnknownNameError, match="did you mean 'beam'"):
        evaluate(bert, None, task, by="beem")  # type: ignore[arg-type]


def test_soft_answers_and_references_by_hand(t5: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5, "generate", lambda batch, **_: ["ba de"] * len(batch["input_ids"]))
    summaries = task_of(Summarisation(), [{"source": "go", "target": "ba de"}, {"source": "ku", "target": "ba"}])
    found = evaluate(t5, None, summaries)
    assert found.metrics["ROUGE-1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found.metrics["ROUGE-2"] == pytest.approx(0.5)
    assert found.predictions == ("ba de", "ba de")


def test_vqa_counts_the_confidence_of_the_answer(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": w, "answer": "0.6|!+yes&&0.3|!+no"} for w in WORDS]
    records = TableRecords([(f"r:{n}", row) for n, row in enumerate(rows)], tmp_path)
    task = VQA(("no", "yes", "maybe")).task("mine", {"train": records, "test": records})
    backbone = build_backbone(max_target_positions=128)
    found = evaluate(backbone, None, task)
    worth = {0: 0.3, 1: 0.6, 2: 0.0}
    assert found.value == pytest.approx(sum(worth[int(p or 0)] for p in found.predictions) / 6)
    outside = TableRecords([*records.rows, ("r:6", {**rows[0], "answer": "1.0|!+teal"})], tmp_path)
    more = VQA(("no", "yes", "maybe")).task("mine", {"train": records, "test": outside})
    for by in ("score", "beam"):
        counted = evaluate(backbone, None, more, by=by)  # type: ignore[arg-type]
        assert counted.value == pytest.approx(found.value * 6 / 7), (
            "a question that cannot be answered counts as missed"
        )
        assert counted.metrics["log-loss"] == pytest.approx(found.metrics["log-loss"], rel=1e-5)


def test_what_has_no_answer_is_not_evaluated(bert: Backbone) -> None:
    task = task_of(CoLA(), [{"sentence": "ba", "label": "1"}, {"sentence": "de", "label": ""}])
    with pytest.raises(DataError, match="'mine/test/1' has no right answer"):
        evaluate(bert, None, task)
    assert len(predict(bert, None, task)) == 2


@pytest.mark.parametrize("family", ["encoder", "seq2seq", "ofa"])
def test_nothing_is_learned_from_an_example_without_an_answer(bert: Backbone, t5: Backbone, family: str) -> None:
    """An encoder-decoder would learn to end at once."""
    task = task_of(CoLA(), [{"sentence": "ba", "label": "1"}, {"sentence": "de", "label": ""}])
    backbone = backbone_named(family, bert, t5)
    with pytest.raises(DataError, match="example 'mine/train/1' has no answer"):
        train_expert(backbone, task, "bottleneck", settings=TrainSettings(steps=2, batch_size=2), r=2)
    with pytest.raises(DataError, match="example 'mine/train/1' has no answer"):
        mean_log_loss(backbone, task.split("train"))


def test_questions_of_dev_that_cannot_be_answered_do_not_choose_the_best_state(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": w, "answer": "1.0|!+yes"} for w in WORDS]
    records = TableRecords([(f"r:{n}", row) for n, row in enumerate(rows)], tmp_path)
    dev = TableRecords([*records.rows, ("r:6", {**rows[0], "answer": "1.0|!+teal"})], tmp_path)
    backbone = build_backbone(max_target_positions=128)
    settings = TrainSettings(steps=2, batch_size=4, keep_best=True)
    losses = []
    for held_out in (records, dev):
        task = VQA(("no", "yes")).task("mine", {"train": records, "dev": held_out})
        expert = train_expert(backbone, task, "bottleneck", settings=settings, r=2)
        losses.append(expert.card.metrics["dev log-loss"])
        blended = blend(backbone, task, [expert], settings=settings)
        losses.append(blended.expert.card.metrics["dev log-loss"])
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
    unanswerable = VQA(("no", "yes")).task("mine", {"test": TableRecords(dev.rows[-1:], tmp_path)})
    assert math.isnan(evaluate(backbone, expert, unanswerable).metrics["log-loss"]), "none is not a perfect one"
