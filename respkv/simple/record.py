"""A pair of tensors as one value: a head that says what they are, then their bytes as they lie.

The head is JSON behind its length, filled up with spaces so that the tensors begin at multiples of
64 bytes. Bytes are copied, never converted, so every dtype comes back as it was, NaNs included.
"""

import json
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
        places = []
        for name, shape in head["pair"]:
            size = torch.Size(shape)
            nbytes = size.numel() * _DTYPES[name].itemsize
            places.append((data[start : start + nbytes], _DTYPES[name], size))
            if min(shape, default=0) < 0 or len(places[-1][0]) != nbytes:
                raise ValueError(f"{shape} of {name} are not {len(places[-1][0])} bytes")
            start += nbytes + -nbytes % ALIGN_BYTES
        (keys, keys_dtype, keys_shape), (values, values_dtype, values_shape) = places
        layers, store = int(head["layers"]), str(head.get("store", ""))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise PageCorrupt(f"a pair of tensors cannot be read: {error}") from error
    # What fails from here on is the device's affair.
    return Pair(
        _copy(keys, keys_dtype, keys_shape, device),
        _copy(values, values_dtype, values_shape, device),
        layers,
        store,
    )


def _copy(
    data: memoryview, dtype: torch.dtype, shape: torch.Size, device: torch.device
) -> torch.Tensor:
    found = torch.empty(shape, dtype=dtype, device=device)
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
