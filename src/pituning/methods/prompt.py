"""Soft prompt as a PEFT tuner: trained embeddings in front of what the model reads, and nothing else.

PEFT's PROMPT_TUNING lives in ``PeftModel.forward``. Here it sits in the stack that reads the input (an encoder-decoder's
encoder, a decoder-only model's body), so that the model itself, its ``generate`` and its cache work as always:

* An encoder's output is longer by the prompt, and the decoder attends to it too, as in the source.
* A decoder-only body gives back the text's positions alone. Position ids count from the first token of the text that is
  no padding, behind the prompt, so padding on either side changes nothing.

Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021; the prompt starts as the
embeddings of tokens drawn from the vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from pituning.errors import RefusedError
from pituning.methods.tuner import OwnLayer, OwnTuner, Placement, placement_of, register

PEFT_TYPE = "SOFT_PROMPT"


@dataclass
class PromptConfig(PeftConfig):
    """Configuration of :class:`PromptModel`.

    Args:
        length: positions of the prompt.
        target_modules: names of the stacks: an encoder-decoder's encoder and decoder, or a decoder-only model's body.

    Raises:
        ValueError: for a length below 1.
    """

    length: int = field(default=20, metadata={"help": "positions of the prompt"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "names of the stacks"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.length < 1:
            raise ValueError(f"length must be at least 1, not {self.length}")


class PromptRows(nn.Module):
    """``[length, width]`` to one copy per sequence, ``[rows, length, width]``.

    A module, so that hooks on it see every example's gradient.
    """

    def forward(self, prompt: Tensor, rows: int) -> Tensor:
        """The prompt of every row."""
        return prompt.expand(rows, -1, -1)


class _StackLayer(OwnLayer):
    """A wrapped stack that answers for what it wraps: the model around it asks for configuration and embeddings."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a prompt adds positions, and no weight of the base can stand for them."""
        raise NotImplementedError("a soft prompt adds positions to the input and cannot be merged into the base model")

    def unmerge(self) -> None:
        """Refused, as :meth:`merge` is."""
        raise NotImplementedError("a soft prompt is never merged")


class PromptLayer(_StackLayer):
    """A stack that reads tokens, with prompts, one or more of which are active."""

    adapter_layer_names = ("prompt_embedding",)
    other_param_names = ("prompt_rows",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, placement: Placement) -> None:
        super().__init__(base_layer, adapter_name, placement)
        self.prompt_embedding = nn.ParameterDict()
        self.prompt_rows = nn.ModuleDict()

    @torch.no_grad()
    def update_layer(self, adapter_name: str, config: PromptConfig) -> None:
        """Add one adapter."""
        embeddings: Any = self.base_layer.get_input_embeddings()  # type: ignore[operator]
        drawn = torch.randint(embeddings.num_embeddings, (config.length,))
        self.prompt_rows[adapter_name] = PromptRows()
        self.prompt_embedding[adapter_name] = nn.Parameter(embeddings(drawn.to(embeddings.weight.device)).clone())
        self._settle(adapter_name, config.inference_mode)

    def shown(self) -> list[str]:
        """The adapters whose prompts are read, one after another."""
        if self.disable_adapters:
            return []
        return [a for a in self.active_adapters if a in self.prompt_embedding]

    def length(self) -> int:
        """Positions of all prompts that are read."""
        return sum(len(self.prompt_embedding[a]) for a in self.shown())

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The stack's output on the prompts and the text."""
        if not self.shown():
            return self.base_layer(input_ids=input_ids, **kwargs)
        if (text := kwargs.pop("inputs_embeds", None)) is None:
            text = self.base_layer.get_input_embeddings()(input_ids)  # type: ignore[operator]
        return self._read(text, **kwargs)

    def _prompted(self, text: Tensor) -> Tensor:
        """Embeddings ``[rows, tokens, width]`` behind the prompts."""
        prompts = [self.prompt_rows[a](self.prompt_embedding[a], len(text)).to(text.dtype) for a in self.shown()]
        return torch.cat([*prompts, text], dim=1)

    def _read(self, text: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        mask = _shown(attention_mask, self.length())
        return self.base_layer(inputs_embeds=self._prompted(text), attention_mask=mask, **kwargs)


class CausalPromptLayer(PromptLayer):
    """The body of a decoder-only model. Only the call that fills an empty cache reads the prompt."""

    def _read(
        self,
        text: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        length = self.length()
        mask = _shown(attention_mask, length)
        before = _tokens_before(past_key_values, length)
        _require_covering(attention_mask, before + text.shape[1])
        positions = length + _positions(position_ids, attention_mask, before, text)
        if before:
            return self.base_layer(
                inputs_embeds=text,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past_key_values,
                **kwargs,
            )
        first = torch.arange(length, device=text.device).expand(len(text), -1)
        output = self.base_layer(
            inputs_embeds=self._prompted(text),
            attention_mask=mask,
            position_ids=torch.cat([first, positions], dim=1),
            past_key_values=past_key_values,
            **kwargs,
        )
        output.last_hidden_state = output.last_hidden_state[:, length:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(h[:, length:] for h in output.hidden_states)
        return output


class PromptedDecoder(_StackLayer):
    """The decoder behind an encoder with prompts: its mask of the encoder's output is longer by them."""

    adapter_layer_names = ()

    def __init__(self, base_layer: nn.Module, encoder: PromptLayer, adapter_name: str, placement: Placement) -> None:
        super().__init__(base_layer, adapter_name, placement)
        self._encoder = (encoder,)  # a tuple, so that it is registered in its own place only

    def forward(self, *args: Any, encoder_attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The decoder's output."""
        mask = _shown(encoder_attention_mask, self._encoder[0].length())
        states = kwargs.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[1] != states.shape[1]:
            raise RefusedError(
                f"the encoder's output has {states.shape[1]} positions, its mask with the soft prompt {mask.shape[1]}: it was "
                "computed without the prompt"
            )
        return self.base_layer(*args, encoder_attention_mask=mask, **kwargs)


class PromptModel(OwnTuner):
    """PEFT tuner that puts a :class:`PromptLayer` around the stack that reads the input."""

    prefix = "prompt_"
    tuner_layer_cls = _StackLayer

    def _create_and_replace(
        self,
        config: PromptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PromptedDecoder):
            return
        if isinstance(target, PromptLayer):
            target.update_layer(adapter_name, config)
            return
        place = placement_of(target, parent)
        if not getattr(self.model.config, "is_encoder_decoder", False):
            _require_stack(target, current_key, "past_key_values", "position_ids")
            layer: _StackLayer = CausalPromptLayer(target, adapter_name, place)
        elif target is self.model.get_encoder():
            _require_stack(target, current_key)
            layer = PromptLayer(target, adapter_name, place)
        else:
            layer = PromptedDecoder(target, self._prompted_encoder(target, current_key), adapter_name, place)
        if isinstance(layer, PromptLayer):
            layer.update_layer(adapter_name, config)
        self._wrap(parent, target_name, layer, adapter_name)

    def _post_injection_hook(self, model: nn.Module, config: PromptConfig, adapter_name: str) -> None:
        kinds = [type(m) for m in model.modules() if isinstance(m, _StackLayer)]
        if kinds not in ([PromptLayer, PromptedDecoder], [CausalPromptLayer]):
            raise ValueError(
                f"a soft prompt in a {type(model).__name__} needs one encoder and its decoder, or one decoder-only body; "
                f"target_modules={config.target_modules} selects {len(kinds)} stacks"
            )

    def _prompted_encoder(self, target: nn.Module, key: str) -> PromptLayer:
        encoder = self.model.get_encoder()
        if target is not self.model.get_decoder() or not isinstance(encoder, PromptLayer):
            raise TypeError(
                f"a soft prompt is put into an encoder and then its decoder; {key} is a {type(target).__name__}"
            )
        return encoder


def _require_stack(module: nn.Module, key: str, *names: str) -> None:
    taken = inspect.signature(module.forward).parameters
    missing = [n for n in ("inputs_embeds", "attention_mask", *names) if n not in taken]
    if missing or not hasattr(module, "get_input_embeddings"):
        raise TypeError(
            f"a soft prompt needs a stack that takes embeddings in place of tokens; {key} is a {type(module).__name__}, whose "
            f"forward has no {' and no '.join(missing) or 'embeddings'}"
        )


def _shown(mask: Tensor | None, length: int) -> Tensor | None:
    """A mask ``[rows, tokens]`` that shows ``length`` more positions in front."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise RefusedError(f"a soft prompt needs an attention mask [rows, tokens], not {list(mask.shape)}")
    return torch.cat([mask.new_ones(len(mask), length), mask], dim=1)


def _tokens_before(cache: Any, length: int) -> int:
    """Tokens of text in the cache, which holds the prompt too unless it is empty."""
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise RefusedError(
            f"a soft prompt needs a cache that grows, not a {type(cache).__name__}, whose size was reckoned without it"
        )
    held = int(cache.get_seq_length())
    if 0 < held <= length:
        raise RefusedError(f"the cache holds {held} positions, too few for a soft prompt of {length} and a text")
    return max(0, held - length)


def _require_covering(mask: Tensor | None, tokens: int) -> None:
    """A cache that was filled without the prompt, or cut, gives itself away by the mask's length."""
    if mask is not None and mask.shape[-1] != tokens:
        raise RefusedError(
            f"the attention mask {list(mask.shape)} does not cover the {tokens} tokens in the cache and the input: was the "
            "cache filled without the soft prompt?"
        )


def _positions(given: Tensor | None, mask: Tensor | None, before: int, text: Tensor) -> Tensor:
    """Position ids of the text ``[rows, tokens]``, without the prompt."""
    tokens = text.shape[1]
    if given is None and mask is not None:
        given = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
    elif given is None:
        given = torch.arange(before, before + tokens, device=text.device)[None]
    if given.dim() != 2:
        raise RefusedError(f"a soft prompt needs position ids [rows, tokens], not {list(given.shape)}")
    return given.expand(len(text), -1)


register(PEFT_TYPE, PromptConfig, PromptModel)
