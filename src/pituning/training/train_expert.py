"""Train one expert for a task: full data with a fixed recipe, or a few shots with cross-fitted decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import PituningError
from pituning.example import Example
from pituning.experts.expert import Expert, ExpertCard, start_of, tensor_hash
from pituning.interpolation.build import build_mixture
from pituning.interpolation.collapse import collapse
from pituning.interpolation.mixture import Mixture
from pituning.methods.attach import config_dict, initial_tensors
from pituning.methods.prefix import folded, is_folded
from pituning.methods.presets import make_config, method_of
from pituning.tasks.task import Task
from pituning.training.checkpoints import require_folder
from pituning.training.crossfit import CrossFit, Search, cross_fit, fold_examples
from pituning.training.trainer import TrainSettings, fit, settings_dict

FULL_DATA = TrainSettings(learning_rate=1e-3, epochs=2, batch_size=16, schedule="linear", keep_best=True)
_DEV_LIMIT = 400


def train_expert(
    backbone: Backbone,
    task: Task,
    method: str | PeftConfig = "lora",
    *,
    name: str | None = None,
    settings: TrainSettings | None = None,
    search: Search | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> Expert:
    """Train an expert from the method's common initialisation.

    Args:
        method: a method's name, or any PEFT configuration that :func:`pituning.methods.attached` takes.
        task: with shots, learning rate and steps are found by cross-fitting (``search``); with full data the run is
            ``settings`` and ends with the best state on the dev split, where there is one.
        settings: overrides the search or the full-data recipe.
        search: the grid for shots; a task with full data has none.
        seed: of the order of the examples; the initialisation does not depend on it.
        folder: for checkpoints and TensorBoard logs; with ``resume`` a run goes on from the last checkpoint there.
        options: fields of the method's PEFT configuration (``r``, ``target_modules``, …).

    Raises:
        UnknownNameError: for an unknown method.
        PituningError: for options beside a configuration, which has them all; for a search with full data.
        DataError: if the training split is empty.
        RefusedError: if the folder holds checkpoints and the run is not to go on from them, or they are another run's.
    """
    require_folder(folder, resume)
    if search is not None and task.shots is None:
        raise PituningError(
            f"task {task.name!r} has full data, for which nothing is searched: give settings=TrainSettings(…) in place of "
            "search=…, or load the task with shots=…"
        )
    if isinstance(method, PeftConfig):
        if options:
            raise PituningError(f"a {type(method).__name__} is complete; set {', '.join(options)} in it")
        method, config = method_of(method), config_dict(method)
    else:
        config = config_dict(make_config(method, backbone, **options))
    initial = initial_tensors(backbone, config)
    examples = task.split("train")
    record: dict[str, Any] = {**backbone.record, "examples": len(examples), "task_kind": task.kind}
    if not is_folded(config):
        record["projection"] = {"projection": True, "projection_dim": config["projection_dim"]}
    metrics: dict[str, float] = {}
    held_out = dev_examples(task)
    if settings is None and task.shots is not None:
        search = search or Search()
        found = cross_fit(backbone, lambda _: start_from(initial, config), examples, search, warm=False)
        settings = search.settings(found.learning_rate, found.steps, seed)
        metrics["cross-fitted log-loss"] = found.loss
    settings = (settings or FULL_DATA).with_(seed=seed)
    mixture, carried = start_from(initial, config)
    result = fit(
        backbone, mixture, carried, examples, settings,
        held_out=held_out, folder=folder, resume=resume, progress=progress,
    )  # fmt: skip
    if result.held_out:
        metrics["dev log-loss"] = result.held_out[result.end_step]
    record |= {"steps_taken": result.steps, **settings_dict(settings)}
    card = ExpertCard(
        name=name or task.name,
        backbone=backbone.hub_name,
        fingerprint=backbone.fingerprint,
        task=task.name,
        method=method,
        init_hash=tensor_hash(folded(config, {name: tensor.cpu() for name, tensor in initial.items()})[1]),
        shots=task.shots,
        seed=task.seed,
        choices=task.choices,
        metrics=metrics,
        training=record,
    )
    return _finished(mixture, carried, card)


def dev_examples(task: Task) -> list[Example]:
    """A sample of the dev split that chooses the best state of a run; none for few shots, which include validation.

    Questions none of whose right answers may be given say nothing about a log-loss, and are left out.
    """
    if task.shots is not None or not task.splits.get("dev"):
        return []
    return [example for example in task.split("dev", _DEV_LIMIT) if example.target]


def start_from(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Mixture, dict[str, Any]]:
    """A mixture of one trainable expert: plain fine-tuning from the given tensors."""
    return build_mixture([Expert(tensors, config, ExpertCard("start"))], train="experts", granularity="model")


def fold_experts(
    backbone: Backbone, task: Task, own: Expert, search: Search, seed: int = 0
) -> dict[int | None, Expert]:
    """The own expert trained without each fold, at the own expert's learning rate and steps; ``None`` → itself.

    α and every later decision may only be fitted on shots that an expert has not seen; these are the experts for that.
    """
    trained_as, initial = start_of(backbone, own)
    known = {f.name for f in fields(TrainSettings)}
    recorded = {k: v for k, v in own.card.training.items() if k in known}
    # what a later version added has harmless defaults
    if not {"learning_rate", "steps", "batch_size"} <= recorded.keys():
        raise PituningError(
            f"the card of expert {own.name!r} does not say how it was trained, so it cannot be retrained without a fold; "
            "use an own expert from train_expert"
        )
    drawn, asked = (own.card.task, own.card.shots, own.card.seed), (task.name, task.shots, task.seed)
    if drawn != asked:
        raise PituningError(
            f"own expert {own.name!r} was trained on (task, shots, draw) = {drawn}, but the target is {asked}: "
            "train one on the target's shots"
        )
    settings = TrainSettings(**recorded).with_(seed=seed)
    experts: dict[int | None, Expert] = {None: own}
    for fold in range(search.folds):
        mixture, config = start_from(initial, trained_as)
        fit(backbone, mixture, config, fold_examples(task.split("train"), search, fold), settings)
        experts[fold] = _finished(mixture, config, own.card)
    return experts


def _finished(mixture: Mixture, config: Mapping[str, Any], card: ExpertCard) -> Expert:
    """The trained expert; a prefix that was trained through a network becomes the plain prefix that it makes."""
    trained = collapse(mixture, config, card).expert
    settings, tensors = folded(trained.config, trained.tensors)
    return Expert(tensors, settings, replace(trained.card, parameters=sum(t.numel() for t in tensors.values())))


__all__ = ["CrossFit", "Search", "TrainSettings", "fold_experts", "start_from", "train_expert"]
