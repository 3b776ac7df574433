"""Beam search with the semantics of OFA's own code.

`model.generate` cannot give the same scores by any settings: it forces the end of a sequence, orders the temperature among
the other rules and handles finished beams differently.

Source: the behaviour of fairseq's sequence generator (Ott et al., "fairseq", NAACL 2019) with the constraints that OFA adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pituning.backbones.ofa.answers import encoded_inputs, prompt_rows
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.constraints import Constraint, Readout, TokenTrie, allowed_mask, special_tokens
from pituning.backbones.ofa.modeling import OFAEncoderOutput, OFAForConditionalGeneration, new_cache
from pituning.errors import PituningError

UNK = 3
NEVER = float("-inf")


@dataclass(frozen=True)
class BeamSettings:
    """How to search. Lengths do not count the end token, but do count the tokens of a decoder prompt.

    Args:
        beam: hypotheses per sentence; 1 is greedy search.
        min_len: fewest tokens of a hypothesis.
        max_len_a, max_len_b: most tokens, ``int(max_len_a · source_length + max_len_b)``, where the source's length is
            that of the padded batch; never more than the model's target positions leave room for.
        length_penalty: a hypothesis' score is Σ log p / (tokens with the end) ** ``length_penalty``; above 1 favours long
            ones.
        normalize: False takes Σ log p itself as the score.
        temperature: divides the logits, before anything else.
        no_repeat_ngram_size: no n-gram of this size occurs twice in a hypothesis, the start token included; 0 is off.
        unk_penalty: subtracted from the log-probability of ``<unk>``.
        renormalize: constraints take part in the softmax, so that the probabilities of what is allowed sum to one; False
            keeps the probabilities of the whole vocabulary and only drops what is not allowed (the reference's zero-shot
            setting).

    Raises:
        PituningError: for values that make no search.
    """

    beam: int = 5
    min_len: int = 1
    max_len_a: float = 0.0
    max_len_b: int = 200
    length_penalty: float = 1.0
    normalize: bool = True
    temperature: float = 1.0
    no_repeat_ngram_size: int = 0
    unk_penalty: float = 0.0
    renormalize: bool = True

    def __post_init__(self) -> None:
        for name, valid in (
            ("beam", self.beam >= 1),
            ("min_len", self.min_len >= 0),
            ("temperature", self.temperature > 0),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0),
        ):
            if not valid:
                raise PituningError(f"BeamSettings: {name} = {getattr(self, name)} makes no search")


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """One finished sequence, on the CPU.

    Attributes:
        tokens: ``[length]``, without the start token, with the decoder prompt if there was one, and with the end token.
        score: what hypotheses are ordered by, larger is better.
        positional_scores: ``[length]``, each token's log-probability.
    """

    tokens: Tensor
    score: float
    positional_scores: Tensor


def beam_search(
    model: OFAForConditionalGeneration,
    inputs: Mapping[str, Tensor] | OFAEncoderOutput,
    settings: BeamSettings | None = None,
    *,
    trie: TokenTrie | None = None,
    allowed_range: tuple[int, int] | None = None,
    only: tuple[int, int] | None = None,
    decoder_prompts: Tensor | None = None,
    source_length: int | None = None,
) -> list[list[Hypothesis]]:
    """The best hypotheses of each sentence, best first: ``beam`` of them, or fewer where constraints leave fewer.

    The model is in eval mode for the time of the search.

    Args:
        inputs: the encoder's arguments, or what it returned for them.
        trie: every hypothesis is one of its sequences (behind the decoder prompt).
        allowed_range: ``(start, end)``: only tokens of that range and the four special symbols, as the reference has it;
            padding is never chosen, but the start token and ``<unk>`` can be.
        only: ``(start, end)``: every token before the end token is of that range, as boxes need it.
        decoder_prompts: ``[batch, length]``, tokens with which each hypothesis must begin, behind the start token, padded
            on the right. They are scored without constraints.
        source_length: number of source tokens, for ``max_len_a`` where ``inputs`` are encoded already.

    Raises:
        PituningError: for constraints or lengths that contradict each other, and where no sequence satisfies them.
    """
    settings = settings or BeamSettings()
    with _evaluating(model), torch.no_grad():
        if not isinstance(inputs, OFAEncoderOutput):
            source_length = inputs["input_ids"].shape[1] if source_length is None else source_length
        encoded = encoded_inputs(model, inputs)
        prompts = prompt_rows(decoder_prompts, len(encoded.last_hidden_state), model.config)
        max_len = _max_len(settings, source_length, prompts, model.config)
        constraint = Constraint.of(trie, allowed_range, only, model.config)
        found = _search(model, encoded, _Rules(model, settings, max_len, constraint, prompts))
    if empty := [n for n, hypotheses in enumerate(found) if not hypotheses]:
        raise PituningError(
            f"no sequence of {settings.min_len} to {max_len} tokens satisfies the constraints for the sentences {empty} of "
            f"the batch ({settings}): allow longer or shorter sequences or other tokens; if there are no constraints, the "
            "model's output is not a number"
        )
    return [sorted(hypotheses, key=lambda h: -h.score) for hypotheses in found]


class _Beams(NamedTuple):
    """What is being searched: one row per sentence at the first step, then ``beam``.

    Attributes:
        sentences: ``[sentences]``, their places in the batch.
        tokens: ``[sentences, rows, steps + 1]``, from the start token on.
        history: ``[sentences, rows, steps]``, cumulative log-probabilities; a row at −∞ is dead and only fills the beam.
    """

    sentences: Tensor
    tokens: Tensor
    history: Tensor


class _Candidates(NamedTuple):
    """Continuations, best first, ``[sentences, candidates]``.

    Attributes:
        total: cumulative log-probabilities.
        parent: the rows that are continued.
        token: what they are continued with.
        ends: whether this ends a hypothesis.
    """

    total: Tensor
    parent: Tensor
    token: Tensor
    ends: Tensor


def _search(model: OFAForConditionalGeneration, encoded: OFAEncoderOutput, rules: _Rules) -> list[list[Hypothesis]]:
    """Hypotheses of each sentence, in the order in which they were finished."""
    beam, cache = rules.settings.beam, new_cache()
    sentences = torch.arange(len(encoded.last_hidden_state), device=encoded.last_hidden_state.device)
    tokens = sentences.new_full((len(sentences), 1, 1), rules.bos)
    beams = _Beams(sentences, tokens, tokens.new_zeros(len(sentences), 1, 0, dtype=rules.readout.dtype))
    found: list[list[Hypothesis]] = [[] for _ in range(len(sentences))]
    for _ in range(rules.max_len + 1):
        decoded = model.model.decoder(beams.tokens[..., -1].view(-1, 1), encoded, past_key_values=cache)
        candidates = rules.candidates(decoded["last_hidden_state"][:, -1], beams)
        remaining = [found[n] for n in beams.sentences.tolist()]
        # an end counts only among the best `beam` candidates
        for sentence, place in candidates.ends[:, :beam].nonzero().tolist():
            hypotheses = remaining[sentence]
            if len(hypotheses) < beam:
                hypotheses.append(_hypothesis(beams, candidates, sentence, place, rules.settings))
        # each row has one end, so 2 · beam candidates hold at least `beam` that go on
        order = candidates.ends.int().argsort(dim=1, stable=True)[:, :beam]
        going = _Candidates(*(x.gather(1, order) for x in candidates))
        full = sentences.new_tensor([len(hypotheses) == beam for hypotheses in remaining], dtype=torch.bool)
        keep = (~full & (going.total[:, 0] > NEVER)).nonzero()[:, 0]
        if not len(keep):
            break
        if len(keep) < len(full):
            encoded = _select(encoded, keep)
            cache.cross_attention_cache.batch_select_indices(keep)  # one entry per sentence, not per row
        beams, rows = _extend(beams, going, keep)
        cache.self_attention_cache.batch_select_indices(rows)
    return found


def _extend(beams: _Beams, going: _Candidates, keep: Tensor) -> tuple[_Beams, Tensor]:
    """The beams of the sentences ``keep`` one token later, and the former decoder row that each row continues."""
    going = _Candidates(*(x[keep] for x in going))
    former = keep[:, None], going.parent
    tokens = torch.cat([beams.tokens[former], going.token[..., None]], dim=2)
    history = torch.cat([beams.history[former], going.total[..., None]], dim=2)
    rows = former[0] * beams.tokens.shape[1] + former[1]
    return _Beams(beams.sentences[keep], tokens, history), rows.flatten()


def _hypothesis(
    beams: _Beams, candidates: _Candidates, sentence: int, place: int, settings: BeamSettings
) -> Hypothesis:
    total, parent, token, _ = (x[sentence, place] for x in candidates)
    tokens = torch.cat([beams.tokens[sentence, parent, 1:], token[None]])
    history = torch.cat([beams.history[sentence, parent], total[None]])
    score = float(total) / (len(tokens) ** settings.length_penalty if settings.normalize else 1)
    return Hypothesis(tokens.cpu(), score, history.diff(prepend=history.new_zeros(1)).cpu())


class _Rules:
    """Everything that decides which token may come next, and its log-probability."""

    def __init__(
        self,
        model: OFAForConditionalGeneration,
        settings: BeamSettings,
        max_len: int,
        constraint: Constraint | None,
        prompts: list[list[int]],
    ) -> None:
        self.settings = settings
        self.max_len = max_len
        self.prompts = prompts
        self.longest_prompt = max(map(len, prompts), default=0)
        self.bos, self.pad, self.eos = special_tokens(model.config)
        self.trie = None if constraint is None else constraint.trie
        # where the softmax or a prompt goes over the whole vocabulary, the projection must
        narrow = constraint is not None and settings.renormalize and not any(prompts)
        self.readout = Readout(model, constraint.tokens if constraint is not None and narrow else None)
        self.fixed: Tensor | None = None
        if constraint is not None and constraint.trie is None and not narrow:
            self.fixed = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.readout.device)
            self.fixed[constraint.tokens] = True
        self._pad, self._eos, self._unk = (self.readout.slice_of(t) for t in (self.pad, self.eos, UNK))

    def candidates(self, hidden: Tensor, beams: _Beams) -> _Candidates:
        """The best 2 · beam continuations of each sentence, from hidden states ``[sentences · rows, d_model]``."""
        forced = self._forced(beams)
        log_probs, column = self._log_probs(hidden, beams, forced).topk(min(2 * self.settings.beam, self.readout.size))
        total = log_probs + beams.history[..., -1:] if beams.history.shape[2] else log_probs
        total = total.masked_fill(total.isnan(), NEVER).flatten(1)
        best, index = total.topk(min(2 * self.settings.beam, total.shape[1]))
        missing = 2 * self.settings.beam - best.shape[1]
        best, index = F.pad(best, (0, missing), value=NEVER), F.pad(index, (0, missing))
        token = self.readout.tokens_of(column.flatten(1).gather(1, index))
        ends = (token == self.eos) & (best > NEVER)
        if forced is not None:
            ends &= (forced == self.pad)[:, None]  # an end token inside a prompt ends nothing
        return _Candidates(best, index // column.shape[2], token, ends)

    def _forced(self, beams: _Beams) -> Tensor | None:
        """The token that each sentence's prompt dictates now, padding where it dictates none, ``[sentences]``."""
        step = beams.history.shape[2]
        if step >= self.longest_prompt:
            return None
        prompts = (self.prompts[n] for n in beams.sentences.tolist())
        return beams.sentences.new_tensor([p[step] if step < len(p) else self.pad for p in prompts])

    def _log_probs(self, hidden: Tensor, beams: _Beams, forced: Tensor | None) -> Tensor:
        """``[sentences, rows, columns]``, −∞ for what may not come next; NaN where the model's output is not finite."""
        logits = self.readout(hidden).view(*beams.tokens.shape[:2], -1)
        if self.settings.temperature != 1:
            logits = logits / self.settings.temperature
        allowed = self._allowed(beams, forced)
        if allowed is not None and self.settings.renormalize:
            logits = logits.masked_fill(~allowed, NEVER)
        log_probs = logits.log_softmax(dim=-1)
        if allowed is not None and not self.settings.renormalize:
            log_probs = log_probs.masked_fill(~allowed, NEVER)
        log_probs[..., self._unk] -= self.settings.unk_penalty
        if forced is None:
            return self._restrict(log_probs, beams)
        column = self.readout.columns(forced)[:, None, None].expand(-1, log_probs.shape[1], 1)
        dictated = torch.full_like(log_probs, NEVER).scatter(2, column, log_probs.gather(2, column))
        free = (forced == self.pad)[:, None, None]
        return torch.where(free, self._restrict(log_probs, beams), dictated)

    def _allowed(self, beams: _Beams, forced: Tensor | None) -> Tensor | None:
        """What the constraint allows, broadcastable to ``[sentences, rows, columns]``; everything inside a prompt."""
        if self.trie is not None:
            step = beams.history.shape[2]
            prefixes: list[tuple[TokenTrie | None, tuple[int, ...]]] = []
            for sentence, rows in zip(beams.sentences.tolist(), beams.tokens.tolist(), strict=True):
                start = len(self.prompts[sentence])
                prefixes += [(self.trie if step >= start else None, tuple(row[1 + start :])) for row in rows]
            return allowed_mask(prefixes, self.readout).view(*beams.tokens.shape[:2], -1)
        if self.fixed is None or forced is None:
            return self.fixed
        return self.fixed | (forced != self.pad)[:, None, None]

    def _restrict(self, log_probs: Tensor, beams: _Beams) -> Tensor:
        """Apply, in place, what the settings say about lengths and repetitions."""
        step = beams.history.shape[2]
        log_probs[..., self._pad] = NEVER
        if step < self.settings.min_len:
            log_probs[..., self._eos] = NEVER
        if step >= self.max_len:
            end = log_probs[..., self._eos].clone()
            log_probs.fill_(NEVER)
            log_probs[..., self._eos] = end
        size = self.settings.no_repeat_ngram_size
        if 0 < size <= step + 1:
            grams = beams.tokens.unfold(2, size, 1)
            begun = (grams[..., :-1] == beams.tokens[:, :, None, step + 2 - size :]).all(-1)
            column = self.readout.columns(grams[..., -1][begun])
            sentence, row, _ = begun.nonzero(as_tuple=True)
            known = column >= 0
            log_probs[sentence[known], row[known], column[known]] = NEVER
        return log_probs


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is in the mode it was."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _select(encoded: OFAEncoderOutput, keep: Tensor) -> OFAEncoderOutput:
    assert encoded.padding_mask is not None
    return OFAEncoderOutput(
        last_hidden_state=encoded.last_hidden_state[keep],
        padding_mask=encoded.padding_mask[keep],
        position_embeddings=encoded.position_embeddings,
    )


def _max_len(
    settings: BeamSettings, source_length: int | None, prompts: Sequence[Sequence[int]], config: OFAConfig
) -> int:
    """Most tokens before the end token."""
    if settings.max_len_a and source_length is None:
        raise PituningError("max_len_a depends on the source's length: give source_length beside the encoder's output")
    wanted = int(settings.max_len_a * (source_length or 0) + settings.max_len_b)
    max_len = min(wanted, config.max_target_positions - 1)  # the end token is written from the last position
    longest = max(map(len, prompts), default=0)
    if max_len < max(settings.min_len, longest):
        raise PituningError(
            f"at most {max_len} tokens can be generated (max_len_a {settings.max_len_a}, max_len_b {settings.max_len_b}, "
            f"{config.max_target_positions} target positions), fewer than min_len {settings.min_len} or the {longest} tokens "
            "of the longest decoder prompt"
        )
    return max_len
