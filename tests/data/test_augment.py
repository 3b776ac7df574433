"""Augmented training pictures: the same with the same seed, and spread as the recipe says."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pituning.data import augment
from pituning.data.augment import (
    AUGMENTATIONS,
    INCREASING_OPERATIONS,
    LARGEST_SIDE,
    MILD_OPERATIONS,
    Augmenter,
    Operation,
    augmenter,
    rand_augment,
    random_crop,
    random_erase,
    random_flip,
)
from pituning.example import Example

NAME = "image-classification"
DRAWS = 1000


def scene(width: int = 48, height: int = 36) -> Image.Image:
    """Smooth colours of medium contrast with a bright corner: every operation shows, and no symmetry hides a flip."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([60 + 120 * x, 80 + 60 * y, 50 + 50 * x + 50 * np.sin(9 * y)], axis=-1)
    pixels[: height // 4 + 1, : width // 4 + 1] += 40
    return Image.fromarray(pixels.astype(np.uint8))


def example(image: Any, **options: Any) -> Example:
    return Example("birds/train/3", ("bird",), "what is it?", "bird", image=image, **options)


def made(seed: int) -> Augmenter:
    result = augmenter(NAME, seed)
    assert result is not None
    return result


def pictures(augment: Augmenter, count: int, source: Image.Image | None = None) -> list[bytes]:
    source = source or scene()
    found = [augment(example(source)).image for _ in range(count)]
    return [f"{image.size}".encode() + image.tobytes() for image in found if isinstance(image, Image.Image)]


class TestDraws:
    def test_the_seed_decides(self) -> None:
        first = pictures(made(3), 20)
        assert pictures(made(3), 20) == first
        assert not set(pictures(made(4), 20)) & set(first)

    def test_the_same_example_looks_different_each_time(self) -> None:
        assert len(set(pictures(made(0), 50))) == 50

    def test_pickling_keeps_the_place_in_the_sequence(self) -> None:
        original = made(5)
        pictures(original, 7)
        copy = pickle.loads(pickle.dumps(original))
        assert pictures(copy, 10) == pictures(original, 10)

    def test_the_source_stays_as_it_was(self) -> None:
        source = scene()
        pictures(made(0), 30, source)
        assert source.tobytes() == scene().tobytes()

    def test_only_the_picture_changes(self) -> None:
        before = example(scene(), choices=("bird", "dog"), weight=0.5, augmentation=NAME)
        after = made(0)(before)
        assert after.image is not before.image
        assert (after.id, after.texts, after.choices, after.weight) == (before.id, ("bird",), ("bird", "dog"), 0.5)

    @pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 200), (200, 3), (640, 480), (1500, 1100)])
    def test_any_size_gives_a_square_of_bounded_side(self, size: tuple[int, int]) -> None:
        source, augment = scene(*size), made(1)
        for _ in range(20):
            image = augment(example(source)).image
            assert isinstance(image, Image.Image)
            assert image.mode == "RGB"
            assert image.width == image.height
            # of a thin picture, only a part whose aspect ratio is at most 4/3 fits
            assert 1 <= image.width <= min(LARGEST_SIDE, max(size), -(-min(size) * 4 // 3))

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
    def test_any_mode_becomes_rgb(self, mode: str) -> None:
        image = made(1)(example(scene().convert(mode))).image
        assert isinstance(image, Image.Image)
        assert image.mode == "RGB"

    def test_the_stages_follow_the_recipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []

        def spy(name: str) -> Callable[..., Image.Image]:
            def stage(image: Image.Image, _: np.random.Generator, *arguments: Any, **options: Any) -> Image.Image:
                seen.append((name, *arguments, options))
                return image

            return stage

        for name in ("random_crop", "random_flip", "rand_augment", "random_erase"):
            monkeypatch.setattr(augment, name, spy(name))
        made(0)(example(scene()))
        assert seen == [
            ("random_crop", {}),
            ("random_flip", {}),
            ("rand_augment", INCREASING_OPERATIONS, {"magnitude": 9, "std": 0.5}),
            ("rand_augment", MILD_OPERATIONS, {"magnitude": 7, "std": 0}),
            ("random_erase", {}),
        ]


class TestCropAndFlip:
    def test_area_aspect_and_place_of_the_crop(self) -> None:
        """A picture whose red and green count columns and rows shows which part of it was taken."""
        side = 240
        columns, rows = np.meshgrid(np.arange(side), np.arange(side))
        source = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))
        random = np.random.default_rng(0)
        areas, ratios, lefts = [], [], []
        for _ in range(DRAWS):
            pixels = np.asarray(random_crop(source, random)).astype(int)
            left, right = pixels[..., 0].min(), pixels[..., 0].max() + 1
            top, bottom = pixels[..., 1].min(), pixels[..., 1].max() + 1
            areas.append((right - left) * (bottom - top) / side**2)
            ratios.append((right - left) / (bottom - top))
            lefts.append(left / max(1, side - (right - left)))
        # the bicubic stretch may miss or invent a line at an edge
        assert 0.07 < min(areas) < 0.12
        assert 0.9 < max(areas) <= 1
        assert 0.73 < min(ratios) < 0.8
        assert 1.25 < max(ratios) < 1.37
        # uniform over 0.08..1 would give 0.54; wide or tall draws that do not fit thin out the large areas
        assert 0.45 < np.mean(areas) < 0.55
        assert abs(np.median(ratios) - 1) < 0.03
        assert abs(np.mean(lefts) - 0.5) < 0.05

    @pytest.mark.parametrize(("size", "box"), [((3, 200), (0, 98, 3, 102)), ((200, 3), (98, 0, 102, 3))])
    def test_a_thin_picture_gives_its_centre(self, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
        source = scene(*size)
        expected = source.crop(box).resize((4, 4), Image.Resampling.BICUBIC)
        assert random_crop(source, np.random.default_rng(0)).tobytes() == expected.tobytes()

    def test_half_of_the_pictures_are_flipped(self) -> None:
        source, random = scene(), np.random.default_rng(0)
        mirrored = Image.fromarray(np.asarray(source)[:, ::-1].copy())
        counts = Counter(random_flip(source, random).tobytes() for _ in range(DRAWS))
        assert set(counts) == {source.tobytes(), mirrored.tobytes()}
        assert abs(counts[mirrored.tobytes()] / DRAWS - 0.5) < 0.06


def pixels_of(operation: Operation, severity: float, source: Image.Image | None = None) -> np.ndarray[Any, Any]:
    return np.asarray(operation(source or scene(), severity)).astype(int)


class TestOperations:
    @pytest.mark.parametrize("severity", [-1.0, -0.9, -0.7, 0.7, 0.9, 1.0])
    @pytest.mark.parametrize("operations", [INCREASING_OPERATIONS, MILD_OPERATIONS], ids=["increasing", "mild"])
    def test_each_changes_the_picture_and_keeps_its_size(
        self, operations: Mapping[str, Operation], severity: float
    ) -> None:
        for name, operation in operations.items():
            found = operation(scene(), severity)
            assert (found.mode, found.size) == ("RGB", (48, 36)), name
            assert (found.tobytes() == scene().tobytes()) == (name == "identity"), name
            for size in ((1, 1), (3, 50)):
                assert operation(scene(*size), severity).size == size, name

    def test_there_are_as_many_as_the_recipe_names(self) -> None:
        assert (len(INCREASING_OPERATIONS), len(MILD_OPERATIONS)) == (15, 10)

    @pytest.mark.parametrize("severity", [-0.93, 0.9, 0.5])
    def test_changes_of_single_values(self, severity: float) -> None:
        """Against the definitions, value by value."""
        level, before = abs(severity), np.asarray(scene()).astype(int)
        threshold, kept = 256 - int(256 * level), {0.93: 1, 0.9: 1, 0.5: 2}[level]
        expected = {
            "invert": 255 - before,
            "solarize": np.where(before < threshold, before, 255 - before),
            "solarize-add": np.where(before < 128, before + int(110 * level), before),
            "posterize": before // 2 ** (8 - kept) * 2 ** (8 - kept),
            "brightness": np.clip(before * max(0.1, 1 + 0.9 * severity), 0, 255),
        }
        for name, pixels in expected.items():
            assert np.abs(pixels_of(INCREASING_OPERATIONS[name], severity) - pixels).max() <= 1, name
        mild = np.clip(before * (0.1 + 1.8 * level), 0, 255)
        assert np.abs(pixels_of(MILD_OPERATIONS["brightness"], severity) - mild).max() <= 1

    def test_saturation_and_contrast_go_either_way(self) -> None:
        for name, spread in (("color", lambda p: np.ptp(p, axis=-1).mean()), ("contrast", lambda p: p.std())):
            less, more = (spread(pixels_of(INCREASING_OPERATIONS[name], severity)) for severity in (-0.9, 0.9))
            assert less < 0.3 * spread(np.asarray(scene()).astype(int)) < 0.3 * more, name

    @pytest.mark.parametrize(("operations", "share"), [(INCREASING_OPERATIONS, 0.45), (MILD_OPERATIONS, 1 / 48)])
    def test_translations_leave_grey_behind(self, operations: Mapping[str, Operation], share: float) -> None:
        source = scene(160, 160)
        before = np.asarray(source).astype(int)
        pixels, severity = {0.45: (36, 0.5), 1 / 48: (3, 0.9)}[share]
        assert share * severity * 160 == pytest.approx(pixels)
        moved = pixels_of(operations["translate-x"], severity, source)
        assert np.abs(moved[:, :-pixels] - before[:, pixels:]).max() <= 1
        assert (moved[:, -pixels:] == 128).all()
        moved = pixels_of(operations["translate-y"], -severity, source)
        assert np.abs(moved[pixels:] - before[:-pixels]).max() <= 1
        assert (moved[:pixels] == 128).all()

    @pytest.mark.parametrize("operations", [INCREASING_OPERATIONS, MILD_OPERATIONS], ids=["increasing", "mild"])
    def test_shears_and_rotations_by_the_angle(self, operations: Mapping[str, Operation]) -> None:
        """A white bar through the middle of a black picture: its slope afterwards."""
        upright = np.zeros((201, 201, 3), np.uint8)
        upright[:, 98:103] = 255
        bar, lying = Image.fromarray(upright), Image.fromarray(upright.transpose(1, 0, 2).copy())

        def slope(image: Image.Image, axis: int) -> float:
            bright = np.asarray(image)[..., 0] > 200
            middles = [np.flatnonzero(line).mean() for line in (bright if axis else bright.T)[60:140]]
            return float(np.polyfit(np.arange(len(middles)), middles, 1)[0])

        for severity in (-0.9, 0.7):
            assert slope(operations["shear-x"](bar, severity), 1) == pytest.approx(-0.3 * severity, abs=0.01)
            assert slope(operations["shear-y"](lying, severity), 0) == pytest.approx(-0.3 * severity, abs=0.01)
            turned = slope(operations["rotate"](bar, severity), 1)
            assert turned == pytest.approx(np.tan(np.radians(30 * severity)), abs=0.01)


class TestRandAugment:
    def test_two_operations_half_of_the_time_in_either_direction(self) -> None:
        calls: list[tuple[str, float]] = []

        def recorder(name: str) -> Operation:
            def record(image: Image.Image, severity: float) -> Image.Image:
                calls.append((name, severity))
                return image

            return record

        operations = {name: recorder(name) for name in "abcde"}
        random, numbers, source = np.random.default_rng(0), Counter[int](), scene()
        for _ in range(DRAWS):
            before = len(calls)
            assert rand_augment(source, random, operations, magnitude=9, std=0.5) is source
            numbers[len(calls) - before] += 1
        assert set(numbers) == {0, 1, 2}
        assert abs(numbers[0] / DRAWS - 0.25) < 0.06
        assert abs(numbers[2] / DRAWS - 0.25) < 0.06
        assert all(abs(count / len(calls) - 0.2) < 0.06 for count in Counter(name for name, _ in calls).values())
        severities = np.array([severity for _, severity in calls])
        assert abs(np.mean(severities > 0) - 0.5) < 0.06
        levels = np.abs(severities)
        assert abs(levels.mean() - 0.9) < 0.01
        assert abs(levels.std() - 0.05) < 0.01
        assert levels.max() == 1  # cut there: 2.3 % lie beyond

    def test_without_deviation_the_magnitude_is_exact(self) -> None:
        seen: set[float] = set()

        def record(image: Image.Image, severity: float) -> Image.Image:
            seen.add(severity)
            return image

        for seed in range(20):
            rand_augment(scene(), np.random.default_rng(seed), {"a": record}, magnitude=7, std=0)
        assert seen == {0.7, -0.7}


class TestErasing:
    def test_share_area_and_noise(self) -> None:
        source = Image.new("RGB", (120, 90), (1, 2, 3))  # hardly ever drawn as noise
        random = np.random.default_rng(0)
        areas, values = [], []
        for _ in range(DRAWS):
            pixels = np.asarray(random_erase(source, random))
            changed = (pixels != (1, 2, 3)).any(axis=-1)
            if changed.any():
                rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
                assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
                areas.append(changed.mean())
                values.append(pixels[changed] / 255)
        assert abs(len(areas) / DRAWS - 0.25) < 0.06
        assert 0.015 < min(areas) < 0.06
        assert 0.25 < max(areas) < 0.34
        noise = np.concatenate(values)
        # of 0.5 + 0.5 z, one value in 6.3 lies on either side of [0, 1]
        assert abs(np.mean(noise == 0) - 0.1587) < 0.01
        assert abs(np.mean(noise == 1) - 0.1587) < 0.01
        assert abs(np.mean(noise < 0.25) - 0.3085) < 0.01
        assert abs(noise.mean() - 0.5) < 0.01

    def test_a_single_pixel_is_never_erased(self) -> None:
        source, random = scene(1, 1), np.random.default_rng(0)
        assert {random_erase(source, random).tobytes() for _ in range(50)} == {source.tobytes()}


class TestNames:
    @pytest.mark.parametrize("name", ["", "none"])
    def test_nothing_to_do(self, name: str) -> None:
        assert augmenter(name, 0) is None

    def test_every_name_is_described(self) -> None:
        assert set(AUGMENTATIONS) == {"none", NAME}
        assert all(text.endswith(".") and "\n" not in text for text in AUGMENTATIONS.values())

    def test_an_unknown_name_names_its_neighbours(self, message: Any) -> None:
        assert message(augmenter, "image-clasification", 0) == (
            "unknown augmentation 'image-clasification': did you mean 'image-classification'? "
            "Known: image-classification, none."
        )

    def test_text_passes_through_unchanged(self) -> None:
        for item in (example(None), example(None, box=(0.0, 0.0, 1.0, 1.0))):
            assert made(0)(item) is item

    def test_a_box_is_refused(self, message: Any) -> None:
        text = message(made(0), example(scene(), box=(1.0, 2.0, 3.0, 4.0)))
        assert text.startswith("birds/train/3: augmentation 'image-classification'")
        assert "(1.0, 2.0, 3.0, 4.0)" in text
        assert "leave Example.augmentation empty" in text

    def test_a_broken_picture_is_named(self, message: Any) -> None:
        assert message(made(0), example(b"not a picture")).startswith("birds/train/3: not an image")
