"""What several arms need of one target and seed (own expert, folds, rankings …): computed once, kept on disk, and timed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.transfer.cells import claimed
from pituning.experiments.cells import write_json
from pituning.experts.expert import Expert

T = TypeVar("T")
Make = Callable[[], tuple[Any, Mapping[str, Expert]]]
"""Gives a piece's plain value and its experts."""
_RECORD = "piece.json"


@dataclass(frozen=True)
class Piece:
    """Something shared.

    Attributes:
        value: as JSON has it.
        seconds: that it took, without those of the pieces it needs.
        needs: names of these.
    """

    value: Any
    experts: Mapping[str, Expert]
    seconds: float
    needs: tuple[str, ...]


@dataclass
class _Frame:
    needs: set[str] = field(default_factory=set)
    elsewhere: float = 0.0


class Shared:
    """The pieces in a folder. Another process that makes one is waited for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Piece] = {}
        self._frames: list[_Frame] = []

    def get(self, name: str, make: Make, folder: Path | None = None) -> Piece:
        """A piece by its name, made where it is not there yet.

        Args:
            folder: instead of the setting's own, for what several settings have in common.
        """
        begin = time.perf_counter()
        if name not in self._known:
            place = (folder or self.folder) / name
            self._known[name] = self._read(place) or self._made(place, make)
        if self._frames:
            self._frames[-1].needs.add(name)
            self._frames[-1].elsewhere += time.perf_counter() - begin
        return self._known[name]

    def measured(self, call: Callable[[], T]) -> tuple[T, float, tuple[str, ...]]:
        """A call's result, its seconds without those spent on pieces, and the pieces that it needed."""
        frame = _Frame()
        self._frames.append(frame)
        begin = time.perf_counter()
        try:
            result = call()
        finally:
            self._frames.pop()
        return result, time.perf_counter() - begin - frame.elsewhere, tuple(sorted(frame.needs))

    def seconds(self, needs: Iterable[str]) -> float:
        """What some pieces, and all that these need, took together when they were made."""
        todo, seen = list(needs), set[str]()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += self._known[name].needs if name in self._known else ()
        return sum(self._known[name].seconds for name in seen if name in self._known)

    def _made(self, place: Path, make: Make) -> Piece:
        with claimed(place.parent / "locks" / f"{place.name}.lock", wait=True):
            if (piece := self._read(place)) is not None:  # made by another process meanwhile
                return piece
            (value, experts), seconds, needs = self.measured(make)
            for key, expert in experts.items():
                expert.save(place / key)
            record = {"value": value, "experts": sorted(experts), "seconds": seconds, "needs": needs}
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / _RECORD, record)  # last: with it the piece is whole
        made = self._read(place)  # as every later reader has it
        assert made is not None
        return made

    def _read(self, place: Path) -> Piece | None:
        try:
            record = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        for need in record["needs"]:
            if need not in self._known and (piece := self._read(place.parent / need)) is not None:
                self._known[need] = piece
        experts = {key: Expert.load(place / key) for key in record["experts"]}
        return Piece(record["value"], experts, record["seconds"], tuple(record["needs"]))
