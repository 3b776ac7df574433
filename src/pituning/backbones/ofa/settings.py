"""`ProcessorSettings`: what `preprocessor_config.json` holds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pituning.backbones.ofa.images import Channels
from pituning.errors import DataError

Positive = Annotated[int, Field(gt=0)]
Spread = Annotated[float, Field(gt=0)]


class ProcessorSettings(BaseModel):
    """Sizes and statistics of an OFA processor.

    Attributes:
        image_size: both sides of an image after resizing, in pixels.
        image_mean, image_std: of red, green and blue, for values of 0 to 1. Released checkpoints use 0.5; other
            choices are :data:`IMAGENET_MEAN` and :data:`IMAGENET_STD`.
        max_image_size: pixels that the location bins span.
        max_source_length: words kept of a caption, question or sentence that goes into a prompt.
        max_target_length: words kept of a caption that is to be learned.
        num_codes, num_bins: image codes and location bins of the vocabulary. The vocabulary itself decides; where it
            has none (the plain vocabulary of BART), so many are appended.
        vocab_size: ids of the model. Where the vocabulary file has more, the rest are BPE pieces without an id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: Positive = 480
    image_mean: Channels = (0.5, 0.5, 0.5)
    image_std: tuple[Spread, Spread, Spread] = (0.5, 0.5, 0.5)
    max_image_size: Positive = 512
    max_source_length: Positive = 80
    max_target_length: Positive = 30
    num_codes: Annotated[int, Field(ge=0)] | None = None
    num_bins: Annotated[int, Field(ge=0)] | None = None
    vocab_size: Positive | None = None

    @classmethod
    def checked(cls, values: dict[str, Any], source: str) -> ProcessorSettings:
        """Settings from a dictionary.

        Raises:
            DataError: if some are not valid; all of them are listed.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, p['loc']))}: {p['msg']}, found {p['input']!r}" for p in error.errors()
            )
            raise DataError(f"{source}: {problems}") from error
