"""Text encoders (BERT, MiniLM, MPNet …): a choice's score is the cosine to its label text's embedding, over τ.

There is no classification head, so the bare backbone already answers (zero-shot) and every task has the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pituning.backbones.base import Backbone, Batch, biased_modules, common_choices, require_text_only
from pituning.backbones.loss import label_smoothed_nll
from pituning.errors import RefusedError
from pituning.example import Example

TEMPERATURE = (
    0.05  # τ of DESIGN §4: cosines lie within about ±0.3 of each other, softmax wants differences of several nats
)

# Query/value are the modules of the LoRA paper; the bottleneck follows the attention output and the FFN output projections;
# IA3 rescales keys, values and what goes into the FFN output projection; a prefix goes in front of self-attention.
_TARGETS = {
    "lora": ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "attn.q", "attn.v", "Wqkv"),
    "bottleneck": ("attention.output.dense", "output.dense", "attn.o", "out_lin", "lin2", "out_proj", "fc2"),
    "ia3": ("key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "attn.k", "attn.v", "output.dense", "lin2", "fc2"),
    "prefix": ("attention.self", "self_attn", "attention"),
}
_UNUSED = ("pooler.dense",)  # its output takes no part in mean pooling


class EncoderBackbone(Backbone):
    """A frozen text encoder with mean pooling; label texts are encoded once, by the bare backbone.

    Args:
        max_length: tokens kept of each input; longer inputs are cut at the end.
    """

    family = "encoder"

    def __init__(
        self, name: str, model: nn.Module, tokenizer: Any, *, device: str | torch.device = "cpu", max_length: int = 128
    ) -> None:
        super().__init__(name, model, tokenizer, device=device)
        self.max_length = max_length
        self._label_embeddings: dict[tuple[tuple[str, ...], str], Tensor] = {}

    def adaptable(self, method: str) -> list[str]:
        """See :meth:`Backbone.adaptable`."""
        if method == "bitfit":
            return biased_modules(self, skip=_UNUSED)
        if method == "prompt":
            raise RefusedError(
                f"backbone {self.name!r}: a soft prompt is not there for the {self.family!r} family, which reads and pools its "
                "text in one module; prefix is"
            )
        names = [n for n, m in self.model.named_modules() if method == "prefix" or isinstance(m, nn.Linear)]
        present = [w for w in _TARGETS.get(method, ()) if any(n == w or n.endswith("." + w) for n in names)]
        if method == "prefix":
            return present[:1]  # BERT has an "attention" around its "attention.self"
        if method == "ia3":
            return [n for w in present for n in ([w] if w != "output.dense" else _feedforward_outputs(names))]
        # "output.dense" is a suffix of "attention.output.dense": keep the general name only.
        return [p for p in present if not any(p != q and p.endswith("." + q) for q in present)]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """See :meth:`Backbone.collate`. Pairs are joined by the tokenizer's own separator.

        Raises:
            RefusedError: for examples with images.
        """
        require_text_only(self, examples)
        choices = common_choices(examples)
        batch = self._tokenize([e.texts for e in examples])
        if choices:
            batch["label_embeddings"] = self.label_embeddings(choices)
            if all(e.target for e in examples):
                batch["target"] = torch.tensor([e.label for e in examples], device=self.device)
        return batch

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """See :meth:`Backbone.loss`: cross-entropy over the task's choices."""
        if "target" not in batch:
            raise RefusedError(
                "an encoder backbone needs a closed answer set with an answer for every example of the batch"
            )
        logits = self._logits(batch, batch["label_embeddings"])
        if label_smoothing:
            return label_smoothed_nll(logits[:, None], batch["target"][:, None], label_smoothing)
        return F.cross_entropy(logits, batch["target"], reduction="none")

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """See :meth:`Backbone.score`."""
        return self._logits(batch, self.label_embeddings(tuple(choices)))

    def embed(self, batch: Batch) -> Tensor:
        """Unit-length mean-pooled embeddings, shape ``[batch, hidden]``."""
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        hidden = self.model(**inputs).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def label_embeddings(self, choices: tuple[str, ...]) -> Tensor:
        """Embeddings of the label texts by the backbone *without* expert, shape ``[choices, hidden]``; cached.

        They are computed in the model's own precision whatever block the call is in, since a later one takes them, too.
        """
        key = choices, self.model.config._attn_implementation  # each rounds in its own way
        if key not in self._label_embeddings:
            with torch.no_grad(), self.bare(), torch.autocast(self.device.type, enabled=False):
                self._label_embeddings[key] = self.embed(self._tokenize([(c,) for c in choices]))
        return self._label_embeddings[key]

    def _logits(self, batch: Batch, labels: Tensor) -> Tensor:
        embedded = self.embed(batch)
        return embedded @ labels.T.to(embedded) / TEMPERATURE

    def _tokenize(self, texts: Sequence[tuple[str, ...]]) -> dict[str, Any]:
        first = [t[0] for t in texts]
        second = [t[1] for t in texts] if len(texts[0]) > 1 else None
        encoded = self.tokenizer(
            first, second, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return dict(encoded.to(self.device))


def _feedforward_outputs(names: Sequence[str]) -> list[str]:
    """The FFN's own modules, as ``0.output.dense``: the suffix ``output.dense`` stands for the attention's output too."""
    ends = [".".join(n.split(".")[-3:]) for n in names if n.endswith(".output.dense")]
    return [e for e in ends if not e.startswith("attention.")]
