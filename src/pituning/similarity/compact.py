"""Task embeddings of 1 KB, for an index over many experts: signs of random projections."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pituning.errors import ExpertError

BITS = 8192
BYTES = BITS // 8
_BUCKETS = 1 << 16  # into which the entries are added up before they are projected

Compact = npt.NDArray[np.uint8]


def compact_fisher(fisher: Mapping[str, Tensor]) -> Compact:
    """A diagonal Fisher as 8,192 bits, uint8 ``[1024]``.

    Every tensor is scaled to unit length, so that all have the same part, and all are put one after the other by name. Bit b
    is the sign of that vector's inner product with direction b; the directions are the same for all embeddings of the same
    shapes, and on every machine. The share of bits in which two embeddings differ is their angle over π, up to a standard
    error of at most 0.0055 (Charikar, STOC 2002). The directions come from adding the entries up, with random signs, in
    65,536 buckets (Charikar, Chen and Farach-Colton, ICALP 2002), and from a Hadamard transform of those.
    """
    parts = [fisher[name].detach().cpu().double().flatten().numpy() for name in sorted(fisher)]
    lengths = [float(np.linalg.norm(part)) for part in parts]
    entries = np.concatenate([part / length if length else part for part, length in zip(parts, lengths, strict=True)])
    hashes = _scrambled(np.arange(len(entries), dtype=np.uint64))
    signs = np.where(hashes >> np.uint64(63), -1.0, 1.0)
    buckets = np.bincount((hashes % np.uint64(_BUCKETS)).astype(np.intp), entries * signs, minlength=_BUCKETS)
    again = _scrambled(np.arange(_BUCKETS, dtype=np.uint64) + np.uint64(1 << 40))
    rotated = hadamard(np.asarray(buckets, np.float64) * np.where(again >> np.uint64(63), -1.0, 1.0))
    taken = np.argsort(again, kind="stable")[:BITS]
    return np.packbits(rotated[taken] > 0)


def compact_similarity(left: Compact, right: Compact) -> float:
    """The cosine that two compact embeddings stand for, −1 to 1; approximates ``fisher-cosine``.

    They carry neither names nor reference points: that both come from the same tensors at comparable points is for the caller
    to see to.

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
    words = np.ascontiguousarray(rows).view(np.uint64) ^ np.ascontiguousarray(query).view(np.uint64)
    different = np.bitwise_count(words).sum(1, dtype=np.int64)
    cosines: npt.NDArray[np.float64] = np.cos(np.pi * different / (8 * rows.shape[1]))
    return cosines


def hadamard(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The Walsh–Hadamard transform, not normalised, of a vector whose length is a power of two."""
    width = 1
    while width < len(x):
        pairs = x.reshape(-1, 2, width)
        x = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1).reshape(-1)
        width *= 2
    return x


def _scrambled(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014): the same bits everywhere, unlike a generator's."""
    z = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
