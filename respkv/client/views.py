"""Pages as arrays and tensors, without a copy. numpy, ml_dtypes and torch load only when used.

numpy holds on to the buffer it is made from, torch does not: it keeps the object but lets go of the
buffer, so a page released under a tensor could be unmapped while the tensor is still in use.
Therefore every tensor here is made over a numpy array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from respkv.client.requests import Buffer, view_of
from respkv.errors import require
from respkv.page import DTYPE_BYTES

if TYPE_CHECKING:
    import numpy
    import torch

_NUMPY_LACKS = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def as_numpy(view: Buffer, dtype: str, shape: Sequence[int]) -> numpy.ndarray[Any, Any]:
    """View a page as an array, read-only where the view is.

    dtype:  bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, int8 or uint8; bfloat16 and the
            float8 need the package ml_dtypes.
    Raises: ValueError naming the dtype, or the bytes there are and the bytes the shape takes.
    """
    import numpy

    nbytes = _check(view, dtype, shape)
    if dtype in _NUMPY_LACKS:
        import ml_dtypes

        element = numpy.dtype(getattr(ml_dtypes, dtype))
    else:
        element = numpy.dtype(dtype)
    if not nbytes:
        return numpy.empty(shape, element)
    array: numpy.ndarray[Any, Any] = numpy.frombuffer(view_of(view), numpy.uint8)
    viewed: numpy.ndarray[Any, Any] = array.view(element).reshape(shape)
    return viewed


def as_torch(view: Buffer, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """View a page as a CPU tensor.

    view:   torch knows no read-only tensors, so nothing stops a write into one that is made of a
            leased page but the protection of its memory, which ends the process. Copy before
            writing, e.g. to the GPU.
    dtype:  as for ``as_numpy``.
    Raises: ValueError as ``as_numpy`` does; MissingExtra without torch.
    """
    try:
        import torch
    except ModuleNotFoundError:
        require("as_torch", "torch", "torch")
        raise  # it is there, and something that it needs is not

    nbytes = _check(view, dtype, shape)
    element: torch.dtype = getattr(torch, dtype)
    if not nbytes:
        return torch.empty(tuple(shape), dtype=element)
    array = as_numpy(view, "uint8", [nbytes])
    if array.flags.writeable:
        tensor = torch.from_numpy(array)
    else:
        tensor = torch.frombuffer(_unprotected(array), dtype=torch.uint8)
    return tensor.view(element).reshape(tuple(shape))


def as_bytes(page: Any) -> memoryview:
    """View an array or a CPU tensor as the bytes to ``put``, also in dtypes without a buffer.

    Raises: ValueError when it is not contiguous, or a tensor not on the CPU.
    """
    if hasattr(page, "untyped_storage"):  # a tensor, told without importing torch
        import torch

        if not page.is_contiguous() or page.device.type != "cpu":
            raise ValueError(f"a tensor on {page.device} must be contiguous and on the CPU")
        page = page.detach().reshape(-1).view(torch.uint8).numpy()
    elif not page.flags.c_contiguous:
        raise ValueError("an array must be contiguous")
    else:
        page = page.reshape(-1).view("uint8")
    return memoryview(page)


def _unprotected(array: numpy.ndarray[Any, Any]) -> Any:
    # torch warns about read-only memory each time; the alias keeps the array, and so its buffer,
    # for as long as the tensor keeps the alias.
    import ctypes

    alias = (ctypes.c_ubyte * array.nbytes).from_address(array.ctypes.data)
    alias.array = array  # type: ignore[attr-defined]
    return alias


def _check(view: Buffer, dtype: str, shape: Sequence[int]) -> int:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(sorted(DTYPE_BYTES))}, not {dtype!r}")
    nbytes = view_of(view).nbytes
    wanted = math.prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != wanted:
        raise ValueError(f"{nbytes} bytes; {dtype} of shape {tuple(shape)} takes {wanted}")
    return nbytes


def decode_page(encoded: Buffer, *, device: str = "cpu") -> torch.Tensor:
    """Decode a page that was asked for ``as_="raw"``, on the device where it is wanted.

    Returns: [L, 2, T, H, D] of its dtype; the bytes go to the device encoded.
    Raises:  PageCorrupt when these are not the bytes of an encoded page.
    """
    from respkv.kernels.encoded import decode_encoded

    return decode_encoded(view_of(encoded), device=device)
