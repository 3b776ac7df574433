"""Training on of benchmarks/paper_formats.py: a run that was broken off ends where an unbroken one does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import pituning as pt
from benchmarks import paper_formats
from pituning.tasks import load_task

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data are not here: no folder {DATA}")
PHASES: tuple[paper_formats.Phase, ...] = (
    (3, False, {"pretrain-things/snli_ve": 2, "pretrain-things/caption": 2}),
    (2, True, {"pretrain/vqa": 2, "pretrain-numbers/snli_ve": 2}),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import build_paper_formats
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    folder = tmp_path_factory.mktemp("formats")
    build_paper_formats.build(DATA, folder, train=24, test=30)
    return folder


def test_a_broken_run_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    paper_formats.pretrain(data, tmp_path / "whole", PHASES, 64)

    monkeypatch.setattr(paper_formats, "SAVE_EVERY", 2)
    real, calls = paper_formats.precision, iter(range(1000))

    @contextmanager
    def broken(*arguments: Any) -> Iterator[None]:
        if next(calls) == 7:  # in the fourth step, after the checkpoint of the second
            raise KeyboardInterrupt
        with real(*arguments):
            yield

    monkeypatch.setattr(paper_formats, "precision", broken)
    with pytest.raises(KeyboardInterrupt):
        paper_formats.pretrain(data, tmp_path / "broken", PHASES, 64)
    assert (tmp_path / "broken.checkpoint").is_file()
    assert not (tmp_path / "broken").exists()
    paper_formats.pretrain(data, tmp_path / "broken", PHASES, 64)

    whole, again = (pt.load_backbone(str(tmp_path / name)) for name in ("whole", "broken"))
    start = pt.load_backbone("ofa-nano").model.state_dict()
    moved = 0
    for (name, expected), found in zip(
        whole.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.allclose(expected, found, atol=1e-5), name
        moved += not torch.equal(expected, start[name])
    assert moved > 100
    example = load_task("snli_ve", data=data / "target").split("test")[0]
    assert whole.collate([example])["patch_images"].shape[-1] == 64  # the side is kept


def test_chance_and_what_the_words_give_away(data: Path) -> None:
    statements = load_task("snli_ve", data=data / "target")
    assert paper_formats.chance(statements, "test") == 0.5
    assert paper_formats.blind(statements, "test") == 0.5
    asked = load_task("vqa", data=data / "target")
    assert 0 <= paper_formats.chance(asked, "test") <= paper_formats.blind(asked, "test") + 0.2
    assert paper_formats.interval(0.5, 1000) == pytest.approx(0.031, abs=1e-3)


def test_rows_of_one_sentence_count_as_one() -> None:
    """Twice the same rows say no more than once; other rows of other sentences do."""
    right, sentences = [True, False, True, True], ["a", "b", "c", "d"]
    once = paper_formats.interval_by_sentence(right, sentences)
    assert once == pytest.approx(paper_formats.interval(0.75, 4))
    assert paper_formats.interval_by_sentence(right * 2, sentences * 2) == pytest.approx(once)
    more = [f"{s}{n}" for n in range(2) for s in sentences]
    assert paper_formats.interval_by_sentence(right * 2, more) == pytest.approx(once / 2**0.5)
