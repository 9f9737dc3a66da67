"""A model as generate sees it: the same one, but its first forward pass may be answered from a cache.

generate calls the model in many places, and each way of generating calls it elsewhere. So nothing
of it is written again: a second object, of a subclass, shares everything with the model, its
parameters, hooks and settings, and differs in two methods. The model itself is left as it is, so
others may use it meanwhile, in other threads too.
"""

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from respkv.integrations.huggingface.prefill import BatchCache

PIECE_TOKENS: Final = 512  # of a prompt behind a prefix, at a time, on a processor
_CUT: Final = frozenset(
    {
        *("attention_mask", "input_ids", "logits_to_keep", "past_key_values", "position_ids"),
        *("return_dict", "use_cache"),
    }
)


def caching_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the view of a model that understands a BatchCache."""
    original: Any = type(model)
    kind = _caching_class(original)
    view: PreTrainedModel = kind.__new__(kind)
    object.__setattr__(view, "__dict__", vars(model))
    return view


@functools.cache
def _caching_class(kind: Any) -> Any:
    """Return the subclass for a class of models; it has its name, which generate looks at."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(kind.__call__, self)
        cache = kwargs.get("past_key_values")
        if args or not isinstance(cache, BatchCache):
            return forward(*args, **kwargs)
        if kwargs.get("input_ids") is None:  # a model that makes embeddings of them beforehand
            cache.answer = None
            cache.bring(forward, inspect.signature(self.forward))
            return forward(**kwargs)
        return _forward(self, forward, cache, kwargs)

    def prepare(
        self: Any,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        # Assisted decoding feeds the whole prompt to its first step, whatever the cache has.
        if is_first_iteration and isinstance(past_key_values, BatchCache):
            past, count = past_key_values.length, input_ids.shape[1]
            if next_sequence_length is None and past and count >= past_key_values.columns:
                next_sequence_length = count - past
        return kind.prepare_inputs_for_generation(
            self,
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__call__": call,
        "prepare_inputs_for_generation": prepare,
    }
    return type(kind.__name__, (kind,), body)


def _forward(
    model: Any, forward: Callable[..., Any], cache: BatchCache, inputs: dict[str, Any]
) -> Any:
    """Run a forward pass, or answer without one."""
    count = inputs["input_ids"].shape[1]
    if cache.answer is not None:
        wants_more = inputs.get("output_attentions") or inputs.get("output_hidden_states")
        if count == 1 and cache.length == cache.columns - 1 and not wants_more:
            logits = cache.take_answer().to(inputs["input_ids"].device)
            return CausalLMOutputWithPast(logits=cast(Any, logits), past_key_values=cache)
        cache.answer = None
    if not cache.is_loaded:
        cache.bring(forward, inspect.signature(model.forward))
    begun = time.perf_counter()
    if count > PIECE_TOKENS and cache.length and _may_be_cut(inputs):
        output = _forward_in_pieces(forward, inputs)
    else:
        output = forward(**inputs)
    if cache.logits is None:
        cache.keep_logits(output.logits, cache.length)
        if output.logits.is_cuda:
            torch.cuda.synchronize(output.logits.device)  # the token is waited for in any case
    if count > 1 or not output.logits.is_cuda:
        cache.rates.computed(count, time.perf_counter() - begun)
    return output


def _may_be_cut(inputs: dict[str, Any]) -> bool:
    """Whether a forward pass gives the same logits when its tokens come in pieces."""
    mask, keep = inputs.get("attention_mask"), inputs.get("logits_to_keep")
    is_known = all(each is None or each is False or name in _CUT for name, each in inputs.items())
    is_flat = mask is None or mask.dim() == 2
    return is_known and is_flat and keep == 1 and inputs["input_ids"].device.type == "cpu"


def _forward_in_pieces(forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Compute long prompts behind a prefix in pieces; return the output of the last.

    Behind a prefix transformers gives attention a mask, and a processor then computes all products of
    queries and keys, where it leaves out half of them when there is none. In pieces few are computed
    in vain: 6,144 tokens behind 2,048 took 1.6 times as long as all 8,192 at once, and now less.
    """
    ids, mask, positions = (
        inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")
    )
    assert ids is not None
    count = ids.shape[1]
    output: Any = None
    for start in range(0, count, PIECE_TOKENS):
        end = min(start + PIECE_TOKENS, count)
        piece = inputs | {"input_ids": ids[:, start:end]}
        if mask is not None:
            piece["attention_mask"] = mask[:, : mask.shape[1] - count + end]
        if positions is not None:
            piece["position_ids"] = positions[..., start:end]
        output = forward(**piece)
    return output
