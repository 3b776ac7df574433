"""Folders that the tests of several verbs share: a tiny backbone, data, and a pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pituning.experts import ExpertPool
from tests.conftest import BackboneOf, RandomExamples, RandomExpert


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, backbone_of: BackboneOf) -> Path:
    """Folder with a tiny random BERT, as transformers saves it."""
    folder = tmp_path_factory.mktemp("backbone") / "bert"
    backbone = backbone_of("encoder")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, random_examples: RandomExamples) -> Path:
    """Folder with tiny files for three built-in tasks."""
    folder = tmp_path_factory.mktemp("data")
    for number, task in enumerate(("movie_quotes", "word_tone", "pocket_gear")):
        (folder / task).mkdir()
        for split, size in {"train": 16, "test": 8}.items():
            examples = random_examples(size, 10 * number + size)
            rows = [f"{e.texts[0]}\t{('negative', 'positive')[i % 2]}" for i, e in enumerate(examples)]
            (folder / task / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows, ""]))
    return folder


@pytest.fixture
def pool(tmp_path: Path, backbone_of: BackboneOf, random_expert: RandomExpert) -> ExpertPool:
    """A pool of two random experts, for word_tone and pocket_gear."""
    found = ExpertPool(tmp_path / "experts")
    for seed, task in enumerate(("word_tone", "pocket_gear")):
        expert = random_expert(backbone_of("encoder"), "lora", seed, name=task)
        found.add(expert.with_card(task=task, metrics={"dev log-loss": 0.5}))
    return found


@pytest.fixture
def break_tensors() -> Callable[[Path], None]:
    """Cut an expert's tensor file short."""

    def cut(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])

    return cut
