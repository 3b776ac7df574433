"""From experts and a few shots to one blended expert: every candidate is compared, one is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.data.fewshot import stratified_folds
from pituning.errors import BackboneMismatchError, DataError, PituningError, RefusedError
from pituning.experts import Expert
from pituning.experts.expert import tensor_hash
from pituning.interpolation import TRAIN_MODES, Coefficients
from pituning.interpolation.build import lora_factors
from pituning.methods import attached, initial_tensors
from pituning.tasks import Task
from pituning.training import interpolate as module
from pituning.training.blend import Interpolation, blend
from pituning.training.crossfit import CrossFit, Search
from pituning.training.evaluation import bias_calibrated_losses
from pituning.training.interpolate import interpolate
from pituning.training.starts import SCALES, blend_start, expected_scale, score_weights
from pituning.training.train_expert import train_expert
from pituning.training.trainer import TrainSettings

SEARCH = Search(learning_rates=(1e-2,), steps=2, eval_every=1, folds=2, alpha_learning_rate=5e-2)
SHORT = TrainSettings(learning_rate=1e-2, steps=2, batch_size=16)
METHODS = ("lora", "bottleneck")


def calibrated_loss(backbone: Backbone, expert: Expert, task: Task) -> float:
    """One example at a time; the calibration has a slow check of its own in test_evaluation."""
    examples = task.split("train")
    with torch.no_grad(), attached(backbone, expert.config, expert.tensors):
        rows = [backbone.score(backbone.collate([e]), e.choices)[0] for e in examples]
    return float(bias_calibrated_losses(torch.stack(rows).log_softmax(1), examples).mean())


def by_evidence(losses: list[float], examples: int) -> np.ndarray:
    """w_k ∝ exp(−N/4 · loss_k)."""
    evidence = np.exp(-0.25 * examples * (np.array(losses) - min(losses)))
    return np.asarray(evidence / evidence.sum())


def prefer(monkeypatch: pytest.MonkeyPatch, position: int, steps: int = 2) -> None:
    """Let the candidate at a position win, whatever the data say."""
    count = [0]

    def fake(backbone: Any, start: Any, examples: Any, search: Search, *_: Any, **__: Any) -> CrossFit:
        start(0)
        loss = 1.0 if count[0] == position else 2.0 + count[0]
        count[0] += 1
        return CrossFit(1e-2, steps, loss, losses=torch.full((len(examples),), loss))

    monkeypatch.setattr(module, "cross_fit", fake)


@pytest.fixture(scope="session")
def own_of(backbone_of: Any, make_task: Any) -> Any:
    """``own_of(family, method)``: the target's own expert after two steps, trained once."""
    known: dict[tuple[str, str], Expert] = {}

    def get(family: str, method: str) -> Expert:
        if (family, method) not in known:
            known[family, method] = train_expert(
                backbone_of(family), make_task(), method, settings=SHORT, name="own", r=3 if method == "lora" else 4
            )
        return known[family, method]

    return get


def assert_sound(result: Interpolation, names: set[str]) -> None:
    chosen = [c for c in result.candidates if c.chosen]
    assert len(chosen) == 1
    assert {c.name for c in result.candidates} == names
    assert result.experts == chosen[0].members
    for candidate in result.candidates:
        assert len(candidate.weights) == len(candidate.members)
        assert sum(candidate.weights) == pytest.approx(1)
        assert candidate.scale == 1 or candidate.name.startswith("interpolation")
    for row in result.weights.values():
        assert len(row) == len(result.experts)
        assert sum(row) == pytest.approx(chosen[0].scale, rel=1e-6)
    assert sum(result.mean_weights().values()) == pytest.approx(chosen[0].scale, rel=1e-6)
    assert f"→ {chosen[0].name}" in str(result)


@pytest.mark.parametrize("train", TRAIN_MODES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("include_own", ["auto", True, False])
def test_runs_and_compares_every_candidate(
    bert: Backbone, random_experts: Any, make_task: Any, own_of: Any, tmp_path: Path,
    train: str, method: str, include_own: bool | str,
) -> None:  # fmt: skip
    task, experts = make_task(), random_experts(bert, method, 2, 1)
    result = interpolate(
        bert, task, experts, own_of("encoder", method), train=train, include_own=include_own, search=SEARCH, name="pi"
    )
    losses = [calibrated_loss(bert, e, task) for e in experts]
    best = experts[int(np.argmin(losses))]
    names = {f"warm start from {best.name}", "keep the own expert"}
    names |= {"interpolation of the experts"} if include_own is not True else set()
    names |= {"interpolation with the own expert"} if include_own is not False else set()
    assert_sound(result, names)
    result.expert.verify(bert)
    assert (result.expert.name, result.expert.card.task, result.expert.card.method) == ("pi", "target", method)
    assert result.expert.card.fingerprint == bert.fingerprint
    assert {p["name"]: p["weight"] for p in result.expert.card.lineage} == pytest.approx(result.mean_weights())
    assert Expert.load(result.expert.save(tmp_path / "pi")).card == result.expert.card
    plain = [c for c in result.candidates if c.name == "interpolation of the experts"]
    for candidate in plain:
        assert candidate.members == tuple(e.name for e in experts)
        np.testing.assert_allclose(candidate.weights, by_evidence(losses, 12), rtol=1e-3)


def test_the_first_candidate_within_the_noise_of_the_best_is_chosen(
    bert: Backbone, random_experts: Any, make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two standard errors of the paired differences: the blend comes first and wins what cannot be told apart."""
    spread = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    error = float(np.std(spread.numpy(), ddof=1)) / 12**0.5
    for shift, expected in ((1.9 * error, "interpolation of the experts"), (2.1 * error, "warm start")):
        given = iter([1 + shift + spread, torch.ones(12, dtype=torch.float64)])

        def fake(*_: Any, given: Any = given, **__: Any) -> CrossFit:
            losses = next(given)
            return CrossFit(1e-2, 0, float(losses.mean()), losses=losses)

        monkeypatch.setattr(module, "cross_fit", fake)
        result = interpolate(bert, make_task(), random_experts(bert, "bottleneck", 2, 16), search=SEARCH)
        assert [c.name.startswith(expected) for c in result.candidates if c.chosen] == [True]


def test_an_encoder_decoder_as_well(t5: Backbone, random_experts: Any, make_task: Any, own_of: Any) -> None:
    experts = random_experts(t5, "lora", 2, 2)
    result = interpolate(t5, make_task(), experts, own_of("seq2seq", "lora"), search=SEARCH)
    result.expert.verify(t5)
    assert len(result.candidates) == 4


def test_without_an_own_expert_and_without_alternatives(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    experts = random_experts(bert, "bottleneck", 3, 3)
    assert_sound(
        interpolate(bert, make_task(), experts, search=SEARCH, alternatives=False), {"interpolation of the experts"}
    )


@pytest.mark.parametrize("train", TRAIN_MODES)
@pytest.mark.parametrize("method", METHODS)
def test_a_single_expert_can_be_interpolated(
    bert: Backbone, random_experts: Any, make_task: Any, method: str, train: str
) -> None:
    result = interpolate(bert, make_task(), random_experts(bert, method, 1, 4), train=train, search=SEARCH, scale=1)
    assert set(result.mean_weights().values()) == {1.0}


@pytest.mark.parametrize("granularity", ["model", "layer", "module", "tensor"])
def test_weights_are_reported_by_group(
    bert: Backbone, random_experts: Any, make_task: Any, monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    prefer(monkeypatch, 0)
    experts = random_experts(bert, "bottleneck", 2, 5)
    result = interpolate(bert, make_task(), experts, train="weights", granularity=granularity, search=SEARCH)
    expected = {"model": 1, "layer": 2, "module": 4, "tensor": 16}
    assert len(result.weights) == expected[granularity]
    assert any(row != pytest.approx(result.candidates[0].weights, abs=1e-4) for row in result.weights.values())


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_soup_is_the_sum_with_the_evidences_weights(
    bert: Backbone, random_experts: Any, make_task: Any, lora_deltas: Any, distance: Any, scale: float
) -> None:
    task, experts = make_task(), random_experts(bert, "lora", 3, 6)
    options: dict[str, Any] = {"train": "none", "alternatives": False, "granularity": "model", "scale": scale}
    result = interpolate(bert, task, experts, search=SEARCH, **options)
    weights = scale * by_evidence([calibrated_loss(bert, e, task) for e in experts], 12)
    dense: dict[str, Tensor] = {}
    for weight, expert in zip(weights, experts, strict=True):
        for name, delta in lora_deltas(expert).items():
            dense[name] = dense.get(name, torch.zeros_like(delta)) + weight * delta
    found = lora_deltas(result.expert)
    assert found.keys() == dense.keys()
    assert all(distance(found[name], delta) < 1e-5 for name, delta in dense.items())
    assert set(result.errors.values()) == {0.0}


class TestScale:
    """The sum of the weights: a mean by how well the untrained blend explains the shots."""

    def test_is_the_mean_by_evidence(
        self, bert: Backbone, random_experts: Any, make_task: Any, lora_deltas: Any, with_deltas: Any
    ) -> None:
        """By blends made by hand, one example at a time."""
        task = make_task(shots=11)  # of three classes
        experts = [  # that change much
            replace(e, tensors={k: 12 * t for k, t in e.tensors.items()}) for e in random_experts(bert, "lora", 2, 6)
        ]
        weights = np.array([0.3, 0.7])
        result = interpolate(
            bert, task, experts, init=weights.tolist(), train="none", alternatives=False, search=SEARCH
        )
        examples, losses = task.split("train"), {}
        for scale in SCALES:
            dense: dict[str, Tensor] = {}
            for weight, expert in zip(scale * weights, experts, strict=True):
                for name, delta in lora_deltas(expert).items():
                    dense[name] = dense.get(name, torch.zeros_like(delta)) + weight * delta
            with torch.no_grad(), with_deltas(bert, dense):
                rows = [bert.score(bert.collate([e]), e.choices)[0] for e in examples]
            losses[scale] = float(
                F.cross_entropy(torch.stack(rows).double(), torch.tensor([e.label for e in examples]))
            )
        (candidate,) = result.candidates
        assert len({round(loss, 4) for loss in losses.values()}) > 1
        shares = by_evidence(list(losses.values()), len(examples))
        assert candidate.scale == pytest.approx(float(shares @ np.array(SCALES)), rel=1e-3)
        assert candidate.scale != pytest.approx(np.mean(SCALES), rel=1e-2), "the shots do tell something"

    def test_few_shots_do_not_tell(self, bert: Backbone, random_experts: Any, make_task: Any) -> None:
        """Below 32 of them the weights sum to one, unless a number is given."""
        task, experts = make_task(shots=11), random_experts(bert, "lora", 2, 6)
        options: dict[str, Any] = {"train": "none", "alternatives": False, "search": SEARCH, "init": "uniform"}
        for count, scaled in ((32, True), (31, False)):
            few = replace(task, splits={**task.splits, "train": task.split("train")[:count]})
            (candidate,) = interpolate(bert, few, experts, **options).candidates
            assert (candidate.scale != 1) is scaled
        assert interpolate(bert, few, experts, scale=2.5, **options).candidates[0].scale == 2.5

    def test_other_methods_have_the_mean(self, bert: Backbone, random_experts: Any, make_task: Any) -> None:
        """Unless a number is given, which reaches out from the common start."""
        experts = random_experts(bert, "bottleneck", 2, 6)
        initial = initial_tensors(bert, experts[0].config)
        experts = [e.with_card(init_hash=tensor_hash(initial)) for e in experts]
        options: dict[str, Any] = {"train": "none", "alternatives": False, "search": SEARCH, "init": "uniform"}
        assert interpolate(bert, make_task(shots=11), experts, **options).candidates[0].scale == 1
        found = interpolate(bert, make_task(), experts, scale=3.0, **options)
        for key, start in initial.items():
            moved = start + 1.5 * sum(e.tensors[key] - start for e in experts)
            torch.testing.assert_close(found.expert.tensors[key], moved, rtol=1e-4, atol=1e-5)
        unknown = [e.with_card(init_hash="") for e in experts]
        with pytest.raises(RefusedError, match="common start"):
            interpolate(bert, make_task(), unknown, scale=3.0, **options)

    def test_the_own_expert_has_not_seen_what_it_is_read_on(
        self, bert: Backbone, random_experts: Any, make_task: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task, (other, *folds) = make_task(), random_experts(bert, "lora", 4, 6)
        held = [part for _, part in stratified_folds(task.split("train"), 2, 0)]
        seen: list[tuple[str, tuple[str, ...]]] = []

        def read(_: Any, examples: Any, model: Any, **__: Any) -> Tensor:
            own = model.mixture.a[0][-folds[0].config["r"] :]  # the last of the stacked factors
            name = next(e.name for e in folds if torch.equal(own, next(iter(lora_factors(e).values())).a))
            seen.append((name, tuple(e.id for e in examples)))
            return torch.zeros(len(examples), len(examples[0].choices)).log_softmax(1)

        monkeypatch.setattr("pituning.training.starts.log_probabilities", read)
        own: dict[int | None, Expert] = {0: folds[0], 1: folds[1], None: folds[2]}
        found = expected_scale(
            bert,
            lambda s: blend_start(bert, [other], [0.5, 0.5], own, train="none", scale=s),
            task.split("train"),
            SEARCH,
        )
        assert found == pytest.approx(sum(SCALES) / len(SCALES)), "equal losses tell nothing"
        expected = [(folds[n].name, tuple(e.id for e in held[n])) for n in (0, 1)]
        assert seen == expected * len(SCALES)

    @pytest.mark.parametrize("scale", ["most", 0.0, -1.0])
    def test_nonsense(self, bert: Backbone, random_experts: Any, make_task: Any, scale: Any) -> None:
        with pytest.raises(PituningError, match="scale must be"):
            interpolate(bert, make_task(), random_experts(bert, "lora", 2, 6), scale=scale, search=SEARCH)


def test_weights_alone_without_a_rate_are_refused(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    with pytest.raises(PituningError, match="alpha_learning_rate=0 would train nothing"):
        interpolate(bert, make_task(), random_experts(bert, "lora", 2, 6), train="weights", search=Search())
    with pytest.raises(PituningError, match="alpha_learning_rate=0 would train nothing: give the settings"):
        blend(bert, make_task(), random_experts(bert, "lora", 2, 6), train="weights", settings=TrainSettings(steps=2))


@pytest.mark.parametrize("penalty", ["weights_to_start", "weights_spread"])
def test_held_weights_have_nothing_to_regularise(
    bert: Backbone, random_experts: Any, make_task: Any, penalty: str
) -> None:
    search = replace(SEARCH, **{penalty: 0.5})
    with pytest.raises(PituningError, match="holds the weights"):
        interpolate(bert, make_task(), random_experts(bert, "lora", 2, 6), search=search)
    settings = replace(SHORT, **{penalty: 0.5})
    for train in ("merge-then-tune", "none"):
        with pytest.raises(PituningError, match=f"train='{train}' holds the weights"):
            blend(bert, make_task(), random_experts(bert, "lora", 2, 6), settings=settings, train=train)


@pytest.mark.parametrize("losses", [[0.40, 0.55], [0.40, 2.0, 0.41]])
def test_weights_by_much_evidence_have_a_finite_alpha(losses: list[float]) -> None:
    """8000 examples: e^−300 is no float32, and e^−3200 no float64."""
    found = score_weights(losses, 8000)
    weights = torch.tensor([found])
    for weight, exact in zip(weights[0].tolist(), by_evidence(losses, 8000), strict=True):
        assert weight == np.float32(exact) or (np.float32(exact) == 0 and weight == np.float32(1e-45) > 0)
    alpha = Coefficients().alpha(weights)
    assert alpha.isfinite().all()
    assert torch.equal(Coefficients().weights(alpha).sort().indices, weights.sort().indices)


def test_weights_by_little_evidence_are_not_touched() -> None:
    """Down to the smallest that float32 has: 1.4e-45."""
    losses = [0.1 * n for n in range(64)]
    evidence = torch.tensor([-0.25 * 64 * loss for loss in losses], dtype=torch.float64)
    expected = torch.softmax(evidence, 0).tolist()
    assert expected[-1] == pytest.approx(2e-44, rel=0.5)
    assert score_weights(losses, 64) == expected
    assert score_weights([0.1, math.inf], 64) == [1.0, 0.0], "no evidence at all"


class TestInitialWeights:
    def first(self, backbone: Backbone, task: Task, experts: Any, **options: Any) -> tuple[float, ...]:
        options = {"train": "none", "alternatives": False, "search": SEARCH, **options}
        return interpolate(backbone, task, experts, **options).candidates[-1].weights

    def test_uniform_given_and_similarity(self, bert: Backbone, random_experts: Any, make_task: Any) -> None:
        task, experts = make_task(), random_experts(bert, "bottleneck", 3, 7)
        assert self.first(bert, task, experts, init="uniform") == pytest.approx([1 / 3] * 3)
        assert self.first(bert, task, experts, init=[0.2, 0.5, 0.3]) == pytest.approx([0.2, 0.5, 0.3])
        similar = np.array([0.3, -1.0, 2.0])
        found = self.first(bert, task, experts, init="similarity", similarities=similar.tolist())
        assert found == pytest.approx(np.exp(similar) / np.exp(similar).sum())

    def test_the_own_expert_gets_an_equal_share_beside_given_numbers(
        self, bert: Backbone, random_experts: Any, make_task: Any, own_of: Any
    ) -> None:
        task, experts = make_task(), random_experts(bert, "bottleneck", 3, 7)
        options: dict[str, Any] = {"own": own_of("encoder", "bottleneck"), "include_own": True}
        found = self.first(bert, task, experts, init=[0.2, 0.5, 0.3], **options)
        assert found == pytest.approx([0.15, 0.375, 0.225, 0.25])
        assert self.first(bert, task, experts, init="uniform", **options) == pytest.approx([0.25] * 4)
        similar = self.first(bert, task, experts, init="similarity", similarities=[0.0, 0.0, 0.0], **options)
        assert similar == pytest.approx([0.25] * 4)

    def test_scores_of_own_and_others_are_of_one_kind(
        self, bert: Backbone, random_experts: Any, make_task: Any, own_of: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the own expert of every fold predicts exactly as the only other expert does, the two share equally."""
        task, (expert,) = make_task(), random_experts(bert, "bottleneck", 1, 8)
        twin = expert.with_card(name="twin")
        monkeypatch.setattr(module, "fold_experts", lambda *_, **__: dict.fromkeys((None, 0, 1), twin))
        assert self.first(bert, task, [expert], own=twin, include_own=True) == pytest.approx([0.5, 0.5], rel=1e-4)


def test_with_the_own_expert_the_weights_stay(
    bert: Backbone, random_experts: Any, make_task: Any, own_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """α would be fitted on the shots that the own expert has seen."""
    own = own_of("encoder", "bottleneck")
    monkeypatch.setattr(module, "fold_experts", lambda *_, **__: dict.fromkeys((None, 0, 1), own))
    prefer(monkeypatch, 0)
    experts = random_experts(bert, "bottleneck", 2, 9)
    result = interpolate(
        bert, make_task(), experts, own, include_own=True, train="experts", search=SEARCH, init="uniform", scale=1
    )
    assert result.experts == (*(e.name for e in experts), "own")
    for row in result.weights.values():
        assert row == pytest.approx([1 / 3] * 3, abs=1e-6)
    moved = [
        k
        for k, t in result.expert.tensors.items()
        if not torch.equal(t, sum(e.tensors[k] for e in (*experts, own)) / 3)
    ]
    assert moved, "the experts themselves are trained"


@pytest.mark.parametrize("method", METHODS)
def test_keeping_the_own_expert_keeps_its_bits(
    bert: Backbone, random_experts: Any, make_task: Any, own_of: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    own = own_of("encoder", method)
    prefer(monkeypatch, 2)
    result = interpolate(bert, make_task(), random_experts(bert, method, 2, 10), own, include_own=False, search=SEARCH)
    assert [c.name for c in result.candidates if c.chosen] == ["keep the own expert"]
    assert result.experts == ("own",)
    assert result.expert.tensors.keys() == own.tensors.keys()
    assert all(torch.equal(result.expert.tensors[k], t) for k, t in own.tensors.items())


def test_the_warm_start_is_from_the_expert_that_tells_answers_apart_however_it_leans(
    bert: Backbone, random_experts: Any, make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifted scores cost an expert log-loss, not its place: a few steps mend them."""
    task, (leaning, vague) = make_task(), random_experts(bert, "bottleneck", 2, 13)
    examples = task.split("train")
    truth = torch.tensor([e.choices.index(e.target) for e in examples])
    right = 2 * torch.nn.functional.one_hot(truth, len(examples[0].choices)).double()
    shift = torch.linspace(0, 6, right.shape[1], dtype=torch.float64)
    rows = [(right + shift).log_softmax(1), torch.zeros_like(right).log_softmax(1)]
    losses = [float(-r[torch.arange(len(truth)), truth].mean()) for r in rows]
    assert losses[0] > losses[1], "as it is, the one that tells nothing looks better"
    given = iter(rows)
    monkeypatch.setattr("pituning.training.starts.log_probabilities", lambda *_: next(given))
    prefer(monkeypatch, 1)
    assert interpolate(bert, task, [leaning, vague], search=SEARCH).experts == (leaning.name,)


def test_a_warm_start_is_plain_fine_tuning_of_the_nearest_expert(
    bert: Backbone, random_experts: Any, make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, 1, steps=3)
    task, experts = make_task(), random_experts(bert, "bottleneck", 2, 11)
    best = experts[int(np.argmin([calibrated_loss(bert, e, task) for e in experts]))]
    result = interpolate(bert, task, experts, search=SEARCH)
    with attached(bert, best.config, best.tensors) as site:
        parameters = list(site.parameters.values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 1e-2 if step else 0.0  # the first step warms up
            optimizer.zero_grad()
            bert.loss(bert.collate(task.split("train"))).mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        expected = {k: p.detach().clone() for k, p in site.parameters.items()}
    assert result.experts == (best.name,)
    for key, tensor in result.expert.tensors.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4)
        assert not torch.equal(tensor, best.tensors[key])


def test_a_smaller_rank_reports_its_error(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    task, experts = make_task(), random_experts(bert, "lora", 3, 12)
    options: dict[str, Any] = {"train": "none", "alternatives": False, "search": SEARCH}
    exact = interpolate(bert, task, experts, **options)
    small = interpolate(bert, task, experts, rank=1, **options)
    assert {t.shape[0] for k, t in small.expert.tensors.items() if "lora_A" in k} == {1}
    assert small.expert.card.parameters < exact.expert.card.parameters
    assert 0 < max(small.errors.values()) < 1


def test_the_same_seed_gives_the_same_expert(bert: Backbone, random_experts: Any, make_task: Any) -> None:
    task, experts = make_task(), random_experts(bert, "bottleneck", 2, 13)
    search = replace(SEARCH, batch_size=4)
    one, again = (interpolate(bert, task, experts, search=search, seed=3).expert for _ in range(2))
    assert all(torch.equal(again.tensors[k], t) for k, t in one.tensors.items())


def test_experts_and_backbone_stay_as_they_were(
    bert: Backbone, random_experts: Any, make_task: Any, own_of: Any
) -> None:
    own, experts = own_of("encoder", "lora"), random_experts(bert, "lora", 2, 14)
    held = [{k: t.clone() for k, t in e.tensors.items()} for e in (*experts, own)]
    backbone = {k: v.clone() for k, v in bert.model.state_dict().items()}
    interpolate(bert, make_task(), experts, own, search=SEARCH)
    assert all(torch.equal(t, h[k]) for e, h in zip((*experts, own), held, strict=True) for k, t in e.tensors.items())
    assert all(torch.equal(v, backbone[k]) for k, v in bert.model.state_dict().items())


def test_a_foreign_first_expert_does_not_hide_the_backbone(bert: Backbone, random_expert: Any, make_task: Any) -> None:
    """A PEFT folder without a card has no fingerprint, but the blend was made on a backbone that is known."""
    foreign = random_expert(bert, "lora", 1, name="foreign")
    foreign = replace(foreign, card=replace(foreign.card, fingerprint="", backbone="somewhere/else"))
    result = interpolate(
        bert, make_task(), [foreign, random_expert(bert, "lora", 2)], train="none", alternatives=False, search=SEARCH
    )
    assert (result.expert.card.fingerprint, result.expert.card.backbone) == (bert.fingerprint, bert.hub_name)


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"include_own": True}, "include_own=True needs the target's own expert"),
            ({"include_own": "maybe"}, "include_own must be True, False or 'auto', not 'maybe'"),
            ({"init": "best"}, "init must be one of uniform, similarity, score or 2 numbers, not 'best'"),
            ({"init": "similarity"}, "one number for each of the 2 experts"),
            ({"init": "similarity", "similarities": [1.0]}, "one number for each of the 2 experts"),
            ({"init": [1.0]}, "init has 1 weights for 2 experts"),
            ({"init": [0.9, 0.9]}, "sum to one"),
            ({"train": "alpha"}, "'alpha'"),
            ({"granularity": "head"}, "not 'head'"),
            ({"rank": 0}, "rank must be at least 1"),
        ],
    )
    def test_arguments(
        self, bert: Backbone, random_experts: Any, make_task: Any, message: Any, options: dict[str, Any], said: str
    ) -> None:
        options = {"train": "none", "search": SEARCH, "alternatives": False, **options}
        assert said in message(interpolate, bert, make_task(), random_experts(bert, "lora", 2, 15), **options)

    def test_a_rank_for_a_method_without_ranks(
        self, bert: Backbone, random_experts: Any, make_task: Any, message: Any
    ) -> None:
        text = message(
            interpolate,
            bert,
            make_task(),
            random_experts(bert, "bottleneck", 2, 15),
            search=SEARCH,
            rank=2,
            train="none",
        )
        assert "LoRA" in text

    def test_no_experts(self, bert: Backbone, make_task: Any) -> None:
        with pytest.raises(RefusedError, match="at least one expert"):
            interpolate(bert, make_task(), [])

    def test_no_examples(self, bert: Backbone, random_experts: Any) -> None:
        with pytest.raises(DataError, match="no examples in split 'train'"):
            interpolate(bert, Task("empty", ("a", "b"), {}), random_experts(bert, "lora", 2))

    def test_another_backbone(self, bert: Backbone, t5: Backbone, random_expert: Any, make_task: Any) -> None:
        pair = [random_expert(bert, "lora", 1), random_expert(t5, "lora", 2)]
        with pytest.raises(BackboneMismatchError, match="'lora-2' was trained on backbone 'tiny-t5'"):
            interpolate(bert, make_task(), pair, search=SEARCH)

    def test_an_own_expert_of_another_method(
        self, bert: Backbone, random_experts: Any, make_task: Any, own_of: Any
    ) -> None:
        experts = random_experts(bert, "bottleneck", 2, 1)
        with pytest.raises(PituningError, match="different methods"):
            interpolate(bert, make_task(), experts, own_of("encoder", "lora"), search=SEARCH)


def test_a_blend_says_what_to_import_and_where_it_started(
    ofa: Backbone, random_experts: Any, make_task: Any, tmp_path: Path
) -> None:
    experts = random_experts(ofa, "bottleneck", 2)
    options: dict[str, Any] = {"train": "none", "alternatives": False, "search": SEARCH}
    blend = interpolate(ofa, make_task(), experts, **options).expert
    assert "\nimport pituning.backbones.ofa.modeling" in (blend.save(tmp_path / "pi") / "README.md").read_text()
    assert blend.card.init_hash == experts[0].card.init_hash
    mixed = [experts[0], experts[1].with_card(init_hash="")]
    assert interpolate(ofa, make_task(), mixed, **options).expert.card.init_hash == "", "no common start is known"
