"""A plain warm start, as several benchmarks measure it: an expert of another task, fine-tuned on the target's examples."""

from __future__ import annotations

from collections.abc import Sequence

from pituning.backbones import Backbone
from pituning.example import Example
from pituning.experts import Expert, ExpertCard
from pituning.interpolation.collapse import collapse
from pituning.training.train_expert import start_from
from pituning.training.trainer import TrainSettings, fit


def warm_started(
    backbone: Backbone,
    expert: Expert,
    examples: Sequence[Example],
    settings: TrainSettings,
    card: ExpertCard | None = None,
) -> Expert:
    """The expert after the run, under its own card where none is given."""
    mixture, config = start_from(expert.tensors, expert.config)
    fit(backbone, mixture, config, examples, settings)
    return collapse(mixture, config, card or expert.card).expert
