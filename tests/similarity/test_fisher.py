"""The Fisher diagonal against a loop over single examples with plain autograd."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import BackboneMismatchError, DataError, RefusedError
from pituning.example import Example
from pituning.experts import Expert, ExpertCard
from pituning.methods import attached, config_dict, initial_tensors, make_config
from pituning.similarity.fisher import FisherEstimate, fisher_diagonal
from pituning.similarity.per_example import Squares
from tests.backbones.ofa.conftest import build_backbone, closed

PRECISIONS = ((torch.float32, 1e-5), (torch.float64, 1e-10))
METHODS = ("lora", "bottleneck")
COMBINATIONS = (
    *((family, method) for family in ("encoder", "seq2seq", "ofa") for method in (*METHODS, "bitfit")),
    ("ofa", "prefix"),
)
BIASES_FOR_T5 = {"target_modules": ["q", "wi", "wo", "layer_norm"]}  # it has none of its own
# What is added to every key alike changes all scores of a query by the same amount, and softmax does not see it.
INVISIBLE = re.compile(r"(key|\.k_proj|pos_k_linear)\.bitfit_bias$")


def an_expert(random_expert: Any, backbone: Backbone, method: str, seed: int) -> Expert:
    options = BIASES_FOR_T5 if (backbone.name, method) == ("tiny-t5", "bitfit") else {}
    expert: Expert = random_expert(backbone, method, seed, **options)
    return expert


def loop_true(backbone: Backbone, expert: Expert, examples: Sequence[Example]) -> dict[str, Tensor]:
    """1/N Σ_n (∂ log p(target_n | x_n))²: one example at a time, so without padding."""
    with attached(backbone, expert.config, expert.tensors) as site:
        total = {k: torch.zeros(p.shape, dtype=torch.float64) for k, p in site.parameters.items()}
        for example in examples:
            loss = backbone.loss(backbone.collate([example]))
            if not loss.requires_grad:  # no layer of the expert takes part
                continue
            gradients = torch.autograd.grad(loss[0], list(site.parameters.values()), allow_unused=True)
            for key, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[key] += gradient.double() ** 2
    return {k: t / len(examples) for k, t in total.items()}


def loop_model(backbone: Backbone, expert: Expert, examples: Sequence[Example]) -> dict[str, Tensor]:
    """1/N Σ_n Σ_c p(c | x_n) (∂ log p(c | x_n))², one example and one choice at a time."""
    with attached(backbone, expert.config, expert.tensors) as site:
        parameters = list(site.parameters.values())
        total = {k: torch.zeros(p.shape, dtype=torch.float64) for k, p in site.parameters.items()}
        for example in examples:
            each = [backbone.loss(backbone.collate([replace(example, target=c)]))[0] for c in example.choices]
            log_p = -torch.stack(each)
            log_p = log_p - log_p.logsumexp(0)
            for choice in range(len(example.choices)):
                gradients = torch.autograd.grad(log_p[choice], parameters, retain_graph=True, allow_unused=True)
                for key, gradient in zip(total, gradients, strict=True):
                    if gradient is not None:
                        total[key] += float(log_p[choice].detach().exp()) * gradient.double() ** 2
    return {k: t / len(examples) for k, t in total.items()}


def assert_close(found: FisherEstimate, expected: dict[str, Tensor], tolerance: float) -> None:
    mean = found.mean()
    assert mean.keys() == expected.keys()
    largest = max(float(slow.norm()) for slow in expected.values())
    for key, slow in expected.items():
        assert mean[key].dtype == torch.float64
        if INVISIBLE.search(key):
            assert max(mean[key].norm(), slow.norm()) <= tolerance**2 * largest, f"{key}: more than rounding"
            continue
        assert slow.norm() > 0, f"{key}: the loop itself gives zero, the comparison would prove nothing"
        error = float((mean[key] - slow).norm() / slow.norm())
        assert error <= tolerance, f"{key}: off by {error:.1e}"


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("family", "method"), COMBINATIONS)
class TestAgainstTheLoop:
    def test_true_labels_with_padding(
        self, backbone_of: Any, random_expert: Any, random_examples: Any,
        family: str, method: str, dtype: torch.dtype, tolerance: float,
    ) -> None:  # fmt: skip
        backbone = backbone_of(family, dtype)
        expert = an_expert(random_expert, backbone, method, 1)
        examples = random_examples(7, 2)
        lengths = backbone.collate(examples)["attention_mask"].sum(1)
        assert lengths.min() < lengths.max(), "the batch must need padding"
        found = fisher_diagonal(backbone, expert, examples, batch_size=3)
        assert found.samples == 7
        assert_close(found, loop_true(backbone, expert, examples), tolerance)

    def test_model_labels_over_closed_choices(
        self, backbone_of: Any, random_expert: Any, random_examples: Any,
        family: str, method: str, dtype: torch.dtype, tolerance: float,
    ) -> None:  # fmt: skip
        backbone = backbone_of(family, dtype)
        expert = an_expert(random_expert, backbone, method, 3)
        examples = random_examples(5, 4)
        found = fisher_diagonal(backbone, expert, examples, labels="model", batch_size=3)
        assert_close(found, loop_model(backbone, expert, examples), tolerance)


@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
def test_model_labels_need_no_answers(backbone_of: Any, random_expert: Any, random_examples: Any, family: str) -> None:
    backbone = backbone_of(family, torch.float64)
    expert, examples = random_expert(backbone, "lora", 3), random_examples(5, 4)
    asked = [replace(e, target="") if i in (1, 4) else e for i, e in enumerate(examples)]
    found = fisher_diagonal(backbone, expert, asked, labels="model", batch_size=3)
    assert_close(found, loop_model(backbone, expert, examples), 1e-10)
    assert math.isnan(found.loss)
    with pytest.raises(DataError, match=r"example 'e/1' has no answer"):
        fisher_diagonal(backbone, expert, asked)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("family", "method"), [c for c in COMBINATIONS if c[0] != "encoder"])
def test_open_targets_of_different_lengths(
    backbone_of: Any, random_expert: Any, random_examples: Any,
    family: str, method: str, dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    backbone = backbone_of(family, dtype)
    expert = an_expert(random_expert, backbone, method, 5)
    examples = random_examples(6, 6, choices=())
    ends = (backbone.collate(examples)["labels"] != -100).sum(1)
    assert ends.min() < ends.max(), "targets must differ in length"
    assert_close(fisher_diagonal(backbone, expert, examples), loop_true(backbone, expert, examples), tolerance)


@pytest.mark.parametrize("method", [*METHODS, "bitfit"])
def test_sentence_pairs(backbone_of: Any, random_expert: Any, random_examples: Any, method: str) -> None:
    backbone = backbone_of("encoder", torch.float64)
    expert, examples = random_expert(backbone, method, 7), random_examples(5, 8, pairs=True)
    assert_close(fisher_diagonal(backbone, expert, examples), loop_true(backbone, expert, examples), 1e-10)


@pytest.mark.parametrize("labels", ["true", "model"])
@pytest.mark.parametrize("method", [*METHODS, "bitfit"])
def test_a_layer_called_twice_accumulates_before_squaring(
    fresh_bert_of: Callable[..., Backbone], random_expert: Any, random_examples: Any, method: str, labels: str
) -> None:
    backbone = fresh_bert_of(torch.float64, share_layers=True)
    expert, examples = random_expert(backbone, method, 9), random_examples(5, 10)
    calls: list[int] = []
    with attached(backbone, expert.config, expert.tensors) as site:
        name = next(name for name in site.live_names.values() if ".layer." in name)
        depth = 2 if method == "bitfit" else 1  # a vector lies in a ParameterDict of its layer
        owner = site.backbone.model.get_submodule(name.rsplit(".", depth)[0])
        batch = backbone.collate(examples)  # the bare backbone encodes the label texts here
        handle = owner.register_forward_hook(lambda *_: calls.append(1))
        backbone.loss(batch)
        handle.remove()
    assert len(calls) == 2, "the shared layer must run twice in one forward pass"
    loop = loop_true if labels == "true" else loop_model
    found = fisher_diagonal(backbone, expert, examples, labels=labels)
    assert_close(found, loop(backbone, expert, examples), 1e-10)


def test_lora_with_its_own_rank_scaling_and_modules(backbone_of: Any, random_expert: Any, random_examples: Any) -> None:
    backbone = backbone_of("encoder", torch.float64)
    expert = random_expert(
        backbone, "lora", 11, r=2, lora_alpha=5, use_rslora=True, target_modules=["key", "output.dense"]
    )
    examples = random_examples(5, 12)
    assert_close(fisher_diagonal(backbone, expert, examples), loop_true(backbone, expert, examples), 1e-10)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize(("family", "method"), [("seq2seq", "bottleneck"), ("ofa", "prefix")])
def test_batches_do_not_matter(
    backbone_of: Any, random_expert: Any, random_examples: Any, family: str, method: str, batch_size: int
) -> None:
    backbone = backbone_of(family, torch.float64)
    expert, examples = random_expert(backbone, method, 13), random_examples(9, 14)
    found = fisher_diagonal(backbone, expert, examples, batch_size=batch_size)
    assert_close(found, loop_true(backbone, expert, examples), 1e-10)


@pytest.mark.parametrize("labels", ["true", "model"])
@pytest.mark.parametrize("method", [*METHODS, "prefix", "bitfit"])
def test_ofa_with_and_without_pictures(random_expert: Any, method: str, labels: str) -> None:
    backbone = build_backbone(torch.float64)
    expert, examples = random_expert(backbone, method, 39), closed(5)
    assert {e.image is None for e in examples} == {True, False}
    found = fisher_diagonal(backbone, expert, examples, labels=labels, batch_size=3)
    assert_close(found, (loop_true if labels == "true" else loop_model)(backbone, expert, examples), 1e-10)


def test_pictures_come_in_small_batches(random_expert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pituning.similarity.fisher.IMAGE_BATCH_SIZE", 2)
    backbone = build_backbone(torch.float64)
    expert, examples = random_expert(backbone, "lora", 43), closed(5)
    sizes: list[int] = []
    collate = backbone.collate
    monkeypatch.setattr(backbone, "collate", lambda batch: sizes.append(len(batch)) or collate(batch))
    found = fisher_diagonal(backbone, expert, examples)
    assert sizes[2:] == [2, 2, 1], "after two and three copies to see whether the rows follow the examples"
    assert_close(found, loop_true(backbone, expert, examples), 1e-10)
    sizes.clear()
    fisher_diagonal(backbone, expert, [replace(e, image=None) for e in examples])
    assert sizes[2:] == [5], "without pictures there is room for all"


def test_only_sums_over_the_batch_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients, weights = torch.randn(5, 3, 2, generator=generator), torch.rand(5, generator=generator)
    squares = Squares(torch.tensor([1, 0, 1, 0, 1]))
    for _ in range(2):
        squares.begin(weights)
        squares.add("w", gradients.clone())  # what is added is used up
        squares.close()
    for total, rows in zip(squares.totals, ((1, 3), (0, 2, 4)), strict=True):
        slow = sum(2 * weights[i].double() * gradients[i].double() ** 2 for i in rows)
        torch.testing.assert_close(total["w"], slow, rtol=1e-6, atol=0)  # squared in float32, summed in float64


@pytest.mark.parametrize("parity", [[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_linear_layers_gradients_are_squared_in_parts_unless_it_is_called_twice(
    parity: list[int], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients, inputs = (torch.randn(calls, 5, 4, width, generator=generator) for width in (3, 2))
    monkeypatch.setattr("pituning.similarity.per_example._CHUNK", 12)  # two examples' gradients
    squares = Squares(torch.tensor(parity))
    for _ in range(calls):
        squares.sees({"weight": "w"}, 5)
    squares.begin()
    for gradient, x in zip(gradients, inputs, strict=True):
        squares.add_outer("w", gradient.clone(), x)
    found = [{k: t.clone() for k, t in half.items()} for half in squares.totals]
    squares.close()
    for half in (0, 1):
        slow = sum(
            sum(torch.outer(g, x) for c in range(calls) for g, x in zip(gradients[c, n], inputs[c, n], strict=True))
            ** 2
            for n in range(5)
            if parity[n] == half
        )
        torch.testing.assert_close(squares.totals[half]["w"], slow.double(), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[half]["w"], squares.totals[half]["w"]), "not complete before the pass ends"


@pytest.mark.parametrize("scale", [1e-15, 1e-22, 1e-30])
def test_gradients_whose_squares_float32_cannot_hold_are_not_lost(scale: float) -> None:
    gradients = scale * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    squares = Squares(torch.tensor([1, 1, 0, 1]))
    squares.begin(torch.ones(4))
    squares.add("w", gradients.clone())
    squares.close()
    torch.testing.assert_close(squares.totals[0]["w"], gradients[2].double() ** 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(squares.totals[1]["w"], (gradients[[0, 1, 3]].double() ** 2).sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_pictures_positions_are_shared_by_the_examples(random_expert: Any, batch_size: int) -> None:
    """A picture has four patches, and the first example none."""
    backbone = build_backbone(torch.float64)
    expert = random_expert(backbone, "bitfit", 41, target_modules=["encoder.image_pos_ln", "image_proj"])
    examples = closed(8)
    found = fisher_diagonal(backbone, expert, examples, batch_size=batch_size)
    assert_close(found, loop_true(backbone, expert, examples), 1e-10)


class TestLayersThatWorkForAllExamplesAtOnce:
    """OFA projects and normalises its positions once per batch: no hook can tell the examples apart there."""

    POSITIONS = ("encoder.pos_ln", "encoder.pos_q_linear", "decoder.self_pos_q_linear", "q_proj")

    @pytest.mark.parametrize("labels", ["true", "model"])
    @pytest.mark.parametrize(("method", "targets"), [("bitfit", POSITIONS), ("lora", POSITIONS[1:])])
    def test_are_exact_all_the_same(
        self,
        backbone_of: Any,
        random_expert: Any,
        random_examples: Any,
        method: str,
        targets: Sequence[str],
        labels: str,
    ) -> None:
        backbone = backbone_of("ofa", torch.float64)
        expert = random_expert(backbone, method, 31, target_modules=list(targets))
        examples = random_examples(4, 32)
        loop = loop_true if labels == "true" else loop_model
        found = fisher_diagonal(backbone, expert, examples, labels=labels)
        assert_close(found, loop(backbone, expert, examples), 1e-10)

    @pytest.mark.parametrize("batch_size", [2, 3, 4, 6])
    def test_even_where_they_see_as_many_rows_as_there_are_examples(
        self, backbone_of: Any, random_expert: Any, random_examples: Any, batch_size: int
    ) -> None:
        """The text's positions are a matrix ``[tokens, width]``; here with as many tokens as examples."""
        backbone = backbone_of("ofa", torch.float64)
        expert = random_expert(backbone, "bitfit", 33, target_modules=["encoder.pos_ln"])
        prompt = " ".join(["ba"] * (batch_size - 1))
        examples = [replace(e, texts=(prompt,), prompt=prompt) for e in random_examples(2 * batch_size, 34)]
        assert backbone.collate(examples)["input_ids"].shape[1] == batch_size
        found = fisher_diagonal(backbone, expert, examples, batch_size=batch_size)
        assert_close(found, loop_true(backbone, expert, examples), 1e-10)

    def test_others_still_run_in_batches(
        self, backbone_of: Any, random_expert: Any, random_examples: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backbone = backbone_of("ofa", torch.float64)
        sizes: list[int] = []
        collate = backbone.collate
        monkeypatch.setattr(backbone, "collate", lambda examples: sizes.append(len(examples)) or collate(examples))
        for method in ("lora", "bottleneck", "prefix"):
            fisher_diagonal(
                backbone, random_expert(backbone, method, 35), random_examples(9, 36), labels="model", batch_size=4
            )
        assert sizes == [2, 3, 4, 4, 1] * 3, "two and three copies to see whether the rows follow the examples"


def test_label_texts_take_no_part(
    fresh_bert_of: Callable[..., Backbone], random_expert: Any, random_examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bare backbone encodes them on first use, in the middle of the first batch."""
    backbone = fresh_bert_of(torch.float64)
    expert, examples = random_expert(backbone, "bitfit", 37), random_examples(5, 38)
    sizes: list[int] = []
    collate = backbone.collate
    monkeypatch.setattr(backbone, "collate", lambda batch: sizes.append(len(batch)) or collate(batch))
    found = fisher_diagonal(backbone, expert, examples, labels="model")
    assert sizes == [2, 3, 5], "they are not taken for examples"
    assert_close(found, loop_model(backbone, expert, examples), 1e-10)


def test_halves_are_every_other_example(backbone_of: Any, random_expert: Any, random_examples: Any) -> None:
    backbone = backbone_of("encoder", torch.float64)
    expert, examples = random_expert(backbone, "lora", 15), random_examples(7, 16)
    found = fisher_diagonal(backbone, expert, examples, batch_size=3)
    even, odd = (loop_true(backbone, expert, examples[h::2]) for h in (0, 1))
    cosines = []
    for key in even:
        torch.testing.assert_close(found.even[key], even[key] * 4, rtol=1e-10, atol=0)
        torch.testing.assert_close(found.odd[key], odd[key] * 3, rtol=1e-10, atol=0)
        cosines.append((even[key] * odd[key]).sum() / even[key].norm() / odd[key].norm())
    assert found.split_half() == pytest.approx(float(sum(cosines) / len(cosines)), rel=1e-9)


@pytest.mark.parametrize("labels", ["true", "model"])
def test_loss_is_that_of_the_true_answers(
    backbone_of: Any, random_expert: Any, random_examples: Any, labels: str
) -> None:
    backbone = backbone_of("encoder", torch.float64)
    expert, examples = random_expert(backbone, "lora", 17), random_examples(5, 18)
    with torch.no_grad(), attached(backbone, expert.config, expert.tensors):
        slow = sum(float(backbone.loss(backbone.collate([e]))[0]) for e in examples)
    assert fisher_diagonal(backbone, expert, examples, labels=labels).loss == pytest.approx(slow, rel=1e-10)


def test_split_half_skips_tensors_whose_fisher_is_zero(bert: Backbone, random_examples: Any) -> None:
    """At LoRA's own start B is zero, and the gradients of all A vanish: they say nothing about how settled F is."""
    config = make_config("lora", bert, r=2)
    expert = Expert(initial_tensors(bert, config), config_dict(config), ExpertCard("start"))
    examples = random_examples(6, 19)
    found = fisher_diagonal(bert, expert, examples)
    assert all(not f.any() for k, f in found.mean().items() if "lora_A" in k)
    alive = [k for k in found.even if "lora_B" in k]
    cosines = [torch.cosine_similarity(found.even[k].flatten(), found.odd[k].flatten(), dim=0) for k in alive]
    assert found.split_half() == pytest.approx(float(torch.stack(cosines).mean()), rel=1e-6)


def test_open_answers_under_the_model_are_sampled_by_the_examples_id(
    backbone_of: Any, random_expert: Any, random_examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_of("seq2seq", torch.float64)
    expert, examples = random_expert(backbone, "lora", 20), random_examples(4, 21, choices=())
    drawn: dict[str, list[str]] = {}
    generate = backbone.generate

    def text(tokens: Any) -> str:
        decoded: str = backbone.tokenizer.decode(tokens, skip_special_tokens=True)
        return decoded

    def spy(batch: Any, **options: Any) -> list[str]:
        assert options["do_sample"], "an expectation under the model needs samples, not the best answer"
        answers = generate(batch, **{**options, "max_new_tokens": 5})
        drawn.setdefault(text(batch["input_ids"][0]), []).extend(answers)
        return answers

    monkeypatch.setattr(backbone, "generate", spy)
    found = fisher_diagonal(backbone, expert, examples, labels="model")
    again = fisher_diagonal(backbone, expert, examples[::-1], labels="model", batch_size=1)
    assert len(drawn) == len(examples)
    assert all(first == second for first, second in drawn.values()), "the answer must depend on the example only"
    answered = [replace(e, target=drawn[text(backbone.tokenizer(e.prompt)["input_ids"])][0]) for e in examples]
    expected = loop_true(backbone, expert, answered)
    assert_close(found, expected, 1e-10)
    assert_close(again, expected, 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_leaves_backbone_and_expert_as_they_were(
    bert: Backbone, random_expert: Any, random_examples: Any, method: str
) -> None:
    expert, examples = random_expert(bert, method, 22), random_examples(4, 23)
    before = {k: v.clone() for k, v in bert.model.state_dict().items()}
    tensors = {k: v.clone() for k, v in expert.tensors.items()}
    state = torch.random.get_rng_state()
    fisher_diagonal(bert, expert, examples)
    after = bert.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(tensors[k], expert.tensors[k]) for k in tensors)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(p.requires_grad or p.grad is not None for p in bert.model.parameters())
    assert not any(m._forward_hooks for m in bert.model.modules())


class TestRefusals:
    @pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, on its own LNTuning
    def test_a_tensor_that_is_not_on_a_linear(self, bert: Backbone, random_examples: Any, message: Any) -> None:
        from peft import LNTuningConfig

        config = LNTuningConfig(target_modules=["LayerNorm"])
        expert = Expert(initial_tensors(bert, config), config_dict(config), ExpertCard("norms", method="ln"))
        text = message(fisher_diagonal, bert, expert, random_examples(3))
        assert "LayerNorm" in text
        assert "[16]" in text
        assert "Linear" in text

    def test_a_prefix_with_projection(self, ofa: Backbone, random_expert: Any, random_examples: Any) -> None:
        expert = random_expert(ofa, "prefix", 1, name="net", projection=True)
        with pytest.raises(RefusedError, match="'net' is a prefix with projection"):
            fisher_diagonal(ofa, expert, random_examples(2))

    def test_no_examples(self, bert: Backbone, random_expert: Any) -> None:
        with pytest.raises(DataError, match="no examples"):
            fisher_diagonal(bert, random_expert(bert), [])

    def test_an_unknown_label_source(self, bert: Backbone, random_expert: Any, random_examples: Any) -> None:
        with pytest.raises(RefusedError, match="true, model, not 'best'"):
            fisher_diagonal(bert, random_expert(bert), random_examples(2), labels="best")

    def test_another_backbone(self, bert: Backbone, t5: Backbone, random_expert: Any, random_examples: Any) -> None:
        with pytest.raises(BackboneMismatchError, match=f"tiny-t5.*{t5.fingerprint}.*tiny-bert.*{bert.fingerprint}"):
            fisher_diagonal(bert, random_expert(t5), random_examples(2))

    def test_examples_of_two_tasks(self, bert: Backbone, random_expert: Any, random_examples: Any) -> None:
        mixed = [*random_examples(2), *random_examples(2, choices=("la", "mi"))]
        with pytest.raises(RefusedError, match="different answer choices"):
            fisher_diagonal(bert, random_expert(bert), mixed)
