"""The arithmetic of benchmarks/predict.py against sums by hand and against figures made with a known truth."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import predict

GAIN = {"a": 3.0, "b": -1.0, "c": 1.0, "d": 0.0}


def test_a_perfect_order() -> None:
    found = predict.scores(GAIN, GAIN)
    assert found == {"rho": pytest.approx(1), "ndcg@3": pytest.approx(1), "regret@1": 0, "hit@3": 1}


def test_another_order_by_hand() -> None:
    """Order d, c, b, a: relevances 1, 2, 0 at discounts 1, 1/log₂3, 1/2; the best order has 4, 2, 1."""
    similarity = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    found = predict.scores(similarity, GAIN)
    third = 1 / math.log2(3)
    assert found["ndcg@3"] == pytest.approx((1 + 2 * third) / (4 + 2 * third + 1 / 2))
    assert found["regret@1"] == pytest.approx(3)
    assert found["hit@3"] == 0
    assert found["rho"] == pytest.approx(stats.spearmanr([1, 2, 3, 4], [3, -1, 1, 0]).statistic)


def test_nothing_to_tell_apart() -> None:
    assert predict.rho(np.zeros(4), np.arange(4.0)) == 0
    assert predict.ndcg(np.arange(4.0), np.ones(4)) == 1


def test_random_orders_are_at_chance() -> None:
    found = predict.at_random({str(n): float(n) for n in range(9)}, times=2000)
    assert abs(found["rho"]) < 0.03
    assert found["regret@1"] == pytest.approx(4, abs=0.25)  # the mean of 8 − n
    assert found["hit@3"] == pytest.approx(1 / 3, abs=0.04)


def test_the_ceiling_is_what_the_truth_itself_reaches() -> None:
    """Of many sources with a known expected gain: ρ of it with the mean over the draws."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=2000)
    table = truth[:, None] + rng.normal(scale=1.5, size=(2000, 5))
    reached = float(stats.spearmanr(truth, table.mean(1)).statistic)
    found = predict.ceiling({f"{n:04}": list(row) for n, row in enumerate(table)})
    assert found == pytest.approx(reached, abs=0.03)
    assert 0.7 < reached < 0.95
    assert math.isnan(predict.ceiling({"a": [1.0], "b": [2.0]}))


def test_the_ceiling_of_noise_is_low() -> None:
    rng = np.random.default_rng(1)
    assert predict.ceiling({f"{n:04}": list(rng.normal(size=6)) for n in range(2000)}) < 0.3


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.8, 2.0])
def test_help_is_a_t_interval_above_zero(shift: float) -> None:
    seed = random.randrange(10**6)
    draws = list(np.random.default_rng(seed).normal(loc=shift, size=5))
    low = stats.ttest_1samp(draws, 0).confidence_interval(0.95).low
    assert predict.has_help(draws) == (low > 0), f"seed {seed}"
    assert not predict.has_help(draws[:1])


def made_rows() -> list[dict[str, Any]]:
    """Four targets: ``good`` is right on the first and third, ``bad`` on the others; two draws."""
    sources = {f"s{n}": float(n) for n in range(5)}
    backwards = {name: -value for name, value in sources.items()}
    rows = []
    for number, target in enumerate(("t0", "t1", "t2", "t3")):
        good, bad = (sources, backwards) if number % 2 == 0 else (backwards, sources)
        similarities = {
            "good": good,
            "bad": bad,
            "score": good,
            "weights": good,
            "gradient": good,
            "calibrated-score": good,
        }
        for draw in range(2):
            gains = {name: value + 0.01 * draw for name, value in sources.items()}
            rows.append({"target": target, "draw": draw, "gains": gains, "similarities": similarities})
    return rows


def test_of_a_single_target_there_is_nothing_to_report_on() -> None:
    found = predict.report([row for row in made_rows() if row["target"] == "t0"])
    assert len(found["targets"]) == 1
    assert all(math.isnan(row["rho, targets to report on"]) for row in found["table"].values())


def test_the_choice_is_made_on_every_other_target_and_reported_on_the_rest() -> None:
    found = predict.report(made_rows())
    good = found["table"]["good"]
    assert good["rho, targets to choose on"] == pytest.approx(1)
    assert good["rho, targets to report on"] == pytest.approx(-1)
    assert good["rho"] == pytest.approx(0)
    assert found["table"][found["chosen"]]["rho, targets to choose on"] == pytest.approx(1)
    assert found["table"]["bad"]["rho, targets to report on"] == pytest.approx(1)
    assert found["draws"] == 2
    assert found["ceiling"] == {t: pytest.approx(1) for t in ("t0", "t1", "t2", "t3")}
    assert found["targets with a source that helps"] == ["t0", "t1", "t2", "t3"]
