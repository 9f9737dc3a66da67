"""The tensors on which codecs are measured, as pages of 64 tokens, 8 heads and 128 channels.

Gaussian numbers, keys and values made as the tests make them (outlier channels after RoPE; heavy
tails), and those of a small random Llama: its exponents are like those of a trained one, its exact
repeats, which come from layer 0 of its values, are more than a trained one has.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import torch

from respkv.page import Geometry
from tests.kernels import data

GEOMETRY: Final = Geometry(layers=8, heads=8, dim=128, tokens=64, dtype="bfloat16")
NUM_PAGES: Final = 4
LLAMA_LAYERS: Final = 6
LLAMA_TOKENS: Final = 1024


class Sample(NamedTuple):
    """Some pages: ``[P, L, 2, T, H, D]`` bfloat16, and what they are called."""

    name: str
    pages: torch.Tensor

    @property
    def geometry(self) -> Geometry:
        """The shape of a page."""
        _, layers, _, tokens, heads, dim = self.pages.shape
        return Geometry(layers, heads, dim, tokens, "bfloat16")

    @property
    def payloads(self) -> list[memoryview]:
        """The bytes of each page."""
        return [memoryview(page.view(torch.uint8).numpy().data).cast("B") for page in self.pages]


def samples() -> Iterator[Sample]:
    """Yield everything that is measured."""
    yield Sample("N(0,1)", _pages(data.gaussian, data.gaussian))
    yield Sample("keys with outliers, heavy-tailed values", _pages(data.keys, data.values))
    yield llama()


def _pages(keys: data.Generate, values: data.Generate) -> torch.Tensor:
    """Return pages whose layers are prompts of ``NUM_PAGES`` pages each."""
    shape = GEOMETRY
    layers = [
        torch.stack(
            [
                each(NUM_PAGES * shape.tokens, shape.heads, shape.dim, 2 * layer + side)
                for side, each in enumerate((keys, values))
            ]
        )
        for layer in range(shape.layers)
    ]
    tokens = torch.unflatten(
        torch.stack(layers), 2, (NUM_PAGES, shape.tokens)
    )  # [L, 2, P, T, H, D]
    return tokens.permute(2, 0, 1, 3, 4, 5).contiguous()


def llama() -> Sample:
    """Return the KV of a small random Llama over tokens of Zipf's distribution."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = GEOMETRY
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=LLAMA_LAYERS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.dim,
    )
    model = LlamaForCausalLM(config).bfloat16()
    tokens = np.minimum(np.random.default_rng(0).zipf(1.2, LLAMA_TOKENS), config.vocab_size) - 1
    with torch.no_grad():
        layers = model(torch.from_numpy(tokens)[None], use_cache=True).past_key_values.layers
    sides = torch.stack([torch.stack([each.keys[0], each.values[0]]) for each in layers])
    pages = torch.unflatten(sides, 3, (-1, shape.tokens))  # [L, 2, H, P, T, D]
    return Sample("small random Llama", pages.permute(3, 0, 1, 4, 2, 5).contiguous())
