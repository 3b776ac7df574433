"""Mixed precision is taken only where it works."""

from collections.abc import Iterator
from typing import Any

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


@pytest.mark.skipif(not bf16_survives(), reason="a bfloat16 product would end this process")
def test_float32_inside_bf16_is_float32(bert: Backbone, random_examples: Any) -> None:
    batch = bert.collate(random_examples(4, 1))
    expected = bert.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    with precision(bert, "bf16"):
        with precision(bert, "fp32"):
            assert not torch.is_autocast_enabled("cpu")
            inner = bert.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        assert torch.is_autocast_enabled("cpu")
        outer = bert.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(inner, expected, rtol=1e-4, atol=1e-5)
    assert (outer - expected).abs().max() > 1e-3, "bfloat16 must be seen to be coarser"
