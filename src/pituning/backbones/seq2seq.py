"""Encoder-decoders (T5, FLAN-T5, BART …): a choice's score is the log-probability of its tokens given the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from pituning.backbones.base import Backbone, Batch, biased_modules, require_text_only
from pituning.backbones.loss import IGNORED, label_smoothed_nll
from pituning.errors import PituningError, RefusedError
from pituning.example import Example

PAIRS_PER_PASS = 512  # bounds the logits of one decoder pass: 512 pairs × 8 tokens × 32k words are 0.5 GB in float32
MAX_NEW_TOKENS = 64

# T5's names, then BART's. Query/value are the modules of the LoRA paper, in cross-attention too; the bottleneck follows
# self-attention and FFN and leaves cross-attention alone (π-Tuning §3); IA3 rescales keys, values, in cross-attention too,
# and what goes into the second projection of the FFN (Liu et al., 2022); a prefix goes in front of self-attention.
_TARGETS = {
    "lora": ("q", "v", "q_proj", "v_proj"),
    "bottleneck": ("SelfAttention.o", "DenseReluDense.wo", "self_attn.out_proj", "fc2"),
    "ia3": ("k", "v", "DenseReluDense.wo", "k_proj", "v_proj", "fc2"),
    "prefix": ("SelfAttention", "self_attn"),
}


class Seq2SeqBackbone(Backbone):
    """A frozen Hugging Face encoder-decoder.

    Args:
        max_length: tokens kept of each prompt; longer prompts are cut at the end. Targets are never cut.

    Raises:
        PituningError: if the tokenizer has no padding or no end-of-sequence token.
    """

    family = "seq2seq"

    def __init__(
        self, name: str, model: nn.Module, tokenizer: Any, *, device: str | torch.device = "cpu", max_length: int = 256
    ) -> None:
        for role in ("pad_token", "eos_token"):
            if getattr(tokenizer, role) is None:
                raise PituningError(
                    f"backbone {name!r}: its tokenizer has no {role}, which an encoder-decoder needs; "
                    f"set tokenizer.{role} and save the tokenizer beside the model"
                )
        super().__init__(name, model, tokenizer, device=device)
        self.max_length = max_length

    def adaptable(self, method: str) -> list[str]:
        """See :meth:`Backbone.adaptable`."""
        if method == "bitfit":
            return biased_modules(self)
        if method == "prompt":
            return ["encoder", "decoder"]
        names = [n for n, m in self.model.named_modules() if method == "prefix" or isinstance(m, nn.Linear)]
        return [w for w in _TARGETS.get(method, ()) if any(n.endswith("." + w) for n in names)]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """See :meth:`Backbone.collate`. ``labels`` holds the targets' tokens and end, shape ``[batch, tokens]``.

        Raises:
            RefusedError: for examples with images.
        """
        require_text_only(self, examples)
        encoded = self.tokenizer(
            [e.prompt for e in examples],
            padding=True,
            padding_side="right",  # BART counts positions from the left edge
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": self._labels([e.target for e in examples]),
        }

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """See :meth:`Backbone.loss`: −log p of the whole target, its end included."""
        return self._losses(
            batch["labels"],
            label_smoothing,
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
        )

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """See :meth:`Backbone.score`: log p of each choice as the whole answer, its end included.

        The encoder runs once. The decoder sees (example, choice) pairs, an example's in successive rows: example b and
        choice c in row b · choices + c.
        More than :data:`PAIRS_PER_PASS` pairs take several passes, each with all examples and some of the choices.

        Raises:
            RefusedError: if there are no choices.
        """
        if not choices:
            raise RefusedError("there is nothing to score: these examples have no choices; use loss or generate")
        model: Any = self.model
        mask = batch["attention_mask"]
        hidden = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)[0]
        examples = len(hidden)
        scores = []
        for labels in torch.split(self._labels(choices), max(1, PAIRS_PER_PASS // examples)):
            losses = self._losses(
                labels.repeat(examples, 1),
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden.repeat_interleave(len(labels), dim=0)),
                attention_mask=mask.repeat_interleave(len(labels), dim=0),
            )
            scores.append(-losses.view(examples, len(labels)))
        return torch.cat(scores, dim=1)

    def generate(self, batch: Batch, **options: Any) -> list[str]:
        """See :meth:`Backbone.generate`: greedy, or beam search with ``num_beams``; special tokens are left out.

        Args:
            options: settings of ``model.generate``. Unless they or the model's own generation settings bound the
                answer's length, it has at most :data:`MAX_NEW_TOKENS` tokens.
        """
        model: Any = self.model
        settings = {"do_sample": False, **options}
        defaults = settings.get("generation_config", model.generation_config)
        if not any(settings.get(limit) or getattr(defaults, limit) for limit in ("max_new_tokens", "max_length")):
            settings["max_new_tokens"] = MAX_NEW_TOKENS
        tokens = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
        answers: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return answers

    def _losses(self, labels: Tensor, label_smoothing: float = 0.0, **inputs: Any) -> Tensor:
        """−log p(labels | inputs), smoothed, summed over tokens: ``[rows, tokens]`` to ``[rows]``."""
        model: Any = self.model
        shifted = model.prepare_decoder_input_ids_from_labels(labels)
        logits = model(**inputs, decoder_input_ids=shifted, use_cache=False).logits
        if label_smoothing:
            return label_smoothed_nll(logits, labels, label_smoothing)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view_as(labels).sum(dim=1)

    def _labels(self, targets: Sequence[str]) -> Tensor:
        end = self.tokenizer.eos_token_id
        rows = self.tokenizer(text_target=list(targets))["input_ids"]
        ended = [torch.tensor(row if end in row else [*row, end]) for row in rows]
        return pad_sequence(ended, batch_first=True, padding_value=IGNORED).to(self.device)
