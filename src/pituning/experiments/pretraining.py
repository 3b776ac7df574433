"""Pretraining an OFA from nothing on emoji scenes, in OFA's unified way: every task is text, pictures and boxes in, text or
boxes out, and all of them train one model at once.

Example n of step s is a function of (s, n) alone, so that a run that is broken off goes on with the very examples that were
to come next.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from pituning.backbones.loss import IGNORED, label_smoothed_nll
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.processing import OFAProcessor
from pituning.backbones.ofa.vocabulary import MASK
from pituning.data.images import open_image
from pituning.data.scenes import draws_for
from pituning.errors import RefusedError
from pituning.example import Example
from pituning.experiments.cells import write_json
from pituning.experiments.pretrain_recipe import PretrainRecipe
from pituning.tasks import pretraining_task
from pituning.training.checkpoints import checkpoints, require_folder, steps_of
from pituning.training.progress import RichProgress

INFILLING = "infilling"
COMPLETE = ' what is the complete text of " {} "?'
"""OFA's prompt for text infilling."""

LOG_FILE = "log.jsonl"
RECIPE_FILE = "recipe.json"
MODEL_FOLDER = "model"
_KINDS = "kinds"  # their place in a batch


class Stream(Dataset[tuple[str, Example]]):
    """All examples of a run in their order: (kind, example)."""

    def __init__(self, recipe: PretrainRecipe, split: str = "pretrain") -> None:
        self.recipe = recipe
        self.examples = {
            kind: pretraining_task(kind, vocabulary=recipe.scenes, split=split, seed=recipe.seed, side=recipe.side)
            .splits["train" if split == "pretrain" else "test"]
            for kind in dict.fromkeys((*recipe.tasks, "caption"))
        }  # fmt: skip

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch_size

    def __getitem__(self, number: int) -> tuple[str, Example]:
        step, place = divmod(number, self.recipe.batch_size)
        every = self.recipe.infilling_every
        if every and step % every == every - 1:
            return INFILLING, self._with_a_gap(number)
        tasks = self.recipe.tasks_at(step)
        kind, n = [(kind, n) for kind, count in tasks.items() for n in range(count)][place]
        example = self.examples[kind][step * tasks[kind] + n]
        if step < self.recipe.decoder_prompts_after:
            example = replace(example, decoder_prompt="none")
        return kind, replace(example, choices=())  # learned against the whole vocabulary

    def _with_a_gap(self, number: int) -> Example:
        """A caption without one to three of its words, to be completed; of scenes that no caption task shows."""
        captions = self.examples["caption"]
        example = captions[len(captions) - 1 - number % (len(captions) // 2)]
        words, draws = example.target.split(), draws_for("pretrain", number, self.recipe.seed, 1)
        length = min(1 + draws.below(3), len(words))
        first = draws.below(len(words) - length + 1)
        text = " ".join([*words[:first], MASK, *words[first + length :]])
        return Example(f"{INFILLING}/{number}", (text,), COMPLETE.format(text), example.target)


@dataclass(frozen=True)
class Collator:
    """Examples to tensors on the CPU, whatever device the model is on; ``<mask>`` in a prompt is the symbol."""

    processor: OFAProcessor

    def __call__(self, examples: Sequence[tuple[str, Example]]) -> dict[str, Any]:
        """What :meth:`OFAProcessor.__call__` gives, and ``kinds``."""
        p = self.processor
        sources = [self._source(example.prompt) for _, example in examples]
        ids = [torch.tensor(source) for source in sources]
        batch: dict[str, Any] = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=p.pad_id)}
        batch["attention_mask"] = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        images = [None if e.image is None else open_image(e.image, e.id) for _, e in examples]
        if all(i is not None for i in images):
            batch["patch_images"] = torch.stack([p.image(i) for i in images if i is not None])
            batch["patch_masks"] = torch.ones(len(images), dtype=torch.bool)
        elif any(i is not None for i in images):
            raise RefusedError("a batch has pictures for all of its examples, or for none")
        rows = []
        for (_, example), image, source in zip(examples, images, sources, strict=True):
            prompt = p.decoder_prompt(source, example.decoder_prompt)
            if example.box is not None and image is not None:
                rows.append(p.target(p.encode_box(example.box, image.size), prompt))
            else:
                rows.append(p.target(example.before_target + example.target.lstrip(), prompt))
        inputs, labels = ([torch.tensor(row[side]) for row in rows] for side in (0, 1))
        batch["decoder_input_ids"] = pad_sequence(inputs, batch_first=True, padding_value=p.pad_id)
        batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {**batch, _KINDS: [kind for kind, _ in examples]}

    def _source(self, prompt: str) -> list[int]:
        p, (first, *rest) = self.processor, prompt.split(MASK)
        ids = p.encode(first.rstrip(" ") if rest else first)
        for part in rest:
            ids += [p.tokenizer.mask_id, *p.encode(part)]
        return [p.bos_id, *ids, p.eos_id]


def build(recipe: PretrainRecipe) -> tuple[OFAForConditionalGeneration, OFAProcessor]:
    """The untrained model, and the processor with a vocabulary made from the texts of the recipe's tasks."""
    symbols, merges = bpe_vocabulary(_texts(recipe), recipe.vocabulary.pieces, recipe.vocabulary.bins)
    processor = OFAProcessor.from_symbols(symbols, merges, image_size=recipe.side, max_image_size=recipe.side)
    torch.manual_seed(recipe.seed)
    model = OFAForConditionalGeneration(OFAConfig(**{**recipe.model, "vocab_size": processor.vocab_size}))
    if recipe.positions_like_contents:
        stream = Stream(recipe)
        images = [example for n in range(4 * recipe.batch_size) if (example := stream[n][1]).image is not None]
        batch = Collator(processor)([("", example) for example in images])
        positions_like_contents(model, batch["patch_images"])
    return model, processor


def pretrain(
    recipe: PretrainRecipe,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    steps: int | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Train all parameters by a recipe, and write a folder that :func:`pituning.load_backbone` reads.

    ``log.jsonl`` gets a line every ``log_every`` steps: the losses since the last one in nats per token, and
    examples per second. Checkpoints lie beside it, and ``recipe.json`` has the recipe of the last call.

    Args:
        folder: instead of the recipe's ``output``.
        resume: go on from the last checkpoint in it. The recipe may differ in what begins after it: more steps before the
            rate falls, later numbers of examples.
        steps: stop after so many, with the schedule of the whole run; a later call with ``resume`` goes on.

    Returns:
        the record that ``model/pretraining.json`` has: steps, seconds, the last losses.

    Raises:
        RefusedError: if the folder holds checkpoints and the run is not to go on from them, or cannot: they have as many
            steps already, or were made with other settings; they are named.
    """
    folder = Path(folder or recipe.output)
    require_folder(folder, resume)
    found = checkpoints(folder)
    if found:
        _require_same_run(recipe, folder, found[-1], steps)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECIPE_FILE, recipe.model_dump(mode="json"))
    model, processor = build(recipe)
    log = _Log(folder / LOG_FILE, stop_after=steps, seen=recipe.batch_size)
    trainer = _Trainer(
        log, model=model, args=_arguments(recipe, folder, device), train_dataset=Stream(recipe),
        data_collator=Collator(processor), callbacks=[log],
    )  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if progress:
        trainer.add_callback(RichProgress())
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    record = {
        "recipe": recipe.model_dump(mode="json"), "steps": trainer.state.global_step,
        "examples": trainer.state.global_step * recipe.batch_size, "seconds": round(log.seconds()),
        "parameters": sum(p.numel() for p in model.parameters()), "losses": log.last, "torch": torch.__version__,
    }  # fmt: skip
    _save(model, processor, folder / MODEL_FOLDER, record)
    return record


def _require_same_run(recipe: PretrainRecipe, folder: Path, checkpoint: Path, stop_after: int | None) -> None:
    """A folder of an earlier version does not say what its run was begun with."""
    taken = steps_of(checkpoint)
    if stop_after is not None and stop_after <= taken:
        raise RefusedError(
            f"{folder} holds {checkpoint.name}, and the run is to stop after {stop_after} steps: give more than {taken}, or "
            f"leave the number out to go on to the end ({recipe.steps})"
        )
    path = folder / RECIPE_FILE
    if not path.is_file():
        return
    try:
        begun = PretrainRecipe(**json.loads(path.read_text(encoding="utf-8"))).shaped(taken)
    except (TypeError, ValueError) as error:
        raise RefusedError(f"{path} is no recipe to compare with: {error}; remove it to go on without") from error
    said = recipe.shaped(taken)
    if other := [f"{name} {begun[name]}, the recipe says {said[name]}" for name in said if begun[name] != said[name]]:
        raise RefusedError(
            f"{folder} holds {checkpoint.name} of a run with {'; '.join(other)}: go on with the settings in {path}, or take "
            "another folder"
        )


class _Trainer(Trainer):
    """A `Trainer` for the mean loss of a batch's target tokens, which reads the examples in their order."""

    def __init__(self, log: _Log, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False
        self._log = log

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Tensor:
        """Cross-entropy, in nats per target token."""
        labels, kinds = inputs["labels"], inputs[_KINDS]
        logits = model(**{k: v for k, v in inputs.items() if k not in ("labels", _KINDS)}).logits
        losses, tokens = label_smoothed_nll(logits, labels), (labels != IGNORED).sum(1)
        self._log.add(kinds, losses.detach(), tokens)
        loss: Tensor = losses.sum() / tokens.sum()
        return loss


class _Log(TrainerCallback):
    """Writes the losses of each kind, and stops a run that is to be continued later."""

    def __init__(self, path: Path, *, stop_after: int | None, seen: int) -> None:
        self.path, self.stop_after, self.batch_size = path, stop_after, seen
        self.last: dict[str, float] = {}
        self._sums: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._before = self._begun = self._since = 0.0
        self._written = 0  # the step of the last line

    def add(self, kinds: Sequence[str], losses: Tensor, tokens: Tensor) -> None:
        """Keep a batch's losses until they are written."""
        for kind in dict.fromkeys(kinds):
            mine = torch.tensor([k == kind for k in kinds], device=losses.device)
            self._sums[kind].append((losses[mine].sum(), tokens[mine].sum()))

    def seconds(self) -> float:
        """Time spent on training, earlier runs included."""
        return self._before + time.perf_counter() - self._begun

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._before = json.loads(kept[-1])["seconds"] if kept else 0.0
        self._begun = self._since = time.perf_counter()
        self._written = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.stop_after:
            control.should_save = control.should_training_stop = True
        if state.global_step % args.logging_steps and not control.should_training_stop:
            return
        self.last = {
            kind: round(float(sum(s for s, _ in sums) / sum(n for _, n in sums)), 4)
            for kind, sums in sorted(self._sums.items())
        }
        self._sums.clear()
        now = time.perf_counter()
        rate = (state.global_step - self._written) * self.batch_size / (now - self._since)
        self._since, self._written = now, state.global_step
        line = {
            "step": state.global_step,
            "seconds": round(self.seconds(), 1),
            "examples/s": round(rate, 1),
            **self.last,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _arguments(recipe: PretrainRecipe, folder: Path, device: str) -> TrainingArguments:
    on_cpu = torch.device(device).type == "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": recipe.decay_steps, "decay_type": "linear"},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16" or (recipe.precision == "auto" and not on_cpu),
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_total_limit=1,
        report_to=[],
        seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=not on_cpu,
        dataloader_drop_last=True,
        use_cpu=on_cpu,
        disable_tqdm=True,
    )


def bpe_vocabulary(texts: Iterable[str], pieces: int, bins: int) -> tuple[list[str], list[tuple[str, str]]]:
    """A byte-level BPE vocabulary made from texts, as :meth:`OFAProcessor.from_symbols` takes it.

    Args:
        pieces: BPE pieces, the 256 bytes among them.
        bins: location bins.

    Returns:
        symbols in the order of their ids, and the merges.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=pieces, initial_alphabet=alphabet, show_progress=False)
    )
    content = json.loads(bpe.to_str())["model"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in content["merges"]]
    ordered = sorted(content["vocab"], key=content["vocab"].get)
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *ordered, MASK, *(f"<bin_{n}>" for n in range(bins))]
    return symbols, [(left, right) for left, right in pairs]


def _texts(recipe: PretrainRecipe) -> Iterator[str]:
    stream = Stream(recipe)
    yield COMPLETE
    for kind in recipe.tasks:
        for number in range(recipe.vocabulary.texts):
            example = stream.examples[kind][number]
            yield example.prompt
            if example.box is None:
                yield example.before_target + example.target.lstrip()


@torch.no_grad()
def positions_like_contents(model: OFAForConditionalGeneration, images: Tensor) -> None:
    """Scale the positions that are added to the contents, so that places can be told apart from the first step."""
    encoder = model.get_encoder()
    stem = encoder.embed_images.eval()
    contents = encoder.image_proj(stem(images).flatten(2).transpose(1, 2))
    table = encoder.embed_image_positions.weight
    table.mul_((contents - contents.mean((0, 1))).std() / table.std())


def _save(model: OFAForConditionalGeneration, processor: OFAProcessor, folder: Path, record: Mapping[str, Any]) -> None:
    """Weights in half precision, the norms' statistics as they are."""
    model = model.to("cpu").eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name in module._parameters:
                parameter.data = parameter.data.half()
    model.config.dtype = "float16"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
