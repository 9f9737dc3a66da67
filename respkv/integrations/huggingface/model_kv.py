"""What a model of transformers keeps of each token, and a name for its weights.

The shape is read off a forward pass of one token rather than off the configuration: families call
the same things by different names, and what a cache is given says it for all of them.
"""

import inspect
import json
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from xxhash import xxh3_128

from respkv.integrations.huggingface.buffers import BufferPool
from respkv.integrations.huggingface.layers import layer_for
from respkv.page import DTYPE_BYTES, Geometry

# What differs between two checkouts of the same weights, or between versions of transformers.
_NOT_THE_MODEL: Final = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "eos_token_id",
        "id2label",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_WEIGHT_BYTES: Final = 64 << 20  # of a weight are brought to the CPU at a time


class UnsupportedModel(TypeError):
    """The model keeps something that pages of keys and values cannot hold."""


@dataclass(frozen=True, slots=True)
class KVLayer:
    """A layer that keeps keys and values.

    index: among the layers of the model. window: of a sliding layer, in tokens; 0: all are seen.
    """

    index: int
    window: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class ModelKV:
    """The keys and values of a model: ``[layers, 2, tokens, heads, dim]`` of ``dtype``.

    layers:    those that keep any, in order; num_layers: all layers that a cache has a place for.
    counts_padding: whether padding in front of tokens changes their keys: positions are columns.
    text_max:  texts of so many tokens and more have other keys than shorter ones with the same
               beginning: rope of type longrope or dynamic. 0: all texts have the same.
    """

    layers: tuple[KVLayer, ...]
    num_layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    text_max: int = 0
    counts_padding: bool = False

    def geometry(self, page_tokens: int) -> Geometry:
        """Return the shape of a page. Raises UnsupportedModel when no page has such numbers."""
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise UnsupportedModel(f"keys and values of {dtype} cannot be stored in pages")
        return Geometry(len(self.layers), self.heads, self.dim, page_tokens, dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes."""
        return len(self.layers) * 2 * self.heads * self.dim * self.dtype.itemsize

    @property
    def window_max(self) -> int:
        """The widest window when all layers slide, else 0."""
        windows = [layer.window for layer in self.layers]
        return max(windows) if all(windows) else 0


def read_model(model: PreTrainedModel) -> ModelKV:
    """Run one token through a model and say what it kept.

    Raises UnsupportedModel for encoder-decoder models, and where layers keep something else than
    keys and values of one shape, one of each for each token: recurrent states, latents, indexer keys.
    So for attention that only works on keys in a layout of its own.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{type(model).__name__} has an encoder; only decoders are supported"
        )
    found = DynamicCache(config=model.config)
    for layer in found.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise UnsupportedModel(
                f"{type(model).__name__} has a layer with a {type(layer).__name__}; supported are"
                " layers that keep the keys and values of tokens, with or without a sliding window"
            )
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, past_key_values=found, use_cache=True)
    layers, shapes = [], set()
    for index, layer in enumerate(found.layers):
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            continue
        keys, values = layer.keys, layer.values
        if keys.shape != values.shape or keys.dtype != values.dtype:
            raise UnsupportedModel(
                f"layer {index} of {type(model).__name__} has keys {list(keys.shape)} and values"
                f" {list(values.shape)}; pages hold keys and values of one shape"
            )
        window = getattr(layer, "sliding_window", 0)
        layers.append(KVLayer(index, window, keys.device))
        shapes.add((keys.shape[1], keys.shape[3], keys.dtype))
    if len(shapes) != 1:
        raise UnsupportedModel(
            f"the layers of {type(model).__name__} keep keys of {len(shapes)} shapes; pages have one"
        )
    if found.get_seq_length(layers[0].index) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps {found.get_seq_length(layers[0].index)} tokens where it is"
            " given 1: it adds tokens of its own, and those of a prompt are not told from them"
        )
    if any(layer.window for layer in layers) and not _masks_windows(model):
        raise UnsupportedModel(
            f"{type(model).__name__} slides in its cache alone: it attends to all of a prompt, but"
            " only to a window of one that comes in two parts"
        )
    if not model._supports_sdpa:
        _check_strides(model, layers, len(found.layers))
    ((heads, dim, dtype),) = shapes
    text_max = text_max_of(model.config.get_text_config())
    _check_causality(model, found)
    counts = _counts_padding(model, found)
    return ModelKV(tuple(layers), len(found.layers), heads, dim, dtype, text_max, counts)


def _masks_windows(model: PreTrainedModel) -> bool:
    """Whether a model has masks that slide; they are made by functions that its module imports."""
    names = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")
    sources = {type(each).__module__ for each in model.modules()}
    return any(hasattr(sys.modules.get(source), name) for source in sources for name in names)


def _check_causality(model: PreTrainedModel, alone: Cache) -> None:
    """Raise UnsupportedModel where a token's keys change with the tokens behind it.

    alone: the cache of the token 0.
    """
    behind = DynamicCache(config=model.config)
    tokens = torch.arange(2, device=model.device)[None]
    with torch.inference_mode():
        model(input_ids=tokens, past_key_values=behind, use_cache=True)
    # The keys of the first layer know nothing of other tokens yet.
    if not all(
        _are_close(one[:, :, 0], two[:, :, 0], 0.1) for one, two in _keys(alone, behind)[:2]
    ):
        raise UnsupportedModel(
            f"{type(model).__name__} attends to tokens that come later; only where nobody does are"
            " the keys of a prefix those of the whole prompt"
        )


def _counts_padding(model: PreTrainedModel, alone: Cache) -> bool:
    """Whether a token has other keys when padding stands in front of it.

    alone: the cache of the token 0. Models that are told positions have the same.
    """
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted or "attention_mask" not in accepted:
        return "position_ids" not in accepted
    padded = DynamicCache(config=model.config)
    tokens = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    mask = torch.tensor([[0, 1]], device=model.device)
    with torch.inference_mode():
        model(input_ids=tokens, attention_mask=mask, past_key_values=padded, use_cache=True)
    one, two = _keys(alone, padded)[0]
    return not _are_close(one[:, :, -1], two[:, :, -1], 0.01)


def _keys(first: Cache, second: Cache) -> list[tuple[Tensor, Tensor]]:
    """Return the keys of the layers that keep any, of two caches."""
    pairs = [
        (one.keys, two.keys)
        for one, two in zip(first.layers, second.layers, strict=True)
        if isinstance(one, DynamicLayer) and isinstance(two, DynamicLayer)
    ]
    return [(one, two) for one, two in pairs if one is not None and two is not None]


def _are_close(one: Tensor, two: Tensor, share: float) -> bool:
    """Whether tensors are the same up to what half precision and other kernels make of them.

    Numbers that are none say nothing: weights may have some for tokens that no prompt has.
    """
    is_number = one.isfinite() & two.isfinite()
    one, two = one[is_number].float(), two[is_number].float()
    return bool((one - two).norm() <= share * one.norm() + 1e-3)


def _check_strides(model: PreTrainedModel, kept: list[KVLayer], num_layers: int) -> None:
    """Run a batch of two through a model whose attention is its own; it may want a memory layout.

    Raises UnsupportedModel.
    """
    layers: list[Any] = []
    for _ in range(num_layers):
        layers.append(DummyLayer())  # type: ignore[no-untyped-call]
    for each in kept:
        layers[each.index] = layer_for(each.window, BufferPool(0))
    cache = Cache(layers=layers)
    tokens = torch.zeros((2, 1), dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            for _ in range(2):
                model(input_ids=tokens, past_key_values=cache, use_cache=True)
    except RuntimeError as error:
        raise UnsupportedModel(
            f"the attention of {type(model).__name__} takes no keys and values that lie token by"
            f" token: {error}"
        ) from error


def text_max_of(config: Any) -> int:
    """Return from which length on a text's keys are turned by other angles; 0: from none."""
    limits = []
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
        elif rope.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
    return min((int(each or 1) for each in limits), default=0)


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """Return the rotary positions of a model: it has one kind, or one for each type of layer."""
    if not isinstance(parameters, dict):
        return []
    return [parameters, *(rope for each in parameters.values() for rope in _ropes(each))]


class WeightsNote:
    """What was seen of a model's weights, to notice that they are others now.

    It sees what optimizers and ``load_state_dict`` do, parameters and modules that were replaced or
    put in front of others (LoRA), and which adapters of PEFT are active; not what is written behind
    torch's back, through ``weight.data``, nor the weights of a model that is offloaded. A look takes
    some 150 us for 300 weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._is_whole = True
        weights = list(model.parameters())
        # What is brought to its device for each forward pass is another tensor each time.
        self._is_offloaded = any(each.is_meta for each in weights)
        # An id may be used again once its weight has gone, so that is noted, too.
        self._weights = [weakref.ref(each, self._lose) for each in weights]
        # Tensors made in inference mode do not count what is done to them.
        self._counts = attrgetter(
            "dtype", "dtype" if any(each.is_inference() for each in weights) else "_version"
        )
        self._tuned = [weakref.ref(each) for each in model.modules() if _is_tuned(each)]
        self._seen = self._look(model)

    @property
    def is_right(self) -> bool:
        """Whether the model computes what these weights say: they are there, and eval mode is on."""
        model = self._model()
        if model is None:
            return True
        is_whole = self._is_whole or self._is_offloaded
        return is_whole and not model.training and self._look(model) == self._seen

    def _look(self, model: PreTrainedModel) -> tuple[object, ...]:
        modules: list[torch.nn.Module] = [model]
        for module in modules:  # model.modules() takes ten times as long
            if module._modules:
                modules += filter(None, module._modules.values())
        weights = [
            weight
            for module in modules
            for weight in module._parameters.values()
            if weight is not None
        ]
        if self._is_offloaded:
            weights = []
        return (
            list(map(id, modules)),
            list(map(id, weights)),
            list(map(self._counts, weights)),
            [_tuning(each) for one in self._tuned if (each := one()) is not None],
        )

    def _lose(self, _: object) -> None:
        self._is_whole = False


def _is_tuned(module: torch.nn.Module) -> bool:
    """Whether a module has adapters of PEFT in it, which can be switched."""
    return hasattr(module, "_active_adapter") and hasattr(module, "_disable_adapters")


def _tuning(module: Any) -> tuple[str, bool, str]:
    """Return which adapters of a module are active, whether any is, and which are merged."""
    merged = getattr(module, "merged_adapters", ())
    return str(module._active_adapter), bool(module._disable_adapters), str(merged)


def fingerprint_of(model: PreTrainedModel) -> bytes:
    """Hash the configuration and every weight: models share KV only when this is equal.

    It reads all weights once, at some 10 GB/s. Which adapters of PEFT are active is hashed, too.
    Raises UnsupportedModel where weights cannot be read: they are packed, or offloaded.
    """
    digest = xxh3_128(json.dumps(_settings(model.config.to_dict()), sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        if not isinstance(weight, Tensor) or weight.is_meta or weight.is_quantized:
            kind = "offloaded" if isinstance(weight, Tensor) and weight.is_meta else "packed"
            raise UnsupportedModel(
                f"{name} of {type(model).__name__} is {kind} and cannot be hashed; give a fingerprint"
                " that names these weights, and no others"
            )
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        for part in _parts(weight):
            digest.update(part)
    for name, module in model.named_modules():
        if _is_tuned(module):
            digest.update(f"{name} {_tuning(module)}".encode())
    return digest.digest()


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a configuration the keys and values depend on, as JSON can say it."""
    return {name: _plain(value) for name, value in config.items() if name not in _NOT_THE_MODEL}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return _settings({str(name): each for name, each in value.items()})
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _parts(weight: Tensor) -> Iterator[memoryview]:
    """Return the bytes of a weight, some at a time, wherever it is."""
    flat = weight.detach().reshape(-1)
    if not flat.numel():
        return
    step = max(1, _WEIGHT_BYTES // flat.element_size())
    for first in range(0, flat.numel(), step):
        part = flat[first : first + step].cpu().view(torch.uint8)
        yield part.numpy().data
