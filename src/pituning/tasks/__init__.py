"""Named tasks and tasks from the user's own files."""

from pituning.tasks.grounding import GroundingRow, grounding_from_files, grounding_from_rows
from pituning.tasks.task import (
    Task,
    TaskDefinition,
    load_task,
    register_task,
    task_from_datasets,
    task_from_files,
    task_names,
)

__all__ = [
    "GroundingRow",
    "Task",
    "TaskDefinition",
    "grounding_from_files",
    "grounding_from_rows",
    "load_task",
    "register_task",
    "task_from_datasets",
    "task_from_files",
    "task_names",
]
