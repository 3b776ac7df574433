"""Image classification: the class names are the answers."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from pituning.data.records import Records
from pituning.data.tables import shortened
from pituning.errors import DataError
from pituning.example import Example
from pituning.tasks.kind import Kind, filled

PROMPT = " what does the image describe?"


@dataclass(frozen=True)
class ImageClassification(Kind):
    """Pictures of one thing each.

    Attributes:
        classes: names of the classes in label order, without underscores.

    Source: Wang et al., "OFA", ICML 2022, §4 (ImageNet); the paper's Table 2 (eight data sets).
    """

    title = "image classification"
    columns = MappingProxyType({"image": 0, "label": 2})
    aliases = MappingProxyType({"label": ("class", "label_name", "fine_label")})
    metrics = ("accuracy",)

    classes: tuple[str, ...] = ()

    @property
    def choices(self) -> tuple[str, ...]:
        """See :attr:`Kind.choices`."""
        return self.classes

    def example(self, records: Records, row: int, identifier: str) -> Example:
        """See :meth:`Kind.example`."""
        name = class_name(filled(records, row, "label"))
        if name not in self.classes:
            raise DataError(
                f"{records.place(row, 'label')}: {shortened(name)!r} is not one of the {len(self.classes)} classes, such as "
                f"{', '.join(map(repr, self.classes[:3]))}"
            )
        return Example(
            identifier,
            ("",),
            PROMPT,
            name,
            self.classes,
            image=records.image(row, "image"),
            augmentation="image-classification",
        )


def class_name(text: str) -> str:
    """A class's name as an answer: spaces for underscores.

    >>> class_name("apple_pie")
    'apple pie'
    """
    return " ".join(text.replace("_", " ").split())
