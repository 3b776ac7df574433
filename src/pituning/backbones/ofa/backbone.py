"""OFA as a backbone: per-example loss, choice scoring, text and boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pituning.backbones.base import Backbone, Batch, biased_modules
from pituning.backbones.ofa.answers import score_answers, target_log_probs
from pituning.backbones.ofa.constraints import TokenTrie
from pituning.backbones.ofa.generation import BeamSettings, beam_search
from pituning.backbones.ofa.modeling import OFAEncoderOutput, OFAForConditionalGeneration
from pituning.backbones.ofa.processing import OFAProcessor
from pituning.data.images import open_image
from pituning.errors import DataError, PituningError, RefusedError
from pituning.example import Box, Example

INPUTS = ("input_ids", "attention_mask", "patch_images", "patch_masks")
BOX_SEARCH = BeamSettings(beam=5, min_len=4, max_len_b=4)  # the paper's evaluation of RefCOCO
TEXT_SEARCH = BeamSettings(beam=5, max_len_b=64)
_BEAM_NAMES = {"num_beams": "beam", "max_new_tokens": "max_len_b"}  # transformers' words for the same
_UNUSED = ("decoder.image_pos_ln", "decoder.code_layernorm_embedding")  # they serve sequences of image codes only


class OFABackbone(Backbone):
    """A frozen OFA.

    Where examples have a closed answer set, every token's distribution is normalised over the tokens that can still lead
    to one of the answers, in the loss as well as in the scores: log p then sums to one over the answers.

    Args:
        processor: turns text, images and boxes into the model's inputs.

    Raises:
        PituningError: if processor and model have vocabularies of different sizes.
    """

    family = "seq2seq"

    def __init__(
        self,
        name: str,
        model: OFAForConditionalGeneration,
        processor: OFAProcessor,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        if processor.vocab_size != model.config.vocab_size:
            raise PituningError(
                f"backbone {name!r}: its processor knows {processor.vocab_size} symbols, its model {model.config.vocab_size}; "
                "they do not belong together"
            )
        super().__init__(name, model, processor, device=device)
        self.processor = processor

    def adaptable(self, method: str) -> list[str]:
        """See :meth:`Backbone.adaptable`: the places of the paper's code."""
        if method == "lora":
            return ["q_proj", "k_proj", "v_proj", "out_proj"]
        if method == "bottleneck":
            return ["self_attn_output", "ffn_output"]
        if method == "prefix":
            return ["self_attn"]
        return biased_modules(self, _UNUSED) if method == "bitfit" else []

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """See :meth:`Backbone.collate`.

        ``choices`` holds each example's answers; ``sizes`` the width and height of its image in pixels, for boxes.

        Raises:
            DataError: for an image that cannot be read, or a target that is not among the example's answers.
        """
        for example in examples:
            if example.choices and example.target not in example.choices:
                raise DataError(
                    f"example {example.id!r}: its target {example.target!r} is not one of its answers: "
                    f"{', '.join(map(repr, example.choices[:8]))}"
                )
        images = [None if e.image is None else open_image(e.image, e.id) for e in examples]
        batch = self.processor(texts=[e.prompt for e in examples], images=images)
        targets = [self._target(e, None if i is None else i.size) for e, i in zip(examples, images, strict=True)]
        moved = {k: v.to(self.device) for k, v in batch.items() if k in INPUTS}
        return {
            **moved,
            "targets": targets,
            "choices": [e.choices for e in examples],
            "sizes": [None if i is None else i.size for i in images],
        }

    def loss(self, batch: Batch) -> Tensor:
        """See :meth:`Backbone.loss`: −log p of the whole target, its end included."""
        tries = {c: self._trie(c) for c in set(batch["choices"]) if c}
        return -target_log_probs(
            self.model, self._encode(batch), batch["targets"], tries=[tries.get(c) for c in batch["choices"]]
        )

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """See :meth:`Backbone.score`: log p of each choice, normalised over the choices.

        Raises:
            RefusedError: if there are no choices.
        """
        if not choices:
            raise RefusedError("there is nothing to score: these examples have no choices; use loss or generate")
        answers = [self._answer(c) for c in choices]
        return score_answers(self.model, self._encode(batch), answers, trie=TokenTrie(answers))

    def generate(self, batch: Batch, **options: Any) -> list[str]:
        """See :meth:`Backbone.generate`.

        Args:
            options: ``num_beams`` (default 5), ``max_new_tokens`` and the other fields of :class:`BeamSettings`; or, with
                ``do_sample=True``, the settings of ``model.generate``.

        Raises:
            PituningError: for a setting that does not exist.
        """
        if options.pop("do_sample", False):
            inputs = {k: batch[k] for k in INPUTS if k in batch}
            drawn = self.model.generate(
                **inputs, **{"max_new_tokens": TEXT_SEARCH.max_len_b, **options}, do_sample=True
            )
            return [self.processor.decode(row.tolist()) for row in drawn]
        renamed = {_BEAM_NAMES.get(name, name): value for name, value in options.items()}
        found = beam_search(self.model, self._encode(batch), _changed(TEXT_SEARCH, renamed))
        return [self.processor.decode(hypotheses[0].tokens.tolist()) for hypotheses in found]

    def locate(self, batch: Batch, **options: Any) -> list[Box | None]:
        """See :meth:`Backbone.locate`: four location tokens by beam search, as a box in the image's own pixels."""
        found = beam_search(
            self.model, self._encode(batch), _changed(BOX_SEARCH, options), only=self.processor.bin_range
        )
        return [
            None if size is None else self.processor.decode_box(hypotheses[0].tokens.tolist(), size)
            for hypotheses, size in zip(found, batch["sizes"], strict=True)
        ]

    def _encode(self, batch: Batch) -> OFAEncoderOutput:
        output: OFAEncoderOutput = self.model.get_encoder()(**{k: batch[k] for k in INPUTS if k in batch})
        return output

    def _answer(self, text: str) -> list[int]:
        return self.processor.encode(text if text.startswith(" ") else f" {text}")

    def _target(self, example: Example, size: tuple[int, int] | None) -> list[int]:
        if example.box is None:
            return self._answer(example.target)
        if size is None:
            raise RefusedError(f"example {example.id!r} has a box but no image")
        return self.processor.encode_box(example.box, size)

    def _trie(self, choices: Sequence[str]) -> TokenTrie:
        return TokenTrie([self._answer(c) for c in choices])


def _changed(settings: BeamSettings, options: Mapping[str, Any]) -> BeamSettings:
    known = {f.name for f in fields(BeamSettings)}
    if unknown := sorted(set(options) - known):
        raise PituningError(f"beam search has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return replace(settings, **options)
