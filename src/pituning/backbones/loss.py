"""The loss that generative models are trained with: cross-entropy with label smoothing, over all tokens or the allowed ones."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # label of positions that do not count, transformers' own value


def label_smoothed_nll(logits: Tensor, labels: Tensor, epsilon: float = 0.0, allowed: Tensor | None = None) -> Tensor:
    """Per-example loss, summed over target tokens: (1 − ε) · −log p(target) + ε · mean over the *other* tokens.

    Args:
        logits: ``[batch, length, vocabulary]``.
        labels: ``[batch, length]``, −100 where nothing counts.
        epsilon: the label smoothing ε.
        allowed: ``[batch, length, vocabulary]``, False for tokens that cannot occur: they get no probability and take no
            part in the smoothing. Every label must be allowed.

    Returns:
        ``[batch]``, in float32 or wider.

    Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, §7. The reference spreads ε over the
    vocabulary less the target, so that ε = 0 is plain cross-entropy; its mask of allowed tokens had no effect on training.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels != IGNORED
    if allowed is None:
        others = logits.new_full(labels.shape, logits.shape[-1] - 1)
    else:
        allowed = allowed | ~counted[..., None]  # positions that do not count must not become NaN
        logits = logits.masked_fill(~allowed, float("-inf"))
        others = allowed.sum(-1).to(logits.dtype) - 1
    log_p = logits.log_softmax(-1)
    target = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    if epsilon == 0:
        losses = -target
    else:
        total = (log_p if allowed is None else log_p.masked_fill(~allowed, 0.0)).sum(-1)
        # with one allowed token its log p is 0 and there is nothing to spread ε over
        losses = -(1 - epsilon) * target - epsilon * (total - target) / others.clamp(min=1)
    return losses.masked_fill(~counted, 0.0).sum(1)
