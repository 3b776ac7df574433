"""Beam search against the enumeration of all sequences, and scores of answers against one full forward pass each."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pituning.backbones.ofa.answers import score_answers, target_log_probs
from pituning.backbones.ofa.constraints import TokenTrie
from pituning.backbones.ofa.generation import BeamSettings, Hypothesis, beam_search
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.errors import PituningError
from tests.backbones.ofa.conftest import build_ofa

Inputs = dict[str, Tensor]
Message = Callable[..., str]
BOS, PAD, EOS, UNK = range(4)
WORDS = 8  # <s>, <pad>, </s>, <unk> and the words 4 … 7
CHOSEN = [t for t in range(WORDS) if t not in (PAD, EOS)]
LONGEST = 3
EVERYTHING = 300  # more beams than there are sequences of at most three tokens
CLOSE = {"rel": 1e-9, "abs": 1e-9}
LogProbs = dict[tuple[int, ...], Tensor]


@pytest.fixture(scope="module")
def small() -> OFAForConditionalGeneration:
    """Eight tokens, in float64, so that all sequences can be enumerated."""
    return build_ofa(torch.float64, vocab_size=WORDS)


@pytest.fixture(scope="module")
def small_inputs() -> Inputs:
    """Three examples: one padded, one whose image is ignored."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, WORDS, (3, 6), generator=generator)
    tokens[1, 4:] = PAD
    images = torch.randn(3, 3, 32, 48, generator=generator, dtype=torch.float64)
    return {"input_ids": tokens, "patch_images": images, "patch_masks": torch.tensor([True, True, False])}


@pytest.fixture(scope="module")
def logits(small: OFAForConditionalGeneration, small_inputs: Inputs) -> list[LogProbs]:
    """Of each example, the next token's logits behind every beginning, computed alone and without a cache."""
    return [logits_by_prefix(small, example(small_inputs, n)) for n in range(3)]


def example(inputs: Inputs, n: int) -> Inputs:
    """One example alone, without padding."""
    length = int((inputs["input_ids"][n] != PAD).sum())
    return {k: v[n : n + 1, :length] if k == "input_ids" else v[n : n + 1] for k, v in inputs.items()}


def logits_by_prefix(model: OFAForConditionalGeneration, inputs: Inputs) -> LogProbs:
    sequences = list(itertools.product([t for t in range(WORDS) if t != PAD], repeat=LONGEST))
    tokens = torch.tensor([(BOS, *s) for s in sequences])
    repeated = {k: v.expand(len(tokens), *v.shape[1:]) for k, v in inputs.items()}
    with torch.no_grad():
        found = model(**repeated, decoder_input_ids=tokens).logits
    return {s[:n]: row[n] for s, row in zip(sequences, found, strict=True) for n in range(LONGEST + 1)}


def enumerate_all(
    logits: LogProbs,
    settings: BeamSettings,
    allowed: Callable[[tuple[int, ...]], set[int]],
    prompt: tuple[int, ...] = (),
) -> dict[tuple[int, ...], tuple[float, list[float]]]:
    """Score and positional scores of every sequence that the settings and ``allowed`` admit, by their definitions."""
    known: dict[tuple[int, ...], Tensor] = {}

    def log_p(prefix: tuple[int, ...]) -> Tensor:
        if prefix not in known:
            forbidden = torch.ones(WORDS, dtype=torch.bool)
            forbidden[list(range(WORDS)) if len(prefix) < len(prompt) else sorted(allowed(prefix[len(prompt) :]))] = (
                False
            )
            scaled = logits[prefix] / settings.temperature
            if settings.renormalize:
                scaled = scaled.masked_fill(forbidden, -math.inf)
            known[prefix] = (scaled - scaled.logsumexp(0)).masked_fill(forbidden, -math.inf)
            known[prefix][UNK] -= settings.unk_penalty
        return known[prefix]

    found = {}
    for length in range(max(settings.min_len, len(prompt)), settings.max_len_b + 1):
        for rest in itertools.product(CHOSEN, repeat=length - len(prompt)):
            sequence = (*prompt, *rest, EOS)
            positional = [float(log_p(sequence[:n])[token]) for n, token in enumerate(sequence)]
            size, whole = settings.no_repeat_ngram_size, (BOS, *sequence)
            grams = [whole[i : i + size] for i in range(len(whole) - size + 1)]
            if min(positional) > -math.inf and (not size or len(set(grams)) == len(grams)):
                norm = (length + 1) ** settings.length_penalty if settings.normalize else 1
                found[sequence] = sum(positional) / norm, positional
    return found


def check_complete(
    hypotheses: Sequence[Hypothesis], expected: Mapping[tuple[int, ...], tuple[float, list[float]]]
) -> None:
    """All sequences, each with its score, best first."""
    assert {tuple(h.tokens.tolist()) for h in hypotheses} == set(expected)
    assert len(hypotheses) == len(expected) > 0
    for hypothesis in hypotheses:
        score, positional = expected[tuple(hypothesis.tokens.tolist())]
        assert hypothesis.score == pytest.approx(score, **CLOSE)
        assert hypothesis.positional_scores.tolist() == pytest.approx(positional, **CLOSE)
    assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)


ANSWERS = [[4], [4, 5], [4, 5, 6], [7, 4], [6]]
TRIE = TokenTrie(ANSWERS)
ANY: dict[str, Any] = {}
SEARCHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, ANY),
    ({"normalize": False}, ANY),
    ({"length_penalty": 0.3}, ANY),
    ({"length_penalty": 2.0, "min_len": 2}, ANY),
    ({"min_len": 0, "max_len_b": 2}, ANY),
    ({"min_len": 3, "temperature": 1.7}, ANY),
    ({"temperature": 0.5, "unk_penalty": 0.7}, ANY),
    ({"no_repeat_ngram_size": 1}, ANY),
    ({"no_repeat_ngram_size": 2, "min_len": 0}, ANY),
    ({}, {"trie": TRIE}),
    ({"renormalize": False, "temperature": 1.3}, {"trie": TRIE}),
    ({"min_len": 2, "normalize": False}, {"trie": TRIE}),
    ({"no_repeat_ngram_size": 1, "unk_penalty": 2.0}, {"trie": TokenTrie([[4, 4], [4, 3, 5], [6]])}),
    ({"unk_penalty": 0.4}, {"allowed_range": (6, 8)}),
    ({"renormalize": False}, {"allowed_range": (4, 7)}),
    ({"min_len": 0}, {"only": (5, 8)}),
    ({"renormalize": False, "min_len": 2}, {"only": (6, 8)}),
    ({"no_repeat_ngram_size": 2, "temperature": 0.8}, {"only": (4, 6)}),
]


def allowed_by(constraint: Mapping[str, Any]) -> Callable[[tuple[int, ...]], set[int]]:
    """What each constraint means: the allowed tokens behind a sequence."""
    if "trie" in constraint:
        return lambda prefix: set(constraint["trie"].allowed_next(prefix))
    if "only" in constraint:
        return lambda prefix: {EOS, *range(*constraint["only"])}
    if "allowed_range" in constraint:
        return lambda prefix: {BOS, PAD, EOS, UNK, *range(*constraint["allowed_range"])}
    return lambda prefix: set(range(WORDS))


@pytest.mark.parametrize(("settings", "constraint"), SEARCHES)
def test_a_beam_that_is_wide_enough_finds_every_sequence(
    small: OFAForConditionalGeneration,
    small_inputs: Inputs,
    logits: list[LogProbs],
    settings: dict[str, Any],
    constraint: dict[str, Any],
) -> None:
    wanted = BeamSettings(**{"beam": EVERYTHING, "max_len_b": LONGEST, **settings})
    found = beam_search(small, small_inputs, wanted, **constraint)
    for n, hypotheses in enumerate(found):
        check_complete(hypotheses, enumerate_all(logits[n], wanted, allowed_by(constraint)))


@pytest.mark.parametrize("constraint", [ANY, {"trie": TRIE}, {"only": (5, 8)}, {"allowed_range": (6, 8)}])
@pytest.mark.parametrize("renormalize", [True, False])
def test_prompts_of_different_lengths(
    small: OFAForConditionalGeneration,
    small_inputs: Inputs,
    logits: list[LogProbs],
    constraint: dict[str, Any],
    renormalize: bool,
) -> None:
    # the last one holds an end token, as the reference's prompt type "src" does
    prompts = [(), (4,), (EOS, 7)]
    padded = torch.tensor([[*p, *[PAD] * (2 - len(p))] for p in prompts])
    settings = BeamSettings(beam=EVERYTHING, min_len=2, max_len_b=LONGEST, temperature=1.2, renormalize=renormalize)
    found = beam_search(small, small_inputs, settings, decoder_prompts=padded, **constraint)
    for n, prompt in enumerate(prompts):
        check_complete(found[n], enumerate_all(logits[n], settings, allowed_by(constraint), prompt))


@pytest.mark.parametrize("only", [(4, 8), (6, 8)])
@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_a_narrow_beam_is_the_definition_followed_step_by_step(
    small: OFAForConditionalGeneration,
    small_inputs: Inputs,
    logits: list[LogProbs],
    beam: int,
    temperature: float,
    only: tuple[int, int],
) -> None:
    settings = BeamSettings(beam=beam, min_len=0, max_len_b=LONGEST, temperature=temperature)
    found = beam_search(small, small_inputs, settings, only=only)
    allowed = [EOS, *range(*only)]
    for n, hypotheses in enumerate(found):
        live, ended = {(): 0.0}, {}
        for step in range(LONGEST + 1):
            total = {
                (*prefix, token): score + float(log_p)
                for prefix, score in live.items()
                for token, log_p in zip(allowed, (logits[n][prefix][allowed] / temperature).log_softmax(0), strict=True)
                if step < LONGEST or token == EOS
            }
            best = sorted(total, key=lambda s: -total[s])[: 2 * beam]
            for sequence in [s for s in best[:beam] if s[-1] == EOS][: beam - len(ended)]:
                ended[sequence] = total[sequence] / len(sequence)
            live = {s: total[s] for s in [s for s in best if s[-1] != EOS][:beam]}
            if len(ended) == beam:
                break
        assert [tuple(h.tokens.tolist()) for h in hypotheses] == sorted(ended, key=lambda s: -ended[s])
        assert [h.score for h in hypotheses] == pytest.approx(sorted(ended.values(), reverse=True), **CLOSE)


def test_the_longest_length_depends_on_the_padded_source(
    small: OFAForConditionalGeneration, small_inputs: Inputs
) -> None:
    settings = BeamSettings(beam=2, min_len=7, max_len_a=0.9, max_len_b=2)  # int(0.9 · 6 + 2)
    for hypotheses in beam_search(small, small_inputs, settings):
        assert [len(h.tokens) for h in hypotheses] == [8, 8]
    encoded = small.get_encoder()(**small_inputs)
    assert [len(h[0].tokens) for h in beam_search(small, encoded, settings, source_length=6)] == [8, 8, 8]
    # 32 target positions, one of which writes the end
    settings = BeamSettings(beam=1, min_len=31)
    assert [len(h[0].tokens) for h in beam_search(small, small_inputs, settings)] == [32, 32, 32]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_repeated(ofa: OFAForConditionalGeneration, inputs: Inputs, size: int) -> None:
    def repeats(settings: BeamSettings) -> int:
        count = 0
        for hypothesis in itertools.chain(*beam_search(ofa, inputs, settings)):
            whole = [BOS, *hypothesis.tokens.tolist()]
            grams = [tuple(whole[i : i + size]) for i in range(len(whole) - size + 1)]
            count += len(grams) - len(set(grams))
        return count

    assert repeats(BeamSettings(beam=4, min_len=25, max_len_b=25)) > 0
    assert repeats(BeamSettings(beam=4, min_len=25, max_len_b=25, no_repeat_ngram_size=size)) == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"trie": TokenTrie([[5, 9], [5, 20, 7], [30], [30, 5], [40, 41, 42]])}, {"only": (70, 90)}, {"prompts": True}],
)
def test_a_sentence_does_not_depend_on_its_batch(inputs: Inputs, options: dict[str, Any]) -> None:
    ofa = build_ofa(torch.float64)
    inputs["patch_images"] = inputs["patch_images"].double()
    prompts = torch.tensor([[7, PAD, PAD], [8, 9, 10], [PAD, PAD, PAD]]) if "prompts" in options else None
    constraint = {k: v for k, v in options.items() if k != "prompts"}
    settings = BeamSettings(beam=3, min_len=2, max_len_b=6)
    together = beam_search(ofa, inputs, settings, decoder_prompts=prompts, **constraint)
    for n, hypotheses in enumerate(together):
        own = None if prompts is None else prompts[n : n + 1, : int((prompts[n] != PAD).sum())]
        [alone] = beam_search(ofa, example(inputs, n), settings, decoder_prompts=own, **constraint)
        assert len(hypotheses) == len(alone) > 0
        for one, other in zip(hypotheses, alone, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.score == pytest.approx(other.score, **CLOSE)


def test_finished_sentences_leave_the_batch(small: OFAForConditionalGeneration, small_inputs: Inputs) -> None:
    shapes: list[tuple[int, int]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        shapes.append((len(arguments[0]), len(arguments[1].last_hidden_state)))

    handle = small.model.decoder.register_forward_pre_hook(note)
    found = beam_search(small, small_inputs, BeamSettings(beam=2, min_len=0, max_len_b=12), only=(4, 7))
    handle.remove()
    last_steps = [max(len(h.tokens) for h in hypotheses) for hypotheses in found]
    assert len(set(last_steps)) > 1, "all sentences end together: this test shows nothing"
    open_sentences = [sum(last > step for last in last_steps) for step in range(max(last_steps))]
    assert shapes == [(n * (2 if step else 1), n) for step, n in enumerate(open_sentences)]


def test_a_search_ends_with_its_last_possible_sequence(
    small: OFAForConditionalGeneration, small_inputs: Inputs
) -> None:
    steps: list[int] = []
    handle = small.model.decoder.register_forward_pre_hook(lambda m, a: steps.append(len(a[0])))
    found = beam_search(small, small_inputs, BeamSettings(beam=7, max_len_b=30), trie=TRIE)
    handle.remove()
    assert [len(hypotheses) for hypotheses in found] == [len(ANSWERS)] * 3
    assert len(steps) == 1 + max(map(len, ANSWERS))


def test_the_search_leaves_no_trace(inputs: Inputs) -> None:
    ofa = build_ofa(dropout=0.5)
    settings = BeamSettings(beam=2, max_len_b=4)
    expected = beam_search(ofa, inputs, settings)
    ofa.model.decoder.train()
    ofa.model.decoder.layers[0].eval()
    modes = {name: module.training for name, module in ofa.named_modules()}
    found = beam_search(ofa, inputs, settings)
    assert {name: module.training for name, module in ofa.named_modules()} == modes
    assert torch.is_grad_enabled()
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert not one.positional_scores.requires_grad
    ofa.model.encoder.embed_tokens.weight.data.fill_(math.nan)
    with pytest.raises(PituningError):
        beam_search(ofa, inputs, settings)
    assert {name: module.training for name, module in ofa.named_modules()} == modes


class Doubled(nn.Linear):
    """A head that is more than its weight, as an adapter would make it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("constraint", [{"trie": TRIE}, {"only": (5, 8)}])
def test_a_head_that_is_adapted_runs_as_it_is(
    small: OFAForConditionalGeneration, small_inputs: Inputs, constraint: dict[str, Any]
) -> None:
    adapted = build_ofa(torch.float64, vocab_size=WORDS)
    adapted.lm_head.__class__ = Doubled
    settings = {"beam": 3, "min_len": 0, "max_len_b": 3}
    found = beam_search(adapted, small_inputs, BeamSettings(**settings), **constraint)
    expected = beam_search(small, small_inputs, BeamSettings(**settings, temperature=0.5), **constraint)
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.score == pytest.approx(other.score, **CLOSE)


def test_searches_that_cannot_be(small: OFAForConditionalGeneration, small_inputs: Inputs, message: Message) -> None:
    def search(settings: dict[str, Any], **constraint: Any) -> list[list[Hypothesis]]:
        return beam_search(small, small_inputs, BeamSettings(**settings), **constraint)

    assert "temperature = 0 makes no search" in message(BeamSettings, temperature=0)
    assert "beam = 0 makes no search" in message(BeamSettings, beam=0)
    assert "exclude one another" in message(search, {}, trie=TRIE, only=(4, 6))
    assert "(3, 6)" in message(search, {}, only=(3, 6))
    assert "(4, 9)" in message(search, {}, allowed_range=(4, 9))
    assert "at most 2 tokens" in message(search, {"min_len": 3, "max_len_b": 2})
    prompts = torch.full((3, 4), 5)
    assert "4 tokens of the longest decoder prompt" in message(search, {"max_len_b": 3}, decoder_prompts=prompts)
    assert "[3, length], not [2, 4]" in message(search, {}, decoder_prompts=prompts[:2])
    prompts[1, 0] = PAD
    assert "padded on the right" in message(search, {}, decoder_prompts=prompts)
    # both answers are longer than two tokens
    text = message(search, {"max_len_b": 2}, trie=TokenTrie([[4, 5, 6], [4, 4, 4]]))
    assert "sentences [0, 1, 2] of the batch" in text
    encoded = small.get_encoder()(**small_inputs)
    assert "give source_length" in message(beam_search, small, encoded, BeamSettings(max_len_a=1.0))


def test_greedy_search_is_the_one_of_transformers(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    found = beam_search(ofa, inputs, BeamSettings(beam=1, min_len=0, max_len_b=8))
    generated = ofa.generate(**inputs, max_new_tokens=8, do_sample=False)[:, 1:].tolist()
    for [hypothesis], tokens in zip(found, generated, strict=True):
        ended = tokens.index(EOS) if EOS in tokens else 8
        assert hypothesis.tokens.tolist() == [*tokens[:ended], EOS]
    for n in range(3):
        alone = ofa.generate(**example(inputs, n), max_new_tokens=8, do_sample=False, num_beams=3)[0].tolist()
        batch = ofa.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=3)[n].tolist()
        assert alone == batch[: len(alone)]
        assert set(batch[len(alone) :]) <= {PAD}


def slow_log_p(
    model: OFAForConditionalGeneration,
    inputs: Inputs,
    answer: Sequence[int],
    trie: TokenTrie | None = None,
    prompt: Sequence[int] = (),
) -> Tensor:
    """Log p of one answer to one example, one full forward pass."""
    logits = model(**inputs, decoder_input_ids=torch.tensor([[BOS, *prompt, *answer]])).logits[0, len(prompt) :]
    total = logits.new_zeros(())
    for n, token in enumerate([*answer, EOS]):
        may = list(range(logits.shape[1])) if trie is None else trie.allowed_next(answer[:n])
        total = total + logits[n, token] - logits[n, may].logsumexp(0)
    return total


LONG_ANSWERS = [[5, 9, 30], [5], [40, 41, 42, 43, 44], [5, 9], [], [7, 5]]


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("with_trie", [False, True])
@pytest.mark.parametrize("rows_per_pass", [1, 7, 128])
def test_scores_of_answers_are_those_of_one_by_one(
    inputs: Inputs, prompted: bool, with_trie: bool, rows_per_pass: int
) -> None:
    ofa = build_ofa(torch.float64)
    inputs["patch_images"] = inputs["patch_images"].double()
    trie = TokenTrie([*LONG_ANSWERS, [50]]) if with_trie else None
    prompts = [[7, EOS, 8], [], [9]] if prompted else [[], [], []]
    padded = torch.tensor([[*p, *[PAD] * (3 - len(p))] for p in prompts]) if prompted else None
    weight = torch.randn(3, len(LONG_ANSWERS), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gradients = []
    found = score_answers(ofa, inputs, LONG_ANSWERS, trie=trie, decoder_prompts=padded, rows_per_pass=rows_per_pass)
    slow = torch.stack([
        torch.stack([slow_log_p(ofa, example(inputs, n), a, trie, prompts[n]) for a in LONG_ANSWERS]) for n in range(3)
    ])  # fmt: skip
    for scores in (found, slow):
        ofa.zero_grad()
        (scores * weight).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in ofa.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found, slow, rtol=1e-10, atol=1e-10)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-9)


def test_over_their_trie_the_probabilities_of_answers_sum_to_one(
    ofa: OFAForConditionalGeneration, inputs: Inputs
) -> None:
    with torch.no_grad():
        scores = score_answers(ofa, inputs, LONG_ANSWERS, trie=TokenTrie(LONG_ANSWERS))
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))
        assert score_answers(ofa, inputs, []).shape == (3, 0)
    # and a search as wide as the answers finds each with its score
    settings = BeamSettings(beam=len(LONG_ANSWERS), min_len=0, max_len_b=5, normalize=False)
    for n, hypotheses in enumerate(beam_search(ofa, inputs, settings, trie=TokenTrie(LONG_ANSWERS))):
        found = {tuple(h.tokens.tolist()): h.score for h in hypotheses}
        expected = {(*a, EOS): float(s) for a, s in zip(LONG_ANSWERS, scores[n], strict=True)}
        assert found == pytest.approx(expected, rel=1e-4)


def test_answers_share_the_encoded_sources(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    encoded: list[int] = []
    decoded: list[tuple[int, int]] = []
    ofa.get_encoder().register_forward_pre_hook(lambda m, a, k: encoded.append(len(k["input_ids"])), with_kwargs=True)
    ofa.model.decoder.register_forward_pre_hook(lambda m, a: decoded.append((len(a[0]), len(a[1].last_hidden_state))))
    score_answers(ofa, inputs, LONG_ANSWERS, rows_per_pass=12)
    assert encoded == [3]
    assert decoded == [(12, 3), (6, 3)]


def test_over_a_trie_only_what_tells_answers_apart_is_decoded(ofa: OFAForConditionalGeneration, inputs: Inputs) -> None:
    decoded: list[tuple[int, ...]] = []
    ofa.model.decoder.register_forward_pre_hook(lambda m, a: decoded.append(tuple(a[0].shape)))
    score_answers(ofa, inputs, LONG_ANSWERS, trie=TokenTrie(LONG_ANSWERS))
    assert decoded == [(3, 3)], "start, 5, 9: nothing else has two ways to go on"
    alone = score_answers(ofa, inputs, [[5, 9]], trie=TokenTrie([[5, 9]]))
    assert len(decoded) == 1
    assert alone.tolist() == [[0.0]] * 3, "the only answer is certain"


@pytest.mark.parametrize("rows_per_pass", [1, 20, 1000])
def test_scores_over_a_trie_of_many_branches_are_those_of_the_targets(inputs: Inputs, rows_per_pass: int) -> None:
    ofa = build_ofa(torch.float64)
    inputs["patch_images"] = inputs["patch_images"].double()
    drawn = random.Random(0)
    answers = [list(a) for a in {tuple(drawn.choices(range(4, 8), k=drawn.randrange(5))) for _ in range(60)}]
    trie = TokenTrie(answers)
    prompts = torch.tensor([[PAD, PAD], [8, 9], [10, PAD]])
    asked = answers[::2]
    with torch.no_grad():
        found = score_answers(ofa, inputs, asked, trie=trie, decoder_prompts=prompts, rows_per_pass=rows_per_pass)
        for n, answer in enumerate(asked):
            one = target_log_probs(ofa, inputs, [answer] * 3, tries=[trie] * 3, decoder_prompts=prompts)
            torch.testing.assert_close(found[:, n], one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_tries", ["none", "some", "all", "one"])
def test_each_example_has_a_target_of_its_own(inputs: Inputs, with_tries: str) -> None:
    ofa = build_ofa(torch.float64)
    inputs["patch_images"] = inputs["patch_images"].double()
    targets = [[5, 9, 30], [7], [40, 41]]
    own: list[TokenTrie | None] = [TokenTrie([t, [11], [5, 12]]) for t in targets]
    tries = {"none": None, "some": [own[0], None, own[2]], "all": own, "one": [TokenTrie(targets)] * 3}[with_tries]
    prompts = torch.tensor([[PAD, PAD], [8, 9], [10, PAD]])
    found = target_log_probs(ofa, inputs, targets, tries=tries, decoder_prompts=prompts)
    for n, target in enumerate(targets):
        prompt = [t for t in prompts[n].tolist() if t != PAD]
        slow = slow_log_p(ofa, example(inputs, n), target, None if tries is None else tries[n], prompt)
        torch.testing.assert_close(found[n], slow, rtol=1e-10, atol=1e-10)


def test_answers_that_cannot_be_scored(ofa: OFAForConditionalGeneration, inputs: Inputs, message: Message) -> None:
    assert "[4] is not in the trie" in message(score_answers, ofa, inputs, [[4, 5], [4]], trie=TokenTrie([[4, 5]]))
    assert "3 examples need as many targets" in message(target_log_probs, ofa, inputs, [[4], [5]])


def test_a_trie_knows_what_may_follow() -> None:
    trie = TokenTrie(ANSWERS)
    for length in range(4):
        for prefix in itertools.product(range(4, WORDS), repeat=length):
            follow = {([*a, EOS])[length] for a in ANSWERS if tuple(a[:length]) == prefix and len(a) >= length}
            assert trie.allowed_next(prefix) == (sorted(follow) or [EOS])
            assert (prefix in trie) == (list(prefix) in ANSWERS)
    assert trie.tokens() == [EOS, 4, 5, 6, 7]


def test_a_trie_refuses_the_end_token_inside_a_sequence(message: Message) -> None:
    assert "[4, 2, 5] holds the end token 2" in message(TokenTrie, [[4, EOS, 5]])
