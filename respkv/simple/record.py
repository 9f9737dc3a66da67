"""A pair of tensors as one value: a head that says what they are, then their bytes as they lie.

The head is JSON behind its length, filled up with spaces so that the tensors begin at multiples of
64 bytes. Bytes are copied, never converted, so every dtype comes back as it was, NaNs included.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from respkv.client.requests import Gathered
from respkv.client.views import as_bytes, as_torch
from respkv.errors import PageCorrupt

MAGIC = b"RSKV"
ALIGN_BYTES = 64
_LENGTH_BYTES = 4
_DTYPES: dict[str, torch.dtype] = {
    str(found).removeprefix("torch."): found
    for found in vars(torch).values()
    if isinstance(found, torch.dtype)
}


@dataclass(frozen=True, slots=True)
class Pair:
    """What a value holds.

    num_layers: of the prefix, when all were stored together; else 0.
    store:      which storing they were, so that layers of two are told apart; else empty.
    """

    keys: torch.Tensor
    values: torch.Tensor
    num_layers: int = 0
    store: str = ""


def pack(pair: Pair) -> Gathered:
    """Return the bytes of a pair, which stay where they are if they can.

    Raises TypeError or ValueError naming what cannot be stored.
    """
    views: list[memoryview] = []
    words: list[list[Any]] = []
    for name, tensor in (("keys", pair.keys), ("values", pair.values)):
        host = _on_host(name, tensor)
        words.append([str(host.dtype).removeprefix("torch."), list(host.shape)])
        views += (_bytes_of(host), memoryview(bytes(-host.nbytes % ALIGN_BYTES)))
    head = json.dumps({"pair": words, "layers": pair.num_layers, "store": pair.store}).encode()
    front = len(MAGIC) + _LENGTH_BYTES
    head += b" " * (-(front + len(head)) % ALIGN_BYTES)
    return Gathered(
        [memoryview(MAGIC + len(head).to_bytes(_LENGTH_BYTES, "little") + head), *views]
    )


def unpack(data: memoryview, device: torch.device) -> Pair:
    """Return the pair of a value, in memory of its own on ``device``. Raises PageCorrupt."""
    front = len(MAGIC) + _LENGTH_BYTES
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise PageCorrupt("a value that is no pair of tensors; is the namespace used otherwise?")
    start = front + int.from_bytes(data[len(MAGIC) : front], "little")
    try:
        head = json.loads(bytes(data[front:start]))
        tensors = []
        for name, shape in head["pair"]:
            dtype = _DTYPES[name]
            nbytes = math.prod(shape) * dtype.itemsize
            tensors.append(_copy(data[start : start + nbytes], dtype, shape, device))
            start += nbytes + -nbytes % ALIGN_BYTES
        keys, values = tensors
        return Pair(keys, values, int(head["layers"]), str(head.get("store", "")))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PageCorrupt(f"a pair of tensors cannot be read: {error}") from error


def _copy(
    data: memoryview, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> torch.Tensor:
    found = torch.empty(tuple(shape), dtype=dtype, device=device)
    if not found.nbytes:
        return found
    found.view(-1).view(torch.uint8).copy_(as_torch(data, "uint8", [found.nbytes]))
    return found


def _on_host(name: str, tensor: object) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; a torch.Tensor is needed")
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    if not is_dense or tensor.is_meta:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name} is {kind} on {tensor.device}; make it a dense tensor")
    # A conjugated or negated view says so in a flag, which bytes have not.
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if not tensor.nbytes:
        return memoryview(b"")
    return as_bytes(tensor)
