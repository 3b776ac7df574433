"""Named tasks and tasks from the user's own files."""

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
    "Task",
    "TaskDefinition",
    "load_task",
    "register_task",
    "task_from_datasets",
    "task_from_files",
    "task_names",
]
