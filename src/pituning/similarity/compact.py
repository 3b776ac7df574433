"""Task embeddings of at most 256 numbers, for an index over many experts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pituning.errors import ExpertError

NUMBERS = 256
_GROUPS = 64  # with fewer than four numbers, a group of tensors would say next to nothing once it is normalised

Compact = npt.NDArray[np.float32]


def compact_fisher(fisher: Mapping[str, Tensor]) -> Compact:
    """A diagonal Fisher as a vector of unit length, float32 ``[≤ 256]``, at most 1 KB.

    Every tensor is scaled to unit length, cut into equal blocks of consecutive entries, and each block is replaced by the mean
    of its entries, without a logarithm or root; the blocks of a tensor are scaled to unit length once more. So every tensor
    has the same part in an inner product, whatever its size. More than 64 tensors are taken together, neighbours by name. The
    vector of a Fisher that is zero throughout is zero.
    """
    groups = min(len(fisher), _GROUPS)
    members = np.array_split(sorted(fisher), groups)
    vector = np.concatenate([_blocks([fisher[name] for name in names], NUMBERS // groups) for names in members])
    length = np.linalg.norm(vector)
    return (vector / length if length else vector).astype(np.float32)


def compact_similarity(left: Compact, right: Compact) -> float:
    """The inner product of two compact embeddings, 0 to 1; approximates ``fisher-cosine``, and its ranking only roughly.

    They carry neither names nor reference points: that both come from the same tensors at comparable points is for the caller
    to see to.

    Raises:
        ExpertError: if they differ in length, or are not finite.
    """
    if left.shape != right.shape or left.ndim != 1:
        raise ExpertError(
            f"compact embeddings have shapes {list(left.shape)} and {list(right.shape)}: they are of different methods or "
            "backbones, and cannot be compared"
        )
    value = float(left.astype(np.float64) @ right.astype(np.float64))
    if not np.isfinite(value):
        raise ExpertError("a compact embedding is not finite: compute it again with `pituning embed --refresh`")
    return value


def _blocks(tensors: list[Tensor], count: int) -> npt.NDArray[np.float64]:
    """Block means of some tensors, each of unit length before; of length √(number of tensors that are not zero)."""
    flat = [t.double().flatten().numpy() for t in tensors]
    lengths = [float(np.linalg.norm(f)) for f in flat]
    entries = np.concatenate([f / length if length else f for f, length in zip(flat, lengths, strict=True)])
    means = np.array([block.mean() for block in np.array_split(entries, min(count, len(entries)))])
    length = float(np.linalg.norm(means))
    return means * (sum(map(bool, lengths)) ** 0.5 / length) if length else means
