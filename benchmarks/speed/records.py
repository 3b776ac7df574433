"""Records: what one run measured, on which machine, as JSON files in `history`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from benchmarks.speed.measuring import Sample
from pituning.errors import DataError

HISTORY = Path(__file__).parent / "history"
SCHEMA = 1
_NAME = re.compile(r"(?P<date>\d{4}-\d{2}-\d{2})-(?P<device>cpu|cuda)-(?P<number>\d+)\.json")

Status = Literal["measured", "not applicable", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of one measurement.

    Attributes:
        reason: why there are no samples; empty if measured.
        seconds: what the measuring took.
    """

    status: Status
    samples: Mapping[str, Sample] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Record:
    """One run on one device.

    Attributes:
        date: ISO 8601, the day.
        machine: see :func:`benchmarks.speed.machine.facts`.
        options: of the command, those that change what is measured.
    """

    date: str
    device: str
    command: str
    machine: Mapping[str, Any]
    options: Mapping[str, Any]
    outcomes: Mapping[str, Outcome]
    quick: bool = False
    name: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": SCHEMA, **{k: v for k, v in asdict(self).items() if k != "name"}}

    @classmethod
    def of(cls, document: Mapping[str, Any], name: str = "") -> Self:
        """From JSON values.

        Raises:
            DataError: for another schema or missing fields.
        """
        try:
            if document["schema"] != SCHEMA:
                raise DataError(f"record {name}: its schema is {document['schema']}, not {SCHEMA}")
            outcomes = {
                key: Outcome(**{**o, "samples": {n: Sample(**s) for n, s in o["samples"].items()}})
                for key, o in document["outcomes"].items()
            }
            fields = {k: document[k] for k in ("date", "device", "command", "machine", "options", "quick")}
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"record {name} is not one of this benchmark's: {error!r}") from error
        return cls(**fields, outcomes=outcomes, name=name)

    def same_machine(self, other: Record) -> bool:
        """Whether figures of both may stand in one table."""
        keys = ("processor", "cores", "threads", "gpu")
        return self.device == other.device and all(self.machine.get(k) == other.machine.get(k) for k in keys)


def claim(history: Path, date: str, device: str) -> Path:
    """A new empty file DATE-DEVICE-N.json, N the next number; of two processes each gets one of its own."""
    history.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = history / f"{date}-{device}-{number}.json"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path


def write(record: Record, path: Path) -> None:
    """Write a record whole or not at all."""
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_text(json.dumps(record.document(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read(history: Path) -> list[Record]:
    """All records of a folder, oldest first; files of other names are left alone.

    Raises:
        DataError: if one is damaged.
    """
    found = []
    for path in history.glob("*.json"):
        if not (match := _NAME.fullmatch(path.name)):
            continue
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"record {path.name} is not JSON: {error}") from error
        found.append(((match["date"], int(match["number"])), Record.of(document, path.stem)))
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def complete(records: Iterable[Record], device: str) -> list[Record]:
    """The full records of a device, oldest first: quick ones decide nothing."""
    return [r for r in records if r.device == device and not r.quick]
