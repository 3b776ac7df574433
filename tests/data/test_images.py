"""Pictures open as RGB and whole, or not at all; what an `Example` holds of them."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
from contextlib import suppress
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pituning.data.images import image_size, open_image
from pituning.errors import DataError
from pituning.example import Example, LazyImage

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")


def picture(width: int = 37, height: int = 23, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


class TestOpening:
    def test_from_a_path_bytes_or_memory(self, tmp_path: Path) -> None:
        image = picture()
        path = tmp_path / "a.png"
        path.write_bytes(encoded(image))
        with Image.open(path) as lazy:
            for source in (path, str(path), path.read_bytes(), image, lazy):
                opened = open_image(source)
                assert (opened.mode, opened.size) == ("RGB", (37, 23))
                assert np.array_equal(np.asarray(opened), np.asarray(image))
                assert opened is not image
                assert image_size(source) == (37, 23)

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "YCbCr"])
    def test_every_mode_becomes_rgb(self, mode: str) -> None:
        image = picture().convert("RGB").convert(mode)
        file = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
        assert np.array_equal(np.asarray(open_image(file)), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("mode", [np.uint16, np.float32, np.int32])
    def test_more_than_eight_bits_would_be_clipped(self, mode: Any, message: Any) -> None:
        image = Image.fromarray((np.arange(12).reshape(3, 4) * 5000).astype(mode))
        assert "8 bits" in message(open_image, image, "a/train/3")
        assert message(open_image, encoded(image, "TIFF"), "a/train/3").startswith("a/train/3: mode ")


class TestBrokenFiles:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_a_broken_file_is_an_error_that_names_it_and_nothing_else(
        self, kind: str, tmp_path: Path, message: Any
    ) -> None:
        whole = encoded(picture(64, 48), kind)
        rng = random.Random(kind)
        path = tmp_path / "broken"
        refused = 0
        for trial in range(120):
            broken = bytearray(whole[: rng.randrange(len(whole))] if trial % 2 else whole)
            for _ in range(0 if trial % 2 else rng.randint(1, 20)):
                broken[rng.randrange(min(len(broken), 400))] = rng.randrange(256)
            path.write_bytes(broken)
            with suppress(DataError):
                assert open_image(path).mode == "RGB"
                continue
            refused += 1
            assert message(open_image, path).startswith(f"{path}: ")
        assert refused > 40, "cutting a file in two must be noticed"

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_a_truncated_file_is_never_read_in_part(self, kind: str, message: Any) -> None:
        whole = encoded(picture(64, 48), kind)
        for share in (0.3, 0.6, 0.9):
            cut = whole[: int(share * len(whole))]
            assert message(open_image, cut, "refcoco/train/7").startswith("refcoco/train/7: not a")
        assert image_size(whole[: len(whole) // 2]) == (64, 48), "the header is whole"

    def test_no_picture_at_all(self, tmp_path: Path, message: Any) -> None:
        (tmp_path / "a.txt").write_text("no picture")
        assert (
            message(open_image, tmp_path / "a.txt")
            == f"{tmp_path / 'a.txt'}: not an image of a format that Pillow knows"
        )
        assert message(open_image, tmp_path / "b.png") == f"no such image file: {tmp_path / 'b.png'}"
        assert message(image_size, tmp_path / "b.png") == f"no such image file: {tmp_path / 'b.png'}"
        assert message(open_image, tmp_path).startswith(f"{tmp_path}: not a readable image")
        assert message(open_image, b"", "x/train/0") == "x/train/0: not an image of a format that Pillow knows"


class TestLazy:
    @pytest.mark.parametrize("call", [open_image, image_size])
    @pytest.mark.parametrize(
        ("found", "said"),
        [
            (b"text", "a.tsv:3: not an image of a format that Pillow knows"),
            (Path("/nowhere/a.png"), "a.tsv:3: no such image file: /nowhere/a.png"),
            ("/nowhere/a.png", "a.tsv:3: no such image file: /nowhere/a.png"),
            (OSError("gone"), "a.tsv:3: the picture cannot be read (OSError: gone)"),
            (DataError("a.tsv:3: said already"), "a.tsv:3: said already"),
        ],
    )
    def test_every_error_names_the_place(self, call: Any, found: Any, said: str, message: Any) -> None:
        def read() -> Any:
            if isinstance(found, Exception):
                raise found
            return found

        assert message(call, LazyImage("a.tsv:3", read), "an id") == said

    def test_a_broken_file_is_named_by_place_and_path(self, tmp_path: Path, message: Any) -> None:
        (tmp_path / "a.png").write_bytes(encoded(picture())[:200])
        image = LazyImage("d[3]", lambda: tmp_path / "a.png")
        assert message(open_image, image).startswith(f"d[3]: {tmp_path / 'a.png'}: not a readable image")

    def test_whatever_it_gives_is_opened(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(encoded(picture()))
        for found in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(picture()), picture()):
            image = LazyImage("here", lambda found=found: found)
            assert np.array_equal(np.asarray(open_image(image)), np.asarray(picture()))
            assert image_size(image) == (37, 23)

    def test_more_than_eight_bits_names_the_place(self, message: Any) -> None:
        deep = Image.fromarray(np.zeros((3, 4), np.uint16))
        assert message(open_image, LazyImage("here", lambda: deep)).startswith("here: mode I;16 has more than 8 bits")


class TestExample:
    @pytest.fixture(params=["path", "bytes", "memory"])
    def source(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        path = tmp_path / "a.png"
        path.write_bytes(encoded(picture()))
        return {"path": path, "bytes": path.read_bytes(), "memory": picture()}[request.param]

    def test_an_example_with_a_picture_is_a_value(self, source: Any) -> None:
        one, same = (Example("i", ("x",), "x", "y", image=source, box=(0.0, 1.0, 2.0, 3.0)) for _ in range(2))
        again = pickle.loads(pickle.dumps(one))
        assert one == same == again
        assert len({one, same, again}) == 1
        assert np.array_equal(np.asarray(open_image(again.image)), np.asarray(picture()))
        assert again.box == (0.0, 1.0, 2.0, 3.0)
        assert len(repr(one)) < 200, "no pixels in an error message"
        with pytest.raises(FrozenInstanceError):
            one.box = None  # type: ignore[misc]

    def test_pictures_tell_examples_apart(self) -> None:
        one, other = (Example("i", ("x",), "x", "y", image=picture(seed=seed)) for seed in (0, 1))
        assert one != other
        assert one != Example("i", ("x",), "x", "y")


def test_pillow_is_imported_only_to_open_a_picture() -> None:
    code = "import sys, pituning.tasks, pituning.data.images, pituning.example; print('PIL' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
