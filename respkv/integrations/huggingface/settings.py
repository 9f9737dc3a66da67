"""What a call of generate asks for, as far as a cache has to know."""

from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

ROOM_MAX: Final = 4096  # tokens that memory is made for at once

# Beside the fields of GenerationConfig; what is in neither may change what tokens mean to the model.
_ARGUMENTS: Final = frozenset(
    {
        "assistant_model",
        "assistant_tokenizer",
        "attention_mask",
        "input_ids",
        "logits_processor",
        "logits_to_keep",
        "prefix_allowed_tokens_fn",
        "stopping_criteria",
        "streamer",
        "synced_gpus",
        "tokenizer",
        "use_model_defaults",
    }
)
# Names of what a cache of transformers does that grows; generate takes "hybrid" for no name at all.
_DYNAMIC: Final = (None, "dynamic", "hybrid")
_FIELDS: Final = frozenset(vars(GenerationConfig()))  # type: ignore[no-untyped-call]


class Settings:
    """The settings of one call: its arguments, over its config, over that of the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        generation_config: GenerationConfig | None,
        arguments: dict[str, Any],
    ) -> None:
        self._model = model
        self._arguments = arguments
        self._configs = [
            config for config in (generation_config, model.generation_config) if config is not None
        ]

    def get(self, name: str) -> Any:
        """Return a setting, None when nobody has said it.

        An argument counts when it is None, too: generate puts it over what the model's config says.
        """
        if name in self._arguments:
            return self._arguments[name]
        for config in self._configs:
            if getattr(config, name, None) is not None:
                return getattr(config, name)
        return None

    def why_not(self, ids: Tensor | None) -> str:
        """Return why the cache cannot be used; empty: it can."""
        is_batch = isinstance(ids, Tensor) and ids.dim() == 2 and ids.numel()
        if ids is None or not is_batch or ids.is_floating_point():
            return "the input is no batch of tokens"
        mask = self._arguments.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            return f"attention_mask is {list(mask.shape)}, and the prompts are {list(ids.shape)}"
        if self._arguments.get("past_key_values") is not None:
            return "the call brings a cache of its own"
        if self.get("use_cache") is False or self._arguments.get("use_cache", True) is None:
            return f"use_cache is {self.get('use_cache')}"
        implementation = self.get("cache_implementation")
        if implementation not in _DYNAMIC:
            return f"cache_implementation is {implementation!r}"
        others = sorted(
            name
            for name, value in self._arguments.items()
            if value is not None and name not in _ARGUMENTS and name not in _FIELDS
        )
        if others:
            return f"{', '.join(others)}: what tokens mean may depend on it"
        if self.get("token_healing"):
            return "token_healing changes the prompt"
        if self.get("use_mtp") or self.get("speculation_type"):
            return "drafts are made of the hidden states of all tokens"
        if self.get("output_attentions") or self.get("output_hidden_states"):
            return "attentions and hidden states are wanted, of all tokens"
        # What these compute is not what the weights alone say, and others would get it.
        if self._model.training:
            return "the model is in training mode; model.eval() leaves it"
        if torch.is_autocast_enabled(self._model.device.type):
            return "autocast is on: keys and values have another precision than the weights"
        return ""

    def mask(self, ids: Tensor) -> Tensor:
        """Return the attention mask [B, columns], found as generate finds it when none is given."""
        given: Tensor | None = self._arguments.get("attention_mask")
        if given is not None:
            return given
        padding, ends = self.get("pad_token_id"), self.end_tokens
        if padding is not None and padding not in ends and bool((ids == padding).any()):
            return ids.ne(padding).long()
        return torch.ones_like(ids)

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text."""
        found = self.get("eos_token_id")
        if found is None:
            return []
        if isinstance(found, Tensor):
            found = found.tolist()
        return [int(each) for each in found] if isinstance(found, list | tuple) else [int(found)]

    @property
    def is_beam_search(self) -> bool:
        """Whether lines of the batch change places."""
        return (self.get("num_beams") or 1) > 1

    @property
    def repeats(self) -> int:
        """Lines of the batch for each prompt."""
        return max(self.get("num_beams") or 1, self.get("num_return_sequences") or 1)

    @property
    def may_skip_forward(self) -> bool:
        """Whether logits are all that is wanted of the first forward pass."""
        drafts = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        return not any(self.get(name) for name in drafts)

    @property
    def names_a_cache(self) -> bool:
        """Whether generate is told of which kind its cache is: it then takes none that is given."""
        return self.get("cache_implementation") is not None

    def new_tokens(self, columns: int, default: int) -> int:
        """Return how many tokens will be generated, as far as is known."""
        new, length = self.get("max_new_tokens"), self.get("max_length")
        if new is None:
            new = default if length is None else length - columns
        return int(max(1, new))

    def room(self, columns: int, default: int) -> int:
        """Return for how many of them memory is made."""
        return min(self.new_tokens(columns, default), ROOM_MAX)
