"""The gallery: what is shown of which test pictures, and that it is what was answered."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_results import example_results
from PIL import Image

from pituning.errors import PituningError, RefusedError
from pituning.example import Box, Example
from pituning.report import write_report
from pituning.report.gallery import CHANGES, Gallery, change, gallery_html, make_gallery, read_gallery, sample
from pituning.tasks import Task, emoji_task

SIZES = {"test": 12}
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"q\""


class Elements(HTMLParser):
    """Every element with its attributes, and the text that is seen."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.hidden = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))
        self.hidden = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self.hidden else data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def grounding() -> Task:
    return emoji_task("refemojig", vocabulary="small", sizes=SIZES)


def answered(task: Task, *answers: Any) -> list[tuple[Example, Any]]:
    """These answers over and over."""
    return [(e, answers[n % len(answers)]) for n, e in enumerate(task.split("test"))]


def shifted(box: Box, by: float) -> Box:
    return box[0] + by, box[1], box[2] + by, box[3]


def boxes_gallery(task: Task, count: int = 12) -> Gallery:
    """The true box before every other picture, and after the first half of them."""
    examples = task.split("test")
    before = [(e, e.box if n % 2 else shifted(e.box or (0, 0, 1, 1), 200)) for n, e in enumerate(examples)]
    after = [(e, e.box if n < 6 else None) for n, e in enumerate(examples)]
    return make_gallery(task, before, after, count)


class TestSample:
    def test_groups_get_their_shares_and_none_that_occurs_is_left_out(self) -> None:
        for seed in range(200):
            rng = random.Random(seed)
            groups = [rng.choices(list(CHANGES), [9, 5, 5, 1, 0])[0] for _ in range(rng.randint(4, 300))]
            ids, count = [f"{rng.random()}" for _ in groups], rng.randint(4, 20)
            chosen = sample(groups, ids, count)
            taken, sizes = Counter(groups[n] for n in chosen), Counter(groups)
            assert len(set(chosen)) == len(chosen) == min(count, len(groups)), seed
            assert set(taken) == set(sizes), seed
            shares = {key: len(chosen) * size / len(groups) for key, size in sizes.items()}
            if min(shares.values()) >= 1:
                assert all(abs(taken[key] - share) < 1 for key, share in shares.items()), seed
            assert [groups[n] for n in chosen] == sorted((groups[n] for n in chosen), key=list(CHANGES).index), seed

    def test_depends_on_the_ids_and_not_on_the_order(self) -> None:
        groups, ids = ["right"] * 20 + ["wrong"] * 10, [f"t/{n}" for n in range(30)]
        order = random.Random(1).sample(range(30), 30)
        first = {ids[n] for n in sample(groups, ids, 6)}
        again = sample([groups[n] for n in order], [ids[n] for n in order], 6)
        assert first == {ids[order[n]] for n in again}
        assert first != {ids[n] for n in sample(groups, [f"u/{n}" for n in range(30)], 6)}

    def test_a_place_is_given_up_only_where_there_is_more_than_one(self) -> None:
        assert sample(["better", "right", "wrong"], ["a", "b", "c"], 1) in ([0], [1], [2])
        assert sample(["right"], ["a"], 12) == [0]


class TestJudging:
    def test_a_box_is_right_where_it_covers_the_true_one_by_half(self, grounding: Task) -> None:
        examples = grounding.split("test")
        rng = random.Random(2)
        found = [(e, shifted(e.box or (0, 0, 1, 1), rng.randint(0, 12))) for e in examples]
        shown = make_gallery(grounding, found, found, len(examples))
        verdicts = {item.id: item.after.right for item in shown.items}
        for example, box in found:
            pixels = [np.zeros((120, 120), bool) for _ in range(2)]
            for drawn, corners in zip(pixels, (example.box, box), strict=True):
                x0, y0, x1, y1 = map(int, corners or ())
                drawn[y0:y1, x0:x1] = True
            share = (pixels[0] & pixels[1]).sum() / (pixels[0] | pixels[1]).sum()
            assert verdicts[example.id] is bool(share >= 0.5), share
        assert set(verdicts.values()) == {True, False}

    def test_no_box_and_one_that_is_inside_out_are_wrong_and_not_drawn(self, grounding: Task) -> None:
        shown = make_gallery(grounding, answered(grounding, None), answered(grounding, (9.0, 9.0, 3.0, 20.0)))
        assert shown.counts == {"wrong": 12}
        assert {(i.before.text, i.after.text, i.before.box, i.after.box) for i in shown.items} == {
            ("no box", "empty box", None, None)
        }

    def test_closed_answers_and_questions_are_compared_with_the_true_ones(self) -> None:
        for name in ("emoji-entailment", "emoji-vqa", "emoji-style"):
            task = emoji_task(name, vocabulary="small", sizes=SIZES)
            true = [(e, e.target) for e in task.split("test")]
            wrong = [(e, next(c for c in e.choices if c != e.target)) for e in task.split("test")]
            assert make_gallery(task, wrong, true).counts == {"better": 12}
            assert make_gallery(task, true, wrong).counts == {"worse": 12}

    def test_a_caption_is_right_if_it_names_all_things(self) -> None:
        task = emoji_task("emoji-caption", vocabulary="small", sizes=SIZES)
        more = [(e, f"a picture of {e.target} and a unicorn") for e in task.split("test")]
        shown = make_gallery(task, answered(task, "a unicorn"), more)
        assert shown.counts == {"better": 12}
        assert "names every thing" in shown.rule

    def test_captions_of_other_pictures_are_shown_without_a_verdict(self) -> None:
        task = replace(emoji_task("emoji-caption", vocabulary="small", sizes=SIZES), more_metrics=())
        shown = make_gallery(task, answered(task, "a unicorn"), answered(task, ""))
        assert shown.counts == {"unjudged": 12}
        page = Elements(gallery_html(shown))
        assert not [a for a in page.all("span") if a.get("role") == "img"]
        assert "nothing" in page.text

    def test_what_became_of_an_answer(self, grounding: Task) -> None:
        shown = boxes_gallery(grounding)
        expected = {0: "better", 1: "right", 6: "wrong", 7: "worse"}
        by_id = {item.id: item for item in shown.items}
        for number, name in expected.items():
            item = by_id[grounding.split("test")[number].id]
            assert item.change == change(item.before, item.after) == name
        assert shown.counts == dict.fromkeys(("better", "right", "wrong", "worse"), 3)

    def test_refuses_what_it_cannot_show(self, grounding: Task) -> None:
        found = answered(grounding, None)
        with pytest.raises(RefusedError, match="the same examples before and after"):
            make_gallery(grounding, found, found[:-1])
        without = [(replace(e, image=None), a) for e, a in found]
        with pytest.raises(RefusedError, match="has no picture"):
            make_gallery(grounding, without, without)
        unknown = [(replace(e, target=""), a) for e, a in found]
        with pytest.raises(RefusedError, match="no true answer"):
            make_gallery(grounding, unknown, unknown)


class TestPage:
    def test_pictures_are_the_examples_own_pixels_at_twice_their_size(self, grounding: Task) -> None:
        shown = boxes_gallery(grounding)
        images = Elements(gallery_html(shown)).all("img")
        assert len(images) == len(shown.items) == 12
        known = {e.id: np.asarray(e.image.read()) for e in grounding.split("test")}  # type: ignore[union-attr]
        for item, image in zip(shown.items, images, strict=True):
            data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), known[item.id])
            assert (image["width"], image["height"], image["class"]) == ("192", "192", "pixels")

    def test_large_pictures_keep_their_size(self, grounding: Task) -> None:
        large = Image.new("RGB", (640, 480))
        examples = [(replace(e, image=large), e.box) for e in grounding.split("test")]
        image = Elements(gallery_html(make_gallery(grounding, examples, examples, 1))).all("img")[0]
        assert (image["width"], image["height"], image.get("class")) == ("640", "480", None)

    def test_boxes_are_drawn_where_they_are_each_in_its_own_line(self, grounding: Task) -> None:
        shown = boxes_gallery(grounding)
        rects = Elements(gallery_html(shown)).all("rect")
        expected = [
            (key, reply.box)
            for item in shown.items
            for key, reply in (("truth", item.truth), ("before", item.before), ("after", item.after))
            if reply.box
        ]
        lines = [r for r in rects if r.get("class")]
        assert len(rects) == 2 * len(lines), "every line lies on a white one"
        assert [r["class"] for r in lines] == [key for key, _ in expected]
        for line, (_, box) in zip(lines, expected, strict=True):
            x, y, width, height = (float(line[k]) for k in ("x", "y", "width", "height"))
            assert (x, y, x + width, y + height) == pytest.approx(box)
        looks = {r["class"]: (r["stroke"], r.get("stroke-dasharray", "")) for r in lines}
        assert len({colour for colour, _ in looks.values()}) == 3
        assert [bool(looks[key][1]) for key in ("truth", "before", "after")] == [False, True, False]

    def test_alternative_texts_say_what_is_asked_and_all_answers_with_their_verdicts(self, grounding: Task) -> None:
        shown = boxes_gallery(grounding)
        for item, image in zip(shown.items, Elements(gallery_html(shown)).all("img"), strict=True):
            assert item.question in image["alt"]
            x0, y0, x1, y1 = (f"{v:.0f}" for v in item.truth.box or ())
            assert f"True answer: box from {x0}, {y0} to {x1}, {y1}." in image["alt"]
            verdicts = re.findall(r"(right|wrong)\.", image["alt"])
            assert verdicts == ["right" if r.right else "wrong" for r in (item.before, item.after)]

    def test_verdicts_are_marks_and_words_not_colours(self, grounding: Task) -> None:
        shown = boxes_gallery(grounding)
        page = Elements(gallery_html(shown))
        verdicts = [r.right for item in shown.items for r in (item.before, item.after)]
        assert [m for m in page.text if m in "✓✗"] == ["✓" if v else "✗" for v in verdicts]
        assert [a["aria-label"] for a in page.all("span") if "aria-label" in a] == [
            "right" if v else "wrong" for v in verdicts
        ]
        for key in shown.counts:
            assert page.text.count(CHANGES[key][1]) == 3 + 1, "on each card and in the caption"

    def test_the_caption_counts_all_test_pictures_and_those_shown(self, grounding: Task) -> None:
        text = " ".join(Elements(gallery_html(boxes_gallery(grounding, 5))).text.split())
        counts = {words: (int(n), int(m)) for n, words, m in re.findall(r"(\d+) ([a-z ]+) \((\d+) shown\)", text)}
        assert "Of 12 test pictures" in text
        assert set(counts) == {"got better", "stayed right", "stayed wrong", "got worse"}
        assert [n for n, _ in counts.values()] == [3, 3, 3, 3]
        assert sorted(m for _, m in counts.values()) == [1, 1, 1, 2]

    def test_whoever_drew_the_emoji_is_named(self, grounding: Task) -> None:
        for name in ("Noto Emoji", "Fluent Emoji", "Twemoji", "CC BY 4.0"):
            assert name in boxes_gallery(grounding)._repr_html_()
        other = replace(grounding, splits={"test": tuple(grounding.split("test"))})
        assert "Noto" not in boxes_gallery(other)._repr_html_()


class TestReport:
    def test_stands_behind_the_differences_and_needs_no_script(self, grounding: Task, tmp_path: Path) -> None:
        record = json.loads(json.dumps(boxes_gallery(grounding).record()))
        page = write_report(example_results() | {"gallery": [record, record]}, tmp_path).read_text(encoding="utf-8")
        headings = re.findall(r"<h2>(.*?)</h2>", page)
        assert headings[1:4] == ["Differences", "Gallery", "Predicted helpers"]
        section = page[page.index("<h2>Gallery") : page.index("<h2>Predicted")]
        assert "<script" not in section
        assert section.count("data:image/png") == 24
        assert section.count("Noto Emoji") == 1

    def test_a_record_reads_back_as_the_same_gallery(self, grounding: Task) -> None:
        shown = boxes_gallery(grounding)
        assert read_gallery(json.loads(json.dumps(shown.record()))) == shown

    def test_pictures_from_elsewhere_are_refused(self, grounding: Task) -> None:
        for source in ("https://example.org/x.png", "x.png", 'data:image/png;base64,AA" onload="x', "data:text/html,x"):
            record = boxes_gallery(grounding).record()
            record["items"] = [{**record["items"][0], "picture": source}]
            with pytest.raises(PituningError, match="expected the picture as data:image/png"):
                read_gallery(record)

    def test_strings_from_outside_are_text_never_markup(self, grounding: Task) -> None:
        shown = boxes_gallery(grounding)
        harmless = Elements(gallery_html(shown))
        items = tuple(
            replace(
                item,
                question=HOSTILE,
                before=replace(item.before, text=HOSTILE),
                after=replace(item.after, text=HOSTILE),
            )
            for item in shown.items
        )
        attacked = Elements(
            gallery_html(replace(shown, items=items, before=HOSTILE, after=HOSTILE, rule=HOSTILE, task=HOSTILE))
        )
        assert [tag for tag, _ in attacked.found] == [tag for tag, _ in harmless.found]
        assert not any("onerror" in attributes for _, attributes in attacked.found)
        assert HOSTILE in attacked.text
