"""Training on `transformers.Trainer`: single experts and interpolations are one and the same loop over a mixture."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from pituning.backbones.base import Backbone, require_targets
from pituning.data.augment import Augmenter, augmenter
from pituning.errors import DataError, PituningError, RefusedError, unknown_name
from pituning.example import Example
from pituning.interpolation.mixture import Mixture
from pituning.methods.attach import check_tensors
from pituning.training.batching import parts_of_similar_length, text_length
from pituning.training.checkpoints import begin, identity, require_folder, steps_of
from pituning.training.gradient_free import SIGMA, minimise
from pituning.training.module import MixtureModel, running

OPTIMIZERS = ("adamw", "cma")
WEIGHTS_FILE = "mixture.safetensors"
HISTORY_FILE = "history.json"
BEST_FILE = "best.safetensors"
"""In a checkpoint: what was measured so far, and, of a run that keeps it, the best state; a resumed run goes on from them."""
ALPHA = "mixture.alpha"  # in a checkpoint
WEIGHTS, PARTS = "example_weights", "parts"  # their places in a batch


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train.

    Attributes:
        learning_rate: of the experts' tensors and of δ.
        alpha_learning_rate: of α; with the paper's (the same as ``learning_rate``) softmax weights hardly move.
        optimizer: ``"adamw"``, or ``"cma"``: the weights alone are learned, without gradients, by CMA-ES; a step is then a
            generation over all examples, and ``alpha_learning_rate`` the first standard deviation of α (0: 0.5).
        weights_to_start, weights_spread: strengths of the regularisers of :meth:`Mixture.penalty`.
        steps: optimizer steps; where ``None``, ``epochs`` over the examples.
        schedule: any scheduler name of transformers; few-shot runs use a constant rate, so that a run stopped earlier
            is nearly the same run.
        warmup: share of the steps.
        label_smoothing: ε of the training loss, spread over the answers (or tokens) that can stand in the target's place.
        accumulate: batches per optimizer step, so that a step sees ``batch_size · accumulate`` examples.
        augment: change training pictures as the examples say; False takes them as they are.
        eval_every: steps between evaluations on the held-out examples, where there are any; 0 means once per epoch.
        keep_best: with held-out examples, end with the state of the lowest held-out log-loss instead of the last.
        seed: order of the examples and dropout, not the initialisation.

    Raises:
        PituningError: for fewer than no steps, or no epochs.
    """

    learning_rate: float = 1e-3
    alpha_learning_rate: float = 0.0
    optimizer: str = "adamw"
    weights_to_start: float = 0.0
    weights_spread: float = 0.0
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 16
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    accumulate: int = 1
    augment: bool = True
    eval_every: int = 0
    keep_best: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 0:
            raise PituningError(f"steps must be 0 (which trains nothing) or more, not {self.steps}; None takes epochs")
        if not 0 < self.epochs < math.inf:
            raise PituningError(f"epochs must be a positive number, not {self.epochs:g}; steps=0 trains nothing")

    def with_(self, **changes: Any) -> TrainSettings:
        """A changed copy."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Fit:
    """What a run reports by step.

    Attributes:
        held_out: held-out log-loss.
        held_out_log_p: rows of :func:`pituning.training.evaluation.log_probabilities` of the held-out examples.
        training: training loss.
        steps: that were taken.
        best_step: that of the lowest held-out log-loss.
        end_step: whose state the mixture has: ``best_step`` where the best is kept, and else the last.
        weights: the mixture's weights ``[groups, experts]`` before the first step, at every evaluation, some fifty times in
            between, and after the last step.
    """

    held_out: dict[int, float] = field(default_factory=dict)
    held_out_log_p: dict[int, Tensor] = field(default_factory=dict)
    training: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    best_step: int = 0
    end_step: int = 0
    weights: dict[int, list[list[float]]] = field(default_factory=dict)


def fit(
    backbone: Backbone,
    mixture: Mixture,
    config: Mapping[str, Any],
    examples: Sequence[Example],
    settings: TrainSettings,
    *,
    held_out: Sequence[Example] = (),
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    may_diverge: bool = False,
) -> Fit:
    """Train a mixture in place on examples; the backbone stays as it is.

    The loss is the mean over a step's examples of each one's loss times its weight.

    Args:
        held_out: examples on which the log-loss is measured before the first step and every ``eval_every`` steps.
        folder: where checkpoints and TensorBoard logs go; nothing is written where it is ``None``.
        resume: continue from the last checkpoint in ``folder``, if there is one. It must be of the same run: only ``steps``
            and ``epochs`` may be others, so that a finished run can be made longer.
        progress: show a progress bar.
        may_diverge: report what was measured of a run that ends in numbers that are not finite, too: a search takes it for
            the loser.

    Raises:
        DataError: if there are no examples.
        PituningError: if a trained tensor is not finite at the end; for ``resume`` without a folder.
        RefusedError: if the folder holds checkpoints and the run is not to go on from them, or they are another run's.
    """
    require_folder(folder, resume)
    if not examples:
        raise DataError("there are no examples to train on")
    trainable = [p for p in mixture.parameters() if p.requires_grad]
    if settings.optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", settings.optimizer, OPTIMIZERS)
    if not trainable or settings.steps == 0:
        return Fit()
    if settings.optimizer == "cma":
        found = _fit_gradient_free(backbone, mixture, config, examples, settings, held_out, folder)
    else:
        found = _fit_by_gradients(backbone, mixture, config, examples, settings, held_out, folder, progress)
    if not may_diverge:
        _require_finite(mixture, settings, found.steps)
    return found


def _fit_by_gradients(
    backbone: Backbone,
    mixture: Mixture,
    config: Mapping[str, Any],
    examples: Sequence[Example],
    settings: TrainSettings,
    held_out: Sequence[Example],
    folder: str | Path | None,
    progress: bool,
) -> Fit:
    """`fit` by AdamW, from the last checkpoint in the folder, if there is one."""
    checkpoint: Path | None = None
    if folder is not None:
        run = identity(backbone, mixture, config, examples, held_out, settings_dict(settings))
        checkpoint = begin(folder, run, settings_dict(TrainSettings()))
    with running(backbone, mixture, config) as model, tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(settings, len(examples), Path(folder) if folder else None, scratch, backbone, progress)
        collate = _Collator(backbone, settings)
        trainer = MixtureTrainer(
            backbone, settings, model=model, args=arguments, train_dataset=_Listed(examples), data_collator=collate
        )
        history = trainer.history = _History(trainer, held_out, settings)
        trainer.add_callback(history)
        _keep_quiet(trainer, progress)
        if checkpoint is not None and (taken := steps_of(checkpoint)) >= arguments.max_steps:
            if taken > arguments.max_steps:
                raise RefusedError(
                    f"{folder} holds {checkpoint.name}, and the run is to have {arguments.max_steps} steps: resume it with at "
                    f"least {taken}, or take another folder"
                )
            trainer._load_from_checkpoint(str(checkpoint))
            history.measure(taken)  # that of the checkpoint's last step, unless it is among its figures
            steps = taken
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
            steps = trainer.state.global_step
        kept = history.restore_best()
        return Fit(
            history.held_out,
            history.held_out_log_p,
            history.training,
            steps,
            history.best_step,
            history.best_step if kept else steps,
            history.weights,
        )


@torch.no_grad()
def _fit_gradient_free(
    backbone: Backbone,
    mixture: Mixture,
    config: Mapping[str, Any],
    examples: Sequence[Example],
    settings: TrainSettings,
    held_out: Sequence[Example],
    folder: str | Path | None,
) -> Fit:
    """`fit` by CMA-ES: the same figures at the same steps, from forward passes over all examples."""
    if folder is not None:
        raise RefusedError("a gradient-free run writes no checkpoints: leave folder out")
    from pituning.training.evaluation import log_loss, log_probabilities

    with running(backbone, mixture, config) as model:
        model.eval()
        collate = _Collator(backbone, settings)
        starts = range(0, len(examples), settings.batch_size)
        batches = [collate(examples[start : start + settings.batch_size]) for start in starts]
        generations = settings.steps or math.ceil(settings.epochs)
        found, best = Fit(steps=generations), mixture.alpha.detach().clone()

        def objective() -> float:
            total = 0.0
            for batch in batches:
                losses = model(settings.label_smoothing, batch[PARTS])
                total += float((losses * batch[WEIGHTS].to(losses)).sum())
            return total / len(examples) + float(_penalty(mixture, settings))

        def after(step: int) -> None:
            nonlocal found, best
            found.weights[step] = mixture.weights().detach().cpu().tolist()
            last = step == generations
            if not held_out or (step and not last and step % (settings.eval_every or 1)):
                return
            found.held_out_log_p[step] = log_probabilities(backbone, held_out, model, finite=False)
            found.held_out[step] = log_loss(found.held_out_log_p[step], held_out)
            if found.held_out[step] <= min(found.held_out.values()):
                found, best = replace(found, best_step=step), mixture.alpha.detach().clone()

        minimise(
            mixture,
            objective,
            generations=generations,
            sigma=settings.alpha_learning_rate or SIGMA,
            seed=settings.seed,
            after=after,
        )
        if not (held_out and settings.keep_best):
            return replace(found, end_step=generations)
        mixture.alpha.copy_(best)
        return replace(found, end_step=found.best_step)


@torch.no_grad()
def _require_finite(mixture: Mixture, settings: TrainSettings, steps: int) -> None:
    for name, tensor in mixture().items():
        if wrong := int((~tensor.isfinite()).sum()):
            rate = max(settings.learning_rate, settings.alpha_learning_rate)
            raise PituningError(
                f"training has diverged: after {steps} steps {wrong} of {tensor.numel()} values of tensor {name} "
                f"{list(tensor.shape)} are NaN or infinite; the learning rate ({rate:g}) is too high, or half precision has "
                "overflowed: lower the rate, or train with the backbone in float32"
            )


def _penalty(mixture: Mixture, settings: TrainSettings) -> Tensor:
    return mixture.penalty(settings.weights_to_start, settings.weights_spread)


class MixtureTrainer(Trainer):
    """A `Trainer` whose model is a mixture: its checkpoints hold α, δ and the trainable φ_k, never the backbone."""

    def __init__(self, backbone: Backbone, settings: TrainSettings, **options: Any) -> None:
        super().__init__(**options)
        # the loss is a mean over its batch: to be divided by the batches of a step
        self.model_accepts_loss_kwargs = False
        self.backbone = backbone
        self.settings = settings
        self.history: _History | None = None
        self._batches, self._examples = 1, 0  # of the present step

    def get_batch_samples(self, *arguments: Any, **options: Any) -> tuple[list[Any], Any]:
        """The batches of the next step."""
        batches, items = super().get_batch_samples(*arguments, **options)
        self._batches, self._examples = len(batches), sum(len(batch[WEIGHTS]) for batch in batches)
        return batches, items

    def compute_loss(
        self, model: MixtureModel, inputs: Mapping[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """Mean of the per-example losses, each times its example's weight."""
        losses: Tensor = model(self.settings.label_smoothing, inputs[PARTS])
        loss: Tensor = (losses * inputs[WEIGHTS].to(losses)).mean()
        if self._batches > 1:  # the trainer takes the mean over batches, so that a smaller one must count less
            loss = loss * (len(losses) * self._batches / self._examples)
        return loss + _penalty(self.model.mixture, self.settings)

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """AdamW with a learning rate of its own for α, which is never decayed."""
        optimizer: torch.optim.Optimizer | None = self.optimizer  # type: ignore[has-type]
        if optimizer is None:
            alpha = [p for n, p in self.model.named_parameters() if n.endswith("alpha") and p.requires_grad]
            other = [p for n, p in self.model.named_parameters() if not n.endswith("alpha") and p.requires_grad]
            rate, decay = self.settings.learning_rate, self.settings.weight_decay
            groups = [{"params": other, "lr": rate, "weight_decay": decay}] if other else []
            if alpha:
                groups.append({"params": alpha, "lr": self.settings.alpha_learning_rate, "weight_decay": 0.0})
            optimizer = self.optimizer = torch.optim.AdamW(groups, lr=rate)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
        safetensors.torch.save_file(state, folder / WEIGHTS_FILE)
        if self.history is not None:
            self.history.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        saved = safetensors.torch.load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE)
        live = {n: p for n, p in (model or self.model).named_parameters() if p.requires_grad}
        _check_saved(live, saved, f"checkpoint {resume_from_checkpoint}")
        with torch.no_grad():
            for name, parameter in live.items():
                parameter.copy_(saved[name])
        if self.history is not None:
            self.history.load(Path(resume_from_checkpoint), live)


class _Collator:
    """Examples to batches of the backbone's, with the weights of their losses in the order of the parts.

    On a CPU texts are computed in parts of similar length, which saves most of the padding; the step is the same. A GPU
    takes a batch as a whole, as do pictures, which are all of one size.
    """

    def __init__(self, backbone: Backbone, settings: TrainSettings) -> None:
        self.backbone, self.settings = backbone, settings
        self._augmenters: dict[str, Augmenter | None] = {"": None}

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        require_targets(examples)
        if self.backbone.device.type == "cpu" and not any(e.image is not None for e in examples):
            parts = parts_of_similar_length([text_length(e) for e in examples])
        else:
            parts = [list(range(len(examples)))]
        changed = [self._augmented(e) for e in examples] if self.settings.augment else examples
        batches = [self.backbone.collate([changed[n] for n in part]) for part in parts]
        return {PARTS: batches, WEIGHTS: torch.tensor([examples[n].weight for part in parts for n in part])}

    def _augmented(self, example: Example) -> Example:
        name = example.augmentation
        if name not in self._augmenters:
            self._augmenters[name] = augmenter(name, self.settings.seed)
        augment = self._augmenters[name]
        return example if augment is None else augment(example)


class _Listed(Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class _History(TrainerCallback):
    """Measures the held-out log-loss along the way and remembers the best state."""

    def __init__(self, trainer: MixtureTrainer, held_out: Sequence[Example], settings: TrainSettings) -> None:
        self.trainer, self.examples, self.settings = trainer, list(held_out), settings
        self.held_out: dict[int, float] = {}
        self.held_out_log_p: dict[int, Tensor] = {}
        self.training: dict[int, float] = {}
        self.weights: dict[int, list[list[float]]] = {}
        self.best_step = 0
        self._best: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.measure(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.settings.eval_every
        if (every and state.global_step % every == 0) or state.global_step == state.max_steps:
            self.measure(state.global_step)
        elif state.global_step % args.logging_steps == 0:
            self._record_weights(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.settings.eval_every:
            self.measure(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.training[state.global_step] = float(logs["loss"])

    def restore_best(self) -> bool:
        """Whether there was one to restore."""
        with torch.no_grad():
            for name, parameter in self.trainer.model.named_parameters():
                if name in self._best:
                    parameter.copy_(self._best[name])
        return bool(self._best)

    def save(self, folder: Path) -> None:
        """Write what was measured so far, and the best state, beside a checkpoint's tensors."""
        record = {"held_out": self.held_out, "training": self.training, "weights": self.weights, "best": self.best_step}
        (folder / HISTORY_FILE).write_text(json.dumps(record), encoding="utf-8")
        if self._best:
            safetensors.torch.save_file({n: t.cpu().contiguous() for n, t in self._best.items()}, folder / BEST_FILE)

    def load(self, folder: Path, live: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint; one of an earlier version has nothing to go on from.

        Raises:
            ExpertError: if the best state is not of these parameters; it names the tensor and the shapes.
        """
        if not (folder / HISTORY_FILE).is_file():
            return
        record = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
        for name in ("held_out", "training", "weights"):
            setattr(self, name, {int(step): value for step, value in record[name].items()})
        self.best_step = record["best"]
        if self.settings.keep_best and (folder / BEST_FILE).is_file():
            best = safetensors.torch.load_file(folder / BEST_FILE)
            _check_saved(live, best, f"best state of {folder}")
            self._best = {n: t.to(live[n]) for n, t in best.items()}

    def _record_weights(self, step: int) -> None:
        self.weights[step] = self.trainer.model.mixture.weights().detach().cpu().tolist()

    def measure(self, step: int) -> None:
        self._record_weights(step)
        if not self.examples or step in self.held_out:
            return
        from pituning.training.evaluation import log_loss, log_probabilities

        self.trainer.model.eval()  # the trainer goes back to training mode by itself
        # a run that has diverged may have a best state from before
        log_p = log_probabilities(self.trainer.backbone, self.examples, self.trainer.model, finite=False)
        loss = log_loss(log_p, self.examples)
        self.held_out[step], self.held_out_log_p[step] = loss, log_p
        if len(self.held_out) > 1:
            self.trainer.log({"held_out_log_loss": loss})
        if loss <= min(self.held_out.values()):
            self.best_step = step
            if self.settings.keep_best:
                live = self.trainer.model.named_parameters()
                self._best = {n: p.detach().clone() for n, p in live if p.requires_grad}


def _arguments(
    settings: TrainSettings, size: int, folder: Path | None, scratch: str, backbone: Backbone, progress: bool
) -> TrainingArguments:
    batch_size = min(settings.batch_size, size)
    steps = settings.steps or math.ceil(settings.epochs * math.ceil(size / (batch_size * settings.accumulate)))
    return TrainingArguments(
        output_dir=str(folder or scratch),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        # the first warm-up step has rate 0, so that a run of one step must have none
        warmup_steps=max(1, round(settings.warmup * steps)) if settings.warmup and steps > 1 else 0,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        logging_strategy="steps" if folder or progress else "no",
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,  # or the losses of a run that has diverged would look like those before
        save_strategy="steps" if folder else "no",
        save_steps=max(1, steps // 5),
        save_total_limit=2,
        report_to=["tensorboard"] if folder else [],
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # batches are collated on the backbone's device, and only CPU tensors can be pinned
        use_cpu=backbone.device.type == "cpu",
        disable_tqdm=True,
    )


def _keep_quiet(trainer: MixtureTrainer, progress: bool) -> None:
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if progress:
        from pituning.training.progress import RichProgress

        trainer.add_callback(RichProgress())


def _check_saved(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str) -> None:
    """:func:`check_tensors`, but for an infinite α: that of a weight of exactly 0 or 1."""
    finite = {n: t.masked_fill(t.isinf(), 0) if n == ALPHA else t for n, t in saved.items()}
    check_tensors({n: tuple(p.shape) for n, p in live.items()}, finite, where)


def settings_dict(settings: TrainSettings) -> dict[str, Any]:
    """Settings as plain values, for an expert's card."""
    return asdict(settings)
