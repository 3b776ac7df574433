"""A stand-in for OFA: a tiny T5 that reads the prompt alone but can point at something, and grounding tasks for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pituning.backbones.base import Backbone, Batch
from pituning.backbones.seq2seq import Seq2SeqBackbone
from pituning.data.images import open_image
from pituning.example import Box, Example
from pituning.tasks import GroundingRow, Task, grounding_from_rows

SIZE = (40, 30)
CORNERS = ((0.0, 0.0), (0.0, 15.0), (20.0, 0.0), (20.0, 15.0))


class PointingBackbone(Seq2SeqBackbone):
    """Points at one of four quarters of the picture, or at nothing: whatever the encoder makes of the phrase."""

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """As for text, with the sizes of the pictures."""
        images = [None if e.image is None else open_image(e.image, e.id) for e in examples]
        batch = super().collate([replace(e, image=None) for e in examples])
        return {**batch, "sizes": [None if i is None else i.size for i in images]}

    def locate(self, batch: Batch, **options: Any) -> list[Box | None]:
        """One of four boxes, or none, from five numbers of the encoder's output at a token of the phrase."""
        assert not torch.is_grad_enabled()
        hidden = self.model.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        assert all(size == SIZE for size in batch["sizes"])
        chosen = [int(row) for row in hidden[:, 30, 5:10].argmax(1)]
        return [None if c == 4 else (*CORNERS[c], CORNERS[c][0] + 20, CORNERS[c][1] + 15) for c in chosen]


def pointing(t5: Backbone) -> PointingBackbone:
    """The stand-in on the model of another backbone."""
    return PointingBackbone("tiny-pointing", t5.model, t5.tokenizer)


def grounding_rows(count: int, seed: int = 0) -> list[GroundingRow]:
    """Phrases of random letters, each about one quarter of a picture."""
    rng = random.Random(seed)
    image = Image.new("RGB", SIZE, "white")
    rows = []
    for index in range(count):
        x, y = rng.choice(CORNERS)
        text = " ".join("".join(rng.choices("abdefgi", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 5)))
        rows.append(GroundingRow(str(index), image, text, (x + 1, y + 1, x + 19, y + 14)))
    return rows


def grounding_task(train: int = 12, test: int = 16, seed: int = 0, name: str = "refs") -> Task:
    """A grounding task of such rows."""
    splits = {"train": grounding_rows(train, seed), "test": grounding_rows(test, seed + 1000)}
    return grounding_from_rows(name, splits)


def write_grounding(folder: Path, count: int, seed: int = 0) -> Path:
    """Such rows as a TSV file with its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, "white").save(folder / "white.png")
    lines = ["\t".join(map(str, ("white.png", row.text, *row.box))) for row in grounding_rows(count, seed)]
    path = folder / f"{seed}.tsv"
    path.write_text("\n".join(["image\ttext\tx0\ty0\tx1\ty1", *lines, ""]))
    return path
