"""`Example`: the one thing that passes from tasks to backbones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled item of a task.

    Attributes:
        id: stable identifier within the task, such as ``"sst2/train/17"``.
        texts: the raw inputs, one string or a pair; what an encoder backbone reads.
        prompt: the same inputs rendered for a generative backbone.
        target: the right answer; where ``choices`` is not empty, one of them.
        choices: the closed set of answers in label order; empty for open-ended tasks.
    """

    id: str
    texts: tuple[str, ...]
    prompt: str
    target: str
    choices: tuple[str, ...] = ()

    @property
    def label(self) -> int:
        """Position of the target among the choices."""
        return self.choices.index(self.target)
