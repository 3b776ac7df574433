"""The suites as data: backbone, targets, sources, shots and arms; and on which targets a default may be tuned.

The rule of the split. A *development* target is one on which a default of this project was, or may be, chosen; a *report*
target is one on which none was: it is run once, and the means of a table are over these alone. Development targets among the
language tasks are sst2 and cr (the search grid and the selection rules, docs/benchmarks.md) and those on which
benchmarks/predict.py chooses the default similarity. All seven of `table1` are for the report, and of `table1-long`: what
defaults were chosen on were other draws of three of them (seed 0 before `table1`, seeds 0 to 3 before `table1-long`). A task
on which a default comes to be chosen is a development target from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.transfer.drawings import DRAWINGS
from pituning.errors import PituningError, unknown_name
from pituning.training.crossfit import Search
from pituning.training.trainer import TrainSettings

MAIN = (
    "zero-shot", "own", "own-extra", "own-rescaled", "nearest", "nearest-tuned", "multitask-tuned", "soup", "soup-tuned",
    "greedy-soup", "ties-tuned", "lorahub", "ratatouille", "pi-published", "pi", "pi-random", "pi-dissimilar", "pi-noise",
    "pi-oracle", "full",
)  # fmt: skip
"""Every way to use experts, its controls and its references."""

ABLATIONS = (
    "pi-k1", "pi-k2", "pi-k3", "pi-k8", "pi-model", "pi-layer", "pi-tensor", "pi-experts", "pi-shared", "pi-weights",
    "pi-uniform", "pi-similarity", "pi-mean", "pi-without-own", "pi-with-own", "pi-bare",
)  # fmt: skip
"""π as shipped with one setting changed."""

OTHER_METHODS = ("own-lora", "own-prefix", "own-bitfit")
"""The own expert of a method that the suite's other experts are not of."""

CONTROLS = ("multitask-tuned", "pi-random", "pi-dissimilar", "pi-noise", "full")
"""What tells explanations apart, and costs more than it tells on every seed: training on the three nearest tasks' rows anew
takes as long as their three experts did."""

FIRST = ("own", "own-extra", "nearest-tuned", "soup-tuned", "pi")
"""What a run computes first of each seed, so that one which is broken off has whole pairs of these."""

LANGUAGE = (
    "agnews", "cola", "cr", "movie_reviews", "mrpc", "qnli", "sick_para", "sst2", "subj", "trec6", "tweet_emotion",
    "tweet_sentiment",
)  # fmt: skip
"""The twelve language tasks with the most test examples (at least 400); the thirteenth, rte, has 277 and is a source alone."""

DEVELOPMENT = ("agnews", "cr", "sick_para", "sst2", "subj", "tweet_emotion")

EMOJI = tuple(
    f"{name}-small"
    for name in (
        "emoji-caption", "emoji-count", "emoji-entailment", "emoji-group", "emoji-object", "emoji-style", "emoji-vqa",
        "refemoji", "refemoji+", "refemojig",
    )
)  # fmt: skip

TABLE1 = tuple(
    f"{name}-small"
    for name in ("refemoji", "refemoji+", "refemojig", "emoji-vqa", "emoji-entailment", "emoji-group", "emoji-count")
)
"""As in the paper's Table 1: referring expressions, questions, entailment; and two classifications."""

SOURCE_TRAINING = TrainSettings(learning_rate=1e-3, epochs=4.0, batch_size=32)
"""Of language tasks. After 1,000 rows twice experts hardly knew their own tasks ("How well the sources are trained" of
docs/transfer.md)."""
MILD_TRAINING = TrainSettings(learning_rate=1e-3, epochs=2.0, batch_size=32)
MADE_ROWS = 2_000
"""Of sources on emoji scenes, which are trained mildly. Experts of 10,000 rows at a rate of 4e-3 know their tasks better, and
help others less."""
SEARCH = Search()


@dataclass(frozen=True)
class Suite:
    """What is compared on what.

    Attributes:
        backbone: as :func:`pituning.load_backbone` takes it; ``--backbone`` overrides it.
        development, report: the targets of either kind; there may be none for development.
        sources: tasks with an expert each; a task is never its own source.
        shots: examples per class; of a task without classes, ``without_classes`` times as many examples in all.
        examples_in_all: whether ``shots`` counts the examples of a task in all, whatever its kind: of one with classes as many
            per class as fit, and at least one. ``without_classes`` has no meaning then.
        seeds: of draw, folds and training order alike.
        arms: names of :data:`benchmarks.transfer.arms.ARMS`.
        fewer_seeds: arm → on how many of the seeds it is measured, the first ones, where these are not all.
        on_development: arms that are measured on development targets, on the first seed; ``None`` is every arm on its seeds.
        test_limit: at most so many test examples, a fixed sample.
        source_rows, source_training: what every source expert is trained on, and how.
        texts_tell: whether near-duplicate texts are leaks: leaked rows are then left out of the sources' training. Texts about
            made pictures repeat by design, and the pictures do not (docs/scenes.md).
        top: experts that are blended by every arm but π, which has its own default.
        search: the grid of every arm; its ``fold_seed`` is the seed's.
        made_by: where the backbone is a folder that has to be made first, the script that makes it.
    """

    name: str
    title: str
    backbone: str
    development: tuple[str, ...]
    report: tuple[str, ...]
    sources: tuple[str, ...]
    method: str = "lora"
    shots: tuple[int, ...] = (16,)
    without_classes: int = 1
    examples_in_all: bool = False
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    arms: tuple[str, ...] = MAIN
    fewer_seeds: Mapping[str, int] = field(default_factory=dict)
    on_development: tuple[str, ...] | None = None
    test_limit: int = 500
    source_rows: int = 3000
    source_training: TrainSettings = SOURCE_TRAINING
    texts_tell: bool = True
    top: int = 3
    search: Search = SEARCH
    made_by: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """All targets in the order of their names."""
        return tuple(sorted((*self.development, *self.report)))

    def settings(self) -> dict[str, Any]:
        """What of the suite changes the value of a cell, besides the cell's own arm, task, shots and seed."""
        names = (
            "sources",
            "method",
            "without_classes",
            "examples_in_all",
            "test_limit",
            "source_rows",
            "source_training",
            "texts_tell",
            "top",
            "search",
        )
        values = asdict(self)
        return {name: values[name] for name in names}

    def seeds_of(self, arm: str, task: str) -> tuple[int, ...]:
        """The seeds on which an arm is measured for a target."""
        seeds = self.seeds[: self.fewer_seeds.get(arm, len(self.seeds))]
        if self.on_development is None or task in self.report:
            return seeds
        return seeds[:1] if arm in self.on_development else ()

    def plan(self) -> list[tuple[str, str, int, int]]:
        """(arm, task, shots, seed) of every cell, in the order of these."""
        return [
            (arm, task, shots, seed)
            for arm in self.arms
            for task in self.targets
            for shots in self.shots
            for seed in self.seeds_of(arm, task)
        ]

    def role(self, task: str) -> str:
        """``"development"`` or ``"report"``."""
        return "development" if task in self.development else "report"

    def chosen_targets(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Targets by name; ``development`` and ``report`` stand for all of that kind.

        Raises:
            UnknownNameError: for a name that is no target.
            PituningError: for a kind of which the suite has none.
        """
        groups = {"development": self.development, "report": self.report}
        for name in names:
            if name in groups and not groups[name]:
                raise PituningError(f"suite {self.name!r} has no {name} targets; it has {', '.join(self.targets)}")
        chosen = [task for name in names for task in groups.get(name, (name,))]
        for name in chosen:
            if name not in self.targets:
                raise unknown_name("target", name, (*self.targets, *groups))
        return tuple(t for t in self.targets if t in chosen)


COMPARED = ("zero-shot", *FIRST, "nearest", "soup")
"""The main arms: experts as they are and tuned, against none and the own one."""

_CORE = Suite(
    "core",
    "MiniLM, LoRA, 16 shots per class, twelve language tasks",
    "minilm",
    DEVELOPMENT,
    tuple(t for t in LANGUAGE if t not in DEVELOPMENT),
    (*LANGUAGE, "rte"),
    seeds=(5, 6, 7, 8, 9),  # seeds 0 to 4 were measured with sources that were hardly trained
    # for LoRA, whose two factors share a weight, weights per tensor are weights per module
    arms=(*MAIN, *(a for a in ABLATIONS if a != "pi-tensor")),
    fewer_seeds={**dict.fromkeys(CONTROLS, 3), **dict.fromkeys(("pi-oracle", *ABLATIONS), 1)},
    on_development=COMPARED,
)

_TABLE1 = Suite(
    "table1",
    "Miniature Table 1: a small OFA, bottleneck adapters, 64 examples in all, seven tasks on emoji scenes",
    "ofa-nano",
    (),
    TABLE1,
    EMOJI,
    method="bottleneck",
    shots=(64,),
    examples_in_all=True,
    seeds=(1, 2, 3),  # a look at seed 0 decided how the sources are trained
    arms=(
        "zero-shot",
        "own",
        *OTHER_METHODS,
        "own-extra",
        "full",
        "nearest",
        "nearest-tuned",
        "soup-tuned",
        "pi-published",
        "pi",
        "pi-random",
    ),
    source_rows=MADE_ROWS,
    source_training=MILD_TRAINING,
    texts_tell=False,
)

SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        _CORE,
        Suite(
            "shots",
            "MiniLM, LoRA, 4 and 64 shots per class, six language tasks",
            "minilm",
            _CORE.development,
            _CORE.report,
            _CORE.sources,
            shots=(4, 64),
            seeds=_CORE.seeds[:3],
            arms=COMPARED,
            on_development=(),
        ),
        Suite(
            "t5",
            "A distilled FLAN-T5-small, LoRA, 16 shots per class, four language tasks",
            "models/flan-t5-small",
            ("cr", "subj"),
            ("mrpc", "trec6"),
            tuple(t for t in _CORE.sources if t not in ("agnews", "movie_reviews")),  # whose texts are the longest
            seeds=(0,),  # one core takes 2 s for a step of 32
            arms=COMPARED,
            source_rows=1000,
            made_by="benchmarks/flan_t5_small.py",
        ),
        replace(
            _CORE,
            name="mild",
            title="`core` with sources that were hardly trained: 1,000 rows, two epochs",
            seeds=(0, 1, 2, 3, 4),
            arms=COMPARED,
            fewer_seeds={},
            on_development=(),
            source_rows=1000,
            source_training=MILD_TRAINING,
        ),
        _TABLE1,
        replace(
            _TABLE1,
            name="table1-long",
            title="Miniature Table 1 with up to 80 steps for every arm",
            seeds=(4, 5, 6),  # seeds 0 to 3 told that 40 steps are too few, and that raw log-loss weighs badly
            arms=("zero-shot", *FIRST),
            search=Search(steps=80, eval_every=40),
        ),
        replace(
            _TABLE1,
            name="drawings",
            title="A small OFA, bottleneck adapters, 64 examples in all, NLVR and easy-VQA",
            report=DRAWINGS,
            sources=(*EMOJI, *DRAWINGS),
            arms=COMPARED,
        ),
    )
}


def suite_named(name: str) -> Suite:
    """A suite.

    Raises:
        UnknownNameError: if there is none of that name.
    """
    if name not in SUITES:
        raise unknown_name("suite", name, SUITES)
    suite = SUITES[name]
    if set(suite.development) & set(suite.report):
        raise PituningError(f"suite {name!r}: a target is for development and for the report")
    return suite
