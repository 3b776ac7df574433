"""Frozen foundation models behind one small interface."""

from pituning.backbones.base import Backbone, Batch
from pituning.backbones.registry import load_backbone

__all__ = ["Backbone", "Batch", "load_backbone"]
