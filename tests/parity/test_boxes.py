"""Acc@0.5 and the prompt of grounding against what OFA's own code computed: shared/fixtures/preprocess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pituning.metrics.registry import metric_named
from pituning.tasks.grounding import box_text, grounding_prompt

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
pytestmark = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"the reference's recorded numbers are not here: no folder {FIXTURES}"
)


def golden(folder: str) -> Any:
    return json.loads((FIXTURES / folder / "golden.json").read_text())


def test_accuracy_at_half() -> None:
    recorded = golden("preprocess")["acc@0.5"]
    compute = metric_named("acc@0.5").compute
    truth, found = ([tuple(box) for box in recorded[side]] for side in ("refs", "hyps"))
    assert [compute([t], [f]) for t, f in zip(truth, found, strict=True)] == recorded["score"]
    assert compute(truth, found) == sum(recorded["score"]) / len(recorded["score"])


def test_a_box_is_written_as_in_the_references_files() -> None:
    rows = golden("preprocess")["rows"]
    written = {row["box"] for row in rows}
    assert "3.5,4.25,30.0,39.99" in written
    for box in written:
        corners = tuple(map(float, box.split(",")))
        assert tuple(map(float, box_text(corners).split(","))) == corners  # type: ignore[arg-type]
    assert box_text((3.5, 4.25, 30.0, 39.99)) in written


def test_the_prompt_is_the_references() -> None:
    """The tokenization fixture encodes the whole prompt; the text inside is the reference's own."""
    (recorded,) = {r["text"] for r in golden("tokenization")["rows"] if "which region does" in r["text"]}
    inside = recorded.split('"')[1].strip()
    assert grounding_prompt(inside) == recorded
