"""Which things a caption of a scene names."""

from __future__ import annotations

import pytest

from pituning.data.emoji import EMOJI
from pituning.errors import DataError
from pituning.metrics.registry import metric_named
from pituning.metrics.scenes import names_in, objects_named


@pytest.mark.parametrize(
    ("found", "share"),
    [
        ("two cherries and a dog and a soccer ball", 1),
        ("a dog and a cherry and a soccer ball and an axe", 1),  # numbers and more things do not count
        ("a picture of three dogs", 1 / 3),
        ("there is a soccer ball and two cherries", 2 / 3),
        ("a ball and a hot dog", 0),
        ("", 0),
    ],
)
def test_counts_the_things_of_the_first_reference(found: str, share: float) -> None:
    references = ["two cherries and a dog and a soccer ball", "something else"]
    assert objects_named([references], [found]) == pytest.approx(share)
    assert metric_named("objects-named").compute([references, ["a dog"]], [found, "a dog"]) == pytest.approx(
        (share + 1) / 2
    )


def test_a_reference_that_names_nothing_is_shown() -> None:
    with pytest.raises(DataError, match="the reference 'running' names nothing"):
        objects_named([["a dog"], ["running"]], ["a dog", "a dog"])


def test_every_name_is_found_in_the_singular_and_in_the_plural() -> None:
    for name, emoji in EMOJI.items():
        assert names_in(f"a {name}") == {name}
        assert names_in(f"four {emoji.plural} and an axe") == {name, "axe"}
