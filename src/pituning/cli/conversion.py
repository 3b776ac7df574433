"""What `pituning convert` does: an OFA checkpoint in, a checked folder out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from pituning.backbones.base import fingerprint_of
from pituning.backbones.ofa.checkpoint import Checkpoint, model_from, open_checkpoint
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.export import new_folders, processor_for, write_backbone
from pituning.backbones.ofa.fairseq_experts import FairseqExpert, FairseqExperts, experts_from_fairseq
from pituning.backbones.ofa.frozen import Change, LoraWeights
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.backbones.ofa.names import FairseqParts
from pituning.backbones.ofa.selfcheck import UnreadOFA, check_folder, checked_logits, require_equal
from pituning.errors import PituningError, RefusedError
from pituning.experts.expert import Expert, ExpertCard, file_hash
from pituning.methods.attach import attached, config_dict, peft_config
from pituning.problems import listed

Report = Callable[[str, int, int], None]
_EMA_NOTE = (
    "the file holds averaged (EMA) weights beside those of the last step; the averaged ones were taken, as the official "
    "evaluation does (--no-ema takes the others)"
)
# What changes training, or nothing: an expert does not care whether its base says the same
_IRRELEVANT = frozenset(
    {
        "dropout", "attention_dropout", "activation_dropout", "encoder_drop_path_rate", "decoder_drop_path_rate",
        "resnet_drop_path_rate", "freeze_resnet", "init_std", "use_cache", "code_image_size", "resnet_type",
        "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What to convert; the fields are the command's options."""

    source: Path
    out: Path
    to: str = "auto"
    ema: bool | None = None
    tokenizer: Path | None = None
    dtype: str = "float32"
    check: bool = True
    base: Path | None = None
    lora_weights: LoraWeights | None = None
    keep_backbone: Path | None = None
    ignore_batchnorm: bool = False
    parts: Path | None = None
    task: str | None = None


@dataclass
class Steps:
    """Counts the steps of a conversion for a progress bar."""

    report: Report
    total: int
    done: int = field(default=0)

    def __call__(self, text: str) -> None:
        """A further step begins."""
        self.report(text, self.done, self.total)
        self.done += 1


def convert_checkpoint(request: Request, report: Report = lambda text, done, steps: None) -> dict[str, Any]:
    """Carry out a conversion.

    Returns:
        what was written, as the command prints it with ``--json``.

    Raises:
        PituningError: if the source cannot be read or is not what was asked for, or a check fails; nothing is left behind.
    """
    for folder in (request.out, request.keep_backbone, request.parts):
        if folder is not None and folder.exists():
            raise RefusedError(f"{folder} exists and is not replaced; choose another place, or remove it")
    steps = Steps(report, 3 + request.check + (request.base is not None))
    steps(f"reading {request.source.name}")
    source = open_checkpoint(request.source, ema=request.ema)
    if source.fairseq is not None and source.fairseq.has_ema and request.ema is None:
        source = replace(source, notes=(*source.notes, _EMA_NOTE))
    if source.format == "pituning":
        raise RefusedError(f"{request.source} is a converted folder already; load_backbone reads it")
    expert = bool(source.expert) if request.to == "auto" else request.to == "expert"
    _require_options_fit(request, source, expert)
    document = _expert(request, source, steps) if expert else _backbone(request, source, steps)
    report("done", steps.total, steps.total)
    return document


def _require_options_fit(request: Request, source: Checkpoint, expert: bool) -> None:
    """No option is ignored silently."""
    given = {"--keep-backbone": request.keep_backbone, "--parts": request.parts, "--task": request.task}
    for_experts = [name for name, value in given.items() if value is not None]
    for_experts += ["--ignore-batchnorm"] * request.ignore_batchnorm
    if for_experts and not expert:
        raise PituningError(
            f"{', '.join(for_experts)} concern experts, but {request.source} is converted as a backbone"
        )
    if expert and request.keep_backbone is None:
        if request.tokenizer is not None:
            raise PituningError(
                "--tokenizer belongs to a backbone: an expert has none (with --keep-backbone it goes there)"
            )
        if request.dtype != "float32":
            raise PituningError(
                f"--dtype {request.dtype} is a backbone's: experts are float32 (with --keep-backbone it is that one's)"
            )
    ignored = ["--base"] * (request.base is not None and not expert)
    ignored += ["--lora-weights"] * (request.lora_weights is not None)
    if ignored and not _has_lora(source):
        hint = " (where training changed the biases only, --to expert makes it one of BitFit)"
        raise PituningError(
            f"{' and '.join(ignored)} would change nothing: {request.source} holds no LoRA, whose product this would find in "
            f"its weights{hint * (not expert and not source.expert)}"
        )
    if expert and request.base is None and request.keep_backbone is None:
        raise PituningError(
            "an expert needs its backbone: give the one it was trained on with --base, or write the file's own with "
            "--keep-backbone FOLDER"
        )


def _backbone(request: Request, source: Checkpoint, steps: Steps) -> dict[str, Any]:
    state, notes = source.state, list(source.notes)
    if source.expert:
        base = _base_state(request, steps)
        state, changes = _own_backbone(source, base, request.lora_weights)
        notes.append(f"the file's expert ({len(source.expert)} tensors) is left out")
        if changes:
            notes.append(f"{_kinds(changes)} differ from the base's; written as the file has them")
    processor = processor_for(source, request.tokenizer)
    steps("building the model")
    model = _rounded(model_from(source.config, state, str(request.source)), request.dtype)
    with new_folders(request.out) as (folder,):
        steps(f"writing {request.out.name}")
        write_backbone(model, folder, request.dtype, processor)
        compared = None
        if request.check:
            steps("checking")
            compared = check_folder(model, folder)
    return {
        "kind": "backbone",
        "folder": request.out,
        "format": source.format,
        **_sizes(model.state_dict(), request.out, request.dtype, model),
        "ema": _ema(source),
        "fingerprint": fingerprint_of(model),
        "tokenizer": processor is not None,
        "check": _check(compared),
        "notes": notes,
    }


def _expert(request: Request, source: Checkpoint, steps: Steps) -> dict[str, Any]:
    if source.fairseq is None:
        raise PituningError(
            f"{request.source} is in the Hugging Face format, which holds no experts; use --to backbone"
        )
    base = _base_state(request, steps)
    found = experts_from_fairseq(
        source.fairseq.parts(), source.config,
        base=None if base is None else base.state, lora_weights=request.lora_weights, args=source.fairseq.args,
    )  # fmt: skip
    if base is not None and request.keep_backbone is None:
        _require_same_model(source.config, base.config)
        _require_unchanged(found.changes, request)
    if request.parts is not None and not found.logits:
        raise PituningError(f"--parts: {request.source} holds a single expert, there is no interpolation to take apart")
    processor = processor_for(source, request.tokenizer) if request.keep_backbone is not None else None
    steps("building the model")
    own = model_from(source.config, found.backbone, str(request.source))
    model, home = own, request.keep_backbone
    if home is not None:
        _rounded(own, request.dtype)
    else:
        assert base is not None
        model, home = model_from(base.config, base.state, str(base.path)), base.path
    backbone = UnreadOFA(home.name.removesuffix(".pt"), model)
    experts = _named(request, source, found, backbone)
    notes, effect = list(source.notes), None
    if model is not own and found.changes:
        effect = _effect(own, backbone, experts[0])
        notes.append(
            f"{len(found.changes)} BatchNorm statistics moved in training and were ignored: on the base the expert's logits "
            f"for a random input differ by up to {effect:.3g} times their largest value from what it was trained to give"
        )
    homes = [request.out, *(f for f in (request.parts, request.keep_backbone) if f is not None)]
    with new_folders(*homes) as folders:
        steps(f"writing {request.out.name}")
        experts[0].save(folders[0])
        for part in experts[1:] if request.parts is not None else ():
            part.save(folders[1] / part.name)
        if request.keep_backbone is not None:
            write_backbone(model, folders[-1], request.dtype, processor)
        compared = None
        if request.check:
            steps("checking")
            compared = _check_expert(backbone, experts[0], folders[0])
            if request.keep_backbone is not None:
                compared += check_folder(model, folders[-1])
    return {
        "kind": "expert",
        "folder": request.out,
        "method": found.blended.method,
        "task": experts[0].card.task,
        **_sizes(experts[0].tensors, request.out, "float32"),
        "ema": _ema(source),
        "weights": found.mean_weights(),
        "logits": {k: t.tolist() for k, t in found.logits.items()},
        "merged": len(found.merged),
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint,
        "keep_backbone": request.keep_backbone,
        "tokenizer": None if request.keep_backbone is None else processor is not None,
        "parts": request.parts,
        "changes": {
            "batchnorm": sum(c.is_statistic for c in found.changes),
            "other": sum(not c.is_statistic for c in found.changes),
            "largest": max((c.largest for c in found.changes), default=0.0),
            "effect": effect,
        },
        "check": _check(compared),
        "notes": notes,
    }


def _base_state(request: Request, steps: Steps) -> Checkpoint | None:
    if request.base is None:
        return None
    steps(f"reading {request.base.name}")
    base = open_checkpoint(request.base)
    if base.expert:
        raise PituningError(f"--base {request.base} holds an expert itself; give the backbone that it was trained on")
    return base


def _has_lora(source: Checkpoint) -> bool:
    return any("lora" in name for name in source.expert)


def _own_backbone(
    source: Checkpoint, base: Checkpoint | None, said: LoraWeights | None
) -> tuple[Mapping[str, Tensor], Sequence[Change]]:
    """The backbone of a checkpoint with an expert, LoRA's products taken out, and where it differs from a base."""
    assert source.fairseq is not None
    if not _has_lora(source):
        return source.state, ()
    parts: FairseqParts = source.fairseq.parts()
    state = None if base is None else base.state
    found = experts_from_fairseq(parts, source.config, base=state, lora_weights=said)
    return found.backbone, found.changes


def _kinds(changes: Sequence[Change]) -> str:
    statistics = sum(c.is_statistic for c in changes)
    counts = {"BatchNorm statistics": statistics, "weights": len(changes) - statistics}
    return " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _require_same_model(own: OFAConfig, base: OFAConfig) -> None:
    mine, theirs = own.to_dict(), base.to_dict()
    irrelevant = _IRRELEVANT | ({"orig_patch_image_size"} if not own.interpolate_position else set())
    names = sorted((mine.keys() | theirs.keys()) - irrelevant)
    problems = [f"{n} is {mine.get(n)!r}, in the base {theirs.get(n)!r}" for n in names if mine.get(n) != theirs.get(n)]
    if problems:
        raise RefusedError(
            "the expert was trained on a model of another configuration than the base:" + listed(problems)
        )


def _require_unchanged(changes: Sequence[Change], request: Request) -> None:
    others = [c for c in changes if not c.is_statistic]
    if not changes or (request.ignore_batchnorm and not others):
        return
    offers = ["--keep-backbone FOLDER writes that backbone as well and ties the expert to it"]
    if not others:
        offers.append("--ignore-batchnorm ties it to the base all the same, and says what that changes")
    examples = sorted(others or changes, key=lambda c: -c.largest)
    raise RefusedError(
        f"{request.source}: training changed {_kinds(changes)} of the backbone it was to leave alone, and the expert is "
        f"exact on that backbone only. {'; '.join(offers)}. Changed, with the largest difference:"
        + listed(f"{c.name} {c.largest:.3g}" for c in examples)
    )


def _named(request: Request, source: Checkpoint, found: FairseqExperts, backbone: UnreadOFA) -> list[Expert]:
    """The blended expert, then the parts of an interpolation, with their cards."""
    assert source.fairseq is not None
    args = source.fairseq.args
    task = request.task if request.task is not None else str(args.get("task") or "")
    training = {
        "family": backbone.family,
        "architecture": "ofa",
        "source": request.source.name,
        "source_sha256": file_hash(request.source),
        "ema": source.fairseq.ema,
    }

    def expert(one: FairseqExpert, name: str, lineage: Sequence[Mapping[str, Any]] = ()) -> Expert:
        card = ExpertCard(
            name=name, backbone=backbone.name, fingerprint=backbone.fingerprint, task=task, method=one.method,
            parameters=sum(t.numel() for t in one.tensors.values()), lineage=tuple(lineage), training=training,
        )  # fmt: skip
        return Expert(one.tensors, config_dict(peft_config(one.config)), card)

    name = request.out.resolve().name
    if not found.logits:
        return [expert(found.blended, name)]
    option = {"bottleneck": "adapter", "lora": "lora", "prefix": "prompt"}[found.blended.method]
    paths = [Path(p).stem for p in str(args.get(f"combine_{option}_path") or "").split(",") if p]
    names = paths if len(set(paths)) == len(found.parts) else [f"{name}-{k}" for k in range(len(found.parts))]
    lineage = [{"name": n, "weight": w} for n, w in zip(names, found.mean_weights(), strict=True)]
    parts = [expert(part, n) for part, n in zip(found.parts, names, strict=True)]
    return [expert(found.blended, name, lineage), *parts]


def _check_expert(backbone: UnreadOFA, expert: Expert, folder: Path) -> int:
    """Load the folder as PEFT does, and compare with the expert in memory; how many logits were compared."""
    config = backbone.model.config
    with attached(backbone, expert.config, expert.tensors):
        expected = checked_logits(backbone.model, config)
    Expert.load(folder).verify(backbone)
    loaded = PeftModel.from_pretrained(backbone.model, folder, autocast_adapter_dtype=False).eval()
    try:
        return require_equal(checked_logits(loaded, config), expected)
    finally:
        loaded.unload()


def _effect(own: OFAForConditionalGeneration, base: UnreadOFA, expert: Expert) -> float:
    """Largest difference of an expert's logits between its own backbone and another, relative to the largest logit."""
    home = UnreadOFA(base.name, own)
    with attached(home, expert.config, expert.tensors):
        expected = checked_logits(own, own.config)
    with attached(base, expert.config, expert.tensors):
        found = checked_logits(base.model, own.config)
    return float((found - expected).abs().max() / expected.abs().max())


def _sizes(
    tensors: Mapping[str, Tensor], folder: Path, dtype: str, model: OFAForConditionalGeneration | None = None
) -> dict[str, Any]:
    counted = tensors if model is None else dict(model.named_parameters())
    return {
        "parameters": sum(t.numel() for t in counted.values()),
        "tensors": len(counted),
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "dtype": dtype,
    }


def _rounded(model: OFAForConditionalGeneration, dtype: str) -> OFAForConditionalGeneration:
    """The float32 model with the values that its weights have in another dtype."""
    rounded: OFAForConditionalGeneration = model.to(getattr(torch, dtype)).to(torch.float32)
    return rounded


def _check(compared: int | None) -> dict[str, Any] | None:
    return None if compared is None else {"passed": True, "logits": compared}


def _ema(source: Checkpoint) -> bool | None:
    """Whether the averaged weights were taken; ``None`` where there was no choice."""
    return source.fairseq.ema if source.fairseq is not None and source.fairseq.has_ema else None
