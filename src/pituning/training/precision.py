"""Mixed precision for a whole block: bfloat16 matrix products, everything else as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from pituning.backbones.base import Backbone
from pituning.errors import PituningError, unknown_name

PRECISIONS = ("auto", "fp32", "bf16")

_WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
_PROBE = (
    "import torch; x = torch.ones(32, 768, dtype=torch.bfloat16); (x @ torch.ones(768, 768).bfloat16()).sum().item()"
)


@contextmanager
def precision(backbone: Backbone, name: str) -> Iterator[None]:
    """Run the block in ``"fp32"`` or with bfloat16 autocast (``"bf16"``: about 2.3 times faster on CPUs with AVX512-BF16).

    ``"auto"`` takes bf16 where the processor has instructions for it and they work, else fp32.

    Raises:
        UnknownNameError: for another name.
        PituningError: for ``"bf16"`` where a bfloat16 product would end the process.
    """
    if name == "bf16" and backbone.device.type == "cpu" and not bf16_survives():
        raise PituningError(
            "precision 'bf16': a bfloat16 matrix product kills a Python process on this machine (the processor announces "
            f"instructions that it may not use); use 'fp32', or start with the environment variable {_WITHOUT_AMX} set"
        )
    if resolved(backbone, name) == "fp32":
        with torch.autocast(backbone.device.type, enabled=False):  # the block may lie in one of bfloat16
            yield
        return
    config = backbone.model.config
    before = config._attn_implementation
    # On CPU the fused attention's backward pass in bfloat16 is slower than the rest of the step together.
    if backbone.device.type == "cpu":
        backbone.model.set_attn_implementation("eager")
    try:
        # no cache: it lives until the outermost block ends, so a trained tensor's cast would never be renewed
        with torch.autocast(backbone.device.type, dtype=torch.bfloat16, cache_enabled=False):
            yield
    finally:
        backbone.model.set_attn_implementation(before)


def resolved(backbone: Backbone, name: str) -> str:
    """The precision that ``"auto"`` stands for on the backbone's device; ``"fp32"`` and ``"bf16"`` stand for themselves.

    Raises:
        UnknownNameError: for another name.
    """
    if name not in PRECISIONS:
        raise unknown_name("precision", name, PRECISIONS)
    if name != "auto":
        return name
    return "bf16" if has_fast_bf16(backbone.device) else "fp32"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 that work; a CPU without them is many times slower in it."""
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")) and bf16_survives()


@lru_cache(maxsize=1)
def bf16_survives() -> bool:
    """Whether a process on this machine survives a bfloat16 product; some virtual machines announce AMX and forbid it.

    Found out in a process of its own (two seconds, once), because the instruction would end this one.
    """
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    probe = subprocess.run([sys.executable, "-c", _PROBE], env=settings, capture_output=True, check=False)
    return probe.returncode == 0
