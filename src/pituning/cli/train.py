"""`pituning train`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from pituning.cli.options import DataOptions, Method, ModelOptions, PoolOptions, SaveOptions, TaskName
from pituning.cli.output import Output, table
from pituning.cli.verb import verb

if TYPE_CHECKING:
    from pituning.tasks import Task
    from pituning.training.trainer import TrainSettings

_METHOD, _TRAINING = "Method", "Training"
_REAL = ("lora_alpha",)
"""Settings that are ints by their annotation in PEFT, and may be any number."""
_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}


@verb
def train(
    task: TaskName,
    source: DataOptions,
    model: ModelOptions,
    pool: PoolOptions,
    saving: SaveOptions,
    output: Output,
    method: Method = "lora",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the method, such as r=16, length=50 or use_rslora=true; give it once for each.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    peft_config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Any PEFT configuration (an adapter_config.json), instead of --method.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Optimizer steps; not found by cross-fitting then.", rich_help_panel=_TRAINING
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="N", min=0.01, help="Passes over the examples, instead of --steps.", rich_help_panel=_TRAINING
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", min=0.0, help="Learning rate; not found by cross-fitting then.", rich_help_panel=_TRAINING
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Examples read at a time.", rich_help_panel=_TRAINING)
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Batches per optimizer step.", rich_help_panel=_TRAINING),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            min=0.0,
            max=0.99,
            help="Spread over the answers that are allowed.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="For checkpoints and TensorBoard logs; one run each.", rich_help_panel=_TRAINING
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from this run's last checkpoint in --log-dir.", rich_help_panel=_TRAINING),
    ] = False,
) -> None:
    """Train an expert for a task and save it into the pool: a small adapter on a backbone that stays frozen.

    With --shots, learning rate and steps are found by cross-fitting on the shots, unless you say how to train.

    Example: pituning train sst2 --shots 16 --seed 0

    Example, own data: pituning train mine --train-file mine.tsv --labels 'neg=a negative remark' --labels 'pos=…'
    """
    if steps is not None and epochs is not None:
        raise typer.BadParameter("give either --steps or --epochs, not both")
    if resume and log_dir is None:
        raise typer.BadParameter("--resume needs --log-dir, the folder with the checkpoints")
    if peft_config is not None and (method != "lora" or set_):
        raise typer.BadParameter("--peft-config is complete: leave out --method and --set")
    options = _method_settings(set_ or [])
    target = source.load(task)
    default = task if target.shots is None else f"{task}-{target.shots}shot-seed{target.seed}"
    with output.status(f"loading {model.backbone}"):
        from pituning.experts.expert import read_config
        from pituning.experts.importing import known_settings
        from pituning.methods import make_config
        from pituning.methods import peft_config as known_config
        from pituning.methods.presets import config_type, method_of
        from pituning.training.checkpoints import checkpoints
        from pituning.training.train_expert import train_expert

        backbone = model.load()
        if peft_config is None:
            config = make_config(method, backbone, **_typed(options, get_type_hints(config_type(method))))
        else:
            config = known_config(known_settings(read_config(peft_config), peft_config))
        folder = saving.destination(pool, default, task=task, method=method_of(config), blended=False)
    changes = {
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "label_smoothing": label_smoothing,
    }
    settings = _settings(target, steps, epochs, {name: value for name, value in changes.items() if value is not None})
    if resume and log_dir is not None and not checkpoints(log_dir):
        output.note(f"no checkpoint in {log_dir}: starting from the beginning")
    searching = settings is None and target.shots is not None
    with output.status("finding learning rate and steps by cross-fitting") if searching else nullcontext():
        expert = train_expert(
            backbone, target, config, settings=settings, seed=source.seed, folder=log_dir, resume=resume,
            progress=not (searching or output.quiet),
        )  # fmt: skip
    saving.write(expert, folder)
    card = expert.card
    output.result(
        {"folder": folder, **asdict(card), "name": folder.name},
        table(
            f"{folder.name}: {card.method} expert for {task} on {card.backbone}",
            ["", "#"],
            [
                ["training examples", f"{len(target.split('train')):,}"],
                ["parameters", f"{card.parameters:,}"],
                ["learning rate", f"{card.training['learning_rate']:g}"],
                ["steps", f"{card.training['steps_taken']:,}"],
                *([metric, f"{value:.4f}"] for metric, value in card.metrics.items()),
            ],
        ),
        f"saved to {folder}",
    )


def _method_settings(given: Sequence[str]) -> dict[str, str]:
    """``["r=16", "use_rslora=true"]`` to texts by name."""
    settings: dict[str, str] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"--set expects NAME=VALUE, not {entry!r}")
        settings[name] = value
    return settings


def _typed(settings: Mapping[str, str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Texts as the values that a configuration's fields take: JSON, a number, True, False and None in any case, or a word."""
    typed: dict[str, Any] = {}
    hints = {**hints, **{name: float for name in _REAL if hints.get(name) is int}}
    for name, text in settings.items():
        constants = (value for word, value in _CONSTANTS.items() if word == text.lower())
        readings = [*_json(text), *_number(text), *constants]
        if not any(isinstance(value, list | dict) for value in readings):
            readings.append(text)
        hint = hints.get(name, Any)
        fitting = [value for value in readings if _fits(value, hint)]
        if not fitting:
            shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise typer.BadParameter(f"--set {name}={text}: expected {shown}, found {type(readings[0]).__name__}")
        typed[name] = fitting[0]
    return typed


def _json(text: str) -> list[Any]:
    """What a text says in JSON, alone in a list; an empty list where it is no JSON."""
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return []


def _number(text: str) -> list[float]:
    """A number as Python writes it (``.1``, ``1e1``), alone in a list, as an int where it is whole; else an empty list."""
    try:
        value = float(text)
    except ValueError:
        return []
    if not math.isfinite(value):
        return []
    return [int(value) if value.is_integer() else value]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type, as far as the type is a plain one; the others are for PEFT to judge."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:  # PEFT has patterns among them, such as pissa_niter_[number of iters]
        return value in parts or (isinstance(value, str) and any("[" in str(part) for part in parts))
    if kind is list:
        return isinstance(value, list) and all(_fits(part, parts[0]) for part in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if (kind or hint) in (bool, str, dict, NoneType):
        return isinstance(value, kind or hint)
    return True


def _settings(task: Task, steps: int | None, epochs: float | None, changes: Mapping[str, Any]) -> TrainSettings | None:
    """The usual settings with what was asked for; ``None`` where nothing was."""
    from pituning.training.crossfit import Search
    from pituning.training.train_expert import FULL_DATA

    if steps is None and epochs is None and not changes:
        return None
    settings = FULL_DATA if task.shots is None else Search().settings(FULL_DATA.learning_rate, Search().steps)
    settings = settings.with_(**changes)
    if epochs is not None:
        settings = settings.with_(steps=None, epochs=epochs)
    return settings if steps is None else settings.with_(steps=steps)
