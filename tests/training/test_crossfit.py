"""Cross-fitting: what is held out is never trained on, and the choice follows from the pooled held-out losses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from pituning.backbones.base import Backbone
from pituning.data.fewshot import stratified_folds
from pituning.errors import DataError, PituningError
from pituning.interpolation import build_mixture
from pituning.methods import attached
from pituning.training import crossfit
from pituning.training.crossfit import Search, choose_cell, cross_fit, fold_examples


def calibrated(log_p: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Losses after the best of many temperatures."""
    best = None
    for temperature in np.exp(np.linspace(-2, 4, 3001)):
        rows = log_p / temperature
        rows = rows - np.log(np.exp(rows).sum(1, keepdims=True))
        losses = -rows[np.arange(len(truth)), truth]
        if best is None or losses.mean() < best.mean():
            best = losses
    assert best is not None
    return best


def test_a_start_without_training_is_measured_on_every_fold(
    bert: Backbone, random_expert: Any, random_examples: Any
) -> None:
    """Each fold has an expert of its own; its predictions on the fold's examples are pooled and calibrated once."""
    examples, search = random_examples(10, 1), Search(learning_rates=(1e-3, 1e-2), folds=3)
    experts = {fold: random_expert(bert, "lora", fold) for fold in range(3)}
    asked: list[int | None] = []

    def start(fold: int | None) -> Any:
        asked.append(fold)
        return build_mixture([experts[fold]], train="none")

    found = cross_fit(bert, start, examples, search)
    rows, truth = [], []
    for fold, (_, held) in enumerate(stratified_folds(examples, 3, 0)):
        with torch.no_grad(), attached(bert, experts[fold].config, experts[fold].tensors):
            for example in held:
                scores = bert.score(bert.collate([example]), example.choices)[0].double()
                rows.append((scores - scores.logsumexp(0)).numpy())
                truth.append(example.choices.index(example.target))
    assert set(asked) == {0, 1, 2}
    assert found.steps == 0
    assert found.loss == pytest.approx(calibrated(np.array(rows), np.array(truth)).mean(), rel=1e-4)


def test_what_is_held_out_is_never_trained_on(
    bert: Backbone, random_expert: Any, random_examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = random_examples(12, 2)
    search = Search(learning_rates=(1e-3, 1e-2), steps=4, eval_every=2, folds=3)
    expert = random_expert(bert, "bottleneck", 2)
    seen: list[tuple[set[str], set[str], float, int | None]] = []
    fit = crossfit.fit

    def spy(
        backbone: Any, mixture: Any, config: Any, train: Any, settings: Any, *, held_out: Any, **options: Any
    ) -> Any:
        seen.append(({e.id for e in train}, {e.id for e in held_out}, settings.learning_rate, settings.steps))
        return fit(backbone, mixture, config, train, settings, held_out=held_out, **options)

    monkeypatch.setattr(crossfit, "fit", spy)
    found = cross_fit(bert, lambda fold: build_mixture([expert], train="experts"), examples, search)
    ids = {e.id for e in examples}
    assert len(seen) == 2 * 3
    assert {rate for _, _, rate, _ in seen} == {1e-3, 1e-2}
    for train, held, _, steps in seen:
        assert not train & held
        assert train | held == ids
        assert steps == 4
    assert sorted(found.curves) == [1e-3, 1e-2]
    assert all(list(curve) == [0, 2, 4] for curve in found.curves.values())
    assert found.curves[1e-3][0] == pytest.approx(found.curves[1e-2][0], rel=1e-9), "step 0 is before any training"
    assert found.loss == found.curves[found.learning_rate][found.steps]


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_the_curve_is_that_of_runs_by_hand(
    backbone_of: Any, random_expert: Any, random_examples: Any, method: str
) -> None:
    """Full-batch AdamW on the attached parameters; the rate warms up over the first step, the gradients are clipped at 1."""
    backbone = backbone_of("encoder", torch.float64)
    examples, expert = random_examples(8, 3), random_expert(backbone, method, 3)
    search = Search(learning_rates=(1e-2,), steps=3, eval_every=1, folds=2)
    found = cross_fit(backbone, lambda fold: build_mixture([expert], train="experts"), examples, search)
    rows: dict[int, list[np.ndarray]] = {}
    truth = []
    for train, held in stratified_folds(examples, 2, 0):
        truth += [e.choices.index(e.target) for e in held]
        with attached(backbone, expert.config, expert.tensors) as site:
            parameters = list(site.parameters.values())
            optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
            for step in range(4):
                if step:
                    optimizer.param_groups[0]["lr"] = 1e-2 if step > 1 else 0.0
                    optimizer.zero_grad()
                    backbone.loss(backbone.collate(train)).mean().backward()
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                with torch.no_grad():
                    for example in held:
                        scores = backbone.score(backbone.collate([example]), example.choices)[0]
                        rows.setdefault(step, []).append((scores - scores.logsumexp(0)).numpy())
    curve = found.curves[1e-2]
    assert list(curve) == [0, 1, 2, 3]
    assert curve[3] != pytest.approx(curve[0], rel=1e-3), "training must change something"
    for step, each in rows.items():
        assert curve[step] == pytest.approx(calibrated(np.array(each), np.array(truth)).mean(), rel=1e-4)


class TestChooseCell:
    """Cells within one paired standard error of the best are as good as the best."""

    base = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0, 2.5, 1.5, 2.2], dtype=torch.float64)
    noise = torch.tensor([0.3, -0.3, 0.3, -0.3, 0.3, -0.3, 0.3, -0.3], dtype=torch.float64)

    def test_a_clear_best_wins(self) -> None:
        losses = {(1e-3, 0): self.base, (1e-3, 10): self.base - 0.1, (1e-2, 10): self.base - 0.2}
        assert choose_cell(losses, warm=True) == choose_cell(losses, warm=False) == (1e-2, 10)

    def test_among_equals_a_warm_start_takes_the_lowest_rate_and_most_steps(self) -> None:
        losses = {
            (1e-3, 0): self.base + 1,
            (1e-3, 10): self.base + 0.01 + self.noise,
            (1e-3, 20): self.base + 0.02 - self.noise,
            (1e-2, 10): self.base,
            (1e-2, 20): self.base + 1,
        }
        assert choose_cell(losses, warm=True) == (1e-3, 20)

    def test_among_equals_a_cold_start_takes_the_most_steps_and_the_best_rate(self) -> None:
        losses = {
            (1e-3, 20): self.base + 0.02 + self.noise,
            (1e-2, 20): self.base + 0.01 - self.noise,
            (1e-2, 10): self.base,
        }
        assert choose_cell(losses, warm=False) == (1e-2, 20)

    def test_the_standard_error_is_that_of_the_paired_differences(self) -> None:
        spread = torch.tensor([3.0, -3.0, 3.0, -3.0, 3.0, -3.0, 3.0, -3.0], dtype=torch.float64)
        worse = {(1e-3, 10): self.base + spread + 0.01, (1e-2, 10): self.base + spread}
        assert choose_cell(worse, warm=True) == (1e-2, 10), "a small but certain difference counts"
        error = float((self.noise + 0.0).std()) / len(self.noise) ** 0.5
        for shift, expected in ((0.99 * error, 1e-3), (1.01 * error, 1e-2)):
            cells = {(1e-3, 10): self.base + shift + self.noise, (1e-2, 10): self.base}
            assert choose_cell(cells, warm=True)[0] == expected

    def test_a_warm_start_is_trained(self) -> None:
        """Before its first step it is read on shots that it was chosen on."""
        losses = {(1e-3, 0): self.base - 1, (1e-3, 10): self.base, (1e-3, 20): self.base + 1}
        assert choose_cell(losses, warm=True) == (1e-3, 10)
        assert choose_cell(losses, warm=False) == (1e-3, 0)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("warm", [True, False])
    def test_a_diverged_cell_is_not_taken_wherever_it_stands(self, value: float, warm: bool) -> None:
        broken = self.base.clone()
        broken[3] = value
        for cells in itertools.permutations([((1e-3, 10), broken), ((1e-2, 10), self.base), ((1e-2, 20), broken)]):
            assert choose_cell(dict(cells), warm=warm) == (1e-2, 10)

    def test_where_all_have_diverged_they_are_named(self) -> None:
        losses = {(1e-3, 10): self.base * math.nan, (1e-2, 20): self.base + math.inf}
        with pytest.raises(PituningError, match=r"10 steps at 0\.001, 20 steps at 0\.01: lower the learning rates"):
            choose_cell(losses, warm=True)

    def test_nothing_to_choose(self) -> None:
        assert choose_cell({(1e-3, 0): self.base}, warm=True) == (1e-3, 0)


@pytest.mark.parametrize("warm", [True, False])
def test_a_rate_that_diverges_loses_and_ends_nothing(
    bert: Backbone, random_expert: Any, random_examples: Any, warm: bool
) -> None:
    examples, expert = random_examples(10, 5), random_expert(bert, "bottleneck", 5)
    search = Search(learning_rates=(1e-3, 1e30), steps=4, eval_every=2)
    found = cross_fit(bert, lambda fold: build_mixture([expert], train="experts"), examples, search, warm=warm)
    assert math.isnan(found.curves[1e30][4]), "the rate must diverge"
    assert found.learning_rate == 1e-3 or found.steps == 0
    assert math.isfinite(found.loss)


def test_fold_examples_are_the_folds_training_part(random_examples: Any) -> None:
    examples, search = random_examples(9, 4), Search(folds=3, fold_seed=7)
    assert fold_examples(examples, search, None) is examples
    for fold, (train, _) in enumerate(stratified_folds(examples, 3, 7)):
        assert list(fold_examples(examples, search, fold)) == train


def test_more_folds_than_examples(bert: Backbone, random_expert: Any, random_examples: Any) -> None:
    expert = random_expert(bert)
    with pytest.raises(DataError, match="cannot make 4 folds of 3 examples"):
        cross_fit(bert, lambda fold: build_mixture([expert], train="none"), random_examples(3), Search(folds=4))
