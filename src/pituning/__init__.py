"""π-Tuning: choose the fine-tuned experts that help a new task and blend them into one.

>>> import pituning as pt
>>> "interpolate" in dir(pt)
True

Everything here is imported on first use, so that ``import pituning`` itself is instant and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pituning.errors import PituningError
from pituning.version import __version__

_EXPORTS = {
    "load_backbone": "pituning.backbones",
    "load_task": "pituning.tasks",
    "task_from_files": "pituning.tasks",
    "task_from_datasets": "pituning.tasks",
    "task_from_records": "pituning.tasks",
    "Expert": "pituning.experts",
    "ExpertPool": "pituning.experts",
    "train_expert": "pituning.training.train_expert",
    "TrainSettings": "pituning.training.trainer",
    "Search": "pituning.training.crossfit",
    "embed_task": "pituning.similarity",
    "rank_experts": "pituning.similarity",
    "interpolate": "pituning.training.interpolate",
    "blend": "pituning.training.blend",
    "evaluate": "pituning.training.evaluation",
    "predict": "pituning.training.evaluation",
    "zero_shot": "pituning.similarity.zero_shot",
    "run_recipe": "pituning.experiments.runner",
    "load_recipe": "pituning.experiments.recipe",
    "run_table": "pituning.experiments.table_runner",
}

__all__ = ["PituningError", "__version__", *_EXPORTS]

if TYPE_CHECKING:
    from pituning.backbones import load_backbone as load_backbone
    from pituning.experiments.recipe import load_recipe as load_recipe
    from pituning.experiments.runner import run_recipe as run_recipe
    from pituning.experiments.table_runner import run_table as run_table
    from pituning.experts import Expert as Expert
    from pituning.experts import ExpertPool as ExpertPool
    from pituning.similarity import embed_task as embed_task
    from pituning.similarity import rank_experts as rank_experts
    from pituning.similarity.zero_shot import zero_shot as zero_shot
    from pituning.tasks import load_task as load_task
    from pituning.tasks import task_from_datasets as task_from_datasets
    from pituning.tasks import task_from_files as task_from_files
    from pituning.tasks import task_from_records as task_from_records
    from pituning.training.blend import blend as blend
    from pituning.training.crossfit import Search as Search
    from pituning.training.evaluation import evaluate as evaluate
    from pituning.training.evaluation import predict as predict
    from pituning.training.interpolate import interpolate as interpolate
    from pituning.training.train_expert import train_expert as train_expert
    from pituning.training.trainer import TrainSettings as TrainSettings


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pituning' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
