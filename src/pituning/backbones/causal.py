"""Decoder-only language models (Llama, Qwen, GPT-2 …): a choice's score is the log-probability of its tokens and the end.

An answer is tokenised apart from its prompt, so that all choices follow the very same tokens: with a chat template the
answer stands right behind the template's opening of the assistant's turn, otherwise :attr:`CausalBackbone.separator`
stands in front of it and belongs to its tokens. Only the answer's tokens and its end are counted, never the prompt's.

Prompts are padded on the left and answers on the right. The padding is masked, and positions are counted from each
prompt's first token, so it has no part in any result; the end token fills it, whether the tokenizer can pad or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from pituning.backbones.base import Backbone, Batch, biased_modules, require_text_only
from pituning.backbones.loss import IGNORED, label_smoothed_nll
from pituning.errors import PituningError, RefusedError
from pituning.example import Example

# These bound how many choices are scored in one pass: 0.5 GB of logits in float32, and as many cached keys and values.
LOGITS_PER_PASS = 2**27
TOKENS_PER_PASS = 2**15
MAX_LENGTH = 512
MAX_NEW_TOKENS = 64

# What templates may be told: some open a chain of thought, and some write today's date into every prompt.
_TEMPLATE_OPTIONS: Mapping[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_PROBE = "ANSWER"

# Llama's and its relatives' names first, then those of GPT-2, NeoX, Falcon, Phi, OPT and GPT-J. Query/value are the modules
# of the LoRA paper (all three projections where they are one); the bottleneck follows attention and FFN; IA3 rescales
# keys, values and what goes into the FFN's output projection.
_LORA_TARGETS = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv")
_KEY_VALUE = ("k_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv")
_ATTENTION_OUTPUTS = (
    "o_proj", "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.dense", "self_attn.out_proj",
    "attn.out_proj",
)  # fmt: skip
_FFN_OUTPUTS = ("down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2", "fc_out")
_SELF_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")


class CausalBackbone(Backbone):
    """A frozen Hugging Face decoder-only language model.

    Args:
        max_length: tokens kept of each prompt, chat template included; by default :data:`MAX_LENGTH`, or half of the
            model's positions where that is less. Longer prompts lose their *beginning*: the question stands at the end.
            Beginning-of-sequence token and template stay whole. Answers are never cut.
        chat: whether the prompt becomes the user's turn and the answer the assistant's, ended by the template's own
            end-of-turn token. ``"auto"``: where the tokenizer has a chat template; ``chat=False`` turns that off.
        separator: stands between prompt and answer where there is no chat; by default a space, or nothing where the
            tokenizer puts a space in front of every text by itself (Llama 2).

    Attributes:
        chat: whether the chat template is used.
        separator: as above; empty with chat.
        end: id of the token that ends an answer.

    Raises:
        PituningError: if the tokenizer has no end-of-sequence token, or a chat template that cannot be used, or the
            model has fewer positions than ``max_length``.
        RefusedError: for quantised models, and for architectures in which padding cannot be kept out of the results.
    """

    family = "causal"

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        *,
        device: str | torch.device = "cpu",
        max_length: int | None = None,
        chat: bool | Literal["auto"] = "auto",
        separator: str | None = None,
    ) -> None:
        _require_plain_attention(name, model)
        super().__init__(name, model, tokenizer, device=device)
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if chat is True and not has_template:
            raise PituningError(f"backbone {name!r}: chat=True, but its tokenizer has no chat template; use chat=False")
        self.chat = has_template if chat == "auto" else chat
        self.separator = "" if self.chat else self._usual_separator() if separator is None else separator
        self.end = self._end_of_turn() if self.chat else self._end_of_sequence()
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self._positions: int | None = positions if isinstance(positions, int) and positions > 0 else None
        self.max_length = max_length or min(MAX_LENGTH, (self._positions or 2 * MAX_LENGTH) // 2)
        if self._positions and self.max_length > self._positions:
            raise PituningError(
                f"backbone {name!r}: max_length={self.max_length}, but the model has {self._positions} positions, for "
                "prompt and answer together"
            )

    @property
    def prompting(self) -> dict[str, Any]:
        """See :attr:`Backbone.prompting`."""
        return {"chat": self.chat, "separator": self.separator}

    def __repr__(self) -> str:
        turns = "; prompts are chat turns, chat=False makes them plain text" if self.chat else ""
        return super().__repr__().removesuffix(")") + turns + ")"

    def adaptable(self, method: str) -> list[str]:
        """See :meth:`Backbone.adaptable`.

        Raises:
            RefusedError: for ``bitfit`` on models without biases (Llama), and where the output projections of attention or
                FFN are no Linear modules, as in some mixtures of experts.
        """
        if method == "prompt":
            return [self.model.base_model_prefix]
        if method == "bitfit":
            return biased_modules(self)
        if method == "prefix":
            return self._present(_SELF_ATTENTIONS, nn.Module)[:1]
        if method == "lora":
            return self._present(_LORA_TARGETS)
        first = self._present(_KEY_VALUE if method == "ia3" else _ATTENTION_OUTPUTS)
        second = self._present(_FFN_OUTPUTS)
        if not (first and second):
            raise RefusedError(
                f"backbone {self.name!r} ({type(self.model).__name__}): {method} adapts attention and FFN, but no Linear "
                f"module of a known name is in the {'FFN' if first else 'attention'}; give target_modules=[...], or use lora"
            )
        return first + second

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """See :meth:`Backbone.collate`.

        Returns:
            ``input_ids`` and ``attention_mask``, the prompts padded on the left, ``[batch, prompt tokens]``; ``labels``,
            the answers' tokens and end, −100 behind them, ``[batch, answer tokens]``.

        Raises:
            RefusedError: for examples with images.
            PituningError: if a prompt cannot be cut to ``max_length``, or prompt and answer exceed the model's positions.
        """
        require_text_only(self, examples)
        prompts = [torch.tensor(self._prompt(e)) for e in examples]
        labels = self._labels([e.target for e in examples])
        for example, prompt, answer in zip(examples, prompts, labels, strict=True):
            total = len(prompt) + int((answer != IGNORED).sum())
            if self._positions and total > self._positions:
                raise PituningError(
                    f"example {example.id!r} has {total} tokens, prompt and answer, but backbone {self.name!r} has "
                    f"{self._positions} positions; use a smaller max_length"
                )
        return {
            "input_ids": _left_padded(prompts, self.end).to(self.device),
            "attention_mask": _left_padded([torch.ones_like(p) for p in prompts], 0).to(self.device),
            "labels": labels.to(self.device),
        }

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """See :meth:`Backbone.loss`: −log p of the whole answer, its end included, given the prompt."""
        labels = batch["labels"]
        said, answered = self._said(labels)
        ids = torch.cat([batch["input_ids"], said], dim=1)
        mask = torch.cat([batch["attention_mask"], answered], dim=1)
        logits = self._run(ids, mask, labels.shape[1], use_cache=False).logits
        return label_smoothed_nll(logits, labels, label_smoothing)

    def score(self, batch: Batch, choices: Sequence[str]) -> Tensor:
        """See :meth:`Backbone.score`: log p of each choice as the whole answer, its end included.

        The model reads the prompts once per pass, and continues them from the cached keys and values with (example, choice)
        pairs, an example's in successive rows: example b and choice c in row b · choices + c. A pass has all examples, and
        as many choices as keep it within :data:`LOGITS_PER_PASS` logits and :data:`TOKENS_PER_PASS` tokens.

        Raises:
            RefusedError: if there are no choices.
        """
        if not choices:
            raise RefusedError("there is nothing to score: these examples have no choices; use loss or generate")
        labels = self._labels(choices).to(self.device)
        examples, tokens = batch["input_ids"].shape
        logits = examples * labels.shape[1] * int(self.model.get_output_embeddings().weight.shape[0])
        held = examples * (tokens + labels.shape[1])
        scores = []
        for part in torch.split(labels, max(1, min(LOGITS_PER_PASS // logits, TOKENS_PER_PASS // held))):
            losses = label_smoothed_nll(self._continued(batch, part), part.repeat(examples, 1))
            scores.append(-losses.view(examples, len(part)))
        return torch.cat(scores, dim=1)

    def generate(self, batch: Batch, **options: Any) -> list[str]:
        """See :meth:`Backbone.generate`: greedy, or beam search with ``num_beams``; the new text alone, without its end.

        Args:
            options: settings of ``model.generate``. Unless they or the model's own generation settings bound the
                answer's length, it has at most :data:`MAX_NEW_TOKENS` tokens. ``do_sample=True`` draws from the model's own
                distribution unless they say otherwise.
        """
        settings = {"do_sample": False, **options}
        if settings["do_sample"]:
            settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
        defaults = settings.get("generation_config", self.model.generation_config)
        if not (settings.get("max_new_tokens") or settings.get("max_length") or defaults.max_new_tokens):
            settings["max_new_tokens"] = MAX_NEW_TOKENS
        ends = {self.end, *_as_ids(defaults.eos_token_id)}
        settings = {"eos_token_id": sorted(ends), "pad_token_id": self.end, **settings}
        ids = batch["input_ids"]
        rows = self.model.generate(input_ids=ids, attention_mask=batch["attention_mask"], **settings)
        return [self._text(row, ends) for row in rows[:, ids.shape[1] :].tolist()]

    def _continued(self, batch: Batch, labels: Tensor) -> Tensor:
        """Logits of every choice behind every prompt, ``[examples · choices, tokens, vocabulary]``."""
        examples, choices = len(batch["input_ids"]), len(labels)
        mask = batch["attention_mask"]
        prompts = self._run(batch["input_ids"], mask, 1, use_cache=True)
        first: Tensor = prompts.logits.repeat_interleave(choices, dim=0)
        if labels.shape[1] == 1:
            return first
        said, answered = self._said(labels.repeat(examples, 1))
        mask = torch.cat([mask.repeat_interleave(choices, dim=0), answered], dim=1)
        cache = prompts.past_key_values
        cache.batch_repeat_interleave(choices)
        rest = self._run(said, mask, said.shape[1], past_key_values=cache, use_cache=True).logits
        return torch.cat([first, rest], dim=1)

    def _run(self, ids: Tensor, mask: Tensor, keep: int, **options: Any) -> Any:
        """The model on the last tokens of a sequence; ``mask`` covers all of it, the logits ``keep`` positions at its end."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, **options)

    def _said(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the model has read of the answers when it says their last tokens, and its mask, ``[rows, tokens − 1]``."""
        answered = labels[:, :-1] != IGNORED
        return labels[:, :-1].masked_fill(~answered, self.end), answered.long()

    def _labels(self, answers: Sequence[str]) -> Tensor:
        rows = [torch.tensor([*self._tokens(self.separator + a), self.end]) for a in answers]
        return pad_sequence(rows, batch_first=True, padding_value=IGNORED)

    def _prompt(self, example: Example) -> list[int]:
        """Token ids of an example's prompt, its beginning cut off where it is too long."""
        text = example.prompt
        ids = self._prompt_ids(text)
        while (excess := len(ids) - self.max_length) > 0:
            if not self.tokenizer.is_fast:
                raise PituningError(
                    f"example {example.id!r}: its prompt has {len(ids)} tokens, max_length={self.max_length}, and the "
                    f"tokenizer of backbone {self.name!r} does not say where in the text they lie; use a larger max_length"
                )
            places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if excess >= len(places):
                raise PituningError(
                    f"example {example.id!r}: max_length={self.max_length} leaves no room for the prompt beside the "
                    f"{len(ids) - len(places)} tokens that backbone {self.name!r} puts around it; use a larger one"
                )
            text = text[places[excess - 1][1] :].lstrip()
            ids = self._prompt_ids(text)
        return ids

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self.chat:
            return self._tokens(self._rendered([{"role": "user", "content": prompt}], add_generation_prompt=True))
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if ids and ids[-1] == self.end:  # an end that the tokenizer adds to every text
            ids = ids[:-1]
        bos = self.tokenizer.bos_token_id
        return ids or [self.end if bos is None else bos]  # the first token of an answer must follow something

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, tokens: list[int], ends: set[int]) -> str:
        length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return str(self.tokenizer.decode(tokens[:length], skip_special_tokens=True)).strip()

    def _rendered(self, turns: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=add_generation_prompt, tokenize=False, **_TEMPLATE_OPTIONS
            )
        except TemplateError as error:
            raise PituningError(
                f"backbone {self.name!r}: its chat template fails ({error}); chat=False goes without"
            ) from error
        return str(text)

    def _end_of_turn(self) -> int:
        """The first special token behind an answer in the template."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
        _, found, tail = self._rendered(turns).rpartition(_PROBE)
        ends = [token for token in self._tokens(tail) if token in self.tokenizer.added_tokens_decoder]
        if not (found and ends):
            raise PituningError(
                f"backbone {self.name!r}: its chat template puts no special token behind the assistant's turn, so an answer "
                "would have no end; chat=False goes without"
            )
        return int(ends[0])

    def _end_of_sequence(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise PituningError(
                f"backbone {self.name!r}: its tokenizer has no eos_token, so an answer would have no end; set "
                "tokenizer.eos_token and save the tokenizer beside the model"
            )
        return int(self.tokenizer.eos_token_id)

    def _usual_separator(self) -> str:
        tokens = self.tokenizer.convert_ids_to_tokens(self._tokens("a"))
        if not tokens:
            raise PituningError(
                f"backbone {self.name!r}: its tokenizer ({type(self.tokenizer).__name__}) makes no token of the text 'a', so "
                "it was not read as it was saved; look into tokenizer.json and tokenizer_config.json beside the model"
            )
        return "" if tokens[0].startswith("▁") else " "

    def _present(self, wanted: Sequence[str], kinds: Any = (nn.Linear, Conv1D)) -> list[str]:
        names = [n for n, m in self.model.named_modules() if isinstance(m, kinds)]
        return [w for w in wanted if any(n.endswith("." + w) for n in names)]


def require_unquantized(name: str, config: Any) -> None:
    """Raise if a model's weights are quantised to 8 or fewer bits.

    Raises:
        RefusedError: names the kind of quantisation.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        kind = (
            settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
        )
        raise RefusedError(
            f"backbone {name!r} is quantised ({getattr(kind, 'value', kind)}): its fingerprint, exact gradients and merging "
            "into its weights are not defined; load the model that it was made from, with dtype=torch.bfloat16 to save "
            "memory"
        )


def _require_plain_attention(name: str, model: Any) -> None:
    """Raise unless attention mask and positions keep padding out of what a model computes."""
    require_unquantized(name, model.config)
    kind = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise RefusedError(
            f"backbone {name!r} ({kind}) has recurrent layers, whose state a mask does not keep free of padding; use a model "
            "of attention layers alone, such as Llama, Qwen3 or GPT-2"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise RefusedError(
            f"backbone {name!r} ({kind}) takes no position_ids, so padding on the left would shift its positions; use a "
            "model that does, such as Llama, Qwen3 or GPT-2"
        )


def _left_padded(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def _as_ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
