"""Choosing from a ranking, against loops over soups whose ΔW are added to the dense weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.data.fewshot import stratified_folds
from pituning.errors import PituningError, UnknownNameError
from pituning.experts import Expert
from pituning.methods import initial_tensors
from pituning.similarity.select import Ranking
from pituning.similarity.selection import Selection, _Shots, select
from pituning.tasks import Task
from pituning.training.crossfit import Search
from pituning.training.evaluation import bias_calibrated_losses, calibrated_losses
from pituning.training.train_expert import train_expert
from pituning.training.trainer import TrainSettings

LogP = Callable[[Sequence[int]], Tensor]


@pytest.fixture
def experts(bert: Backbone, random_expert: Any) -> list[Expert]:
    """Five LoRA experts that each change the backbone's answers."""
    return [random_expert(bert, "lora", s, scale=0.6, name=f"e{s}") for s in range(5)]


def ranked(experts: Sequence[Expert], kind: str = "weights", values: Sequence[float] = ()) -> Ranking:
    return Ranking("target", kind, tuple(experts), tuple(values or [1 - 0.1 * i for i in range(len(experts))]))


@pytest.fixture
def log_p_of(bert: Backbone, experts: list[Expert], lora_deltas: Any, with_deltas: Any) -> Callable[[Task], LogP]:
    """``log_p_of(task)(members)``: log p ``[examples, choices]`` of a uniform soup, one example at a time."""
    deltas = [lora_deltas(e) for e in experts]

    def of_task(task: Task) -> LogP:
        bert.score(bert.collate(task.split("train")[:1]), task.choices)  # label texts are encoded by the bare backbone

        def log_p(members: Sequence[int]) -> Tensor:
            mean = {m: sum(deltas[i][m] for i in members) / len(members) for m in deltas[0]} if members else {}
            with torch.no_grad(), with_deltas(bert, mean):
                rows = [bert.score(bert.collate([e]), task.choices)[0] for e in task.split("train")]
            return torch.log_softmax(torch.stack(rows), 1)

        return log_p

    return of_task


@pytest.fixture
def answered_by(make_task: Any, log_p_of: Any) -> Callable[[Sequence[int]], Task]:
    """``answered_by(members)``: a task of 48 examples whose right answers are those of a soup."""

    def make(members: Sequence[int]) -> Task:
        task = make_task(shots=16)
        answers = log_p_of(task)(members).argmax(1).tolist()
        train = zip(task.split("train"), answers, strict=True)
        splits = {**task.splits, "train": tuple(replace(e, target=task.choices[a]) for e, a in train)}
        return replace(task, splits=splits)

    return make


@pytest.fixture
def helped(answered_by: Any) -> Task:
    """A task that the soup of the experts 0 and 1 knows."""
    return answered_by([0, 1])


def names(selection: Selection) -> list[str]:
    return [e.name for e in selection.experts]


def slow_greedy(log_p: LogP, task: Task, rows: Sequence[int]) -> list[int]:
    examples = task.split("train")

    def loss(members: Sequence[int]) -> float:
        return float(calibrated_losses(log_p(members)[list(rows)], [examples[r] for r in rows]).mean())

    chosen: list[int] = []
    while len(chosen) < 5:
        tried = {i: loss([*chosen, i]) for i in range(5) if i not in chosen}
        best = min(tried, key=lambda i: tried[i])
        if chosen and tried[best] >= loss(chosen):
            break
        chosen.append(best)
    return chosen


def folds_of(task: Task) -> list[tuple[list[int], list[int]]]:
    at = {e.id: i for i, e in enumerate(task.split("train"))}
    return [([at[e.id] for e in a], [at[e.id] for e in b]) for a, b in stratified_folds(task.split("train"), 2, 0)]


def cross_fitted(log_p: LogP, task: Task, rule: Callable[[Sequence[int]], Sequence[int]]) -> Tensor:
    held = [r for _, rows in folds_of(task) for r in rows]
    parts = [log_p(rule(train))[rows] for train, rows in folds_of(task)]
    return calibrated_losses(torch.cat(parts), [task.split("train")[r] for r in held])


def test_top_k_and_threshold_without_examples(experts: list[Expert]) -> None:
    ranking = ranked(experts)
    assert names(select(ranking)) == ["e0", "e1", "e2", "e3", "e4"]
    assert names(select(ranking, "top-k", k=3)) == ["e0", "e1", "e2"]
    assert names(select(ranking, "top-k", k=9)) == ["e0", "e1", "e2", "e3", "e4"]
    assert names(select(ranking, "threshold", threshold=0.9)) == ["e0", "e1"]
    none = select(ranking, "threshold", threshold=2.0)
    assert (none.experts, none.helps) == ((), None)
    assert none.reason == "none is so similar: the highest similarity by weights is +1.0000"
    assert "unchecked" in select(ranking).reason


def test_greedy_is_forward_selection_judged_on_the_folds_left_out(
    bert: Backbone, experts: list[Expert], helped: Task, log_p_of: Any
) -> None:
    log_p = log_p_of(helped)
    found = select(ranked(experts), "greedy", backbone=bert, task=helped)
    expected = slow_greedy(log_p, helped, range(48))
    assert names(found) == [f"e{i}" for i in expected]
    assert set(expected) == {0, 1}, "the soup that gave the answers is found"
    greedy = cross_fitted(log_p, helped, lambda rows: slow_greedy(log_p, helped, rows))
    nearest, bare = (cross_fitted(log_p, helped, lambda rows, m=m: m) for m in ([0], []))
    losses = [arm.loss for arm in found.arms]
    assert [arm.name for arm in found.arms] == ["soup by greedy", "nearest expert alone", "bare backbone"]
    assert losses == pytest.approx([float(x.mean()) for x in (greedy, nearest, bare)], rel=1e-4)
    gain = (bare - greedy).numpy()
    assert gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain))
    assert found.helps
    assert f"a gain of {gain.mean():+.4f} nats, with a standard error of {gain.std(ddof=1) / np.sqrt(48):.4f}" in str(
        found
    )
    singles = {s.members: s.loss for s in found.soups}
    for i in range(5):
        slow = calibrated_losses(log_p([i]), helped.split("train")).mean()
        assert singles[(f"e{i}",)] == pytest.approx(float(slow), rel=1e-4)


def test_auto_takes_as_many_of_the_ranking_as_make_the_best_soup(
    bert: Backbone, experts: list[Expert], helped: Task, log_p_of: Any
) -> None:
    log_p, order = log_p_of(helped), [1, 0, 3, 2, 4]
    ranking = ranked([experts[i] for i in order])

    def slow(rows: Sequence[int]) -> list[int]:
        picked = [helped.split("train")[r] for r in rows]
        losses = [float(calibrated_losses(log_p(order[: k + 1])[list(rows)], picked).mean()) for k in range(5)]
        return order[: int(np.argmin(losses)) + 1]

    found = select(ranking, "auto", backbone=bert, task=helped)
    assert names(found) == [f"e{i}" for i in slow(range(48))]
    assert found.arms[0].loss == pytest.approx(float(cross_fitted(log_p, helped, slow).mean()), rel=1e-4)
    alone = select(ranking, "auto", k=1, backbone=bert, task=helped)
    assert [soup.members for soup in alone.soups] == [("e1",)]


def test_a_ranking_by_score_is_made_anew_without_the_fold(
    bert: Backbone, experts: list[Expert], helped: Task, log_p_of: Any
) -> None:
    log_p, truth = log_p_of(helped), torch.tensor([e.label for e in helped.split("train")])
    losses = torch.stack([-log_p([i]).gather(1, truth[:, None])[:, 0] for i in range(5)])

    def best(rows: Sequence[int]) -> list[int]:
        return [int(losses[:, list(rows)].mean(1).argmin())]

    order = losses.mean(1).argsort().tolist()
    ranking = ranked([experts[i] for i in order], "score", [-float(losses[i].mean()) for i in order])
    found = select(ranking, "top-k", k=2, backbone=bert, task=helped)
    assert found.arms[1].loss == pytest.approx(float(cross_fitted(log_p, helped, best).mean()), rel=1e-4)
    same = select(ranking, "diverse", k=2, diversity=0, backbone=bert, task=helped)
    assert [arm.loss for arm in same.arms] == [arm.loss for arm in found.arms]
    low = ranking.similarities[1]
    above = select(ranking, "threshold", threshold=low, backbone=bert, task=helped)

    def at_least(rows: Sequence[int]) -> list[int]:
        return [i for i in range(5) if -float(losses[i, list(rows)].mean()) >= low]

    assert above.arms[0].loss == pytest.approx(float(cross_fitted(log_p, helped, at_least).mean()), rel=1e-4)


def test_so_is_one_by_calibrated_score(bert: Backbone, experts: list[Expert], helped: Task, log_p_of: Any) -> None:
    log_p, examples = log_p_of(helped), helped.split("train")

    def losses(rows: Sequence[int]) -> list[float]:
        picked = [examples[r] for r in rows]
        return [float(bias_calibrated_losses(log_p([i])[list(rows)], picked).mean()) for i in range(5)]

    whole = losses(range(len(examples)))
    order = sorted(range(5), key=lambda i: whole[i])
    ranking = ranked([experts[i] for i in order], "calibrated-score", [-whole[i] for i in order])
    found = select(ranking, "top-k", k=2, backbone=bert, task=helped)
    slow = cross_fitted(log_p, helped, lambda rows: [int(np.argmin(losses(rows)))])
    assert found.arms[1].loss == pytest.approx(float(slow.mean()), rel=1e-4)


def test_score_weighted_soups(
    bert: Backbone, experts: list[Expert], helped: Task, log_p_of: Any, lora_deltas: Any, with_deltas: Any
) -> None:
    examples, log_p = helped.split("train"), log_p_of(helped)
    losses = [float(bias_calibrated_losses(log_p([i]), examples).mean()) for i in (0, 1)]
    weights = torch.softmax(-0.25 * len(examples) * torch.tensor(losses), 0).tolist()
    deltas = [lora_deltas(e) for e in experts[:2]]
    with (
        torch.no_grad(),
        with_deltas(bert, {m: weights[0] * d + weights[1] * deltas[1][m] for m, d in deltas[0].items()}),
    ):
        mixed = torch.log_softmax(torch.cat([bert.score(bert.collate([e]), helped.choices) for e in examples]), 1)
    found = select(ranked(experts), "auto", k=2, soup="score", backbone=bert, task=helped)
    loss = {soup.members: soup.loss for soup in found.soups}["e0", "e1"]
    assert loss == pytest.approx(float(calibrated_losses(mixed, examples).mean()), rel=1e-4)
    assert abs(weights[0] - 0.5) > 0.01, "else this would be the uniform soup"


def test_none_helps_where_the_answers_are_noise(bert: Backbone, experts: list[Expert], make_task: Any) -> None:
    task = make_task(shots=8, seed=3)
    for how in ("greedy", "auto", "top-k"):
        found = select(ranked(experts), how, backbone=bert, task=task)
        assert found.experts == ()
        assert found.helps is False
        assert found.reason.startswith("none of these helps: ")
        assert f"experts for target by {how}: none" in str(found)


def test_the_nearest_expert_alone_where_the_soup_spoils_it(
    bert: Backbone, experts: list[Expert], answered_by: Any
) -> None:
    task, order = answered_by([4]), [experts[4], *experts[:4]]
    found = select(ranked(order), "top-k", k=5, backbone=bert, task=task)
    soup, nearest, _ = found.arms
    assert nearest.loss < soup.loss
    assert names(found) == ["e4"]
    assert found.reason.startswith("nearest expert alone")
    assert names(select(ranked(order), "greedy", backbone=bert, task=task))[0] == "e4"


def test_an_expert_without_a_finite_loss_is_never_chosen(
    bert: Backbone, experts: list[Expert], helped: Task, random_expert: Any
) -> None:
    huge = random_expert(bert, "lora", 7, scale=1e30, name="huge")
    for how, soup in (("top-k", "uniform"), ("greedy", "uniform"), ("auto", "score")):
        found = select(ranked([huge, *experts[3:]]), how, k=2, soup=soup, backbone=bert, task=helped)
        assert "huge" not in names(found)
        assert "nan" not in found.reason
        unsound = [arm.name for arm in found.arms if not np.isfinite(arm.loss)]
        assert "nearest expert alone" in unsound
        assert f"the log-loss of {' and of '.join(unsound)} is not a finite number, so it is not chosen" in found.reason
    for how, soup in (("greedy", "uniform"), ("auto", "score")):
        ranking = ranked([*experts[:2], huge])
        found = select(ranking, how, soup=soup, backbone=bert, task=helped)
        assert found.helps
        assert set(names(found)) == {"e0", "e1"}
    with pytest.raises(
        PituningError, match=r"similarity of expert 'e1' by weights is nan, which has no place in an order"
    ):
        select(ranked(experts, values=[0.9, float("nan"), 0.8, 0.7, 0.6]))


@pytest.mark.parametrize("how", ["greedy", "auto"])
def test_rounding_does_not_choose_an_expert_of_no_weight(
    bert: Backbone, experts: list[Expert], helped: Task, random_expert: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another order of the same sum may make the soup with it the better one by a hair."""
    plain = _Shots._loss
    monkeypatch.setattr(_Shots, "_loss", lambda self, members, rows: plain(self, members, rows) - 1e-6 * len(members))
    huge = random_expert(bert, "lora", 7, scale=1e30, name="huge")
    found = select(ranked([*experts[:2], huge]), how, soup="score", backbone=bert, task=helped)
    assert set(names(found)) == {"e0", "e1"}


def test_a_backbone_without_a_finite_loss_is_no_rival(
    fresh_bert_of: Any, experts: list[Expert], make_task: Any, message: Any
) -> None:
    spoilt = fresh_bert_of(torch.float32)
    with torch.no_grad():
        spoilt.model.embeddings.word_embeddings.weight.fill_(float("nan"))
    found = message(select, ranked(experts), "top-k", k=1, backbone=spoilt, task=make_task(shots=4))
    assert "log-loss of bare backbone on the examples of task 'target' is not a finite number" in found


def test_an_own_expert_is_a_rival_retrained_without_each_fold(
    bert: Backbone, experts: list[Expert], helped: Task
) -> None:
    own = train_expert(bert, helped, settings=TrainSettings(learning_rate=1e-2, steps=3, batch_size=8), name="mine")
    found = select(ranked(experts), "top-k", k=2, backbone=bert, task=helped, own=own, search=Search(folds=3))
    assert [arm.name for arm in found.arms][2:] == ["bare backbone", "own expert mine"]
    assert all(len(arm.losses) == 48 for arm in found.arms)


def test_diverse_weighs_similarity_against_what_is_chosen_already(
    bert: Backbone, experts: list[Expert], random_expert: Any, lora_deltas: Any
) -> None:
    near = experts[0]
    twin = Expert({k: t + 0.001 for k, t in near.tensors.items()}, near.config, replace(near.card, name="twin"))
    ranking = ranked([near, twin, *experts[1:]], values=(1.0, 0.99, 0.7, 0.6, 0.5, 0.2))
    assert names(select(ranking, "diverse", k=3, diversity=0)) == ["e0", "twin", "e1"]
    assert "twin" not in names(select(ranking, "diverse", k=3, diversity=0.5))

    deltas = [lora_deltas(e) for e in ranking.experts]

    def cosine(i: int, j: int) -> float:
        each = [float((deltas[i][m] * d).sum() / deltas[i][m].norm() / d.norm()) for m, d in deltas[j].items()]
        return sum(each) / len(each)

    chosen = [0]
    while len(chosen) < 6:
        left = [i for i in range(6) if i not in chosen]
        worth = [0.3 * (ranking.similarities[i] - 0.2) / 0.8 - 0.7 * max(cosine(j, i) for j in chosen) for i in left]
        chosen.append(left[int(np.argmax(worth))])
    assert names(select(ranking, "diverse", k=6, diversity=0.7)) == [ranking.experts[i].name for i in chosen]


def test_diverse_of_other_methods_measures_from_their_start(bert: Backbone, random_expert: Any) -> None:
    experts = [random_expert(bert, "bottleneck", s, name=f"b{s}") for s in range(3)]
    with pytest.raises(
        PituningError, match=r"'bottleneck' experts their common start comes from the backbone: pass backbone="
    ):
        select(ranked(experts), "diverse")
    start = initial_tensors(bert, experts[0].config)
    further = {k: start[k] + 1.5 * (t - start[k]) for k, t in experts[0].tensors.items()}
    twin = Expert(further, experts[0].config, replace(experts[0].card, name="twin"))
    ranking = ranked([experts[0], twin, *experts[1:]])
    assert names(select(ranking, "diverse", k=2, backbone=bert)) == ["b0", "b1"]


@pytest.mark.parametrize(
    ("how", "options", "said"),
    [
        ("top-k", {"k": 0}, "k must be at least 1, not 0"),
        ("greedy", {}, "'greedy' compares soups on the target's examples: pass backbone=… and task=…"),
        ("auto", {"candidates": 0}, "candidates must be at least 1, not 0"),
        ("threshold", {}, "threshold=… belongs to selection 'threshold', and that needs one; this is 'threshold'"),
        ("top-k", {"threshold": 0.5}, "and that needs one; this is 'top-k'"),
        ("diverse", {"diversity": 1.5}, "diversity must be between 0 and 1, not 1.5"),
        ("threshold", {"threshold": -1, "k": 1}, "k=1 has no effect on selection 'threshold'"),
        ("top-k", {"diversity": 0.5}, "diversity=0.5 belongs to selection 'diverse'; this is 'top-k'"),
        ("diverse", {"candidates": 3}, "candidates=3 belongs to selections 'greedy' and 'auto'; this is 'diverse'"),
        ("top-k", {"soup": "score"}, "selection 'top-k' without backbone=… and task=… compares none"),
    ],
)
def test_mistakes_are_explained(
    experts: list[Expert], message: Any, how: str, options: dict[str, Any], said: str
) -> None:
    assert said in message(select, ranked(experts), how, **options)


def test_unknown_names(experts: list[Expert]) -> None:
    with pytest.raises(UnknownNameError, match="unknown selection 'gredy': did you mean 'greedy'"):
        select(ranked(experts), "gredy")
    with pytest.raises(UnknownNameError, match="unknown soup 'scored': did you mean 'score'"):
        select(ranked(experts), soup="scored")
