"""Named tasks and tasks from the user's own files."""

from pituning.tasks.captioning import Captioning
from pituning.tasks.emoji import emoji_task, pretraining_task
from pituning.tasks.entailment import VisualEntailment
from pituning.tasks.grounding import Grounding, GroundingRow, grounding_from_files, grounding_from_rows
from pituning.tasks.image_classification import ImageClassification
from pituning.tasks.kind import Kind
from pituning.tasks.paper import KINDS, task_from_records
from pituning.tasks.summarisation import Summarisation
from pituning.tasks.task import (
    Task,
    TaskDefinition,
    load_task,
    register_task,
    task_from_datasets,
    task_from_files,
    task_names,
)
from pituning.tasks.vqa import VQA

__all__ = [
    "KINDS",
    "VQA",
    "Captioning",
    "Grounding",
    "GroundingRow",
    "ImageClassification",
    "Kind",
    "Summarisation",
    "Task",
    "TaskDefinition",
    "VisualEntailment",
    "emoji_task",
    "grounding_from_files",
    "grounding_from_rows",
    "load_task",
    "pretraining_task",
    "register_task",
    "task_from_datasets",
    "task_from_files",
    "task_from_records",
    "task_names",
]
