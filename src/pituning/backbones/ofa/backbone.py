"""OFA as a backbone: per-example loss, choice scoring, text and boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pituning.backbones.base import Backbone, Batch, biased_modules
from pituning.backbones.ofa.answers import score_answers, target_log_probs
from pituning.backbones.ofa.constraints import TokenTrie
from pituning.backbones.ofa.generation import BeamSettings, beam_search
from pituning.backbones.ofa.modeling import OFAEncoderOutput, OFAForConditionalGeneration
from pituning.backbones.ofa.processing import OFAProcessor
from pituning.data.images import open_image
from pituning.errors import DataError, PituningError, RefusedError
from pituning.example import Box, DecoderPrompt, Example

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
    searches_choices = True

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
        self._closed = lru_cache(maxsize=8)(self._answer_set)  # 3,129 answers take a while to cut into tokens

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

        ``choices`` holds each example's answers; ``sizes`` the width and height of its image in pixels, for boxes;
        ``decoder_prompts`` ``[batch, length]``, where an example has one, what the decoder reads before the answer.

        Raises:
            DataError: for an image that cannot be read, or a target that is not among the example's answers.
        """
        for example in examples:
            if example.choices and example.target and example.target not in example.choices:
                raise DataError(
                    f"example {example.id!r}: its target {example.target!r} is not one of its answers: "
                    f"{', '.join(map(repr, example.choices[:8]))}"
                )
        images = [None if e.image is None else open_image(e.image, e.id) for e in examples]
        batch = self.processor(texts=[e.prompt for e in examples], images=images)
        targets = [self._target(e, None if i is None else i.size) for e, i in zip(examples, images, strict=True)]
        moved = {k: v.to(self.device) for k, v in batch.items() if k in INPUTS}
        kinds = [e.decoder_prompt for e in examples]
        if any(kind != "none" for kind in kinds):
            moved["decoder_prompts"] = self._decoder_prompts(batch, kinds)
        return {
            **moved,
            "targets": targets,
            "choices": [e.choices for e in examples],
            "sizes": [None if i is None else i.size for i in images],
        }

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """See :meth:`Backbone.loss`: −log p of the whole target, its end included."""
        if unknown := [n for n, target in enumerate(batch["targets"]) if target is None]:
            raise DataError(
                f"the examples {unknown} of the batch have no answer, so there is no loss; they can be answered"
            )
        return -target_log_probs(
            self.model,
            self._encode(batch),
            batch["targets"],
            tries=[self._closed(c)[1] if c else None for c in batch["choices"]],
            decoder_prompts=batch.get("decoder_prompts"),
            label_smoothing=label_smoothing,
        )

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """See :meth:`Backbone.score`: log p of each choice, normalised over the choices.

        Raises:
            RefusedError: if there are no choices.
        """
        if not choices:
            raise RefusedError("there is nothing to score: these examples have no choices; use loss or generate")
        answers, trie = self._closed(tuple(choices))
        prompts = batch.get("decoder_prompts")
        return score_answers(self.model, self._encode(batch), answers, trie=trie, decoder_prompts=prompts)

    def generate(self, batch: Batch, **options: Any) -> list[str]:
        """See :meth:`Backbone.generate`.

        Args:
            options: ``num_beams`` (default 5), ``max_new_tokens`` and the other fields of :class:`BeamSettings`; ``choices``,
                the only answers that may be written; or, with ``do_sample=True``, the settings of ``model.generate``.

        Raises:
            PituningError: for a setting that does not exist.
        """
        prompts = batch.get("decoder_prompts")
        lengths = [0] * len(batch["choices"]) if prompts is None else self._lengths(prompts)
        if options.pop("do_sample", False):
            rows = list(self._draw(batch, options, lengths))
        else:
            choices = tuple(options.pop("choices", ()))
            renamed = {_BEAM_NAMES.get(name, name): value for name, value in options.items()}
            settings = _changed(TEXT_SEARCH, renamed)
            # the search counts the prompt's tokens, the caller the answer's
            settings = replace(
                settings,
                max_len_b=settings.max_len_b + max(lengths),
                min_len=settings.min_len + min(lengths) if settings.min_len else 0,
            )
            answers, trie = self._closed(choices) if choices else ([], None)
            found = beam_search(self.model, self._encode(batch), settings, trie=trie, decoder_prompts=prompts)
            rows = [hypotheses[0].tokens for hypotheses in found]
            if choices:
                known = dict(zip(map(tuple, answers), choices, strict=True))
                return [known[tuple(row[length:-1].tolist())] for row, length in zip(rows, lengths, strict=True)]
        texts = [self.processor.decode(row[length:].tolist()) for row, length in zip(rows, lengths, strict=True)]
        return [text.strip() for text in texts]

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

    def _draw(self, batch: Batch, options: Mapping[str, Any], lengths: Sequence[int]) -> Tensor:
        """Sampled sequences behind their prompts, without the start token."""
        inputs = {k: batch[k] for k in INPUTS if k in batch}
        if any(lengths):
            if len(set(lengths)) > 1:
                raise RefusedError(
                    "answers are drawn together only for decoder prompts of equal length: draw one by one"
                )
            start = batch["decoder_prompts"].new_full((len(lengths), 1), self.processor.bos_id)
            inputs["decoder_input_ids"] = torch.cat([start, batch["decoder_prompts"]], dim=1)
        settings = {"max_new_tokens": TEXT_SEARCH.max_len_b, **options}
        drawn: Tensor = self.model.generate(**inputs, **settings, do_sample=True)
        return drawn[:, 1:]

    def _decoder_prompts(self, batch: Mapping[str, Tensor], kinds: Sequence[DecoderPrompt]) -> Tensor:
        sources = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        prompts = [self.processor.decoder_prompt(s, kind)[1:] for s, kind in zip(sources, kinds, strict=True)]
        rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        return pad_sequence(rows, batch_first=True, padding_value=self.processor.pad_id).to(self.device)

    def _lengths(self, prompts: Tensor) -> list[int]:
        lengths: list[int] = (prompts != self.processor.pad_id).sum(1).tolist()
        return lengths

    def _answer(self, text: str) -> list[int]:
        return self.processor.encode(text if text.startswith(" ") else f" {text}")

    def _target(self, example: Example, size: tuple[int, int] | None) -> list[int] | None:
        if not example.target:
            return None
        if example.box is None:
            if example.choices:
                return self._answer(example.target)
            return self.processor.encode(example.before_target + example.target.lstrip())
        if size is None:
            raise RefusedError(f"example {example.id!r} has a box but no image")
        return self.processor.encode_box(example.box, size)

    def _answer_set(self, choices: tuple[str, ...]) -> tuple[list[list[int]], TokenTrie]:
        answers = [self._answer(c) for c in choices]
        return answers, TokenTrie(answers)


def _changed(settings: BeamSettings, options: Mapping[str, Any]) -> BeamSettings:
    known = {f.name for f in fields(BeamSettings)}
    if unknown := sorted(set(options) - known):
        raise PituningError(f"beam search has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return replace(settings, **options)
