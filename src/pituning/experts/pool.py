"""A pool: a folder of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pituning.backbones.base import Backbone
from pituning.errors import ExpertError, unknown_name
from pituning.experts.expert import CARD_FILE, CONFIG_FILE, TENSOR_FILE, Expert, recover_interrupted, tensor_hash
from pituning.experts.health import require_sound


class ExpertPool:
    """The experts in a folder, one sub-folder each, in the order of their names.

    The folder itself is the index: what lies there is listed, and a save is atomic, so a half-written expert (its
    folder's name starts with a dot) never is.

    >>> ExpertPool("no/such/folder").names()
    []
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def names(self) -> list[str]:
        """Names of the experts."""
        if not self.folder.is_dir():
            return []
        recover_interrupted(self.folder)
        files = (CONFIG_FILE, TENSOR_FILE, CARD_FILE)  # one is enough: a damaged expert must not vanish from the list
        visible = (p for p in self.folder.iterdir() if not p.name.startswith("."))
        return sorted(p.name for p in visible if any((p / file).is_file() for file in files))

    def load(self, name: str) -> Expert:
        """Load one expert; its name is the folder's.

        Raises:
            UnknownNameError: if there is none of that name.
            ExpertError: if its files are broken.
        """
        if name not in self.names():
            raise unknown_name("expert", name, self.names(), f"The pool is {self.folder}.")
        return Expert.load(self.folder / name).with_card(name=name)

    def load_all(self, backbone: Backbone | None = None, exclude: Sequence[str] = ()) -> list[Expert]:
        """Load every expert but the excluded ones, and check that each belongs to the backbone.

        Raises:
            ExpertError: for the first broken expert; :meth:`verify` lists all of them.
        """
        experts = [self.load(name) for name in self.names() if name not in exclude]
        for expert in experts:
            if backbone is not None:
                expert.require_backbone(backbone)
        return experts

    def add(self, expert: Expert, name: str | None = None) -> Path:
        """Save an expert into the pool under its own name or another.

        Raises:
            ExpertError: if the name is not that of a visible folder, or the expert cannot be saved.
        """
        name = expert.name if name is None else name
        if not name or name.startswith(".") or Path(name).name != name:
            raise ExpertError(
                f"an expert in a pool cannot be called {name!r}: the name must be that of a visible folder"
            )
        return expert.with_card(name=name).save(self.folder / name)

    def verify(self, backbone: Backbone | None = None) -> dict[str, str]:
        """Load and check every expert; returns the problem by name, empty where there is none.

        A problem is also an expert that has no effect, and one whose tensors are those of another.
        """
        report: dict[str, str] = {}
        first_with: dict[str, str] = {}
        for name in self.names():
            try:
                expert = self.load(name)
                expert.verify(backbone)
                require_sound(expert)
            except ExpertError as error:
                report[name] = str(error)
                continue
            first = first_with.setdefault(tensor_hash(expert.tensors), name)
            report[name] = "" if first == name else f"expert {name!r} has the same tensors as {first!r}, bit by bit"
        return report

    def __iter__(self) -> Iterator[Expert]:
        return (self.load(name) for name in self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __repr__(self) -> str:
        return f"ExpertPool({str(self.folder)!r}, {len(self)} experts)"
