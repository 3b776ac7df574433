"""Which similarity predicts who helps? Every kind × reference point against the measured gain of a warm start.

    python benchmarks/predict.py --data ../shared/data/text --work runs/predict --threads 1

For every target, every draw of 16 shots per class and every expert of another task: the target's test accuracy after the
expert was fine-tuned on the shots, minus that of the own expert after as many steps from the common start. One rate for each
of the two, fixed beforehand; no choice is made on test figures. Experts are trained on 1,000 rows of their tasks. Every
figure is kept in a folder (`--figures`) as soon as it is there, with a hash of the experts that it was measured with; a run
that is begun again with the same experts goes on. Processes may share the folders if each has targets of its own (`--tasks`)
and the experts are there.

The truth is a mean over draws, and has noise: the *ceiling* is the rank correlation between the gains of two halves of the
draws, corrected for the halving (Spearman–Brown), averaged over all splits. Against the truth stand Spearman's ρ, NDCG@3 and
regret@1 (points lost by taking the first instead of the best), averaged over targets; the intervals resample targets. *Chance*
is a random order. The default is chosen on every other target, and reported on the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pituning as pt
from benchmarks.warm import warm_started
from pituning.backbones import Backbone
from pituning.interpolation.collapse import collapse
from pituning.similarity.embedding import pool_embedding
from pituning.similarity.measures import average_ranks
from pituning.tasks import Task
from pituning.training.precision import precision
from pituning.training.train_expert import start_from
from pituning.training.trainer import TrainSettings, fit

TASKS = (
    "sst2", "cr", "agnews", "tweet_sentiment", "tweet_emotion", "mrpc", "sick_para", "trec6", "subj", "cola",
)  # fmt: skip
KINDS = [("calibrated-score", "shared"), ("score", "shared"), ("gradient", "shared"), ("weights", "shared")]
KINDS += [(kind, reference) for reference in ("shared", "own") for kind in ("fisher", "fisher-paper", "fisher-cosine")]
SLOW_KINDS = [("tuned-score", "shared")]
"""Measured with ``--slow`` alone; in the report where all draws have them."""
AVERAGES = (
    ("score", "gradient"), ("score", "weights"), ("calibrated-score", "weights"), ("tuned-score", "calibrated-score"),
    ("tuned-score", "weights"),
)  # fmt: skip
"""Kinds whose ranks are averaged, from the figures of each: nothing is measured again."""
STEPS, BATCH, OWN_RATE, WARM_RATE = 30, 8, 1e-3, 3e-4
SOURCE_ROWS = 1000
Gains = Mapping[str, Mapping[str, Sequence[float]]]
"""target → source → gain of each draw, in points."""


def trained_pool(backbone: Backbone, work: Path, data: Path, tasks: Sequence[str]) -> pt.ExpertPool:
    """An expert for every task, with its embeddings."""
    pool = pt.ExpertPool(work / "experts")
    settings = TrainSettings(learning_rate=1e-3, epochs=2.0, batch_size=32)
    for name in tasks:
        if name in pool.names():
            continue
        start = time.perf_counter()
        full = pt.load_task(name, data=data)
        rows = full.split("train", SOURCE_ROWS)
        with precision(backbone, "auto"):
            mixture, config = start_from(*_initial(backbone))
            fit(backbone, mixture, config, rows, settings)
        expert = collapse(mixture, config, _card(backbone, full, len(rows))).expert
        pool.add(expert, name)
        print(f"expert {name}: {len(rows)} rows, {time.perf_counter() - start:.0f} s", flush=True)
    for reference, name in itertools.product(("own", "shared"), tasks):
        pool_embedding(backbone, pool, name, reference, data=data)
    return pool


def _initial(backbone: Backbone) -> tuple[Any, Any]:
    from pituning.methods import config_dict, initial_tensors, make_config

    config = config_dict(make_config("lora", backbone))
    return initial_tensors(backbone, config), config


def _card(backbone: Backbone, task: Task, rows: int) -> Any:
    from pituning.experts import ExpertCard
    from pituning.experts.expert import tensor_hash

    tensors, _ = _initial(backbone)
    return ExpertCard(
        task.name, backbone=backbone.hub_name, fingerprint=backbone.fingerprint, task=task.name, method="lora",
        init_hash=tensor_hash(tensors), choices=task.choices, training={**backbone.record, "examples": rows},
    )  # fmt: skip


def measure(
    backbone: Backbone,
    pool: pt.ExpertPool,
    data: Path,
    target: str,
    draw: int,
    limit: int,
    file: Path,
    experts: str,
    kinds: Sequence[tuple[str, str]] = KINDS,
) -> dict[str, Any]:
    """One target and draw: the own expert's accuracy, the gain of every source, and every similarity; kept as it grows."""
    found: dict[str, Any] = {"target": target, "draw": draw, "limit": limit, "experts": experts, "gains": {}}
    if file.is_file():
        kept = json.loads(file.read_text())
        found = kept if all(kept.get(key) == found[key] for key in ("limit", "experts")) else found
    task = pt.load_task(target, data=data).few_shot(16, draw)
    own_run = TrainSettings(
        learning_rate=OWN_RATE, steps=STEPS, batch_size=BATCH, schedule="constant_with_warmup", seed=draw
    )
    if "own" not in found or len(found["gains"]) < len(pool) - 1:
        with precision(backbone, "auto"):
            own = pt.train_expert(backbone, task, settings=own_run)
            found.setdefault("own", 100 * pt.evaluate(backbone, own, task, limit=limit).metrics["accuracy"])
            for expert in pool:
                if expert.card.task == target or expert.name in found["gains"]:
                    continue
                warm_run = own_run.with_(learning_rate=WARM_RATE)
                tuned = warm_started(backbone, expert, task.split("train"), warm_run)
                value = 100 * pt.evaluate(backbone, tuned, task, limit=limit).metrics["accuracy"]
                found["gains"][expert.name] = value - found["own"]
                _keep(file, found)
    else:
        own = None
    for kind, reference in kinds:
        label = label_of(kind, reference)
        if label in found.setdefault("similarities", {}):
            continue
        own = own or pt.train_expert(backbone, task, settings=own_run)
        with precision(backbone, "auto") if kind == "tuned-score" else nullcontext():  # it trains
            ranking = pt.rank_experts(backbone, task, pool, own, kind=kind, reference=reference, data=data)
        found["similarities"][label] = {e.name: s for e, s in zip(ranking.experts, ranking.similarities, strict=True)}
        _keep(file, found)
    return found


def label_of(kind: str, reference: str) -> str:
    """A kind's name in the figures and the table."""
    return f"{kind} ({reference})" if kind.startswith("fisher") else kind


def pool_hash(pool: pt.ExpertPool) -> str:
    """The same for pools whose experts have the same names and tensors."""
    from pituning.experts.expert import tensor_hash

    return hashlib.sha256(repr([(e.name, tensor_hash(e.tensors)) for e in pool]).encode()).hexdigest()[:16]


def _keep(file: Path, found: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(found))
    temporary.replace(file)


def ceiling(gains: Mapping[str, Sequence[float]]) -> float:
    """Rank correlation that a perfect predictor of the expected gains could be seen to have with a mean over the draws."""
    table = np.array([gains[s] for s in sorted(gains)])  # [sources, draws]
    draws = range(table.shape[1])
    if len(draws) < 2:
        return float("nan")
    found = []
    for half in itertools.combinations(draws, len(draws) // 2):
        rest = [d for d in draws if d not in half]
        found.append(rho(table[:, list(half)].mean(1), table[:, rest].mean(1)))
    reliability = max(0.0, float(np.mean(found)))
    whole = 2 * reliability / (1 + reliability)  # of the mean over all draws (Spearman–Brown)
    return whole**0.5


def rho(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Spearman's ρ; 0 where one side is constant."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(spearmanr(left, right).statistic)


def ndcg(similarity: NDArray[np.float64], gain: NDArray[np.float64], top: int = 3) -> float:
    """NDCG@top with the gains above the least one as relevance."""
    relevance = gain - gain.min()
    discount = 1 / np.log2(np.arange(2, top + 2))
    reached = (relevance[np.argsort(-similarity, kind="stable")][:top] * discount[: len(relevance)]).sum()
    best = (np.sort(relevance)[::-1][:top] * discount[: len(relevance)]).sum()
    return float(reached / best) if best else 1.0


def regret(similarity: NDArray[np.float64], gain: NDArray[np.float64]) -> float:
    """Gain of the best minus that of the first."""
    return float(gain.max() - gain[int(np.argmax(similarity))])


def scores(similarity: Mapping[str, float], gain: Mapping[str, float]) -> dict[str, float]:
    """All three, and whether the best is among the first three."""
    names = sorted(gain)
    s, g = np.array([similarity[n] for n in names]), np.array([gain[n] for n in names])
    first = np.argsort(-s, kind="stable")[:3]
    return {
        "rho": rho(s, g),
        "ndcg@3": ndcg(s, g),
        "regret@1": regret(s, g),
        "hit@3": float(int(np.argmax(g)) in first),
    }


def rank_average(similarities: Mapping[str, Mapping[str, float]], kinds: Sequence[str]) -> dict[str, float]:
    """The kind ``average`` from similarities that are known: source → similarity."""
    names = sorted(similarities[kinds[0]])
    ranks = average_ranks([[similarities[kind][n] for n in names] for kind in kinds])
    return dict(zip(names, ranks, strict=True))


def at_random(gain: Mapping[str, float], times: int = 500) -> dict[str, float]:
    """The same of random orders."""
    rng, names = np.random.default_rng(0), sorted(gain)
    found = [scores(dict(zip(names, rng.random(len(names)), strict=True)), gain) for _ in range(times)]
    return {key: statistics.fmean(f[key] for f in found) for key in found[0]}


def interval(values: Sequence[float], statistic: Callable[[Any], float] = np.mean) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over targets."""
    rng, array = np.random.default_rng(0), np.array(values)
    drawn = [statistic(array[rng.integers(len(array), size=len(array))]) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def mean_of(values: Sequence[float]) -> float:
    """NaN of none: of a single target there is nothing to report on."""
    return statistics.fmean(values) if values else float("nan")


def has_help(draws: Sequence[float]) -> bool:
    """Whether a source's gain over the draws has a 95 % t interval above zero."""
    from scipy.stats import t

    array = np.array(draws)
    if len(array) < 2:
        return False
    width = float(t.ppf(0.975, len(array) - 1)) * array.std(ddof=1) / len(array) ** 0.5
    return bool(array.mean() - width > 0)


def report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """From the kept figures to the table."""
    gains: dict[str, dict[str, list[float]]] = {}
    similarities: dict[str, dict[str, dict[str, list[float]]]] = {}
    everywhere = set.intersection(*(set(row["similarities"]) for row in rows))
    for row in rows:
        for source, gain in row["gains"].items():
            gains.setdefault(row["target"], {}).setdefault(source, []).append(gain)
        known = {kind: values for kind, values in row["similarities"].items() if kind in everywhere}
        averages = [kinds for kinds in AVERAGES if everywhere.issuperset(kinds)]
        averaged = {f"average of {', '.join(kinds)}": rank_average(known, kinds) for kinds in averages}
        for kind, values in {**known, **averaged}.items():
            for source, value in values.items():
                similarities.setdefault(kind, {}).setdefault(row["target"], {}).setdefault(source, []).append(value)
    targets = sorted(gains)
    mean = {t: {s: statistics.fmean(g) for s, g in gains[t].items()} for t in targets}
    helped = [t for t in targets if any(has_help(g) for g in gains[t].values())]
    choose, hold = targets[::2], targets[1::2]
    table = {}
    for kind, by_target in similarities.items():
        each = {t: scores({s: statistics.fmean(v) for s, v in by_target[t].items()}, mean[t]) for t in targets}
        table[kind] = {
            **{key: statistics.fmean(each[t][key] for t in targets) for key in ("rho", "ndcg@3", "regret@1")},
            "rho interval": interval([each[t]["rho"] for t in targets]),
            "rho, targets to choose on": statistics.fmean(each[t]["rho"] for t in choose),
            "rho, targets to report on": mean_of([each[t]["rho"] for t in hold]),
            "hit@3 of helped": mean_of([each[t]["hit@3"] for t in helped]),
            "hit@3 of helped, to report on": [each[t]["hit@3"] for t in helped if t in hold],
            "by target": {t: each[t]["rho"] for t in targets},
        }
    chance = {t: at_random(mean[t]) for t in targets}
    return {
        "targets": targets,
        "draws": len(next(iter(next(iter(gains.values())).values()))),
        "targets with a source that helps": helped,
        "chosen": max(table, key=lambda k: table[k]["rho, targets to choose on"]),
        "ceiling": {t: ceiling(gains[t]) for t in targets},
        "chance": {key: statistics.fmean(c[key] for c in chance.values()) for key in chance[targets[0]]},
        "table": table,
        "gains": mean,
    }


def show(found: Mapping[str, Any]) -> None:
    helped = len(found["targets with a source that helps"])
    print(f"\n{len(found['targets'])} targets, {found['draws']} draws; {helped} have a source whose gain is above 0")
    print(
        f"{'similarity':<36}{'ρ':>7}{'95 % interval':>18}{'NDCG@3':>9}{'regret@1':>10}{'hit@3':>7}{'ρ, held out':>13}"
    )
    for kind, row in sorted(found["table"].items(), key=lambda item: -item[1]["rho"]):
        low, high = row["rho interval"]
        print(
            f"{kind:<36}{row['rho']:>7.2f}{f'{low:.2f} to {high:.2f}':>18}{row['ndcg@3']:>9.2f}{row['regret@1']:>10.2f}"
            f"{row['hit@3 of helped']:>7.2f}{row['rho, targets to report on']:>13.2f}"
        )
    chance = found["chance"]
    print(
        f"{'chance':<36}{chance['rho']:>7.2f}{'':>18}{chance['ndcg@3']:>9.2f}{chance['regret@1']:>10.2f}{chance['hit@3']:>7.2f}"
    )
    print(f"{'ceiling':<36}{statistics.fmean(found['ceiling'].values()):>7.2f}")
    print(f"chosen on {', '.join(found['targets'][::2])}: {found['chosen']}")


def write_pictures(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """``predict-similarities.png``: ρ of every similarity with its interval; ``predict-gains.png``: the truth."""
    from pituning.report.images import drawing, save

    files = [folder / "predict-similarities.png", folder / "predict-gains.png"]
    folder.mkdir(parents=True, exist_ok=True)
    with drawing():
        save(_similarities(found), files[0])
        save(_gains(found), files[1])
    return files


def _similarities(found: Mapping[str, Any]) -> Any:
    """Similarities as rows: mean ρ and its interval, the targets as dots, chance and the ceiling as lines."""
    from benchmarks.plots import Row, intervals
    from pituning.report.style import OTHER, PI
    from pituning.similarity.select import DEFAULT_KIND

    rows = {}
    for kind, values in sorted(found["table"].items(), key=lambda item: -item[1]["rho"]):
        low, high = values["rho interval"]
        text = f"{values['rho']:.2f} ({low:.2f} to {high:.2f})".replace("-", "−")
        colour = PI if kind == DEFAULT_KIND else OTHER
        rows[kind] = Row(values["rho"], low, high, list(values["by target"].values()), colour, text)
    ceilings = [c for c in found["ceiling"].values() if not np.isnan(c)]
    lines = {found["chance"]["rho"]: "-"} | ({statistics.fmean(ceilings): ":"} if ceilings else {})
    label = "Spearman's ρ with the measured gain; solid: chance, dotted: noise ceiling; dots are targets"
    title = f"{len(found['targets'])} targets, {found['draws']} draws of 16 shots per class"
    return intervals(rows, label=label, title=title, lines=lines)


def _gains(found: Mapping[str, Any]) -> Any:
    """Targets as rows, sources as columns."""
    from benchmarks.plots import heat_map

    targets = list(found["targets"])
    gains: Mapping[str, Mapping[str, float]] = found["gains"]
    sources = sorted({s for by_source in gains.values() for s in by_source})
    values = np.array([[gains[t].get(s, np.nan) for s in sources] for t in targets])
    label = "points against the own expert"
    return heat_map(values, targets, sources, label=label, title="gain of a warm start from each source's expert")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the text tasks")
    parser.add_argument("--work", type=Path, required=True, help="for experts and figures")
    parser.add_argument("--figures", type=Path, help="folder of the figures (default: figures in --work)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--limit", type=int, default=300, help="test examples of each task (default 300)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=Path, help="folder for two pictures of the outcome")
    parser.add_argument("--slow", action="store_true", help="measure tuned-score, too")
    parser.add_argument("--report-only", action="store_true", help="from what is kept, without running anything")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.figures or arguments.work / "figures"
    files = {
        (target, draw): folder / f"{target}-{draw}.json"
        for draw in range(arguments.draws)
        for target in arguments.tasks
    }
    if not arguments.report_only:
        backbone = pt.load_backbone("minilm")
        pool = trained_pool(backbone, arguments.work, arguments.data, arguments.tasks)
        experts = pool_hash(pool)
        for (target, draw), file in files.items():
            start = time.perf_counter()
            kinds = KINDS + SLOW_KINDS * arguments.slow
            found = measure(backbone, pool, arguments.data, target, draw, arguments.limit, file, experts, kinds)
            best = max(found["gains"], key=lambda s: found["gains"][s])
            print(
                f"{target} {draw}: own {found['own']:.1f}, best {best} {found['gains'][best]:+.1f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    kept = [json.loads(file.read_text()) for file in files.values() if file.is_file()]
    wanted = {label_of(*kind) for kind in KINDS}
    rows = [row for row in kept if wanted <= row.get("similarities", {}).keys()]  # another process may be at one
    if not rows:
        sys.exit(f"no figures in {folder}")
    found = report(rows)
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / "predict.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    if arguments.pictures:
        print(*write_pictures(found, arguments.pictures))


if __name__ == "__main__":
    main()
