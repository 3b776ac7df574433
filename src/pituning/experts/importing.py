"""Any PEFT folder, from disk or the hub, becomes an expert: every tensor finds its module, or the import says which does not.

PEFT itself warns of missing keys, says nothing of extra ones, and so runs a checkpoint whose names have changed as if it had
never been trained. Here the names are matched to the backbone's, and the match must be complete in both directions.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, ExpertError, RefusedError
from pituning.experts.expert import CARD_FILE, CONFIG_FILE, TENSOR_FILE, Expert, ExpertCard, read_config, read_tensors
from pituning.experts.health import require_sound
from pituning.methods.attach import attached
from pituning.problems import listed

PREFIX = "base_model.model."
_PICKLES = ("adapter_model.bin", "pytorch_model.bin")
# …lora_A.default.weight and …lora_A.weight.default → …lora_A.weight: names that carry the adapter's own
_PARTS = (
    r"lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|bottleneck_(?:down|up)|bitfit_bias|prefix_(?:key|value)"
)
_NAMED = re.compile(rf"^(?P<head>.*\.(?:{_PARTS}))\.(?!weight$|bias$)[^.]+(?P<tail>(?:\.(?:weight|bias))?)$")
_ORIGINS = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode")


def import_expert(
    source: str | Path,
    backbone: Backbone,
    *,
    name: str | None = None,
    task: str = "",
    licence: str = "",
    revision: str | None = None,
    drop_heads: bool = False,
    any_base: bool = False,
) -> Expert:
    """Read a PEFT adapter, one that pituning did not write or one of its own, and prove that it fits the backbone.

    Names are matched where they differ by the adapter's name in the key, or by what stands in front of the module's name
    (``base_model.model.model.layers.0…`` for ``base_model.model.layers.0…``, as between model classes and releases of
    transformers). The match must be one to one, with equal shapes; what was renamed is in the card.

    Args:
        source: a folder, or a hub repository's id.
        name: of the expert; the folder's or repository's last part by default.
        task, licence: what it was trained for, and under which terms it may be used, where that is known; by default what the
            card of one of pituning's own says.
        revision: of the hub repository.
        drop_heads: leave out whole modules that were saved beside the adapter and that the backbone does not have, such as a
            classification head. Without it they are refused, by name: pituning scores answers without heads, and a head that
            is lost unsaid halves an accuracy.
        any_base: import even if the folder says that it was trained on a model of another name.

    Raises:
        ExpertError: if a file is missing or a pickle, a setting is unknown to this version of PEFT, a tensor does not find
            its place, or the adapter has no effect.
        BackboneMismatchError: if it was trained on another base.
        RefusedError: if it holds a head or other whole modules; for ``drop_heads`` or ``any_base`` with one of pituning's own.
    """
    folder = fetched(source, revision)
    if (folder / CARD_FILE).is_file():
        if drop_heads or any_base:
            said = "drop_heads (--drop-heads)" if drop_heads else "any_base (--any-base)"
            raise RefusedError(
                f"{folder} holds an expert that pituning wrote, whose card names its backbone by fingerprint and which has no "
                f"head: leave out {said}"
            )
        expert = Expert.load(folder)
        expert.verify(backbone)
        require_sound(expert)
        said_of = {"name": name, "task": task, "licence": licence}
        return expert.with_card(**{key: value for key, value in said_of.items() if value})
    if not (folder / TENSOR_FILE).is_file() and any((folder / pickle).is_file() for pickle in _PICKLES):
        raise ExpertError(
            f"{folder} holds its tensors as a pickle only, which is never read: load it where it was made and save it again "
            "with safe_serialization=True"
        )
    config = read_config(folder / CONFIG_FILE)
    tensors = read_tensors(folder / TENSOR_FILE)
    name = name or Path(str(source)).name
    record: dict[str, Any] = {"source": str(source) if not Path(source).is_dir() else Path(source).name}
    record |= {k: config[k] for k in ("base_model_name_or_path", "revision", "peft_version") if config.get(k)}
    _require_same_base(config, backbone, name, any_base)
    config = known_settings(config, folder / CONFIG_FILE)
    tensors = {_NAMED.sub(r"\g<head>\g<tail>", key): t for key, t in tensors.items()}
    if len(tensors) != len(set(tensors)):
        raise ExpertError(f"{folder / TENSOR_FILE} holds more than one adapter; save them apart")
    tensors, copies = _without_copies(tensors, config, backbone, name)
    if copies:
        record["same_as_the_backbone"] = copies
    tensors, heads = _without_heads(tensors, config, backbone, name, drop_heads)
    if heads:
        config["modules_to_save"] = None
        record["left_out"] = heads
    found, config, renamed = _placed(tensors, config, backbone, name)
    if renamed:
        record["renamed"] = renamed
    card = ExpertCard(
        name=name,
        backbone=backbone.hub_name,
        fingerprint=backbone.fingerprint,
        task=task,
        licence=licence,
        method=str(config["peft_type"]).lower(),
        parameters=sum(t.numel() for t in found.values()),
        training={**backbone.record, "imported": record},
    )
    expert = Expert(found, {**config, "base_model_name_or_path": None}, card)
    expert.verify(backbone)
    require_sound(expert)
    return expert


def fetched(source: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter; fetched from the hub where it is not on disk.

    Raises:
        ExpertError: if there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise ExpertError(f"{source} is no folder, and no id of a hub repository (owner/name) either")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(source), revision=revision, allow_patterns=["*.json", "*.safetensors", "*.md"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ExpertError(f"{source} is no folder, and could not be fetched from the hub: {error}") from error


def known_settings(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The configuration without what only says where it comes from.

    Raises:
        ExpertError: for a setting that this PEFT does not know and that is switched on: PEFT would drop it and run something
            else.
    """
    kind = config.get("peft_type")
    config_type = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if config_type is None:
        raise ExpertError(f"{path}: peft_type {kind!r} is not known to the installed PEFT")
    names = {f.name for f in fields(config_type)}
    unknown = {k: v for k, v in config.items() if k not in names and k not in _ORIGINS}
    if on := [f"{k}={v!r}" for k, v in unknown.items() if v not in (None, False, "", 0) and v != [] and v != {}]:
        raise ExpertError(
            f"{path}: the installed PEFT has no setting {', '.join(on)}; it would be dropped, and the adapter would compute "
            "something else; install the PEFT that wrote it"
        )
    kept = {k: v for k, v in config.items() if k in names and k not in _ORIGINS}
    return {**kept, "peft_type": kind}


def _require_same_base(config: Mapping[str, Any], backbone: Backbone, name: str, any_base: bool) -> None:
    said = str(config.get("base_model_name_or_path") or "")
    if any_base or not said:
        return
    ends = {Path(n).name.lower() for n in (backbone.name, backbone.hub_name)}
    if Path(said).name.lower() not in ends:
        raise BackboneMismatchError(
            f"expert {name!r} was trained on {said!r}, and this backbone is {backbone.hub_name!r}; pass any_base=True "
            "(--any-base) if they are the same model under two names"
        )


def _without_heads(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], backbone: Backbone, name: str, drop: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without whole modules that the backbone lacks, and the names of those."""
    modules = dict(backbone.model.named_modules())
    heads = [
        key
        for key in tensors
        if not re.search(rf"\.(?:{_PARTS})(\.|$)", key)
        and not any(p in modules for p in _tails(key))
        and _is_weight(key)
    ]
    heads += [k for k in tensors if k not in heads and _is_saved_module(k, config)]
    if heads and not drop:
        shown = listed(f"{k} {list(tensors[k].shape)}" for k in heads)
        raise RefusedError(
            f"expert {name!r} holds whole modules of its own, such as a head, beside its adapter; they are never averaged, and "
            f"this backbone has no use for them. To import the adapter without them, pass drop_heads=True "
            f"(--drop-heads):{shown}"
        )
    return {k: t for k, t in tensors.items() if k not in heads}, heads


def _without_copies(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], backbone: Backbone, name: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without copies of the backbone's own, which PEFT writes beside adapters of embeddings and output layers."""
    own = dict(backbone.model.named_parameters(remove_duplicate=False))
    copies: list[str] = []
    differing: list[str] = []
    for key, tensor in tensors.items():
        plain = key.replace(".base_layer.", ".")
        match = next((own[p] for p in _tails(plain, modules=False) if p in own), None)
        if match is None or _is_saved_module(key, config):
            continue
        same = match.shape == tensor.shape and torch.equal(match.detach().cpu(), tensor.to(match.dtype))
        (copies if same else differing).append(key)
    if differing:
        raise RefusedError(
            f"expert {name!r} brings tensors of the base itself that differ from the backbone's; an expert leaves the backbone "
            f"as it is:{listed(f'{k} {list(tensors[k].shape)}' for k in differing)}"
        )
    return {k: t for k, t in tensors.items() if k not in copies}, copies


def _is_saved_module(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a module that was trained whole."""
    return any(f".{module}." in f".{key}" for module in config.get("modules_to_save") or ())


def _placed(
    tensors: Mapping[str, Tensor], config: dict[str, Any], backbone: Backbone, name: str
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors under the backbone's names, the configuration that attaches them, and what was renamed."""
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    tried: list[str] = []
    for settings in _targets(config, tensors, backbone):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with attached(backbone, settings) as site:
                    wanted = {k: tuple(p.shape) for k, p in site.parameters.items()}
        except ExpertError as error:
            tried.append(str(error))
            continue
        for old, new in _rewrites(tensors, wanted):
            moved = {_moved(k, old, new): k for k in tensors}
            if len(moved) == len(tensors) and {k: shapes[o] for k, o in moved.items()} == wanted:
                renamed = f"{old or '(nothing)'} → {new or '(nothing)'}" if old != new else ""
                return {k: tensors[o] for k, o in moved.items()}, settings, renamed
        best = max((_overlap(tensors, wanted, *r) for r in _rewrites(tensors, wanted)), default=0)
        missing = [f"not in the folder: {k} {list(s)}" for k, s in wanted.items() if k not in tensors]
        extra = [f"not in the backbone: {k} {list(s)}" for k, s in shapes.items() if k not in wanted]
        wrong = [
            f"tensor {k} has shape {list(shapes[k])}, expected {list(s)}"
            for k, s in wanted.items()
            if k in shapes and shapes[k] != s
        ]
        counts = f"{len(wrong)} of another shape, {len(missing)} missing, {len(extra)} extra"
        shown = listed([*wrong[:4], *missing[:2], *extra[:2]])
        tried.append(f"{best} of {len(tensors)} tensors fit at best ({counts}), among them{shown}")
    raise ExpertError(f"expert {name!r} does not fit backbone {backbone.name!r}: {tried[0]}")


def _targets(config: dict[str, Any], tensors: Mapping[str, Tensor], backbone: Backbone) -> Iterator[dict[str, Any]]:
    """The configuration as it is, then with the adapted modules named one by one, as the tensors' names say."""
    yield config
    modules = [name for name, _ in backbone.model.named_modules() if name]
    paths = {re.split(rf"\.(?:{_PARTS})(?:\.|$)", key)[0].removeprefix(PREFIX) for key in tensors}
    named = {module for path in paths if (module := _module_of(path, modules))}
    if named:
        free = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        yield {**config, **{k: v for k, v in free.items() if k in config}, "target_modules": sorted(named)}


def _module_of(path: str, modules: Collection[str]) -> str | None:
    """The one module whose name shares the longest ending with a path, in whole parts."""
    for ending in _suffixes(path):
        found = [m for m in modules if m == ending or m.endswith(f".{ending}")]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _rewrites(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> list[tuple[str, str]]:
    """Pairs (what stands in front in the folder, what stands there in the backbone), the identity first."""
    found = {("", ""): None}
    if tensors and wanted:
        key = max(wanted, key=len)
        for other in tensors:
            common = _common_suffix(key, other)
            if common.count(".") >= 2 or common == key:
                found[other.removesuffix(common), key.removesuffix(common)] = None
    return list(found)


def _moved(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else f"{key} (does not start with {old})"


def _overlap(tensors: Mapping[str, Tensor], wanted: Collection[str], old: str, new: str) -> int:
    return sum(_moved(k, old, new) in wanted for k in tensors)


def _common_suffix(left: str, right: str) -> str:
    """The longest common ending, in whole parts of the names."""
    parts: list[str] = []
    for a, b in zip(reversed(left.split(".")), reversed(right.split(".")), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(reversed(parts))


def _tails(key: str, modules: bool = True) -> Iterator[str]:
    """Names that a tensor's key may stand for: of its module, or of the tensor itself, with less and less in front."""
    path = key.removeprefix(PREFIX)
    yield from _suffixes(path.rpartition(".")[0] if modules else path)


def _suffixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    yield from (".".join(parts[i:]) for i in range(len(parts)))


def _is_weight(key: str) -> bool:
    return key.endswith((".weight", ".bias"))


def import_notes(expert: Expert) -> str:
    """What an import changed, in one line; empty where it changed nothing."""
    record: Mapping[str, Any] = expert.card.training.get("imported", {})
    said = [f"keys renamed: {record['renamed']}"] if "renamed" in record else []
    said += [f"left out: {', '.join(record['left_out'])}"] if "left_out" in record else []
    return "; ".join(said)
