"""Experts and pools of experts."""

from pituning.experts.expert import Expert, ExpertCard
from pituning.experts.pool import ExpertPool

__all__ = ["Expert", "ExpertCard", "ExpertPool"]
