"""Models of transformers over a paged cache: one forward pass for pieces of many sequences.

``PagedModel`` registers an implementation of attention under the name ``respkv_paged``, and runs a
model as if all tokens of a step were one long row. What differs per token, its position, comes with
it; what differs per sequence is known to attention alone, which finds the step among the arguments
that every layer hands on. No mask is made, and nothing of a family is known here: windows, soft caps
and scales are those that the model hands to attention or its cache.

Without a step the same implementation is torch's own, so such a model still generates by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from respkv.integrations.huggingface.model_kv import ModelKV, UnsupportedModel, read_model
from respkv.kernels.paged_kv import Scoring
from respkv.paged import Chunk, PagedAttentionCache, PagedCacheConfig, PagedStep

NAME: Final = "respkv_paged"
_STEP: Final = "paged_step"  # the argument that reaches attention
# Attention of these is no plain window over what is stored, or turns keys by what else is there.
_LAYER_TYPES: Final = ("full_attention", "sliding_attention")
_ROPE_TYPES_REFUSED: Final = ("dynamic", "longrope")


@dataclass(slots=True)
class _Pass:
    """A step on its way through a model."""

    step: PagedStep
    windows: tuple[int, ...]  # of each layer; 0: none
    attended: list[int] = field(default_factory=list)


def paged_config(
    model: PreTrainedModel,
    *,
    num_blocks: int | None = None,
    memory_bytes: int | None = None,
    block_tokens: int = 16,
    prefix_sharing: bool = True,
) -> PagedCacheConfig:
    """Describe a paged cache for a model; runs one token through it to see what it keeps.

    num_blocks, memory_bytes: how large it is; one of the two.
    Raises UnsupportedModel for a model that keeps something else than keys and values of every
    token and layer, and ValueError for no size or two.
    """
    kept = _kept(model)
    if (num_blocks is None) == (memory_bytes is None):
        raise ValueError("say how large the cache is by num_blocks or by memory_bytes")
    one = PagedCacheConfig(
        num_layers=len(kept.layers),
        num_kv_heads=kept.heads,
        head_dim=kept.dim,
        num_blocks=1,
        block_tokens=block_tokens,
        dtype=kept.dtype,
        device=kept.layers[0].device,
        prefix_sharing=prefix_sharing,
    )
    return (
        one.with_bytes(memory_bytes)
        if memory_bytes is not None
        else one.with_blocks(num_blocks or 0)
    )


class PagedModel:
    """A model whose sequences are in a paged cache.

    The model is the caller's, and is switched to ``respkv_paged`` until ``close``. One thread at a time.
    Raises UnsupportedModel for a model that cannot be run so, and ValueError for a cache of another
    shape than the model's.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedAttentionCache) -> None:
        kept = _kept(model)
        config = cache.config
        shape = (config.num_layers, config.num_kv_heads, config.head_dim, config.dtype)
        if shape != (len(kept.layers), kept.heads, kept.dim, kept.dtype):
            raise ValueError(
                f"the cache has (layers, heads, dim, dtype) {shape}, {type(model).__name__} needs"
                f" {(len(kept.layers), kept.heads, kept.dim, kept.dtype)}; see paged_config"
            )
        self.model, self.cache = model, cache
        self._windows = tuple(layer.window for layer in kept.layers)
        self._before = str(model.config._attn_implementation)
        self._no_mask = torch.zeros((1, 1, 1, 1), device=model.device)
        register()
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise UnsupportedModel(f"{type(model).__name__} does not let attention be replaced")

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the next tokens of some sequences in one forward pass.

        chunks: of different sequences, which know these tokens; pieces of prompts and single tokens mix.
        Returns: [N, V], the logits at the last token of each of the N chunks that want them, in
                 the order of the chunks.
        Raises OutOfBlocks when there is no room for all of them, ValueError for tokens that are
        not known or computed already, and when the model has its own attention again: after
        ``close``, of this or of another PagedModel of the same model. Whatever it raises, no token
        counts as computed.
        """
        if self.model.config._attn_implementation != NAME:
            raise ValueError(
                f"{type(self.model).__name__} has its own attention again: a PagedModel of it was"
                " closed; make a new one over the same cache"
            )
        step = PagedStep(self.cache, chunks)
        under_way = _Pass(step, self._windows)
        with torch.inference_mode():
            output = self.model(
                input_ids=step.tokens[None],
                position_ids=step.positions[None],
                # One that is prepared already is taken as it is; attention does not look at it.
                attention_mask=self._no_mask,
                use_cache=False,
                logits_to_keep=step.last,
                **{_STEP: under_way},
            )
        if under_way.attended != list(range(len(self._windows))):
            raise UnsupportedModel(
                f"{type(self.model).__name__} hands attention its layers {under_way.attended},"
                f" not each of {len(self._windows)} in turn"
            )
        step.commit()
        logits: Tensor = output.logits[0]
        # A copy, because what was made in inference mode may not be changed outside.
        return logits.clone()

    def close(self) -> None:
        """Give the model the attention back that it had. Idempotent."""
        if self.model.config._attn_implementation == NAME:
            self.model.set_attn_implementation(self._before)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def register() -> None:
    """Make ``respkv_paged`` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: over the paged cache in a step, else as torch does.

    query: [1, Q, S, D]; key, value: [1, H, S, D], of the new tokens.
    Returns: [1, S, Q, D].
    """
    under_way: _Pass | None = kwargs.pop(_STEP, None)
    if under_way is None:
        return _plain(module, query, key, value, attention_mask, scaling, softcap, dropout, kwargs)
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} attends with {name}, which pages have not"
            )
    layer = int(getattr(module, "layer_idx"))  # noqa: B009
    under_way.attended.append(layer)
    scoring = Scoring(scaling, under_way.windows[layer] or None, softcap)
    new, new_key, new_value = (each[0].transpose(0, 1) for each in (query, key, value))
    return under_way.step.attend(layer, new, new_key, new_value, scoring)[None], None


def _plain(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    if softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = torch.unflatten(query, 1, (key.shape[1], -1))
    scores = grouped @ key[:, :, None].transpose(-1, -2)
    scores = softcap * torch.tanh(scores * Scoring(scaling).scale(query.shape[-1]) / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Make the mask for attention without a step; in one, transformers is given a mask and asks for none."""
    if getattr(kwargs.get("config"), "attn_logit_softcapping", None) is not None:
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _kept(model: PreTrainedModel) -> ModelKV:
    """Return what a model keeps. Raises UnsupportedModel when blocks cannot hold it."""
    kept, name = read_model(model), type(model).__name__
    if len(kept.layers) < kept.num_layers:
        raise UnsupportedModel(
            f"{name} has {kept.num_layers} layers and keeps keys of {len(kept.layers)}; blocks are of all"
        )
    config = model.config.get_text_config()
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in _LAYER_TYPES:
            raise UnsupportedModel(f"{name} has layers of {kind}; blocks serve {_LAYER_TYPES}")
    for kind in _rope_types(getattr(config, "rope_parameters", None)):
        if kind in _ROPE_TYPES_REFUSED:
            raise UnsupportedModel(
                f"{name} has rope of type {kind}: how it turns a key depends on what else is computed"
            )
    return kept


def _rope_types(parameters: Any) -> list[str]:
    """Return the kinds of rotary positions; a model has one, or one for each type of layer."""
    if not isinstance(parameters, dict):
        return []
    nested = [_rope_types(each) for each in parameters.values()]
    return [str(parameters.get("rope_type")), *(kind for kinds in nested for kind in kinds)]
