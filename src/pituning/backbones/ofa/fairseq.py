"""Read a fairseq checkpoint of OFA without running anything in it.

A ``.pt`` file is a pickle, and a pickle can run any code when it is read. Here it is read by torch's restricted unpickler
with an allow-list: tensors, ``argparse.Namespace``, and *inert stand-ins* for the configuration objects and statistics that
fairseq, omegaconf and numpy leave in such files. A stand-in keeps what it is given and does nothing. Any other name in the
file is refused before anything is built.
"""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.ofa.names import FairseqParts, split_fairseq
from pituning.errors import PituningError

ALLOWED_INERT = frozenset(
    {
        "collections.defaultdict",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "typing.Any",
        *(
            f"{module}.{t}"
            for module in ("builtins", "__builtin__")
            for t in ("bool", "dict", "float", "int", "list", "str")
        ),
    }
)
"""Names outside of fairseq and omegaconf that such files mention; they become stand-ins, too."""

ALLOWED_INERT_PACKAGES = ("fairseq.", "omegaconf.")
EMA_KEYS = ("ema_fp32_params", "ema")


class Inert:
    """Stands for an object of a library that is not loaded; holds its pickled contents, runs nothing.

    Attributes:
        args: what it was made with.
        state: what it was filled with.
    """

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Inert:
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class FairseqCheckpoint:
    """What is needed of a fairseq checkpoint.

    Attributes:
        state: tensors under fairseq's names: the averaged (EMA) weights, or those of the last step.
        args: command line arguments of the training by name (``encoder_layers``, ``scale_attn``, …).
        ema: whether ``state`` holds the averaged weights.
        has_ema: whether the file has both kinds.
    """

    state: Mapping[str, Tensor]
    args: Mapping[str, Any]
    ema: bool = False
    has_ema: bool = False
    path: Path = field(default_factory=Path)

    def parts(self) -> FairseqParts:
        """Backbone, expert and tables of indices."""
        return split_fairseq(self.state)


def read_fairseq(path: str | Path, *, ema: bool | None = None) -> FairseqCheckpoint:
    """Read a fairseq checkpoint of OFA.

    Args:
        path: a ``.pt`` file with ``model`` and ``args`` or ``cfg``. Tensors stay in the file until they are used.
        ema: take the averaged weights (True) or those of the last step (False). By default the averaged ones where the
            file has them, as the official evaluation of such checkpoints does (``--ema-eval``).

    Raises:
        PituningError: if the file wants anything but the allowed names, cannot be read, or lacks what is asked for.
    """
    path = Path(path)
    content = load_pickled(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        keys = f" with the entries {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else ""
        raise PituningError(
            f"{path} is not a fairseq checkpoint: expected a dictionary with the entry 'model', found a "
            f"{type(content).__name__}{keys}"
        )
    extra = content.get("extra_state")
    averaged: Mapping[Any, Any] | None = next(
        (extra[k] for k in EMA_KEYS if isinstance(extra, Mapping) and extra.get(k)), None
    )
    if ema and averaged is None:
        raise PituningError(f"{path} has no averaged (EMA) weights in extra_state; leave out --ema")
    state = _tensors(content["model"], path)
    use_ema = averaged is not None and ema is not False
    if use_ema and averaged is not None:
        tables = split_fairseq(state).tables  # indices cannot be averaged: the model's own are right
        state = {**_tensors(averaged, path), **tables}
    return FairseqCheckpoint(state, _arguments(content), use_ema, averaged is not None, path)


def load_pickled(path: str | Path) -> Any:
    """A torch file's content through the restricted unpickler; see the module's introduction.

    Raises:
        PituningError: names what the file wants beyond the allow-list; or says that it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise PituningError(f"no such file: {path}")
    zipped = zipfile.is_zipfile(path)
    inert = _mentioned(path) if zipped else []
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]
    allowed += [(Inert, name) for name in inert]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise _refusal(path, [name[1]] if name else _wanted(path), error) from None
    except Exception as error:  # bytes that are no pickle make the unpickler fail in any way
        raise _unreadable(path, error) from error


def plain(value: Any) -> Any:
    """Arguments as plain values: namespaces and omegaconf containers become dictionaries and lists."""
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Inert) and isinstance(value.state, Mapping):
        for content in ("_content", "_val"):  # of omegaconf's containers and of its values
            if content in value.state:
                return plain(value.state[content])
    if isinstance(value, Inert) and len(value.args) == 1 and isinstance(value.args[0], str):
        return value.args[0]  # fairseq's enumerations
    return value


def _mentioned(path: Path) -> list[str]:
    """Allowed names that the file mentions beyond torch's own, found without building anything."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except pickle.UnpicklingError as error:
        raise _refusal(path, _wanted(path), error) from None
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    forbidden = [n for n in names if n not in ALLOWED_INERT and not n.startswith(ALLOWED_INERT_PACKAGES)]
    if forbidden:
        raise _refusal(path, forbidden)
    return names


def _wanted(path: Path) -> list[str]:
    """What a pickle that the restricted unpickler does not understand would build, as far as reading its text tells.

    Names that become stand-ins are left out: they are not why the file is refused.
    """
    zipped = zipfile.is_zipfile(path)
    names: set[str] = set()
    with suppress(Exception):  # a broken archive; or what follows is no pickle
        if zipped:
            with zipfile.ZipFile(path) as archive:
                data = next((archive.read(n) for n in archive.namelist() if n.endswith("data.pkl")), b"")
        else:
            data = path.read_bytes()
        stream = io.BytesIO(data)
        while True:  # torch's old format is several pickles, then raw numbers
            names |= _built_by_one_pickle(stream)
    harmless = re.compile(r"torch\.\w+Storage|torch\._utils\._rebuild\w+|argparse\.Namespace|collections\.OrderedDict")
    inert = ALLOWED_INERT_PACKAGES if zipped else ()
    return sorted(n for n in names - ALLOWED_INERT if not harmless.fullmatch(n) and not n.startswith(inert))


def _built_by_one_pickle(stream: io.BytesIO) -> set[str]:
    strings: list[str] = []
    memo: dict[int, str] = {}
    names = set()
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "GLOBAL":
            names.add(str(argument).replace(" ", "."))
        elif operation.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif operation.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif operation.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo.get(int(argument or 0), ""))
        elif isinstance(argument, str):
            strings.append(argument)
    return names


def _unreadable(path: Path, error: Exception) -> PituningError:
    """With the cause, less torch's advice to switch the protection off."""
    paragraphs = str(error).split("\n\n") if isinstance(error, pickle.UnpicklingError) else [str(error)]
    said = [p for p in paragraphs if p and not p.startswith(("Weights only load failed", "Check the documentation"))]
    reason = said[0].splitlines()[0] if said else type(error).__name__
    if number := re.fullmatch(r"Unsupported operand (\d+)", reason):
        name = next((o.name for o in pickletools.opcodes if ord(o.code) == int(number[1])), number[1])
        reason = f"unsupported pickle instruction {name}"
    return PituningError(f"{path} cannot be read, it is truncated or not a torch file ({reason}); nothing was run")


def _refusal(path: Path, names: Iterable[str], error: Exception | None = None) -> PituningError:
    """Names what the file would build; where it is nothing forbidden, the cause is ``error``."""
    named = ", ".join(names)
    if not named and error is not None:
        return _unreadable(path, error)
    return PituningError(
        f"{path} is refused: reading it would run or build {named}, which a checkpoint of weights has no use for; "
        "nothing was run. If you trust its source, save its tensors and arguments again without it"
    )


def _tensors(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    strange = [f"{k!r} ({type(v).__name__})" for k, v in state.items() if not isinstance(v, Tensor)]
    if strange:
        raise PituningError(f"{path}: the model's state should hold tensors only, found {', '.join(strange[:8])}")
    return {str(k): v.detach() for k, v in state.items()}


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of model and task; the model's count where both have one."""
    try:
        cfg, args = plain(content.get("cfg")), plain(content.get("args"))
    except RecursionError as error:
        raise PituningError("the checkpoint's arguments contain themselves") from error
    found: dict[str, Any] = {}
    if isinstance(cfg, Mapping):
        for group in ("task", "model"):
            if isinstance(cfg.get(group), Mapping):
                found |= cfg[group]
    if not found and isinstance(args, Mapping):
        found = dict(args)
    return {k: v for k, v in found.items() if v != "???"}  # omegaconf's missing value
