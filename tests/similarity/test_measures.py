"""Similarities against formulas written out in numpy, and against the numbers of the paper's own notebook."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.main import get_command

from pituning.backbones.base import Backbone
from pituning.cli import app
from pituning.data.fewshot import stratified_folds
from pituning.errors import DataError, ExpertError, PituningError, RefusedError, UnknownNameError
from pituning.experiments.recipe import InterpolationSection
from pituning.experts import Expert, ExpertPool
from pituning.methods import attached, initial_tensors
from pituning.similarity import TaskEmbedding
from pituning.similarity.gradient import loss_slopes
from pituning.similarity.graph import task_graph
from pituning.similarity.measures import (
    KINDS,
    MEASURES,
    Comparison,
    average_ranks,
    fisher_similarity,
    gradient_similarities,
    tuned_score_similarity,
    weight_similarity,
    zero_tensors,
)
from pituning.similarity.select import DEFAULT_KIND
from pituning.training.crossfit import Search
from pituning.training.evaluation import bias_calibrated_losses

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"the reference's recorded numbers are not here: no folder {FIXTURES}"
)
SHAPES = {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (6, 4)}


def embedding(fisher: dict[str, Tensor], **changes: Any) -> TaskEmbedding:
    values: dict[str, Any] = {
        "task": "t", "samples": 8, "labels": "true", "reference": "own", "reference_hash": "h", "mean_loss": 1.0,
        "split_half": 1.0,
    }  # fmt: skip
    return TaskEmbedding(fisher=fisher, **{**values, **changes})


def random_fisher(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(s, generator=generator) ** 2 * 10 ** torch.randn(1, generator=generator)
        for k, s in SHAPES.items()
    }


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def by_hand(left: dict[str, Tensor], right: dict[str, Tensor], kind: str) -> float:
    values = []
    for key in left:
        a, b = left[key].double().numpy(), right[key].double().numpy()
        if kind != "fisher-cosine":
            epsilon = 1e-6 if kind == "fisher-paper" else 1e-6 * np.mean(a + b)
            a, b = a / (a + b + epsilon), b / (a + b + epsilon)
        values.append(cosine(a, b))
    return float(np.mean(values))


@pytest.mark.parametrize("kind", ["fisher", "fisher-paper", "fisher-cosine"])
@pytest.mark.parametrize("seed", range(5))
def test_fisher_similarities_are_their_formulas(kind: str, seed: int) -> None:
    left, right = random_fisher(2 * seed), random_fisher(2 * seed + 1)
    found = fisher_similarity(embedding(left), embedding(right), kind)
    assert found == pytest.approx(by_hand(left, right, kind), rel=1e-12)
    assert found == pytest.approx(fisher_similarity(embedding(right), embedding(left), kind), rel=1e-12)
    assert fisher_similarity(embedding(left), embedding(left), kind) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("kind", ["fisher", "fisher-cosine"])
def test_only_the_papers_variant_depends_on_the_scale_of_the_loss(kind: str) -> None:
    left, right = random_fisher(10), random_fisher(11)
    small = [embedding({k: f * 1e-6 for k, f in x.items()}) for x in (left, right)]
    assert fisher_similarity(*small, kind) == pytest.approx(by_hand(left, right, kind), rel=1e-5)
    assert fisher_similarity(*small, "fisher-paper") != pytest.approx(by_hand(left, right, "fisher-paper"), rel=1e-2)


@pytest.mark.parametrize("kind", ["fisher", "fisher-paper", "fisher-cosine"])
def test_tensors_without_fisher_are_left_out_and_named(kind: str) -> None:
    left, right = random_fisher(20), random_fisher(21)
    rest = {k: f for k, f in left.items() if k != "a.bias"}
    left["a.bias"] = torch.zeros(4)
    found = fisher_similarity(embedding(left), embedding(right), kind)
    assert found == pytest.approx(by_hand(rest, right, kind), rel=1e-12)
    assert zero_tensors(embedding(left)) == ["a.bias"]
    assert zero_tensors(embedding(right)) == []


@pytest.mark.parametrize("kind", ["fisher", "fisher-paper", "fisher-cosine"])
def test_a_cosine_that_is_not_finite_is_an_error(kind: str, message: Any) -> None:
    left, right = random_fisher(1), random_fisher(2)
    right["a.bias"][2] = float("nan")
    found = message(fisher_similarity, embedding(left, task="x"), embedding(right, task="y"), kind)
    assert "embeddings of 'x' and 'y' have no finite cosine in tensor a.bias [4]" in found


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(RefusedError, match="fisher, fisher-paper, fisher-cosine, not 'cosine'"):
        fisher_similarity(embedding(random_fisher(0)), embedding(random_fisher(1)), "cosine")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": "shared"}, "different reference points (own, shared)"),
        ({"fisher": {k: f for k, f in random_fisher(1).items() if k != "b.weight"}}, "differ in tensor b.weight"),
        ({"fisher": {**random_fisher(1), "b.weight": torch.ones(2, 2)}}, "differ in tensor b.weight"),
    ],
)
def test_embeddings_that_do_not_compare_are_refused(changes: dict[str, Any], said: str, message: Any) -> None:
    other = embedding(**{"fisher": random_fisher(1), "task": "u", **changes})
    text = message(fisher_similarity, embedding(random_fisher(0)), other)
    assert said in text
    assert "'t'" in text
    assert "'u'" in text


def test_shared_embeddings_must_share_their_point() -> None:
    left = embedding(random_fisher(0), reference="shared", reference_hash="one")
    right = embedding(random_fisher(1), reference="shared", reference_hash="two")
    with pytest.raises(ExpertError, match="different shared experts"):
        fisher_similarity(left, right)
    same = embedding(random_fisher(1), reference="shared", reference_hash="one")
    assert fisher_similarity(left, same) == pytest.approx(
        by_hand(random_fisher(0), random_fisher(1), "fisher"), rel=1e-9
    )


def golden_embeddings(case: str) -> list[TaskEmbedding]:
    """The inputs of a case of the reference's similarity notebook."""
    if case == "tiny_model3":
        recorded = safetensors.torch.load_file(FIXTURES / "fim" / "fim.safetensors")
        names = ("adapter_single", "adapter_single_frozenbn", "trainer_with_steps")
        prefixes = [f"{n}.sumAB." for n in names]
        scale = 4.0
    else:
        recorded = safetensors.torch.load_file(FIXTURES / "similarity" / "inputs.safetensors")
        prefixes = [f"{case}.t{i}." for i in range(2 if case == "two_tasks" else 3)]
        scale = 1.0
    return [
        embedding({k.removeprefix(p): f / scale for k, f in recorded.items() if k.startswith(p)}, task=p)
        for p in prefixes
    ]


@needs_fixtures
@pytest.mark.parametrize("case", ["random3", "two_tasks", "tiny_model3"])
def test_fisher_paper_gives_the_notebooks_numbers(case: str) -> None:
    golden = json.loads((FIXTURES / "similarity" / "golden.json").read_text())[case]["upper"]
    embeddings = golden_embeddings(case)
    assert all(e.fisher for e in embeddings)
    for i, left in enumerate(embeddings):
        for j in range(i + 1, len(embeddings)):
            found = fisher_similarity(left, embeddings[j], "fisher-paper")
            assert found == pytest.approx(golden[i][j], abs=2e-6), (i, j)  # the notebook computes in float32


@needs_fixtures
@pytest.mark.parametrize("case", ["random3", "two_tasks", "tiny_model3", "zero_component"])
def test_the_task_graph_is_the_notebooks_matrix(case: str) -> None:
    """In ``zero_component`` a tensor without Fisher in one task is left out for all, so that all entries compare."""
    golden = json.loads((FIXTURES / "similarity" / "golden.json").read_text())[case]["symmetric_rounded4"]
    embeddings = {e.task: e for e in golden_embeddings(case)}
    graph = task_graph(embeddings, "fisher-paper")
    assert graph.kind == "fisher-paper"
    assert graph.names == tuple(embeddings)
    np.testing.assert_allclose(graph.matrix, golden, rtol=0, atol=5.5e-5)


@needs_fixtures
def test_what_the_notebook_skips_without_a_word_is_an_error_here(message: Any) -> None:
    text = message(
        fisher_similarity, golden_embeddings("missing_component")[0], golden_embeddings("missing_component")[2]
    )
    assert "encoder.layers.0.fc1.weight" in text


class TestWeights:
    def test_lora_compares_what_it_adds_to_the_base_weights(
        self, bert: Backbone, random_expert: Any, lora_deltas: Any
    ) -> None:
        left = random_expert(bert, "lora", 1, r=2)
        right = random_expert(bert, "lora", 2, r=4, lora_alpha=3, use_rslora=True, target_modules=["query", "key"])
        mine, others = lora_deltas(left), lora_deltas(right)
        common = [m for m in mine if m in others]
        assert len(common) == 2
        slow = np.mean([cosine(mine[m], others[m]) for m in common])
        assert weight_similarity(left, right) == pytest.approx(slow, rel=1e-9)
        assert weight_similarity(left, left) == pytest.approx(1, rel=1e-12)

    def test_the_same_change_in_other_factors_is_the_same(self, bert: Backbone, random_expert: Any) -> None:
        expert = random_expert(bert, "lora", 3)
        rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
        turned = {
            k: rotation @ t if "lora_A" in k else t @ rotation.T for k, t in expert.tensors.items()
        }  # fmt: skip
        other = type(expert)(turned, expert.config, expert.card)
        assert weight_similarity(expert, other) == pytest.approx(1, rel=1e-5)

    def test_bottleneck_compares_the_way_from_the_start(self, bert: Backbone, random_expert: Any) -> None:
        left, right = random_expert(bert, "bottleneck", 4), random_expert(bert, "bottleneck", 5)
        start = initial_tensors(bert, left.config)
        slow = np.mean([cosine(left.tensors[k] - start[k], right.tensors[k] - start[k]) for k in start])
        assert weight_similarity(left, right, start) == pytest.approx(slow, abs=1e-6)
        with pytest.raises(RefusedError, match="common initialisation"):
            weight_similarity(left, right)

    def test_experts_without_a_common_module_or_tensor(self, bert: Backbone, random_expert: Any, message: Any) -> None:
        left = random_expert(bert, "lora", 6, target_modules=["query"])
        right = random_expert(bert, "lora", 7, target_modules=["value"])
        assert "no module in common" in message(weight_similarity, left, right)
        wide = random_expert(bert, "bottleneck", 8)
        narrow = random_expert(bert, "bottleneck", 9, target_modules=["attention.output.dense"])
        text = message(weight_similarity, wide, narrow, initial_tensors(bert, wide.config))
        assert (
            "'bottleneck-8' and 'bottleneck-9' differ in tensor base_model.model.encoder.layer.0.output.dense" in text
        )

    @pytest.mark.parametrize(("init_hash", "known"), [("", "is not known"), ("another", "is another")])
    @pytest.mark.parametrize("position", [0, 1])
    def test_another_start_is_refused(
        self, bert: Backbone, random_expert: Any, message: Any, init_hash: str, known: str, position: int
    ) -> None:
        pair = [random_expert(bert, "bottleneck", s, name=f"e{s}") for s in (10, 11)]
        start = initial_tensors(bert, pair[0].config)
        pair[position] = pair[position].with_card(init_hash=init_hash)
        text = message(weight_similarity, *pair, start)
        assert f"expert 'e{10 + position}' was trained {known}" in text
        assert "use another similarity" in text

    def test_bitfit_and_lora_need_no_record_of_their_start(self, bert: Backbone, random_expert: Any) -> None:
        for method in ("bitfit", "lora"):
            left, right = (random_expert(bert, method, s) for s in (12, 13))
            start = initial_tensors(bert, left.config)
            bare = [e.with_card(init_hash="") for e in (left, right)]
            assert weight_similarity(*bare, start) == weight_similarity(left, right, start)


class TestGradient:
    """Against central differences of the loss in float64, one example at a time."""

    STEP = 1e-4

    def difference(self, loss_at: Any) -> float:
        return float((loss_at(self.STEP) - loss_at(-self.STEP)) / (2 * self.STEP))

    def mean_loss(self, backbone: Backbone, examples: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([backbone.loss(backbone.collate([e])) for e in examples]).mean()

    @pytest.mark.parametrize("family", ["encoder", "seq2seq", "ofa"])
    def test_lora_falls_towards_its_delta(
        self,
        backbone_of: Any,
        random_experts: Any,
        random_examples: Any,
        lora_deltas: Any,
        with_deltas: Any,
        family: str,
    ) -> None:
        backbone = backbone_of(family, torch.float64)
        experts, examples = random_experts(backbone, "lora", 3, seed=4), random_examples(5, seed=1)
        slopes = loss_slopes(backbone, experts, examples, batch_size=2)
        found = gradient_similarities(backbone, experts, examples)
        for expert, slope, similarity in zip(experts, slopes, found, strict=True):
            deltas = lora_deltas(expert)

            def loss_at(t: float, deltas: dict[str, Tensor] = deltas) -> Tensor:
                with with_deltas(backbone, {m: t * d for m, d in deltas.items()}):
                    return self.mean_loss(backbone, examples)

            slow = self.difference(loss_at)
            assert slope == pytest.approx(slow, rel=1e-5, abs=1e-8)
            length = np.sqrt(sum(float(d.square().sum()) for d in deltas.values()))
            assert similarity == pytest.approx(-slow / length, rel=1e-5, abs=1e-8)

    @pytest.mark.parametrize(
        ("family", "method"),
        [("encoder", "bottleneck"), ("encoder", "bitfit"), ("ofa", "prefix"), ("seq2seq", "bottleneck")],
    )
    def test_other_methods_fall_from_their_common_start(
        self, backbone_of: Any, random_expert: Any, random_examples: Any, family: str, method: str
    ) -> None:
        backbone = backbone_of(family, torch.float64)
        experts, examples = [random_expert(backbone, method, s) for s in (1, 2)], random_examples(5, seed=2)
        start = initial_tensors(backbone, experts[0].config)
        for expert, found in zip(experts, gradient_similarities(backbone, experts, examples), strict=True):
            way = {k: expert.tensors[k] - z for k, z in start.items()}

            def loss_at(t: float, config: Any = expert.config, way: dict[str, Tensor] = way) -> Tensor:
                with attached(backbone, config, {k: start[k] + t * w for k, w in way.items()}):
                    return self.mean_loss(backbone, examples)

            length = np.sqrt(sum(float(w.square().sum()) for w in way.values()))
            assert found == pytest.approx(-self.difference(loss_at) / length, rel=1e-5, abs=1e-8)

    def test_neither_its_length_nor_its_neighbours_move_an_experts_value(
        self, backbone_of: Any, random_expert: Any, random_examples: Any
    ) -> None:
        backbone, examples = backbone_of("encoder", torch.float64), random_examples(4)
        expert, other = (random_expert(backbone, "lora", s) for s in (1, 2))
        longer = Expert(
            {k: t * 3 if "lora_B" in k else t for k, t in expert.tensors.items()}, expert.config, expert.card
        )
        untrained = Expert(initial_tensors(backbone, expert.config), expert.config, expert.card)
        alone = gradient_similarities(backbone, [expert], examples)
        assert gradient_similarities(backbone, [other, longer, untrained], examples)[1:] == [
            pytest.approx(alone[0], rel=1e-9),
            0.0,
        ]

    def test_no_examples_and_another_start_are_refused(
        self, bert: Backbone, random_expert: Any, random_examples: Any, message: Any
    ) -> None:
        pair = [random_expert(bert, "bottleneck", s, name=f"e{s}") for s in (1, 2)]
        with pytest.raises(DataError, match="no examples to take the gradient"):
            gradient_similarities(bert, pair, [])
        pair[1] = pair[1].with_card(init_hash="another")
        text = message(gradient_similarities, bert, pair, random_examples(2))
        assert "expert 'e2' was trained is another" in text
        assert "similarity 'gradient'" in text

    def test_an_infinite_loss_is_an_error(self, fresh_bert_of: Any, random_expert: Any, random_examples: Any) -> None:
        backbone = fresh_bert_of(torch.float32)
        expert = random_expert(backbone, "lora", 1)
        backbone.model.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
        with pytest.raises(ExpertError, match=r"'gradient': the gradient of the loss .* is not finite"):
            gradient_similarities(backbone, [expert], random_examples(2))


class TestRegistry:
    def comparison(
        self, backbone: Backbone, experts: list[Expert], task: Any, folder: Path, **changes: Any
    ) -> Comparison:
        return Comparison(backbone, task, ExpertPool(folder), experts, **changes)

    def test_every_kind_is_there_under_its_name(self) -> None:
        fishers = {"fisher", "fisher-paper", "fisher-cosine"}
        assert set(KINDS) == fishers | {"weights", "gradient", "score", "calibrated-score", "tuned-score", "average"}
        assert all(measure.name == name for name, measure in MEASURES.items())

    def test_the_default_is_one_and_the_same_everywhere(self) -> None:
        assert DEFAULT_KIND in MEASURES
        assert InterpolationSection().kind == DEFAULT_KIND
        (option,) = [p for p in get_command(app).commands["rank"].params if p.name == "kind"]
        assert option.default == DEFAULT_KIND

    @pytest.mark.parametrize("kind", ["score", "calibrated-score"])
    def test_scores_are_losses_of_the_expert_one_example_at_a_time(
        self, bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path, kind: str
    ) -> None:
        experts, task = [random_expert(bert, "lora", s) for s in range(2)], make_task()
        examples = task.split("train")
        for expert, found in zip(experts, MEASURES[kind](self.comparison(bert, experts, task, tmp_path)), strict=True):
            with attached(bert, expert.config, expert.tensors), torch.no_grad():
                rows = torch.cat([bert.score(bert.collate([e]), task.choices) for e in examples]).log_softmax(1)
            plain = -rows[range(len(examples)), [e.label for e in examples]]
            slow = plain if kind == "score" else bias_calibrated_losses(rows, examples)
            assert found == pytest.approx(-float(slow.mean()), rel=1e-4)

    def test_tuned_score_is_the_loss_of_warm_starts_on_what_they_were_not_tuned_on(
        self, bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path
    ) -> None:
        """Against a plain training loop and a search for the temperature."""
        experts, task = [random_expert(bert, "lora", s) for s in range(2)], make_task()
        examples, rate, steps = list(task.split("train")), 1e-2, 3
        search = Search(learning_rates=(rate, 1.0), steps=steps, batch_size=len(examples))
        for expert in experts:
            rows, truth = [], []
            for train, held in stratified_folds(examples, 2, 0):
                with attached(bert, expert.config, expert.tensors) as site:
                    optimizer = torch.optim.AdamW(site.parameters.values(), lr=rate, weight_decay=0.0)
                    for step in range(steps):
                        optimizer.param_groups[0]["lr"] = rate if step else 0.0  # the warm-up is the first step
                        optimizer.zero_grad()
                        bert.loss(bert.collate(train)).mean().backward()
                        torch.nn.utils.clip_grad_norm_(site.parameters.values(), 1.0)
                        optimizer.step()
                    with torch.no_grad():
                        rows += [bert.score(bert.collate([e]), task.choices) for e in held]
                truth += [e.label for e in held]
            scores = torch.cat(rows)
            slow = min(
                float(F.cross_entropy(scores / math.exp(t), torch.tensor(truth))) for t in np.linspace(-2, 4, 6001)
            )
            found = tuned_score_similarity(bert, expert, task, search)
            assert found == pytest.approx(-slow, abs=1e-5)

    def test_average_is_the_mean_share_of_candidates_beaten(
        self, bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path
    ) -> None:
        experts = [random_expert(bert, "lora", s) for s in range(4)]
        kinds = ("score", "gradient", "weights")
        comparison = self.comparison(
            bert, experts, make_task(), tmp_path, own=random_expert(bert, "lora", 9), average_of=(*kinds, "score")
        )
        rows = [MEASURES[kind](comparison) for kind in kinds]
        shares = [[sum(a > b for b in row) / 3 for a in row] for row in rows]
        assert MEASURES["average"](comparison) == pytest.approx(np.mean(shares, axis=0).tolist())

    def test_nan_has_no_rank(self, message: Any) -> None:
        assert "similarity of candidate 1 is NaN" in message(average_ranks, [[1.0, 2.0], [0.5, float("nan")]])

    def test_ties_count_half_and_one_candidate_is_the_best(self) -> None:
        assert average_ranks([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]) == pytest.approx(
            [(0.75 + 0) / 2, (0.75 + 1) / 2, 0.25]
        )
        assert average_ranks([[-3.0], [7.0]]) == [1.0]

    def test_what_is_missing_is_named(self, bert: Backbone, random_expert: Any, make_task: Any, tmp_path: Path) -> None:
        experts, task = [random_expert(bert, "lora", s) for s in range(2)], make_task()
        with pytest.raises(PituningError, match="'weights' needs the target's own expert"):
            MEASURES["average"](self.comparison(bert, experts, task, tmp_path, average_of=("score", "weights")))
        with pytest.raises(UnknownNameError, match="unknown similarity 'scores': did you mean 'score'"):
            MEASURES["average"](self.comparison(bert, experts, task, tmp_path, average_of=("scores",)))
        with pytest.raises(UnknownNameError, match="unknown similarity 'average'"):
            MEASURES["average"](self.comparison(bert, experts, task, tmp_path, average_of=("average",)))
        with pytest.raises(PituningError, match="average_of names no similarity"):
            MEASURES["average"](self.comparison(bert, experts, task, tmp_path, average_of=()))
