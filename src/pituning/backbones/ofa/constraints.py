"""Which tokens may be written where, and the output projection restricted to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.errors import PituningError

SPECIAL = 4  # <s>, <pad>, </s> and <unk> are the first tokens of OFA's vocabulary
SLOW_ROWS = range(8, 16)  # numbers of rows for which MKL takes twice as long as for 16, or with the weight on the left


class TokenTrie:
    """The token sequences that may be generated, by their beginnings.

    Args:
        sequences: without start and end tokens.
        eos: the end token, which ends every sequence.

    >>> trie = TokenTrie([[5, 6], [5], [7]])
    >>> trie.allowed_next([]), trie.allowed_next([5]), trie.allowed_next([8])
    ([5, 7], [2, 6], [2])
    """

    def __init__(self, sequences: Iterable[Sequence[int]] = (), eos: int = 2) -> None:
        self.eos = eos
        self._children: list[dict[int, int]] = [{}]
        for sequence in sequences:
            self.insert(sequence)

    def insert(self, sequence: Sequence[int]) -> None:
        """Allow one more sequence.

        Raises:
            PituningError: if the end token is inside it.
        """
        if self.eos in sequence:
            raise PituningError(
                f"the sequence {list(sequence)} holds the end token {self.eos}: leave it out, it is added to every sequence"
            )
        node = 0
        for token in [*sequence, self.eos]:
            if token not in self._children[node]:
                self._children[node][token] = len(self._children)
                self._children.append({})
            node = self._children[node][token]

    def allowed_next(self, prefix: Sequence[int]) -> list[int]:
        """The tokens that may follow ``prefix``, ascending; the end token alone if nothing begins like that."""
        node = self._find(prefix)
        return [self.eos] if node is None else sorted(self._children[node])

    def tokens(self) -> list[int]:
        """All tokens of all sequences and the end token, ascending."""
        return sorted({self.eos}.union(*self._children))

    def __contains__(self, sequence: Sequence[int]) -> bool:
        """Whether this whole sequence may be generated."""
        node = self._find(sequence)
        return node is not None and self.eos in self._children[node]

    def _find(self, prefix: Sequence[int]) -> int | None:
        node: int | None = 0
        for token in prefix:
            node = None if node is None else self._children[node].get(token)
        return node


class Constraint(NamedTuple):
    """Tokens that can be allowed at all, and the trie that says where, if there is one."""

    tokens: list[int]
    trie: TokenTrie | None

    @classmethod
    def of(
        cls,
        trie: TokenTrie | None,
        allowed_range: tuple[int, int] | None,
        only: tuple[int, int] | None,
        config: OFAConfig,
    ) -> Constraint | None:
        if sum(x is not None for x in (trie, allowed_range, only)) > 1:
            raise PituningError("trie, allowed_range and only exclude one another: give one of them")
        if trie is not None:
            return cls(trie.tokens(), trie)
        start, end = allowed_range or only or (SPECIAL, config.vocab_size)
        if not SPECIAL <= start < end <= config.vocab_size:
            raise PituningError(
                f"the range ({start}, {end}) of tokens is not one of words: {SPECIAL} <= start < end <= {config.vocab_size}"
            )
        if allowed_range is not None:
            return cls([*range(SPECIAL), *range(start, end)], None)
        return None if only is None else cls([special_tokens(config)[2], *range(start, end)], None)


class Readout:
    """The output projection, over the whole vocabulary or only over some tokens.

    Attributes:
        size: number of columns.
        dtype: of the logits, float32 or wider.
    """

    def __init__(self, model: OFAForConditionalGeneration, tokens: Sequence[int] | None) -> None:
        head = self._head = model.lm_head
        self.device = head.weight.device
        self.dtype = torch.promote_types(head.weight.dtype, torch.float32)
        self.size = model.config.vocab_size if tokens is None else len(tokens)
        self._tokens = None if tokens is None else torch.tensor(sorted(tokens), device=self.device)
        # a head that something has been put on must run as it is
        self._weight: Tensor | None = None
        if type(head) is nn.Linear and head.bias is None:
            self._weight = head.weight if self._tokens is None else head.weight[self._tokens]

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[rows, d_model]`` to ``[rows, columns]``."""
        if self._weight is None:
            logits: Tensor = self._head(hidden)
            logits = logits if self._tokens is None else logits[:, self._tokens]
        elif len(hidden) in SLOW_ROWS:
            logits = (self._weight @ hidden.t()).t()
        else:
            logits = F.linear(hidden, self._weight)
        return logits.to(self.dtype)

    def columns(self, tokens: Tensor) -> Tensor:
        """Column of each token, −1 where it has none."""
        if self._tokens is None:
            return tokens
        column = torch.searchsorted(self._tokens, tokens).clamp(max=self.size - 1)
        return column.where(self._tokens[column] == tokens, -1)

    def slice_of(self, token: int) -> slice:
        """Where a token's column is; an empty slice if it has none."""
        column = int(self.columns(torch.tensor(token, device=self.device)))
        return slice(0, 0) if column < 0 else slice(column, column + 1)

    def tokens_of(self, columns: Tensor) -> Tensor:
        """Token of each column."""
        return columns if self._tokens is None else self._tokens[columns]


def allowed_mask(prefixes: Sequence[tuple[TokenTrie | None, tuple[int, ...]]], readout: Readout) -> Tensor:
    """What may follow each prefix in its trie, ``[prefixes, columns]``; everything where there is no trie."""
    distinct = dict.fromkeys(prefixes)
    mask = torch.zeros(len(distinct), readout.size, dtype=torch.bool, device=readout.device)
    rows: list[int] = []
    tokens: list[int] = []
    for index, (trie, prefix) in enumerate(distinct):
        if trie is None:
            mask[index] = True
        else:
            allowed = trie.allowed_next(prefix)
            rows += [index] * len(allowed)
            tokens += allowed
    mask[rows, readout.columns(torch.tensor(tokens, dtype=torch.long, device=readout.device))] = True
    index_of = {prefix: index for index, prefix in enumerate(distinct)}
    return mask[[index_of[prefix] for prefix in prefixes]]


def special_tokens(config: OFAConfig) -> tuple[int, int, int]:
    """Start, padding and end."""
    bos, pad, eos = config.decoder_start_token_id, config.pad_token_id, config.eos_token_id
    assert isinstance(bos, int)
    assert isinstance(pad, int)
    assert isinstance(eos, int)
    return bos, pad, eos
