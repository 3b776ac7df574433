"""Few-shot draws and cross-fitting folds: seeded, balanced over classes, nested in the number of shots."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from pituning.errors import DataError
from pituning.example import Example


def draw_shots(examples: Sequence[Example], shots: int, seed: int) -> tuple[Example, ...]:
    """Draw ``shots`` examples per class; for the same seed 4 shots are among the 16, and those among the 64.

    For tasks without classes a shot is one example. The draw does not depend on the order of ``examples``, only on their ids.

    Raises:
        DataError: if a class (or a task without choices) has fewer examples than shots.
    """
    if shots < 1:
        raise DataError(f"shots must be at least 1, not {shots}")
    drawn = []
    if examples and not any(example.target for example in examples):
        raise DataError("none of the examples has an answer, so there are no labelled examples to draw")
    for name, members in sorted(_by_class(examples).items()):
        if len(members) < shots and not name:
            raise DataError(f"{shots} shots asked for, but there are only {len(members)} examples")
        if len(members) < shots:
            raise DataError(f"{shots} shots per class asked for, but class {name!r} has only {len(members)} examples")
        members = sorted(members)
        random.Random(f"{seed}/{name}").shuffle(members)
        drawn.append(members[:shots])
    return tuple(examples[index] for group in zip(*drawn, strict=True) for _, index in group)


def stratified_folds(examples: Sequence[Example], folds: int, seed: int) -> list[tuple[list[Example], list[Example]]]:
    """Split examples into (train, held out) pairs; classes are spread evenly, every example is held out once.

    Raises:
        DataError: if there are fewer examples than folds.
    """
    if not 2 <= folds <= len(examples):
        problem = f"cannot make {folds} folds of {len(examples)} examples"
        if folds < 2:
            raise DataError(f"{problem}; cross-fitting needs at least 2")
        raise DataError(f"{problem}: take at least {folds} shots, or give --steps and --learning-rate")
    fold_of: dict[str, int] = {}
    position = 0
    for name, members in sorted(_by_class(examples).items()):
        members = sorted(members)
        random.Random(f"folds/{seed}/{name}").shuffle(members)
        for identifier, _ in members:
            fold_of[identifier] = position % folds
            position += 1
    return [
        ([e for e in examples if fold_of[e.id] != f], [e for e in examples if fold_of[e.id] == f]) for f in range(folds)
    ]


def _by_class(examples: Sequence[Example]) -> dict[str, list[tuple[str, int]]]:
    """Class → id and position of its examples: the examples themselves may be too many to keep.

    Open-ended examples have no class, and neither have questions whose answers are right to a degree (VQA); those without an
    answer that may be given are left out. A choice that no example has for its answer is a class without members.
    """
    classes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    choices: tuple[str, ...] = ()
    for index, example in enumerate(examples):
        if example.target and example.choices != choices and not example.answers:
            choices = example.choices
            classes |= {choice: [] for choice in choices if choice not in classes}
        if example.target:
            classes[example.target if example.choices and not example.answers else ""].append((example.id, index))
    return classes
