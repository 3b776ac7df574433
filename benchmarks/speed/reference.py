"""Seconds and memory of the reference implementation (official code, CPU, 2 threads, float32): what was recorded of it."""

from __future__ import annotations

Case = tuple[str, str, int, int]
"""Mode, method, experts, batch."""

PROBE_OF_REFERENCE = 0.34  # seconds, median beside the reference's cases

# seconds and peak MB of the reference for ofa_tiny, then for ofa_base
REFERENCE: dict[Case, tuple[float, int, float, int]] = {
    ("train", "full", 1, 2): (0.594, 1256, 1.880, 2855),
    ("train", "adapter", 1, 2): (0.270, 754, 0.940, 1650),
    ("train", "adapter", 2, 2): (0.308, 763, 1.062, 1749),
    ("train", "adapter", 4, 2): (0.333, 786, 1.258, 1845),
    ("train", "adapter", 8, 2): (0.442, 856, 1.605, 2100),
    ("train", "lora", 1, 2): (0.272, 753, 0.993, 1703),
    ("train", "lora", 2, 2): (0.343, 839, 1.377, 2183),
    ("train", "lora", 4, 2): (0.456, 954, 1.951, 2946),
    ("train", "lora", 8, 2): (0.655, 1172, 3.240, 4325),
    ("train", "prefix", 1, 2): (0.267, 757, 0.985, 1645),
    ("train", "prefix", 2, 2): (0.282, 744, 1.088, 1685),
    ("train", "prefix", 4, 2): (0.290, 766, 1.178, 1737),
    ("train", "adapter", 1, 4): (0.482, 839, 1.829, 2057),
    ("train", "adapter", 4, 4): (0.677, 946, 2.461, 2441),
    ("train", "lora", 1, 4): (0.484, 879, 1.888, 2164),
    ("train", "lora", 4, 4): (0.808, 1239, 3.901, 4162),
    ("fisher", "adapter", 1, 2): (0.254, 770, 0.967, 1681),
    ("beam", "full", 1, 2): (0.249, 728, 1.036, 1449),
    ("beam", "adapter", 1, 2): (0.305, 725, 1.227, 1442),
    ("beam", "adapter", 4, 2): (0.347, 726, 1.283, 1455),
    ("beam", "adapter", 8, 2): (0.392, 738, 1.380, 1549),
    ("beam", "lora", 1, 2): (0.305, 695, 1.150, 1432),
    ("beam", "lora", 4, 2): (0.464, 838, 2.317, 2039),
    ("beam", "prefix", 1, 2): (0.330, 728, 1.272, 1474),
    ("beam", "prefix", 4, 2): (0.474, 782, 2.033, 1785),
}

SHOWN: tuple[Case, ...] = (
    ("train", "full", 1, 2),
    ("train", "adapter", 1, 2),
    ("train", "adapter", 4, 2),
    ("train", "lora", 1, 2),
    ("train", "lora", 4, 2),
    ("train", "prefix", 1, 2),
    ("fisher", "adapter", 1, 2),
    ("beam", "full", 1, 2),
    ("beam", "adapter", 1, 2),
    ("beam", "adapter", 4, 2),
    ("beam", "lora", 1, 2),
    ("beam", "prefix", 1, 2),
)
"""The cases of the speed page; `ofa.py` has them all."""


def case_name(size: str, case: Case) -> str:
    """As tables have it.

    >>> case_name("tiny", ("train", "adapter", 4, 2))
    'tiny train adapter K=4 batch=2'
    """
    mode, method, experts, batch = case
    return f"{size} {mode} {method} K={experts} batch={batch}"


def recorded(size: str, case: Case) -> tuple[float, int]:
    """Seconds and peak megabytes of one case at a size, ``"tiny"`` or ``"base"``."""
    found = REFERENCE[case]
    return found[:2] if size == "tiny" else found[2:]
