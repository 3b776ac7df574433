"""A recipe that pretrains an OFA from nothing: sizes, vocabulary, scenes, tasks and schedule in one YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pituning.errors import PituningError
from pituning.tasks.emoji import PRETRAINING

Positive = Annotated[int, Field(ge=1)]
_ANY_TIME = {"pretrain", "title", "save_every", "log_every", "workers", "output"}
"""What changes no weight."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VocabularySection(_Strict):
    """The BPE vocabulary, which is made from the texts of the tasks.

    Attributes:
        pieces: BPE pieces, the 256 bytes among them.
        bins: location bins along a side of the picture.
        texts: examples of each task whose texts are read for it.
    """

    pieces: int = Field(default=1000, ge=257)
    bins: int = Field(default=48, ge=2)
    texts: Positive = 4000


class LaterSection(_Strict):
    """What a step holds from some step on.

    Attributes:
        after: so many steps.
        tasks: as in :class:`PretrainRecipe`, of the same kinds and as many examples in all.
    """

    after: Positive
    tasks: Mapping[str, Positive] = Field(min_length=1)


class PretrainRecipe(_Strict):
    """Multi-task pretraining as OFA's: every step is a batch of grounding, captioning, questions and names, or of infilling.

    Attributes:
        pretrain: the model's name.
        model: fields of :class:`pituning.backbones.ofa.OFAConfig`.
        side: of the pictures, in pixels.
        scenes: vocabulary of the scenes, see :func:`pituning.data.scenes.names_of`.
        tasks: kind of pretraining (:data:`pituning.tasks.emoji.PRETRAINING`) → its examples in a step.
        later: other numbers of examples from some step on.
        infilling_every: every so many steps the batch holds texts with a gap instead, without pictures; 0: never.
        decoder_prompts_after: step from which the decoder reads a question before it answers, as OFA's VQA tasks have it.
        positions_like_contents: scale the first image positions to the spread of the first image features, so that places
            can be told apart from the first step.
        learning_rate: rises for the first ``warmup_steps``, stays, and falls to zero in the last ``decay_steps``. So a run can
            be made longer in between: with more ``steps`` it goes on as if they had been asked for from the start.
        save_every, log_every: steps.
        workers: processes that draw pictures.
        output: folder of the checkpoints, the log and, in ``model/``, what :func:`pituning.load_backbone` reads.
    """

    pretrain: str
    title: str
    model: Mapping[str, Any]
    vocabulary: VocabularySection = VocabularySection()
    side: int = Field(default=96, ge=48)
    scenes: Literal["small", "full"] = "small"
    tasks: Mapping[str, Positive] = Field(min_length=1)
    later: LaterSection | None = None
    infilling_every: int = Field(default=8, ge=0)
    decoder_prompts_after: int = Field(default=0, ge=0)
    positions_like_contents: bool = True
    steps: Positive
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(default=500, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = Field(default=0, ge=0)
    save_every: Positive = 1000
    log_every: Positive = 100
    workers: int = Field(default=1, ge=0)
    output: str

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: Mapping[str, int]) -> Mapping[str, int]:
        if unknown := sorted(set(tasks) - set(PRETRAINING)):
            raise ValueError(f"there is no kind of pretraining {unknown[0]!r}; there are {', '.join(PRETRAINING)}")
        return tasks

    @field_validator("model")
    @classmethod
    def _known_model(cls, model: Mapping[str, Any]) -> Mapping[str, Any]:
        from pituning.backbones.ofa.configuration import OFAConfig

        if unknown := sorted(k for k in model if not hasattr(OFAConfig(), k)):
            raise ValueError(f"an OFA has no setting {', '.join(unknown)}")
        try:
            OFAConfig(**{**model, "vocab_size": 1000})
        except (PituningError, TypeError) as error:
            raise ValueError(str(error)) from error
        return model

    @model_validator(mode="after")
    def _later_is_as_large(self) -> PretrainRecipe:
        if self.later is not None and sum(self.later.tasks.values()) != self.batch_size:
            raise ValueError(
                f"later.tasks: {sum(self.later.tasks.values())} examples in a step, but there are {self.batch_size} in tasks"
            )
        if self.later is not None and (unknown := sorted(set(self.later.tasks) - set(self.tasks))):
            raise ValueError(
                f"later.tasks: there is no {unknown[0]!r} in tasks, whose texts the vocabulary is made from"
            )
        return self

    def tasks_at(self, step: int) -> Mapping[str, int]:
        """Kind of pretraining → its examples in a step."""
        return self.later.tasks if self.later is not None and step >= self.later.after else self.tasks

    @property
    def batch_size(self) -> int:
        """Examples of a step."""
        return sum(self.tasks.values())

    def shaped(self, steps: int) -> dict[str, Any]:
        """The settings that a run's first steps depend on, of which later ones may still be changed without a difference."""
        values = self.model_dump(
            mode="json", exclude=_ANY_TIME | {"steps", "decay_steps", "later", "decoder_prompts_after"}
        )
        falls = self.steps - self.decay_steps
        return values | {
            "steps, decay_steps": [self.steps, self.decay_steps] if self.decay_steps and steps > falls else None,
            "later": self.later.model_dump() if self.later is not None and steps > self.later.after else None,
            "decoder_prompts_after": self.decoder_prompts_after if steps > self.decoder_prompts_after else None,
        }

    def missing_inputs(self) -> list[str]:
        """Nothing: the scenes are part of the package."""
        return []
