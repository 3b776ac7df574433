"""Opening pictures: as RGB, whole, or not at all."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pituning.errors import DataError
from pituning.example import LazyImage

if TYPE_CHECKING:
    from PIL.Image import Image

    from pituning.example import ImageSource

# More than eight bits a channel: Pillow would clip them at 255 and make the picture white.
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def open_image(source: ImageSource, name: str = "image") -> Image:
    """Read a picture and convert it to RGB.

    Transparency is dropped and an orientation tag is ignored, as in OFA's own code: boxes count pixels as stored.

    Args:
        name: what an error calls a picture that has no path, such as the example's id.

    Raises:
        DataError: if there is no such file, or it is broken, truncated, or has more than eight bits a channel.
    """
    with _opened(source, name) as image:
        image.load()
        if image.mode in _DEEP_MODES:
            raise DataError(
                f"{_shown(source, name)}: mode {image.mode} has more than 8 bits a channel; convert it to 8 bits first"
            )
        return image.convert("RGB")


def image_size(source: ImageSource, name: str = "image") -> tuple[int, int]:
    """Width and height of a picture in pixels, from its header alone.

    Raises:
        DataError: if there is no such file, or it is no picture.
    """
    with _opened(source, name) as image:
        return image.size


@contextmanager
def _opened(source: ImageSource, name: str) -> Iterator[Image]:
    """The picture, not decoded yet; whatever goes wrong inside the block, too, is the file's fault."""
    from PIL import Image, UnidentifiedImageError

    place = ""  # a file that something else names is told by both
    if isinstance(source, LazyImage):
        name, source = source.place, _read(source)
        place = f"{name}: " if isinstance(source, str | Path) else ""
    try:
        if isinstance(source, Image.Image):
            yield source
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{place}no such image file: {source!s}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{place}{_shown(source, name)}: not an image of a format that Pillow knows") from error
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types for a broken file
        found = f"{type(error).__name__}: {error}"
        raise DataError(f"{place}{_shown(source, name)}: not a readable image ({found})") from error


def _read(image: LazyImage) -> Path | str | bytes | Image:
    try:
        return image.read()
    except DataError:
        raise
    except Exception as error:  # whatever a store of pictures may raise
        raise DataError(f"{image.place}: the picture cannot be read ({type(error).__name__}: {error})") from error


def _shown(source: ImageSource, name: str) -> str:
    if isinstance(source, LazyImage):
        return source.place
    return str(source) if isinstance(source, str | Path) else name
