"""Few-shot draws and folds, as properties over random tasks."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pituning.data.fewshot import draw_shots, stratified_folds
from pituning.errors import DataError
from pituning.example import Example


def examples(sizes: list[int]) -> list[Example]:
    """``sizes[c]`` examples of class c, interleaved."""
    choices = tuple(f"class {c}" for c in range(len(sizes)))
    made = [
        Example(f"t/{c}-{i}", (f"text {c} {i}",), "p", choices[c], choices)
        for c, n in enumerate(sizes)
        for i in range(n)
    ]
    random.Random(0).shuffle(made)
    return made


seeds = st.integers(0, 1000)


@given(sizes=st.lists(st.integers(64, 90), min_size=1, max_size=4), seed=seeds)
def test_draws_are_nested_and_balanced(sizes: list[int], seed: int) -> None:
    pool = examples(sizes)
    drawn = {shots: draw_shots(pool, shots, seed) for shots in (4, 16, 64)}
    ids = {shots: {e.id for e in d} for shots, d in drawn.items()}
    assert ids[4] < ids[16] < ids[64] <= {e.id for e in pool}
    for shots, members in drawn.items():
        assert len(members) == len(ids[shots]), "no example twice"
        assert Counter(e.target for e in members) == dict.fromkeys(pool[0].choices, shots)
        assert drawn[64][: len(members)] == members, "the smaller draw comes first"


@given(
    sizes=st.lists(st.integers(8, 12), min_size=1, max_size=3), seed=seeds, shuffle=st.randoms(use_true_random=False)
)
def test_draws_and_folds_do_not_depend_on_the_order_of_the_rows(sizes: list[int], seed: int, shuffle: Any) -> None:
    pool = examples(sizes)
    turned = list(pool)
    shuffle.shuffle(turned)
    assert draw_shots(turned, 4, seed) == draw_shots(pool, 4, seed)
    for (_, one), (_, other) in zip(stratified_folds(turned, 3, seed), stratified_folds(pool, 3, seed), strict=True):
        assert {e.id for e in one} == {e.id for e in other}


def test_the_seed_decides() -> None:
    pool = examples([40, 40])
    draws = [tuple(e.id for e in draw_shots(pool, 8, seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len({frozenset(d) for d in draws}) == 3
    one, again, other = ([{e.id for e in h} for _, h in stratified_folds(pool, 2, s)] for s in (0, 0, 1))
    assert one == again
    assert one != other


def test_the_classes_are_drawn_independently() -> None:
    """Otherwise example i of one class would always come with example i of the other."""
    pool = examples([40, 40])
    drawn = [{e.id.split("-")[1] for e in draw_shots(pool, 8, 3) if e.id.startswith(f"t/{c}-")} for c in (0, 1)]
    assert drawn[0] != drawn[1]


def test_too_few_examples(message: Any) -> None:
    text = message(draw_shots, examples([20, 7]), 8, 0)
    assert text == "8 shots per class asked for, but class 'class 1' has only 7 examples"
    with pytest.raises(DataError, match="at least 1, not 0"):
        draw_shots(examples([4]), 0, 0)


def test_without_choices_a_shot_is_one_example() -> None:
    pool = [Example(f"t/{i}", ("x",), "p", f"answer {i}") for i in range(20)]
    assert len(draw_shots(pool, 4, 0)) == 4


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), folds=st.integers(2, 5), seed=seeds)
def test_folds_are_disjoint_complete_and_stratified(sizes: list[int], folds: int, seed: int) -> None:
    pool = examples(sizes)
    if len(pool) < folds:
        with pytest.raises(DataError, match=f"cannot make {folds} folds of {len(pool)} examples"):
            stratified_folds(pool, folds, seed)
        return
    split = stratified_folds(pool, folds, seed)
    assert len(split) == folds
    assert sorted(e.id for _, held in split for e in held) == sorted(e.id for e in pool), "each is held out once"
    sizes_held = [len(held) for _, held in split]
    assert max(sizes_held) - min(sizes_held) <= 1
    for train, held in split:
        assert not {e.id for e in train} & {e.id for e in held}
        assert len(train) + len(held) == len(pool)
    for choice in pool[0].choices:
        counts = [sum(e.target == choice for e in held) for _, held in split]
        assert max(counts) - min(counts) <= 1


def test_one_shot_in_all_gets_a_remedy(message: Any) -> None:
    one = [Example("t/0", ("x",), "p", "answer")]
    assert message(stratified_folds, one, 2, 0) == (
        "cannot make 2 folds of 1 examples: take at least 2 shots, or give --steps and --learning-rate"
    )
    assert "shots" not in message(stratified_folds, one, 1, 0)


@pytest.mark.parametrize("folds", [0, 1, 7])
def test_impossible_folds(folds: int) -> None:
    with pytest.raises(DataError, match=f"cannot make {folds} folds of 6 examples"):
        stratified_folds(examples([3, 3]), folds, 0)


def test_a_class_without_examples_is_named(message: Any) -> None:
    pool = [replace(e, choices=(*e.choices, "class 2")) for e in examples([8, 8])]
    assert "class 'class 2' has only 0 examples" in message(draw_shots, pool, 4, 0)
    graded = [replace(e, answers=((e.target, 1.0),)) for e in pool]
    assert len(draw_shots(graded, 4, 0)) == 4


def test_questions_without_an_answer_are_no_classes() -> None:
    """Their choices are those of the whole data set, and no answer of theirs may be given."""
    pool = [
        Example(f"t/{i}", ("x",), "p", a, ("red", "blue", "green"), answers=((a, 1.0),))
        for i, a in enumerate(["red", "blue"])
    ]
    unanswered = Example("t/2", ("x",), "p", "", ("red", "blue", "green"))
    assert {e.id for e in draw_shots([*pool, unanswered], 2, 0)} == {"t/0", "t/1"}
