"""``import pituning`` is instant: everything heavy waits for its first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pituning

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "sklearn", "plotly", "accelerate")


def test_import_pituning_imports_nothing_heavy() -> None:
    code = f"import sys, pituning; dir(pituning); print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", pituning.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(pituning)
    assert getattr(pituning, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'pituning' has no attribute 'interpolat'"):
        pituning.interpolat  # noqa: B018


def test_the_errors_are_one_family() -> None:
    from pituning import errors

    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(kinds) >= 6
    assert all(issubclass(k, pituning.PituningError) for k in kinds)


def test_unknown_names_come_with_the_nearest() -> None:
    from pituning.errors import unknown_name

    text = str(unknown_name("task", "sst", ["sst2", "sst5", "cola"], "A hint."))
    assert text.startswith("unknown task 'sst': did you mean 'sst")
    assert "Known: cola, sst2, sst5." in text
    assert text.endswith("A hint.")
    assert str(unknown_name("task", "zzzz", [])) == "unknown task 'zzzz': Known: none."
