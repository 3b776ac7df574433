"""A recipe of one of the paper's tables: experts, task embeddings and interpolations for a list of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pituning.errors import PituningError, unknown_name
from pituning.metrics.registry import FITTING, answers_of, lacking, metric_named, metric_names
from pituning.training.trainer import TrainSettings

Stage = Literal["experts", "fisher", "interpolation"]
STAGES: tuple[Stage, ...] = ("experts", "fisher", "interpolation")
PI = "pi"
BARE = "zero-shot"

Positive = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def missing_backbone(name: str) -> list[str]:
    """What is wrong with a backbone's folder, if a folder is meant; a hub id is only found out when it is fetched."""
    is_meant = name.startswith((".", "/", "~")) or name.count("/") > 1  # a hub id is owner/name
    if not is_meant or Path(name).expanduser().is_dir():
        return []
    return [
        f"backbone: there is no folder {name}; `pituning convert` writes one from an OFA checkpoint, `pituning pretrain` "
        "trains a small one"
    ]


class TrainingSection(_Strict):
    """How a run goes; what is left out comes from the more general section, at last from :class:`TrainSettings`."""

    learning_rate: float | None = Field(default=None, gt=0)
    alpha_learning_rate: float | None = Field(default=None, ge=0)
    steps: Positive | None = None
    epochs: float | None = Field(default=None, gt=0)
    batch_size: Positive | None = None
    accumulate: Positive | None = None
    schedule: str | None = None
    warmup: float | None = Field(default=None, ge=0, lt=1)
    weight_decay: float | None = Field(default=None, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    augment: bool | None = None
    eval_every: int | None = Field(default=None, ge=0)
    keep_best: bool | None = None

    def given(self) -> dict[str, Any]:
        """The settings that this section names."""
        return self.model_dump(exclude_none=True)


def merged(*sections: TrainingSection) -> dict[str, Any]:
    """What sections name, a more special one after a more general one: its steps replace epochs, and its epochs steps."""
    found: dict[str, Any] = {}
    for section in sections:
        given = section.given()
        if given.keys() & {"steps", "epochs"}:
            found = {name: value for name, value in found.items() if name not in ("steps", "epochs")}
        found |= given
    return found


class MethodSection(_Strict):
    """A method of Table 1: fields of its PEFT configuration, and what its training does differently."""

    options: Mapping[str, Any] = Field(default_factory=dict)
    training: TrainingSection = TrainingSection()


class TaskSection(_Strict):
    """A task of the table.

    Attributes:
        evaluate: columns: a split, or ``split:metric`` where it is not the task's own metric.
        training: of both stages; a method's settings give way to it, those of the interpolation do not.
        published: row (a method, ``pi`` or ``zero-shot``) → column → the paper's figure, in per cent as printed. Columns that
            cannot be measured here, such as those of an evaluation server, may be among them.
        experts: the experts that the paper blended, where it says so; otherwise the most similar are chosen.
    """

    evaluate: tuple[str, ...] = Field(min_length=1)
    training: TrainingSection = TrainingSection()
    published: Mapping[str, Mapping[str, float]] = Field(default_factory=dict)
    experts: tuple[str, ...] = ()


class StageThree(_Strict):
    """How experts are chosen and blended."""

    method: str = "bottleneck"
    kind: str = "fisher"
    reference: Literal["shared", "own"] = "own"
    top: Positive = 2
    train: Literal["experts", "shared", "weights", "none", "merge-then-tune"] = "experts"
    granularity: Literal["model", "encoder-decoder", "layer", "attention", "module", "tensor"] = "module"
    init: Literal["uniform", "similarity", "score"] = "uniform"
    include_own: bool = True
    training: TrainingSection = TrainingSection()


class TableRecipe(_Strict):
    """One table, or a block of rows of it.

    Attributes:
        data: folder of data sets, each in a folder of its own; without it they are looked for as :func:`load_task` does.
        pool: the experts to choose from; stage 1 puts full-data experts there.
        own: where few-shot experts and blends go, so that no few-shot expert is chosen for another task.
        shots: labelled examples per class; the learning rate and the number of steps are then found by cross-fitting, and
            there are no sections ``training``.
        training: common to all runs of all stages.
        interpolation: stage 3; none for a table of zero-shot transfer.
        zero_shot: also evaluate the bare backbone and the most similar expert as it is.
    """

    table: str
    title: str
    backbone: str
    data: str | None = None
    pool: str
    own: str | None = None
    output: str
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    shots: Positive | None = None
    seed: int = 0
    test_limit: Positive | None = None
    training: TrainingSection = TrainingSection()
    methods: Mapping[str, MethodSection] = Field(min_length=1)
    tasks: Mapping[str, TaskSection] = Field(min_length=1)
    interpolation: StageThree | None = StageThree()
    zero_shot: bool = False

    @model_validator(mode="after")
    def _everything_exists(self) -> TableRecipe:
        problems = [*self._unknown_names(), *self._wrong_columns(), *self._wrong_options(), *self._wrong_settings()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def own_folder(self) -> Path:
        """Where few-shot experts and blends go."""
        return Path(self.own or self.pool)

    def said(self, method: str, task: str) -> dict[str, Any]:
        """The settings of a stage 1 run that the recipe names."""
        return merged(self.training, self.methods[method].training, self.tasks[task].training)

    def said_of_blend(self, task: str) -> dict[str, Any]:
        """Those of a stage 3 run."""
        assert self.interpolation is not None
        return merged(self.training, self.tasks[task].training, self.interpolation.training)

    def settings(self, method: str, task: str) -> TrainSettings | None:
        """Settings of a stage 1 run; ``None`` where cross-fitting finds them."""
        return None if self.shots is not None else TrainSettings(**{"keep_best": True, **self.said(method, task)})

    def blend_settings(self, task: str) -> TrainSettings | None:
        """Settings of a stage 3 run, likewise."""
        return None if self.shots is not None else TrainSettings(**{"keep_best": True, **self.said_of_blend(task)})

    def expert_name(self, task: str, method: str) -> str:
        """What a stage 1 expert is called in its folder."""
        return f"{task}-{method}" + ("" if self.shots is None else f"-{self.shots}shot-seed{self.seed}")

    def blend_name(self, task: str) -> str:
        """What a blend is called in its folder."""
        return self.expert_name(task, PI)

    def named_experts(self, task: str) -> list[str]:
        """The experts that the recipe names for a task's blend, as the pool calls them: few-shot ones lie in ``own``."""
        assert self.interpolation is not None
        method, apart = self.interpolation.method, self.own_folder != Path(self.pool)
        return [f"{e}-{method}" if apart else self.expert_name(e, method) for e in self.tasks[task].experts]

    def missing_inputs(self, tasks: Sequence[str] = ()) -> list[str]:
        """What has to be there before the recipe can run, and is not: the backbone's folder, and of the tasks (all by
        default) the files, and what their metrics need; and columns whose metric does not fit the task's answers.
        """
        from pituning.tasks.task import load_task

        missing = missing_backbone(self.backbone)
        for name in tasks or self.tasks:
            section = self.tasks[name]
            try:
                task = load_task(name, data=self.data)
            except PituningError as error:
                missing.append(str(error))
                continue
            fitting = FITTING[answers_of(task.metric, task.choices)]
            columns = [column.partition(":")[2] for column in section.evaluate]
            metrics = [
                metric_named(m) for m in dict.fromkeys((task.metric, *task.more_metrics, *filter(None, columns)))
            ]
            others = " or ".join(other for answers in fitting for other in metric_names(answers))
            missing += [
                f"tasks.{name}.evaluate: metric {metric.name!r} compares answers of the kind {metric.answers!r}, "
                f"which are not the task's; it may be {others}"
                for metric in metrics
                if metric.answers not in fitting
            ]
            missing += [f"task {name!r}: {what}" for what in lacking(m.name for m in metrics if m.answers in fitting)]
            wanted = {"train", *(column.split(":")[0] for column in section.evaluate)}
            missing += [f"task {name!r}: no split {split!r}" for split in sorted(wanted) if not task.splits.get(split)]
        return missing

    def _unknown_names(self) -> list[str]:
        from pituning.methods.presets import method_names
        from pituning.similarity.measures import KINDS
        from pituning.tasks.task import task_names

        blend = self.interpolation
        known: dict[str, tuple[list[str], list[str]]] = {
            "task": (task_names(), [*self.tasks, *(e for t in self.tasks.values() for e in t.experts)]),
            "method": (method_names(), [*self.methods, *([blend.method] if blend else [])]),
            "similarity": (list(KINDS), [blend.kind] if blend else []),
        }
        problems = [
            str(unknown_name(k, n, names)) for k, (names, used) in known.items() for n in used if n not in names
        ]
        if blend and blend.method not in self.methods:
            problems.append(
                f"interpolation.method {blend.method!r} is none of the methods of stage 1: {', '.join(self.methods)}"
            )
        rows = {*self.methods, PI, BARE}
        problems += [
            f"tasks.{name}.published: there is no row {row!r}; the rows are {', '.join(sorted(rows))}"
            for name, section in self.tasks.items()
            for row in section.published
            if row not in rows
        ]
        problems += [
            f"tasks.{name}.experts: {name!r} itself is among the experts"
            for name, t in self.tasks.items()
            if name in t.experts
        ]
        return problems

    def _wrong_columns(self) -> list[str]:
        from pituning.metrics.registry import all_metric_names

        metrics = all_metric_names()
        return [
            f"tasks.{name}.evaluate: {unknown_name('metric', metric, metrics)}"
            for name, section in self.tasks.items()
            for column in section.evaluate
            if (metric := column.partition(":")[2]) and metric not in metrics
        ]

    def _wrong_options(self) -> list[str]:
        from pituning.methods.presets import method_fields, method_names

        return [
            f"methods.{method}.options: method {method!r} has no setting {option!r}"
            for method, section in self.methods.items()
            if method in method_names()
            for option in section.options
            if option not in method_fields(method)
        ]

    def _wrong_settings(self) -> list[str]:
        problems = []
        places: dict[str, TrainingSection] = {
            "training": self.training,
            **{f"methods.{m}.training": s.training for m, s in self.methods.items()},
            **{f"tasks.{t}.training": s.training for t, s in self.tasks.items()},
        }
        if self.interpolation:
            places["interpolation.training"] = self.interpolation.training
        from transformers.trainer_utils import SchedulerType

        schedules = [s.value for s in SchedulerType]
        for place, section in places.items():
            if section.steps is not None and section.epochs is not None:
                problems.append(f"{place}: give either steps or epochs, not both")
            if section.schedule is not None and section.schedule not in schedules:
                problems.append(f"{place}: {unknown_name('schedule', section.schedule, schedules)}")
            if self.shots is not None and (given := section.given()):
                problems.append(
                    f"{place}: with shots, cross-fitting finds learning rate and steps and has settings of its own; "
                    f"leave out {', '.join(given)}"
                )
        return problems
