"""What a model of transformers keeps of each token, and a name for its weights.

The shape is read off a forward pass of one token rather than off the configuration: families call
the same things by different names, and what a cache is given says it for all of them.
"""

import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from xxhash import xxh3_128

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
    text_max:  texts of so many tokens and more have other keys than shorter ones with the same
               beginning: rope of type longrope or dynamic. 0: all texts have the same.
    """

    layers: tuple[KVLayer, ...]
    num_layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    text_max: int = 0

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
    keys and values of one shape: recurrent states, latents, indexer keys.
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
    ((heads, dim, dtype),) = shapes
    text_max = text_max_of(model.config.get_text_config())
    return ModelKV(tuple(layers), len(found.layers), heads, dim, dtype, text_max)


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
