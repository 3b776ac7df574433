"""Task embeddings of 1 KB, for an index over many experts: how far along a pool's mean, and signs of what is left.

Fisher diagonals of one method resemble one another, whatever the task. What they have in common is therefore kept exactly, as
one number, and the bits are spent on the rest, which is what a ranking depends on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import scipy.linalg
from torch import Tensor

from pituning.errors import ExpertError

BYTES = 1024
_HEAD = 8  # bytes of the float64 in front
BITS = 8 * (BYTES - _HEAD)
ANCHORED = 32
"""The anchor of a pool is the mean of so many embeddings; one of fewer is made anew when there are twice as many."""
_BUCKETS = 1 << 16  # into which the entries are added up before they are projected

Compact = npt.NDArray[np.uint8]
Anchor = npt.NDArray[np.float32]
"""A vector of length one in the space of :func:`unit_vector`."""


def unit_vector(fisher: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
    """A diagonal Fisher as one vector of length one (or zero): tensor after tensor by name, each of the same length.

    The inner product of two of them is ``fisher-cosine`` where the same tensors are zero.
    """
    parts = [fisher[name].detach().cpu().double().flatten().numpy() for name in sorted(fisher)]
    lengths = [float(np.linalg.norm(part)) for part in parts]
    scale = max(1, sum(map(bool, lengths))) ** 0.5
    return np.concatenate(
        [part / (length * scale) if length else part for part, length in zip(parts, lengths, strict=True)]
    )


def anchor_of(fishers: Iterable[Mapping[str, Tensor]]) -> Anchor:
    """The direction of the mean of some diagonal Fishers."""
    total = sum(map(unit_vector, fishers))
    length = np.linalg.norm(total)
    return np.asarray(total / length if length else total, dtype=np.float32)


def compact_fisher(fisher: Mapping[str, Tensor], anchor: Anchor | None = None) -> Compact:
    """A diagonal Fisher as uint8 ``[1024]``: its inner product with the anchor (float64), and 8,128 bits for the rest.

    The rest is :func:`unit_vector` less its part along the anchor, or the whole vector where there is no anchor. Bit b is the
    sign of its inner product with direction b; the directions are the same for all embeddings of the same shapes, and on
    every machine. The share of bits in which two embeddings differ is the angle of their rests over π, up to a standard error
    of at most 0.0055 (Charikar, STOC 2002). The directions come from adding the entries up, with random signs, in 65,536
    buckets (Charikar, Chen and Farach-Colton, ICALP 2002), and from a Hadamard transform of those.

    Raises:
        ExpertError: if the anchor is one of other tensors.
    """
    entries = unit_vector(fisher)
    along = 0.0
    if anchor is not None:
        if anchor.shape != entries.shape:
            raise ExpertError(f"an embedding of {len(entries)} entries has no part along an anchor of {anchor.size}")
        along = float(anchor.astype(np.float64) @ entries)
        entries = entries - along * anchor
    buckets, signs = _hashed(len(entries))
    flips, taken = _directions()
    sums = np.bincount(buckets, entries * signs, minlength=_BUCKETS)
    rotated = hadamard(np.asarray(sums, np.float64) * flips)[taken]
    head = np.frombuffer(np.float64(along).tobytes(), np.uint8)
    return np.concatenate([head, np.packbits(rotated > 0)])


def compact_similarity(left: Compact, right: Compact) -> float:
    """The cosine that two compact embeddings with one anchor stand for, −1 to 1; approximates ``fisher-cosine``.

    They carry neither names nor reference points: that both come from the same tensors at comparable points and have the same
    anchor is for the caller to see to.

    Raises:
        ExpertError: if they differ in length.
    """
    if left.shape != right.shape or left.ndim != 1:
        raise ExpertError(
            f"compact embeddings have shapes {list(left.shape)} and {list(right.shape)}: one of them is broken or of another "
            "version; compute it again with `pituning embed --refresh`"
        )
    return float(compact_cosines(left[None], right)[0])


def compact_cosines(rows: Compact, query: Compact) -> npt.NDArray[np.float64]:
    """The same for many embeddings ``[N, 1024]`` against one."""
    rows, query = np.ascontiguousarray(rows), np.ascontiguousarray(query)
    words = rows.view(np.uint64)[:, 1:] ^ query.view(np.uint64)[1:]
    different = np.bitwise_count(words).sum(1, dtype=np.int32)
    along, mine = rows.view(np.float64)[:, 0], float(query.view(np.float64)[0])
    rest = np.sqrt(np.maximum(0.0, 1 - along**2) * max(0.0, 1 - mine**2))
    cosines: npt.NDArray[np.float64] = along * mine + rest * np.cos(np.pi * different / (64 * words.shape[1]))
    return cosines


def hadamard(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The Walsh–Hadamard transform, not normalised, of a vector whose length is a power of four."""
    side = math.isqrt(len(x))
    matrix = _hadamard_matrix(side)
    transformed: npt.NDArray[np.float64] = (matrix @ x.reshape(side, side) @ matrix).ravel()
    return transformed


@lru_cache(maxsize=4)
def _hadamard_matrix(side: int) -> npt.NDArray[np.float64]:
    return np.asarray(scipy.linalg.hadamard(side), dtype=np.float64)


@lru_cache(maxsize=2)
def _hashed(count: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """A bucket and a sign for each of so many entries."""
    hashes = _scrambled(np.arange(count, dtype=np.uint64))
    return (hashes % np.uint64(_BUCKETS)).astype(np.intp), _signs(hashes)


@lru_cache(maxsize=1)
def _directions() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """Signs of the buckets, and the rows of the Hadamard matrix that are used."""
    hashes = _scrambled(np.arange(_BUCKETS, dtype=np.uint64) + np.uint64(1 << 40))
    return _signs(hashes), np.argsort(hashes, kind="stable")[:BITS]


def _signs(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    return np.where(hashes >> np.uint64(63), -1.0, 1.0)


def _scrambled(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014): the same bits everywhere, unlike a generator's."""
    z = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
