"""Mixed precision is taken only where it works."""

from collections.abc import Iterator

import pytest
import torch

from pituning import PituningError
from pituning.backbones.base import Backbone
from pituning.training import precision as module
from pituning.training.precision import bf16_survives, precision


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose bfloat16 instructions end the process."""
    monkeypatch.setattr(module, "_PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    bf16_survives.cache_clear()
    yield
    bf16_survives.cache_clear()


@pytest.mark.usefixtures("forbidden")
def test_bf16_is_refused_where_it_would_end_the_process(bert: Backbone) -> None:
    with pytest.raises(PituningError, match="ONEDNN_MAX_CPU_ISA"), precision(bert, "bf16"):
        pass


@pytest.mark.usefixtures("forbidden")
def test_auto_falls_back_to_float32(bert: Backbone) -> None:
    with precision(bert, "auto"):
        assert not torch.is_autocast_enabled("cpu")
