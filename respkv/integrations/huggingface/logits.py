"""Logits as bytes: 16 for the name of their dtype, then the numbers, so that they come back as they were."""

from typing import Final

import torch
from torch import Tensor

_HEAD_BYTES: Final = 16


def pack_logits(logits: Tensor) -> bytes:
    """Return the bytes of logits [V]. Raises ValueError for another shape."""
    if logits.dim() != 1 or not logits.dtype.is_floating_point:
        raise ValueError(f"logits are [V] floats, not {list(logits.shape)} {logits.dtype}")
    name = str(logits.dtype).removeprefix("torch.").encode()
    numbers = logits.detach().contiguous().cpu().view(torch.uint8).numpy()
    return name.ljust(_HEAD_BYTES, b"\0") + numbers.tobytes()


def unpack_logits(packed: bytes | memoryview) -> Tensor | None:
    """Return logits [V] on the CPU; None: these are none, they were stored by something else."""
    name = bytes(packed[:_HEAD_BYTES]).rstrip(b"\0").decode(errors="replace")
    dtype = getattr(torch, name, None)
    rest = len(packed) - _HEAD_BYTES
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return None
    if rest < dtype.itemsize or rest % dtype.itemsize:
        return None
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)[_HEAD_BYTES:].view(dtype)
