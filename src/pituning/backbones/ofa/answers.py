"""Log-probabilities of given answers: all candidates of a closed set, or each example's own target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pituning.backbones.loss import label_smoothed_nll
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.constraints import Readout, TokenTrie, allowed_mask, special_tokens
from pituning.backbones.ofa.modeling import OFAEncoderOutput, OFAForConditionalGeneration
from pituning.errors import PituningError

ROWS_PER_PASS = 128  # bounds the logits of one decoder pass: 128 rows × 4 tokens × 59k words are 122 MB in float32
NEVER = float("-inf")


def score_answers(
    model: OFAForConditionalGeneration,
    inputs: Mapping[str, Tensor] | OFAEncoderOutput,
    answers: Sequence[Sequence[int]],
    *,
    trie: TokenTrie | None = None,
    decoder_prompts: Tensor | None = None,
    rows_per_pass: int = ROWS_PER_PASS,
) -> Tensor:
    """Log-probability of each candidate as the whole answer to each example, its end included: ``[batch, answers]``.

    Differentiable, in whatever mode the model is. The encoder runs once and no encoded source is repeated. Over a trie,
    answers with a common beginning share its decoder row, and a token that is the only one allowed has probability 1 and
    is not computed.

    Args:
        inputs: the encoder's arguments, or what it returned for them.
        answers: tokens, without start and end.
        trie: normalise every token's probability over the tokens that this trie allows there; over a trie of all the
            answers the probabilities of the answers then sum to one.
        decoder_prompts: ``[batch, length]``, tokens between the start token and the answer, padded on the right; they
            have no share in the log-probability.
        rows_per_pass: decoder rows, (example, answer) pairs, computed together.

    Raises:
        PituningError: if an answer is not in the trie.
    """
    encoded = encoded_inputs(model, inputs)
    batch = len(encoded.last_hidden_state)
    prompts = prompt_rows(decoder_prompts, batch, model.config)
    readout = Readout(model, None if trie is None else trie.tokens())
    if trie is not None:
        return _scores_over_trie(model, encoded, prompts, answers, trie, readout, rows_per_pass)
    order = sorted(range(len(answers)), key=lambda n: len(answers[n]))  # answers of similar length need less padding
    count = max(1, rows_per_pass // batch)
    passes: list[Tensor] = []
    for start in range(0, len(order), count):
        chunk = [answers[n] for n in order[start : start + count]]
        pairs = [_Pair(prompt, answer, None) for prompt in prompts for answer in chunk]
        passes.append(_pair_log_probs(model, encoded, pairs, readout).view(batch, len(chunk)))
    if not passes:
        return torch.zeros(batch, 0, dtype=readout.dtype, device=readout.device)
    scores = torch.cat(passes, dim=1)
    return scores.index_select(1, torch.tensor(order, device=scores.device).argsort())


def _scores_over_trie(
    model: OFAForConditionalGeneration,
    encoded: OFAEncoderOutput,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    trie: TokenTrie,
    readout: Readout,
    rows_per_pass: int,
) -> Tensor:
    """``[batch, answers]``: log p of the tokens at which an answer parts from others."""
    eos = special_tokens(model.config)[2]
    next_tokens: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # beginning → (answer, its next token)
    for index, answer in enumerate(answers):
        _require_in(trie, answer)
        for position, token in enumerate([*answer, eos]):
            next_tokens.setdefault(tuple(answer[:position]), []).append((index, token))
    choices = {prefix: found for prefix, found in next_tokens.items() if len(trie.allowed_next(prefix)) > 1}
    batch, device = len(prompts), readout.device
    scores = torch.zeros(batch, len(answers), dtype=readout.dtype, device=device)
    rows = _longest(choices)
    count = max(1, rows_per_pass // batch)
    for start in range(0, len(rows), count):
        chunk = rows[start : start + count]
        decoded = _decoded(model, encoded, [[*prompt, *row[-1]] for prompt in prompts for row in chunk])
        prefixes = [prefix for row in chunk for prefix in row]
        of_row = torch.tensor([n for n, row in enumerate(chunk) for _ in row], device=device)
        length = torch.tensor([len(prefix) for prefix in prefixes], device=device)
        prompted = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        hidden = decoded[torch.arange(batch, device=device)[:, None] * len(chunk) + of_row, prompted + length]
        allowed = allowed_mask([(trie, prefix) for prefix in prefixes], readout)
        log_p = readout(hidden.flatten(0, 1)).view(batch, len(prefixes), -1).masked_fill(~allowed, NEVER).log_softmax(2)
        taken = [(place, *choice) for place, prefix in enumerate(prefixes) for choice in choices[prefix]]
        places, indices, tokens = (torch.tensor(values, device=device) for values in zip(*taken, strict=True))
        scores = scores.index_add(1, indices, log_p[:, places, readout.columns(tokens)])
    return scores


def _longest(prefixes: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """The beginnings that no other one begins with, each behind those that it begins with itself and no earlier one has.

    >>> _longest([(), (5,), (5, 9), (7,)])
    [[(7,)], [(), (5,), (5, 9)]]
    """
    rows: list[list[tuple[int, ...]]] = []
    for prefix in sorted(prefixes):  # right before the first of those that begin with it
        if rows and prefix[: len(rows[-1][-1])] == rows[-1][-1]:
            rows[-1].append(prefix)
        else:
            rows.append([prefix])
    return sorted(rows, key=lambda row: len(row[-1]))  # rows of similar length need less padding


def _require_in(trie: TokenTrie, answer: Sequence[int]) -> None:
    if answer not in trie:
        raise PituningError(f"the answer with the tokens {list(answer)} is not in the trie: insert it, or use no trie")


def target_log_probs(
    model: OFAForConditionalGeneration,
    inputs: Mapping[str, Tensor] | OFAEncoderOutput,
    targets: Sequence[Sequence[int]],
    *,
    tries: Sequence[TokenTrie | None] | None = None,
    decoder_prompts: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Log-probability of each example's own target, its end included: ``[batch]``.

    Args:
        targets: one per example; otherwise as in :func:`score_answers`.
        tries: one per example, ``None`` where every token is allowed.
        label_smoothing: ε of :func:`label_smoothed_nll`, spread over the tokens that a trie allows; the result is then
            minus that loss.

    Raises:
        PituningError: if a target is not in its trie, or their numbers differ from the batch.
    """
    encoded = encoded_inputs(model, inputs)
    batch = len(encoded.last_hidden_state)
    tries = [None] * batch if tries is None else tries
    if len(targets) != batch or len(tries) != batch:
        raise PituningError(f"{batch} examples need as many targets and tries, not {len(targets)} and {len(tries)}")
    prompts = prompt_rows(decoder_prompts, batch, model.config)
    known = [trie for trie in tries if trie is not None]
    allowed = sorted({token for trie in set(known) for token in trie.tokens()}) if len(known) == batch else None
    pairs = [_Pair(*pair) for pair in zip(prompts, targets, tries, strict=True)]
    return _pair_log_probs(model, encoded, pairs, Readout(model, allowed), label_smoothing)


class _Pair(NamedTuple):
    """A decoder row to be scored."""

    prompt: Sequence[int]
    answer: Sequence[int]
    trie: TokenTrie | None


def _pair_log_probs(
    model: OFAForConditionalGeneration,
    encoded: OFAEncoderOutput,
    pairs: Sequence[_Pair],
    readout: Readout,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``[pairs]``; only the positions that write an answer are projected."""
    eos = special_tokens(model.config)[2]
    row, place, target, prefixes = [], [], [], []
    for index, (prompt, answer, trie) in enumerate(pairs):
        if trie is not None:
            _require_in(trie, answer)
        for position, token in enumerate([*answer, eos]):
            row.append(index)
            place.append(len(prompt) + position)
            target.append(token)
            prefixes.append((trie, tuple(answer[:position])))
    device = encoded.last_hidden_state.device
    rows, places, targets = (torch.tensor(x, device=device) for x in (row, place, target))
    decoded = _decoded(model, encoded, [[*p.prompt, *p.answer] for p in pairs])
    logits, columns = readout(decoded[rows, places]), readout.columns(targets)
    allowed = allowed_mask(prefixes, readout) if any(p.trie is not None for p in pairs) else None
    if label_smoothing:
        shown = None if allowed is None else allowed[:, None]
        log_p = -label_smoothed_nll(logits[:, None], columns[:, None], label_smoothing, shown)
    else:
        log_p = -F.cross_entropy(
            logits if allowed is None else logits.masked_fill(~allowed, NEVER), columns, reduction="none"
        )
    return log_p.new_zeros(len(pairs)).index_add(0, rows, log_p)


def _decoded(model: OFAForConditionalGeneration, encoded: OFAEncoderOutput, rows: Sequence[Sequence[int]]) -> Tensor:
    """The decoder's last states ``[rows, 1 + longest, d_model]``, the start token's first."""
    bos = special_tokens(model.config)[0]
    written = pad_sequence([torch.tensor([bos, *row]) for row in rows], batch_first=True)
    written = written.to(encoded.last_hidden_state.device)
    # padding stands behind everything that is read, where the causal mask hides it
    states: Tensor = model.model.decoder(written, encoded, attention_mask=torch.ones_like(written))["last_hidden_state"]
    return states


def encoded_inputs(
    model: OFAForConditionalGeneration, inputs: Mapping[str, Tensor] | OFAEncoderOutput
) -> OFAEncoderOutput:
    if isinstance(inputs, OFAEncoderOutput):
        return inputs
    encoded: OFAEncoderOutput = model.get_encoder()(**inputs)
    return encoded


def prompt_rows(decoder_prompts: Tensor | None, batch: int, config: OFAConfig) -> list[list[int]]:
    """Each example's decoder prompt without padding."""
    if decoder_prompts is None:
        return [[] for _ in range(batch)]
    pad = special_tokens(config)[1]
    if decoder_prompts.dim() != 2 or len(decoder_prompts) != batch:
        raise PituningError(f"decoder_prompts must have the shape [{batch}, length], not {list(decoder_prompts.shape)}")
    padding = decoder_prompts == pad
    if (padding[:, :-1] & ~padding[:, 1:]).any():
        raise PituningError("decoder_prompts must be padded on the right: there are tokens behind padding")
    return [[token for token in row if token != pad] for row in decoder_prompts.tolist()]
