"""The reference implementation's expert checkpoints as PEFT tensors: adapters, LoRA, prefixes and their interpolations, BitFit.

Such a checkpoint is a whole model. What makes an expert of it is here; the rest is its backbone, which training may have
changed although it was called frozen: :attr:`FairseqExperts.changes` lists that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.fairseq_prefixes import plain_prefixes
from pituning.backbones.ofa.frozen import Change, Factors, LoraWeights, changes_of, take_out_products
from pituning.backbones.ofa.names import FairseqParts, our_name
from pituning.errors import PituningError, RefusedError
from pituning.problems import listed

PEFT_PREFIX = "base_model.model."
_SITES = {"1": "self_attn_output", "2": "ffn_output"}
_ADAPTER_PARTS = [f"{half}_proj.{part}" for half in ("down", "up") for part in ("weight", "bias")]
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_KINDS = {
    "bottleneck": re.compile(r"\.adapters?[12]\.|\.adapter_interpolation_weight[12]$"),
    "lora": re.compile(r"_attn\.(q|k|v|out)_proj\.|\.lora_interpolation_weight$"),
    "prefix": re.compile(r"_prompt_encoder\.|\.prompt_weight_scale$"),
}
_NUMBERED = re.compile(r"\.(?:adapters[12]|(?:q|k|v|out)_proj|(?:en|de)coder_prompt_encoder)\.(\d+)\.")
_COUNT_ARGUMENT = {"bottleneck": "adapter_num", "lora": "lora_num", "prefix": "prompt_num"}


@dataclass(frozen=True)
class FairseqExpert:
    """One expert.

    Attributes:
        method: ``"bottleneck"``, ``"lora"``, ``"prefix"`` or ``"bitfit"``.
        tensors: under PEFT's file key names, float32.
        config: what differs from the defaults of the method's PEFT configuration.
    """

    method: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class FairseqExperts:
    """What an expert checkpoint holds.

    Attributes:
        blended: the expert that the checkpoint computes: the only one, or the interpolation of ``parts``, exact.
        parts: the experts that it interpolates; one where there is no interpolation.
        logits: by group (an adapter's site, an attention, a layer's prefix), ``[experts]``; empty for one expert. The
            weights are their softmax.
        backbone: the checkpoint's backbone under our names, without what loralib has merged into it.
        changes: where it differs from the base; empty without a base.
        merged: the file's names of the weights that LoRA's product had been merged into.
    """

    blended: FairseqExpert
    parts: tuple[FairseqExpert, ...]
    logits: Mapping[str, Tensor]
    backbone: Mapping[str, Tensor]
    changes: tuple[Change, ...] = ()
    merged: tuple[str, ...] = ()

    def mean_weights(self) -> list[float]:
        """Weight of each part, averaged over the groups."""
        if not self.logits:
            return [1.0]
        weights = torch.stack([_softmax(x) for x in self.logits.values()])
        return [float(w) for w in weights.mean(dim=0)]


@dataclass(frozen=True)
class _Entry:
    """Where a tensor of one expert comes from.

    Attributes:
        key: PEFT's file key.
        source: name in the file of expert k (``None``: of the only one).
        group: name in the file of the logits that weigh it.
    """

    key: str
    source: Callable[[int | None], str]
    group: str


def experts_from_fairseq(
    parts: FairseqParts,
    config: OFAConfig,
    *,
    base: Mapping[str, Tensor] | None = None,
    lora_weights: LoraWeights | None = None,
    args: Mapping[str, Any] | None = None,
) -> FairseqExperts:
    """Import the expert, or the interpolated experts, of a checkpoint of the reference implementation.

    Args:
        parts: see :func:`split_fairseq`.
        config: the backbone's; it says which layers must have an expert's tensors.
        base: the frozen backbone under our names. loralib leaves its product in the saved projections or not, depending
            on what was run last: comparing with the base tells, and proves it.
        lora_weights: what the projections hold, where no base can tell.
        args: the training's arguments, whose number of experts must be that in the file.

    Raises:
        PituningError: for a checkpoint without an expert, or tensors that are missing, extra or misshaped; all are named.
            Without adapters, LoRA and prefixes it is an expert (of BitFit) only if nothing but biases differs from the base.
        RefusedError: if LoRA's projections are neither the base's nor the base's plus the product; or nothing tells.
    """
    found = parts.expert
    if not found:
        return _biases(parts.backbone, base)
    method = _method(found)
    count = _count(found, method, args or {})
    numbers: Sequence[int | None] = [None] if count is None else range(count)
    if method == "prefix":
        found = plain_prefixes(found, config)
    entries = list(_ENTRIES[method](found, config))
    _require_complete(found, entries, numbers, method, config)
    singles = [{e.key: found[e.source(k)].float() for e in entries} for k in numbers]
    settings = _settings(method, singles[0])
    experts = tuple(FairseqExpert(method, tensors, settings) for tensors in singles)
    logits = {} if count is None else {group: found[group] for group in dict.fromkeys(e.group for e in entries)}
    blended = experts[0] if count is None else _blend(experts, entries, logits)
    backbone, merged = dict(parts.backbone), tuple[str, ...]()
    if method == "lora":
        backbone, merged = take_out_products(parts, _factors(singles, numbers), base, lora_weights)
    changes = () if base is None else changes_of(backbone, base)
    return FairseqExperts(blended, experts, logits, backbone, changes, merged)


def _biases(backbone: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> FairseqExperts:
    """A BitFit expert: what was added to the base's biases, in a checkpoint that differs from the base by nothing else."""
    nothing = (
        "this checkpoint holds no expert: no adapter, LoRA or prefix tensors (such as "
        "encoder.layers.0.adapter1.down_proj.weight)"
    )
    if base is None:
        raise PituningError(f"{nothing}; if training changed the backbone itself, convert it as a backbone")
    changes = changes_of(backbone, base)
    trained = [c for c in changes if not c.is_statistic]
    if not trained:
        raise PituningError(f"{nothing}, and its weights are the base's")
    others = [c for c in trained if not c.name.endswith(".bias") or ".embed_images." in c.name]
    if others:
        raise PituningError(
            f"{nothing}. Training changed {len(trained)} weights of the backbone, and not only biases as BitFit does: convert "
            "it as a backbone. Changed, with the largest difference:"
            + listed(f"{c.name} {c.largest:.3g}" for c in others)
        )
    names = sorted(c.name for c in trained)
    added = {n: (backbone[n].double() - base[n].double()).float() for n in names}
    tensors = {f"{PEFT_PREFIX}{n.removesuffix('bias')}bitfit_bias": t for n, t in added.items()}
    config = {"peft_type": "BITFIT", "target_modules": [n.removesuffix(".bias") for n in names]}
    expert = FairseqExpert("bitfit", tensors, config)
    frozen = {**backbone, **{n: base[n] for n in names}}
    return FairseqExperts(expert, (expert,), {}, frozen, tuple(c for c in changes if c.is_statistic))


def _method(found: Mapping[str, Tensor]) -> str:
    present = [m for m, pattern in _KINDS.items() if any(pattern.search(k) for k in found)]
    if len(present) != 1:
        raise RefusedError(
            f"this checkpoint mixes {' and '.join(present)}; an expert has one method, so it cannot be imported as one"
        )
    return present[0]


def _count(found: Mapping[str, Tensor], method: str, args: Mapping[str, Any]) -> int | None:
    """Number of interpolated experts; ``None`` for a single one."""
    numbers = {int(m[1]) for k in found if (m := _NUMBERED.search(k))}
    count = max(numbers) + 1 if numbers else None
    argument = _COUNT_ARGUMENT[method]
    said = args.get(argument)
    try:
        expected = None if said is None else int(said)
    except (TypeError, ValueError, OverflowError):
        raise PituningError(f"the training's arguments say {argument} = {said!r}, which is not a number") from None
    if expected is not None and expected != (count or 1):
        raise PituningError(
            f"the training's arguments say {argument} = {said}, but the file holds {count or 1} "
            f"expert{'s' * ((count or 1) != 1)}"
        )
    return count


def _adapter_entries(found: Mapping[str, Tensor], config: OFAConfig) -> Iterator[_Entry]:
    for side, layer in _layers(config):
        for number, site in _SITES.items():
            for part in _ADAPTER_PARTS:
                stem = f"{side}.layers.{layer}"
                yield _Entry(
                    f"{PEFT_PREFIX}model.{stem}.{site}.bottleneck_{part.replace('_proj', '')}",
                    _numbered(f"{stem}.adapter{number}.{part}", f"{stem}.adapters{number}.{{}}.{part}"),
                    f"{stem}.adapter_interpolation_weight{number}",
                )


def _lora_entries(found: Mapping[str, Tensor], config: OFAConfig) -> Iterator[_Entry]:
    for side, layer in _layers(config):
        for attention in ("self_attn", "encoder_attn") if side == "decoder" else ("self_attn",):
            for projection in _PROJECTIONS:
                for half in ("lora_A", "lora_B"):
                    stem = f"{side}.layers.{layer}.{attention}"
                    yield _Entry(
                        f"{PEFT_PREFIX}{our_name(f'{stem}.{projection}.{half}')}.weight",
                        _numbered(f"{stem}.{projection}.{half}", f"{stem}.{projection}.{{}}.{half}"),
                        f"{stem}.lora_interpolation_weight",
                    )


def _prefix_entries(found: Mapping[str, Tensor], config: OFAConfig) -> Iterator[_Entry]:
    for side, layer in _layers(config):
        if any(k.startswith(f"{side}.{side}_prompt_encoder.") for k in found):
            for half in ("key", "value"):
                tail = f"{layer}.{half}"  # as plain_prefixes names them
                yield _Entry(
                    f"{PEFT_PREFIX}model.{side}.layers.{layer}.self_attn.prefix_{half}",
                    _numbered(f"{side}.{side}_prompt_encoder.{tail}", f"{side}.{side}_prompt_encoder.{{}}.{tail}"),
                    f"{side}.prompt_weight_scale.{layer}",
                )


_ENTRIES: Mapping[str, Callable[[Mapping[str, Tensor], OFAConfig], Iterator[_Entry]]] = {
    "bottleneck": _adapter_entries,
    "lora": _lora_entries,
    "prefix": _prefix_entries,
}


def _layers(config: OFAConfig) -> list[tuple[str, int]]:
    counts = {"encoder": config.encoder_layers, "decoder": config.decoder_layers or config.encoder_layers}
    return [(side, layer) for side, count in counts.items() for layer in range(count)]


def _numbered(single: str, numbered: str) -> Callable[[int | None], str]:
    return lambda k: single if k is None else numbered.format(k)


def _require_complete(
    found: Mapping[str, Tensor],
    entries: Sequence[_Entry],
    numbers: Sequence[int | None],
    method: str,
    config: OFAConfig,
) -> None:
    """Every expert has every tensor in every layer, of the shape that the first one shows, and nothing is left over."""
    interpolated = numbers[0] is not None
    sizes = _sizes(found, entries, numbers[0], method)
    wanted: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        wanted |= dict.fromkeys((entry.source(k) for k in numbers), _shape(entry.key, sizes, config.d_model))
        if interpolated:
            wanted[entry.group] = (len(numbers),)
    if method == "lora" and interpolated:  # each expert has its own copy of the projection
        for name in [n for n in wanted if n.endswith(".lora_A")]:
            stem = name.removesuffix(".lora_A")
            wanted |= {f"{stem}.weight": (config.d_model, config.d_model), f"{stem}.bias": (config.d_model,)}
    problems = [f"extra tensor {n} {list(found[n].shape)}" for n in found if n not in wanted]
    for name, shape in wanted.items():
        if name not in found:
            problems.append(f"missing tensor {name} {list(shape)}")
        elif tuple(found[name].shape) != shape:
            problems.append(f"tensor {name} has shape {list(found[name].shape)}, expected {list(shape)}")
        elif not torch.isfinite(found[name]).all():
            problems.append(f"tensor {name} holds values that are NaN or infinite")
    if problems:
        raise PituningError(f"the checkpoint's {method} expert is not complete:" + listed(problems))


def _sizes(found: Mapping[str, Tensor], entries: Sequence[_Entry], number: int | None, method: str) -> dict[str, int]:
    """Rank, bottleneck or prefix length by stack, as the first tensor of a kind shows it."""
    sizes: dict[str, int] = {}
    for entry in entries:
        stack = "decoder" if method == "prefix" and ".decoder." in entry.key else "encoder"
        tensor = found.get(entry.source(number))
        first_dimension = entry.key.endswith(("bottleneck_down.weight", "lora_A.weight", "prefix_key"))
        if tensor is not None and tensor.dim() and first_dimension:
            sizes.setdefault(stack, len(tensor))
    return sizes


def _shape(key: str, sizes: Mapping[str, int], width: int) -> tuple[int, ...]:
    size = sizes.get("decoder" if "prefix" in key and ".decoder." in key else "encoder", 0)
    shapes = {
        "bottleneck_down.weight": (size, width), "bottleneck_down.bias": (size,), "bottleneck_up.weight": (width, size),
        "bottleneck_up.bias": (width,), "lora_A.weight": (size, width), "lora_B.weight": (width, size),
        "prefix_key": (size, width), "prefix_value": (size, width),
    }  # fmt: skip
    return next(shape for end, shape in shapes.items() if key.endswith(end))


def _settings(method: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The PEFT configuration; dropout as in the reference's code."""
    if method == "prefix":
        lengths = dict.fromkeys(("encoder", "decoder"), 0)
        for key, tensor in tensors.items():
            lengths["decoder" if ".decoder." in key else "encoder"] = len(tensor)
        return {
            "peft_type": "PREFIX_KV", "length": lengths["encoder"], "decoder_length": lengths["decoder"],
            "target_modules": ["self_attn"], "dropout": 0.2,
        }  # fmt: skip
    size = next(len(t) for k, t in tensors.items() if k.endswith(("bottleneck_down.weight", "lora_A.weight")))
    if method == "bottleneck":
        sites = list(_SITES.values())
        return {"peft_type": "BOTTLENECK", "r": size, "target_modules": sites, "init_std": 0.02, "dropout": "drop-path"}
    # loralib's default alpha, which the reference never changes: the product is divided by r
    return {
        "peft_type": "LORA",
        "r": size,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "target_modules": sorted(_PROJECTIONS),
    }


def _factors(experts: Sequence[Mapping[str, Tensor]], numbers: Sequence[int | None]) -> list[Factors]:
    ending = ".lora_A.weight"
    modules = [k.removesuffix(ending) for k in experts[0] if k.endswith(ending)]
    return [
        Factors(m.removeprefix(PEFT_PREFIX), number, tensors[f"{m}{ending}"], tensors[f"{m}.lora_B.weight"])
        for m in modules
        for number, tensors in zip(numbers, experts, strict=True)
    ]


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits.double(), dim=0)


def _blend(experts: Sequence[FairseqExpert], entries: Sequence[_Entry], logits: Mapping[str, Tensor]) -> FairseqExpert:
    """Σ w_k φ_k with w = softmax of the group's logits; for LoRA Σ w_k B_k A_k, exact at rank K · r. In float64."""
    first, count = experts[0], len(experts)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        weights = _softmax(logits[entry.group])
        parts = [e.tensors[entry.key].double() for e in experts]
        if entry.key.endswith("lora_A.weight"):
            blended = torch.cat(parts, dim=0)
        elif entry.key.endswith("lora_B.weight"):
            # PEFT divides by the rank, which is now K times as large
            blended = torch.cat([count * w * b for w, b in zip(weights, parts, strict=True)], dim=1)
        else:
            blended = sum((w * p for w, p in zip(weights, parts, strict=True)), torch.zeros_like(parts[0]))
        tensors[entry.key] = blended.float()
    config = dict(first.config)
    if first.method == "lora":
        config["r"] = count * config["r"]
    return FairseqExpert(first.method, tensors, config)
