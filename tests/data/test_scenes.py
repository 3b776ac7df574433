"""Scenes are functions of their numbers, boxes are exact, splits are apart, and the emoji come with their licences."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pituning.data.emoji import COLOURS, EMOJI, FOLDER, GROUPS, KNOWN, NEW, SMALL, SMALL_NEW, STYLES, sprite
from pituning.data.scenes import SIDES, SPLITS, VISIBLE, Background, Draws, Scene, Wish, image, names_of, render, scene

BLACK = Background("plain", ((0, 0, 0), (0, 0, 0)))
WHITE = Background("plain", ((255, 255, 255), (255, 255, 255)))


def fingerprint(made: Scene) -> str:
    return hashlib.sha256(repr(made).encode() + render(made).tobytes()).hexdigest()


def some_scenes(count: int, split: str = "train", start: int = 0, **options: Any) -> list[Scene]:
    return [scene(split, start + n, **options) for n in range(count)]


class TestDeterminism:
    def test_the_same_numbers_give_the_same_scene_in_another_process(self) -> None:
        code = (
            "from tests.data.test_scenes import fingerprint; from pituning.data.scenes import scene\n"
            "print([fingerprint(scene(s, i, seed=7)) for s in ('train', 'pretrain') for i in (2**33, 11, 3)])"
        )
        run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        here = [fingerprint(scene(s, i, seed=7)) for s in ("train", "pretrain") for i in (3, 11, 2**33)[::-1]]
        assert run.stdout.strip() == str(here)

    def test_draws_are_those_of_philox(self) -> None:
        """The stream of NumPy's Philox is promised to stay: seeded with 0, 5 and 2**32 + 1 as pairs of 32 bits."""
        raw = np.random.Philox(np.random.SeedSequence([0, 0, 5, 0, 1, 1])).random_raw(128).tolist()
        draws = Draws(0, 5, 2**32 + 1)
        assert [draws.unit() for _ in range(128)] == [(r >> 11) / 2**53 for r in raw[::-1]]

    def test_everything_in_the_key_counts(self) -> None:
        made = [scene("train", 0), scene("train", 1), scene("train", 0, seed=1), scene("train", 2**32), scene("val", 0)]
        assert len({fingerprint(m) for m in made}) == len(made)

    def test_draws_are_uniform(self) -> None:
        draws = Draws(3)
        counts = Counter(draws.below(5) for _ in range(5000))
        assert set(counts) == set(range(5))
        assert min(counts.values()) > 850
        assert Counter(tuple(draws.shuffled("abc")) for _ in range(1200)).most_common()[-1][1] > 130


class TestSplits:
    def test_no_two_splits_share_a_picture(self) -> None:
        seen: dict[str, str] = {}
        for split in SPLITS:
            for made in some_scenes(600, split, side=48, names=SMALL):
                key = hashlib.sha256(render(made).tobytes()).hexdigest()
                assert seen.setdefault(key, split) == split, (split, made.index)
        assert len(seen) > 2990, "scenes repeat"

    @pytest.mark.parametrize("split", ["pretrain", "pretrain-val"])
    def test_pretraining_sees_known_emoji_in_two_styles(self, split: str) -> None:
        things = [t for made in some_scenes(700, split) for t in made.things]
        assert {t.style for t in things} == {"noto", "fluent"}
        assert {t.name for t in things} == set(KNOWN)

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_later_splits_have_new_emoji_and_the_third_style(self, split: str) -> None:
        things = [t for made in some_scenes(700, split) for t in made.things]
        assert {t.style for t in things} == set(STYLES)
        assert {t.name for t in things} == set(EMOJI)

    def test_the_small_vocabulary(self) -> None:
        assert (len(SMALL), len(SMALL_NEW)) == (100, 25)
        assert set(SMALL) <= set(KNOWN)
        assert set(SMALL_NEW) <= set(NEW)
        assert {EMOJI[n].group for n in SMALL} == set(GROUPS)
        assert set(names_of("pretrain", "small")) == set(SMALL)
        assert set(names_of("test", "small")) == {*SMALL, *SMALL_NEW}
        things = [t for made in some_scenes(100, "train", vocabulary="small") for t in made.things]
        assert {t.name for t in things} <= {*SMALL, *SMALL_NEW}

    def test_a_fifth_of_the_emoji_is_new(self) -> None:
        assert 0.15 < len(NEW) / len(EMOJI) < 0.22
        assert {EMOJI[n].group for n in NEW} == set(GROUPS)


class TestContents:
    def test_boxes_are_what_a_thing_changes(self) -> None:
        """With and without a thing, on black and on white: one of the two shows each of its pixels."""
        checked = 0
        for made in some_scenes(150):
            for thing in made.things:
                if any(o is not thing and _touch(o, thing) for o in made.things):
                    continue
                others = tuple(o for o in made.things if o is not thing)
                changed = np.zeros((made.side, made.side), dtype=bool)
                for background in (BLACK, WHITE):
                    whole = replace(made, background=background)
                    changed |= (render(whole) != render(replace(whole, things=others))).any(-1)
                rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
                assert thing.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), (made.index, thing)
                assert thing.visible == 1
                checked += 1
        assert checked > 100

    def test_hidden_pixels_are_in_no_box(self) -> None:
        hidden = 0
        for made in some_scenes(120):
            owner: dict[tuple[int, int], int] = {}
            sizes = []
            for n, thing in enumerate(made.things):
                ys, xs = np.nonzero(sprite(thing.name, thing.style, thing.longer).mask)
                sizes.append(len(xs))
                owner |= {(x + thing.at[0], y + thing.at[1]): n for x, y in zip(xs.tolist(), ys.tolist(), strict=True)}
            for n, thing in enumerate(made.things):
                xs, ys = zip(*(place for place, who in owner.items() if who == n), strict=True)
                assert thing.box == (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
                assert thing.visible == pytest.approx(len(xs) / sizes[n])
                assert thing.visible >= VISIBLE
                hidden += thing.visible < 1
        assert hidden > 3, "nothing overlaps, so nothing was tested"

    def test_two_to_six_things_often_several_of_a_kind(self) -> None:
        made = some_scenes(400)
        assert {len(m.things) for m in made} == {2, 3, 4, 5, 6}
        assert 0.3 < sum(len({t.name for t in m.things}) < len(m.things) for m in made) / 400 < 0.9
        assert 0.3 < sum(len({t.style for t in m.things}) == 1 for m in made) / 400 < 0.8
        assert {m.background.kind for m in made} == {"plain", "gradient", "stripes", "noise"}

    def test_sizes_lie_apart(self) -> None:
        lengths: dict[str, list[int]] = {"small": [], "medium": [], "large": []}
        for made in some_scenes(200):
            for t in made.things:
                lengths[t.size].append(t.longer)
                assert max(t.box[2] - t.box[0], t.box[3] - t.box[1]) >= t.longer - 4 or t.visible < 1
                assert min(t.box) >= 0
                assert max(t.box) <= made.side
        assert max(lengths["small"]) * 1.2 < min(lengths["medium"])
        assert max(lengths["medium"]) * 1.2 < min(lengths["large"])

    def test_things_stand_out(self) -> None:
        """Nearly every thing has more than half of its edge in another colour than what is behind it."""
        shares = []
        for made in some_scenes(200):
            change = np.abs(render(made).astype(int) - render(replace(made, things=()))).sum(-1)
            for t in (t for t in made.things if t.visible == 1):
                mask = np.pad(sprite(t.name, t.style, t.longer).mask, 1)
                inner = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
                edge = mask[1:-1, 1:-1] & ~inner
                (x, y), (height, width) = t.at, edge.shape
                shares.append((change[y : y + height, x : x + width][edge] > 40).mean())
        assert min(shares) > 0.4
        assert (np.array(shares) < 0.5).mean() < 0.01

    def test_wishes_are_fulfilled(self) -> None:
        wishes = [Wish("dog", "noto", "large"), Wish("dog", size="small"), Wish("tree")]
        for n in range(30):
            things = scene("test", n, wishes=wishes).things
            assert Counter(t.name for t in things) == {"dog": 2, "tree": 1}
            assert Counter(t.size for t in things if t.name == "dog") == {"large": 1, "small": 1}
            assert any((t.name, t.style, t.size) == ("dog", "noto", "large") for t in things)

    @pytest.mark.parametrize("where", SIDES)
    def test_a_curtain_hides_a_half_and_nothing_else(self, where: str) -> None:
        for n in range(20):
            made = scene("train", n, wishes=[Wish("dog"), Wish("cat", size="large")], cover=where)
            assert made.cover is not None
            x0, y0, x1, y1 = map(int, made.cover)
            assert (x1 - x0) * (y1 - y0) == made.side**2 / 2
            bare = replace(made, things=())
            assert (render(made) == render(bare))[y0:y1, x0:x1].all()
            assert len(np.unique(render(made)[y0:y1, x0:x1])) == 2

    def test_larger_pictures(self) -> None:
        made = scene("train", 5, side=192)
        assert render(made).shape == (192, 192, 3)
        assert render(made).dtype == np.uint8
        assert image(made).size == (192, 192)
        assert min(t.longer for t in made.things) >= 0.2 * 192


def _touch(a: Any, b: Any) -> bool:
    return bool(min(a.box[2], b.box[2]) > max(a.box[0], b.box[0]) and min(a.box[3], b.box[3]) > max(a.box[1], b.box[1]))


class TestRefusals:
    def test_what_is_out_of_range_is_named(self, message: Any) -> None:
        assert "unknown split of scenes 'dev'" in message(scene, "dev", 0)
        assert "-1" in message(scene, "train", -1)
        assert "2**64" in message(scene, "train", 0, seed=2**64)
        assert "at least 48 pixels" in message(scene, "train", 0, side=40)
        assert "unknown vocabulary 'big'" in message(scene, "train", 0, vocabulary="big")
        assert "did you mean 'dog'" in message(scene, "train", 0, names=["dogg"])
        assert "unknown half to cover" in message(scene, "train", 0, cover="middle")

    def test_what_has_no_room(self, message: Any) -> None:
        text = message(scene, "train", 0, wishes=[Wish("dog", size="large")] * 9)
        assert text.startswith("9 things with sizes ['large'")
        assert text.endswith("have no room in a scene")


class TestAtlas:
    def test_it_is_small(self) -> None:
        assert sum(f.stat().st_size for f in FOLDER.iterdir() if f.is_file()) <= 6_000_000

    def test_names_are_short_unique_and_say_nothing_of_looks(self) -> None:
        assert 220 <= len(EMOJI) <= 270
        assert len({e.plural for e in EMOJI.values()}) == len(EMOJI)
        for e in EMOJI.values():
            words = e.name.split()
            assert 1 <= len(words) <= 2
            assert not {*COLOURS, "small", "big", "left", "right", "top", "bottom", "middle", "thing"} & {*words} - {
                "top"
            }
            assert e.name == e.name.lower()
            assert e.name not in GROUPS

    def test_no_name_means_another_emoji_as_well(self) -> None:
        """ "hot dog" ends like "dog" and means something else; no other name ends in one."""
        inside = {(a, b) for a in EMOJI for b in EMOJI if a != b and a.endswith(f" {b}")}
        assert inside == {("hot dog", "dog"), ("teddy bear", "bear"), ("fire truck", "truck")}

    @pytest.mark.parametrize("style", STYLES)
    def test_boxes_are_tight_and_apart(self, style: str) -> None:
        with Image.open(FOLDER / f"{style}.webp") as opened:
            sheet = opened.convert("RGBA")
        alpha = np.array(sheet.getchannel("A"))
        for e in EMOJI.values():
            x0, y0, x1, y1 = e.boxes[style]
            inner = alpha[y0:y1, x0:x1]
            assert max(inner.shape) == 64
            assert min(inner.max(0)[0], inner.max(0)[-1], inner.max(1)[0], inner.max(1)[-1]) > 0
            alpha[y0:y1, x0:x1] = 0
        assert not alpha.any(), "something lies outside of all boxes"

    def test_colours_are_words_or_nothing(self) -> None:
        found = Counter(c for e in EMOJI.values() for c in e.colours.values())
        assert set(found) == {*COLOURS, ""}
        assert {EMOJI[n].colours["noto"] for n in ("frog", "eggplant", "tomato", "lemon")} == {
            "green",
            "purple",
            "red",
            "yellow",
        }

    def test_licences_are_there(self) -> None:
        notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
        sources = json.loads((FOLDER / "atlas.json").read_text(encoding="utf-8"))["sources"]
        for style in STYLES:
            package, version = sources[style].rsplit(" ", 1)
            assert f"{style}.webp" in notice
            assert f"{package} {version}" in notice
        for part in (
            "Apache License, Version 2.0",
            "Copyright (c) Microsoft Corporation",
            "Permission is hereby granted",
        ):
            assert part in notice
        assert "https://creativecommons.org/licenses/by/4.0/" in notice
        assert "Changes:" in notice
