"""Log-probabilities of given answers: all candidates of a closed set, or each example's own target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    Differentiable, in whatever mode the model is. The encoder runs once and no encoded source is repeated.

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
    order = sorted(range(len(answers)), key=lambda n: len(answers[n]))  # answers of similar length need less padding
    count = max(1, rows_per_pass // batch)
    passes: list[Tensor] = []
    for start in range(0, len(order), count):
        chunk = [answers[n] for n in order[start : start + count]]
        pairs = [_Pair(prompt, answer, trie) for prompt in prompts for answer in chunk]
        passes.append(_pair_log_probs(model, encoded, pairs, readout).view(batch, len(chunk)))
    if not passes:
        return torch.zeros(batch, 0, dtype=readout.dtype, device=readout.device)
    scores = torch.cat(passes, dim=1)
    return scores.index_select(1, torch.tensor(order, device=scores.device).argsort())


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
    bos, _, eos = special_tokens(model.config)
    row, place, target, prefixes = [], [], [], []
    for index, (prompt, answer, trie) in enumerate(pairs):
        if trie is not None and answer not in trie:
            raise PituningError(
                f"the answer with the tokens {list(answer)} is not in the trie: insert it, or use no trie"
            )
        for position, token in enumerate([*answer, eos]):
            row.append(index)
            place.append(len(prompt) + position)
            target.append(token)
            prefixes.append((trie, tuple(answer[:position])))
    device = encoded.last_hidden_state.device
    rows, places, targets = (torch.tensor(x, device=device) for x in (row, place, target))
    written = pad_sequence([torch.tensor([bos, *p.prompt, *p.answer]) for p in pairs], batch_first=True).to(device)
    # padding stands behind everything that is read, where the causal mask hides it
    decoded = model.model.decoder(written, encoded, attention_mask=torch.ones_like(written))
    logits, columns = readout(decoded["last_hidden_state"][rows, places]), readout.columns(targets)
    allowed = allowed_mask(prefixes, readout) if any(p.trie is not None for p in pairs) else None
    if label_smoothing:
        shown = None if allowed is None else allowed[:, None]
        log_p = -label_smoothed_nll(logits[:, None], columns[:, None], label_smoothing, shown)
    else:
        log_p = -F.cross_entropy(
            logits if allowed is None else logits.masked_fill(~allowed, NEVER), columns, reduction="none"
        )
    return log_p.new_zeros(len(pairs)).index_add(0, rows, log_p)


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
