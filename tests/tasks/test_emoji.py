"""Tasks on scenes: what is said is true, what is asked has the right answer, and no text gives its answer away.

The texts are read here by code of the test's own: two-valued, by plain thresholds between those of the tasks.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from pituning.data.emoji import EMOJI, FOLDER, GROUPS, KNOWN, SMALL, SMALL_NEW
from pituning.data.images import open_image
from pituning.data.scenes import Scene, Thing, render
from pituning.example import Example
from pituning.tasks import emoji_task, load_task, pretraining_task, task_names
from pituning.tasks.emoji import PRETRAINING, TASKS
from pituning.tasks.emoji_language import with_article
from pituning.tasks.emoji_rows import LABELS, QUESTIONS, ROWS, STATEMENTS, VQA_ANSWERS, Row, Source, common_colours

NAMES = ("refemoji", "refemoji+", "refemojig", "emoji-entailment", "emoji-vqa", "emoji-caption", "emoji-group",
         "emoji-style", "emoji-object", "emoji-count")  # fmt: skip
TRAIN = Source("train")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
ATLAS = {e["name"]: e for e in json.loads((FOLDER / "atlas.json").read_text(encoding="utf-8"))["emoji"]}
GROUP_OF = {
    **{g: g for g in GROUPS},
    "thing of the sky": "sky",
    "household item": "household",
    "stationery item": "stationery",
}
COLOUR = r"red|orange|yellow|green|blue|purple|pink|brown|black|white|grey"
SIDE = r"left|right|top|bottom"

_rows: dict[tuple[str, Source], list[Row]] = {}


def rows(kind: str, count: int, source: Source = TRAIN) -> list[Row]:
    """The first rows, made once for all tests."""
    made = _rows.setdefault((kind, source), [])
    made.extend(ROWS[kind](source, n) for n in range(len(made), count))
    return made[:count]


# what the words mean


def is_noun(thing: Thing, noun: str) -> bool:
    if noun in ATLAS:
        return thing.name == noun
    assert noun == "thing" or noun in GROUP_OF, noun
    return noun == "thing" or ATLAS[thing.name]["group"] == GROUP_OF[noun]


def fits(thing: Thing, words: str, side: int) -> bool:
    """Whether adjectives and a noun fit a thing."""
    size, colour, noun = re.fullmatch(rf"(small |big )?((?:{COLOUR}) )?(.+)", words).groups()  # type: ignore[union-attr]
    return (
        is_noun(thing, noun)
        and (size is None or (thing.longer > 0.39 * side if size == "big " else thing.longer < 0.28 * side))
        and (colour is None or ATLAS[thing.name]["styles"][thing.style]["colour"] == colour.strip())
    )


def middle(thing: Thing, side: int) -> tuple[float, float]:
    return (thing.box[0] + thing.box[2]) / 2 / side, (thing.box[1] + thing.box[3]) / 2 / side


def at(thing: Thing, where: str, side: int) -> bool:
    x, y = middle(thing, side)
    return {"left": x < 0.46, "right": x > 0.54, "top": y < 0.46, "bottom": y > 0.54}[where]


def beside(thing: Thing, other: Thing, relation: str, side: int) -> bool:
    (x, y), (u, v) = middle(thing, side), middle(other, side)
    return {
        "to the left of": x < u - 0.07,
        "to the right of": x > u + 0.07,
        "above": y < v - 0.07,
        "below": y > v + 0.07,
    }[relation]


def the_one(things: Sequence[Thing]) -> Thing:
    assert len(things) == 1, f"denotes {len(things)} things"
    return things[0]


def first_by(things: Sequence[Thing], key: Callable[[Thing], float]) -> list[Thing]:
    best = min(map(key, things))
    return [t for t in things if key(t) == best]


RELATION = r"to the left of|to the right of|above|below"


def meant(text: str, scene: Scene) -> Thing:
    """The one thing that an expression denotes."""
    side, things = scene.side, list(scene.things)
    text = text.removeprefix("the ")
    if match := re.fullmatch(r"(.+?) (?:that is )?closest to the (.+)", text):
        mark = the_one([t for t in things if fits(t, match[2], side)])
        candidates = [t for t in things if t is not mark and fits(t, match[1], side)]
        return the_one(first_by(candidates, lambda t: math.dist(middle(t, side), middle(mark, side))))
    if match := re.fullmatch(rf"(.+?) (?:that is )?({RELATION}) the (.+?)(?: and ({RELATION}) the (.+))?", text):
        found = [t for t in things if fits(t, match[1], side)]
        for relation, words in (match.group(2, 3), match.group(4, 5)):
            if relation:
                mark = the_one([t for t in things if fits(t, words, side)])
                found = [t for t in found if t is not mark and beside(t, mark, relation, side)]
        return the_one(found)
    if match := re.fullmatch(r"(leftmost|rightmost|topmost|lowest|biggest|smallest) (.+)", text):
        key: dict[str, Callable[[Thing], float]] = {
            "leftmost": lambda t: middle(t, side)[0],
            "rightmost": lambda t: -middle(t, side)[0],
            "topmost": lambda t: middle(t, side)[1],
            "lowest": lambda t: -middle(t, side)[1],
            "biggest": lambda t: -t.longer,
            "smallest": lambda t: t.longer,
        }
        return the_one(first_by([t for t in things if fits(t, match[2], side)], key[match[1]]))
    if match := re.fullmatch(r"(.+) in the middle", text):
        return the_one(
            [t for t in things if fits(t, match[1], side) and max(abs(c - 0.5) for c in middle(t, side)) < 0.17]
        )
    sides: list[str] = []
    if match := re.fullmatch(rf"(.+) (?:on the|at the|in the) ({SIDE})(?: (left|right) corner)?", text):
        text, sides = match[1], [s for s in match.group(2, 3) if s]
    elif (match := re.fullmatch(rf"({SIDE})(?: (left|right))? (.+)", text)) and text not in ATLAS:
        text, sides = match[3], [s for s in match.group(1, 2) if s]
    return the_one([t for t in things if fits(t, text, side) and all(at(t, s, side) for s in sides)])


class TestExpressions:
    @pytest.mark.parametrize("kind", ["refemoji", "refemoji+", "refemojig", "grounding", "detection"])
    @pytest.mark.parametrize("vocabulary", ["small", "full"])
    def test_each_denotes_exactly_the_thing_in_its_box(self, kind: str, vocabulary: Any) -> None:
        for row in rows(kind, 300, Source("train", seed=3, vocabulary=vocabulary)):
            thing = meant(row.columns["text"], row.scene)
            assert row.columns["box"] == ",".join(str(float(c)) for c in thing.box), row

    def test_nothing_unclear_is_asked(self) -> None:
        """Beside a big or small thing of a name or group stands none of medium size, beside a red one none of no colour."""
        sizes = colours = 0
        for row in rows("refemoji+", 300):
            match = re.fullmatch(rf"(?:the )?(small |big )?((?:{COLOUR}) )?(.+)", row.columns["text"])
            assert match
            if "est " in row.columns["text"]:
                continue
            alike = [t for t in row.scene.things if is_noun(t, match[3])]
            if match[1] and not match[2]:
                assert "medium" not in {t.size for t in alike}
                sizes += len(alike) > 1
            if match[2] and not match[1]:
                assert "" not in {t.colour for t in alike}
                colours += len(alike) > 1
        assert min(sizes, colours) > 0, "no expression chose among several"

    def test_looks_alone(self) -> None:
        texts = [row.columns["text"] for row in rows("refemoji+", 300)]
        assert not [t for t in texts if re.search(rf"\b({SIDE}|middle|above|below|most|corner|closest)\b", t)
                    and "top hat" not in t]  # fmt: skip
        assert not [t for t in texts if re.search(r"noto|fluent|twemoji", t)]
        assert sum(bool(re.search(rf"\b({COLOUR}|small|big|smallest|biggest)\b", t)) for t in texts) > 200

    def test_short_ones_mostly_say_where(self) -> None:
        texts = [row.columns["text"] for row in rows("refemoji", 300)]
        assert 0.6 < sum(bool(re.search(rf"\b({SIDE}|middle|\w+most|lowest)\b", t)) for t in texts) / 300 < 0.95
        assert max(len(t.split()) for t in texts) <= 12

    def test_long_ones_relate_and_mostly_need_to(self) -> None:
        made = rows("refemojig", 300)
        assert all(re.search(rf"{RELATION}|closest to", row.columns["text"]) for row in made)
        first = [
            re.split(rf" (?:that is )?(?:{RELATION}|closest)", row.columns["text"])[0].removeprefix("the ")
            for row in made
        ]
        needed = [
            sum(is_noun(t, re.sub(rf"^(small |big )?(({COLOUR}) )?", "", words)) for t in row.scene.things) > 1
            for words, row in zip(first, made, strict=True)
        ]
        assert sum(needed) / 300 > 0.6


class TestQuestions:
    def answer(self, question: str, scene: Scene) -> str:
        side, things = scene.side, scene.things
        plurals = {e["plural"]: name for name, e in ATLAS.items()}
        plurals |= {f"{g}s": g for g in GROUPS} | {"dishes": "dish", "things of the sky": "sky", "things": "thing"}
        plurals |= {"household items": "household", "stationery items": "stationery"}
        if match := re.fullmatch(r"how many (.+) are there\?", question):
            return str(sum(is_noun(t, plurals[match[1]]) for t in things))
        if match := re.fullmatch(r"is there an? (.+)\?", question):
            return "yes" if any(fits(t, match[1], side) for t in things) else "no"
        if match := re.fullmatch(rf"is the (.+) ({RELATION}) the (.+)\?", question):
            first, second = (the_one([t for t in things if fits(t, match[n], side)]) for n in (1, 3))
            return "yes" if beside(first, second, match[2], side) else "no"
        if match := re.fullmatch(r"is the (.+) (bigger|smaller) than the (.+)\?", question):
            first, second = (the_one([t for t in things if fits(t, match[n], side)]) for n in (1, 3))
            assert first.longer != second.longer
            return "yes" if (first.longer > second.longer) == (match[2] == "bigger") else "no"
        match = re.fullmatch(r"what (color|kind of thing) is (the .+)\?", question)
        assert match, question
        entry = ATLAS[(found := meant(match[2], scene)).name]
        return str(entry["group"] if match[1] == "kind of thing" else entry["styles"][found.style]["colour"])

    @pytest.mark.parametrize("source", [TRAIN, Source("pretrain", 5, vocabulary="small")])
    def test_answers_are_right(self, source: Source) -> None:
        for row in rows("vqa", 480, source):
            assert self.answer(row.columns["question"], row.scene) == row.columns["answer"], row
            assert row.columns["answer"] in VQA_ANSWERS

    def test_answers_are_balanced_in_each_type(self) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows("vqa", 480):
            counts[row.columns["key"].split("/")[0]][row.columns["answer"]] += 1
        assert {kind: sum(c.values()) for kind, c in counts.items()} == dict.fromkeys(QUESTIONS, 60)
        assert all(max(c.values()) - min(c.values()) <= 1 for c in counts.values())
        assert set(counts["group"]) == set(GROUPS)
        assert set(counts["colour"]) == set(common_colours(TRAIN))

    def test_questions_do_not_give_their_answers_away(self) -> None:
        made = [r for r in rows("vqa", 1600) if r.columns["answer"] in ("yes", "no")]
        texts = [r.columns["question"] for r in made]
        assert len(texts) == 800
        assert guessed(texts, [r.columns["answer"] for r in made]) < 0.57


class TestStatements:
    def label(self, text: str, scene: Scene) -> str:
        """True of what is seen: yes; else maybe, where the curtain may hide what would make it so; else no."""
        side, things = scene.side, scene.things
        plurals = {e["plural"]: name for name, e in ATLAS.items()}
        hidden = scene.cover is not None
        if match := re.fullmatch(r"there (?:is|are) exactly (\w+) (.+)", text):
            wanted, noun = NUMBERS.index(match[1]), plurals.get(match[2], match[2])
            count = sum(t.name == noun for t in things)
            if hidden:
                return "contradiction" if count > wanted else "neutral"
            return "entailment" if count == wanted else "contradiction"
        if match := re.fullmatch(r"there are at least (\w+) (.+)", text):
            seen = sum(t.name == plurals[match[2]] for t in things) >= NUMBERS.index(match[1])
        elif match := re.fullmatch(rf"there is an? (.+) (?:on the|at the) ({SIDE})", text):
            seen = any(fits(t, match[1], side) and at(t, match[2], side) for t in things)
            if scene.cover is not None:
                x0, y0, x1, y1 = scene.cover
                hidden = {"left": x0 == 0, "right": x1 == side, "top": y0 == 0, "bottom": y1 == side}[match[2]]
        elif match := re.fullmatch(r"there is an? (.+)", text):
            seen = any(fits(t, match[1], side) for t in things)
        else:
            match = re.fullmatch(rf"an? (.+) is ({RELATION}) an? (.+)", text)
            assert match, text
            seen = any(
                beside(a, b, match[2], side)
                for a in things
                for b in things
                if a.name == match[1] and b.name == match[3]
            )
        return "entailment" if seen else "neutral" if hidden else "contradiction"

    @pytest.mark.parametrize("source", [TRAIN, Source("test", 1, vocabulary="small")])
    def test_labels_are_right(self, source: Source) -> None:
        for row in rows("entailment", 540, source):
            assert self.label(row.columns["hypothesis"], row.scene) == row.columns["label"], row

    def test_labels_are_balanced_in_each_template(self) -> None:
        counts = Counter((r.columns["key"].split("/")[0], r.columns["label"]) for r in rows("entailment", 540))
        assert counts == {(template, label): 30 for template in STATEMENTS for label in LABELS}

    def test_statements_do_not_give_their_labels_away(self) -> None:
        made = rows("entailment", 1440)
        texts = [r.columns["hypothesis"] for r in made]
        assert guessed(texts, [r.columns["label"] for r in made]) < 0.4

    def test_a_curtain_alone_does_not_either(self) -> None:
        counts = Counter((r.columns["label"], r.scene.cover is None) for r in rows("entailment", 540))
        assert 40 < counts["entailment", False] < 140
        assert counts["neutral", True] == 0


def guessed(texts: list[str], labels: list[str]) -> float:
    """Accuracy of naive Bayes on words and word pairs, learned from one half and asked about the other."""

    def words(text: str) -> list[str]:
        parts = text.split()
        return parts + [" ".join(pair) for pair in pairwise(parts)]

    half = len(texts) // 2
    counts = {label: Counter[str]() for label in sorted(set(labels))}
    for text, label in zip(texts[:half], labels[:half], strict=True):
        counts[label].update(words(text))
    vocabulary = len({w for c in counts.values() for w in c})

    def best(text: str) -> str:
        def score(label: str) -> float:
            total = sum(counts[label].values()) + vocabulary
            return sum(math.log((counts[label][w] + 1) / total) for w in words(text))

        return max(counts, key=score)

    return sum(best(t) == y for t, y in zip(texts[half:], labels[half:], strict=True)) / (len(texts) - half)


class TestCaptions:
    def test_every_caption_counts_every_thing(self) -> None:
        for row in rows("caption", 200):
            things = Counter(t.name for t in row.scene.things)
            captions = row.columns["caption"].split("&&")
            assert len(captions) == 3
            for caption in captions:
                listed = re.sub(r"^(a picture of |there (is|are) )", "", caption).split(" and ")
                found = Counter[str]()
                for part in listed:
                    number, _, noun = part.partition(" ")
                    if number in ("a", "an"):
                        found[noun] += 1
                    else:
                        found[next(n for n, e in ATLAS.items() if e["plural"] == noun)] += NUMBERS.index(number)
                assert found == things

    def test_the_first_goes_from_left_to_right(self) -> None:
        for row in rows("caption", 200):
            order = [p.split(" ", 1)[1] for p in row.columns["caption"].split("&&")[0].split(" and ")]
            left = [min(middle(t, 1)[0] for t in row.scene.things if noun in (t.name, ATLAS[t.name]["plural"]))
                    for noun in order]  # fmt: skip
            assert left == sorted(left)

    def test_none_is_cut(self) -> None:
        for example in emoji_task("emoji-caption", sizes={"train": 100}).split("train"):
            assert example.target == example.answers[0][0]


class TestClassification:
    @pytest.mark.parametrize(
        ("name", "count"), [("emoji-group", 18), ("emoji-style", 3), ("emoji-object", len(EMOJI)), ("emoji-count", 6)]
    )
    def test_classes_are_balanced_and_right(self, name: str, count: int) -> None:
        task = emoji_task(name, sizes={"train": 2 * count})
        assert len(task.choices) == count
        assert Counter(e.target for e in task.split("train")) == dict.fromkeys(task.choices, 2)
        assert all(e.augmentation == "" for e in task.split("train"))
        for row in rows(name.removeprefix("emoji-"), 30):
            things = row.scene.things
            right = {"emoji-group": things[0].group, "emoji-style": things[0].style, "emoji-object": things[0].name,
                     "emoji-count": NUMBERS[len(things)]}  # fmt: skip
            assert row.columns["label"] == right[name]
            assert name == "emoji-count" or len(things) == 1


class TestTasks:
    def test_names(self) -> None:
        held_out = [f"emoji-pretraining-{kind}" for kind in PRETRAINING]
        every = [*NAMES, *held_out]
        assert {t.name for t in TASKS} == {*every, *(f"{n}-small" for n in every)} <= set(task_names())
        for kind in PRETRAINING:
            named = load_task(f"emoji-pretraining-{kind}-small").split("test")[3]
            plain = pretraining_task(kind, vocabulary="small", split="pretrain-val").split("test")[3]
            assert (named.prompt, named.target, named.box) == (plain.prompt, plain.target, plain.box)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_task_needs_no_files(self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        monkeypatch.chdir(tmp_path)
        task = load_task(name, data=tmp_path)
        assert {k: len(v) for k, v in task.splits.items()} == {"train": 2000, "dev": 200, "test": 500}
        example = task.split("test")[-1]
        assert example.id == f"{name}/test/499"
        assert example.prompt.startswith(" ")
        assert (example.target in task.choices) if task.choices else example.target
        assert open_image(example.image, example.id).size == (96, 96)  # type: ignore[arg-type]
        assert task.split("test")[499] == example
        assert pickle.loads(pickle.dumps(example)) == example

    def test_prompts_and_answers_are_those_of_the_big_tasks(self) -> None:
        first = {name: emoji_task(name, sizes={"train": 1}).split("train")[0] for name in NAMES}
        assert re.fullmatch(r' which region does the text " .+ " describe\?', first["refemojig"].prompt)
        assert first["refemoji"].target == ",".join(map(str, first["refemoji"].box or ()))
        assert re.fullmatch(r' does the image describe " .+ "\?', first["emoji-entailment"].prompt)
        assert first["emoji-entailment"].choices == ("no", "yes", "maybe")
        assert first["emoji-vqa"].answers == ((first["emoji-vqa"].target, 1.0),)
        assert first["emoji-caption"].prompt == first["emoji-object"].prompt == " what does the image describe?"

    def test_the_picture_is_that_of_the_row(self) -> None:
        task = emoji_task("emoji-vqa", seed=4, side=64, sizes={"dev": 3})
        for n, example in enumerate(task.split("dev")):
            row = ROWS["vqa"](Source("val", 4, 64), n)
            assert (np.array(open_image(example.image)) == render(row.scene)).all()  # type: ignore[arg-type]
            assert (example.texts[0], example.target) == (row.columns["question"], row.columns["answer"])

    def test_few_shots(self) -> None:
        task = load_task("refemoji", shots=64, seed=2)
        assert len(task.split("train")) == 64
        assert [e.id for e in task.split("train")] == [
            e.id for e in load_task("refemoji").few_shot(64, 2).split("train")
        ]
        few = emoji_task("emoji-style", sizes={"train": 60, "test": 5}).few_shot(4)
        assert Counter(e.target for e in few.split("train")) == {"noto": 4, "fluent": 4, "twemoji": 4}

    def test_examples_are_the_same_in_another_process(self) -> None:
        code = "from tests.tasks.test_emoji import digest; print(digest())"
        run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert run.stdout.strip() == digest()

    def test_small_tasks_have_the_small_vocabulary(self) -> None:
        assert set(load_task("emoji-object-small").choices) == {*SMALL, *SMALL_NEW}
        assert set(load_task("emoji-object").choices) == set(EMOJI)
        named, made = load_task("refemojig-small"), emoji_task("refemojig", vocabulary="small")
        assert [e.prompt for e in named.split("train")[:9]] == [e.prompt for e in made.split("train")[:9]]
        things = [t for row in rows("refemojig", 60, Source("train", vocabulary="small")) for t in row.scene.things]
        assert {t.name for t in things} <= {*SMALL, *SMALL_NEW}

    def test_mistakes_are_named(self, message: Any) -> None:
        assert "unknown task on emoji scenes 'refemojis': did you mean 'refemoji'" in message(emoji_task, "refemojis")
        assert "unknown vocabulary 'tiny'" in message(emoji_task, "refemoji", vocabulary="tiny")
        assert "unknown split 'val'" in message(emoji_task, "refemoji", sizes={"val": 3})
        assert "unknown kind of pretraining 'text'" in message(pretraining_task, "text")
        assert "unknown split of pretraining 'train'" in message(pretraining_task, "vqa", split="train")
        split = emoji_task("refemoji", sizes={"train": 3}).split("train")
        with pytest.raises(IndexError, match="3"):
            split[3]


class TestPretraining:
    @pytest.mark.parametrize("kind", PRETRAINING)
    def test_streams_are_long_and_know_only_what_is_known(self, kind: str) -> None:
        task = pretraining_task(kind, vocabulary="full")
        stream = task.split("train")
        assert len(stream) == 2**31
        last = stream[2**31 - 1]
        assert isinstance(last, Example)
        assert last.target
        assert open_image(last.image).size == (96, 96)  # type: ignore[arg-type]
        validation = pretraining_task(kind, vocabulary="full", split="pretrain-val")
        assert len(validation.split("test")) == 500
        if kind == "classification":
            assert task.choices == validation.choices == KNOWN

    def test_grounding_leaves_relations_to_be_learned(self) -> None:
        texts = [r.columns["text"] for r in rows("grounding", 300, Source("pretrain"))]
        assert not [t for t in texts if re.search(rf"{RELATION}|closest to", t)]
        assert all(r.columns["text"] in SMALL for r in rows("detection", 60, Source("pretrain", vocabulary="small")))


def test_articles() -> None:
    assert [with_article(w) for w in ("apple", "unicorn", "umbrella", "ufo", "hat")] == [
        "an apple",
        "a unicorn",
        "an umbrella",
        "a ufo",
        "a hat",
    ]


def digest() -> str:
    """A few examples of each task, as text."""
    import hashlib

    found = hashlib.sha256()
    for name in NAMES:
        for example in emoji_task(name, sizes={"train": 3}).split("train"):
            pixels = np.array(open_image(example.image)).tobytes()  # type: ignore[arg-type]
            found.update(
                repr((example.id, example.prompt, example.target, example.answers, example.box)).encode() + pixels
            )
    return found.hexdigest()
