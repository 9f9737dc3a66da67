"""Pages as arrays and tensors: same memory, right dtype, errors that name what is wrong."""

import gc
import mmap
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy
import pytest
import torch

from respkv.client import as_bytes, as_numpy, as_torch
from respkv.page import DTYPE_BYTES

SHAPE = (2, 2, 4, 3, 8)  # [L, 2, T, H, D]
COUNT = 2 * 2 * 4 * 3 * 8


def page_memory(dtype: str) -> bytearray:
    return bytearray(range(256)) * 8 if dtype == "" else bytearray(COUNT * DTYPE_BYTES[dtype])


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_arrays_and_tensors_share_the_pages_memory(dtype: str) -> None:
    memory = page_memory(dtype)
    array = as_numpy(memory, dtype, SHAPE)
    tensor = as_torch(memory, dtype, SHAPE)
    assert array.shape == tuple(tensor.shape) == SHAPE
    assert str(array.dtype) == dtype
    assert tensor.dtype == getattr(torch, dtype)
    array[1, 1, 3, 2, 7] = 3
    assert tensor[1, 1, 3, 2, 7].float() == 3
    tensor[0, 0, 0, 0, 0] = 2
    assert float(array[0, 0, 0, 0, 0]) == 2
    assert bytes(as_bytes(array)) == bytes(as_bytes(tensor)) == bytes(memory)


@pytest.mark.parametrize("view", [as_numpy, as_torch])
def test_a_wrong_size_is_named(view: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"100 bytes; float16 of shape \(2, 3\) takes 12"):
        view(bytearray(100), "float16", (2, 3))


@pytest.mark.parametrize("view", [as_numpy, as_torch])
@pytest.mark.parametrize("dtype", ["float64", "object", "tensor"])
def test_an_unknown_dtype_is_named(view: Callable[..., Any], dtype: str) -> None:
    with pytest.raises(ValueError, match=f"not '{dtype}'"):
        view(bytearray(8), dtype, (8,))


@pytest.mark.parametrize("view", [as_numpy, as_torch])
def test_a_page_of_no_bytes_is_an_empty_array(view: Callable[..., Any]) -> None:
    assert tuple(view(b"", "bfloat16", (0, 4)).shape) == (0, 4)


def test_an_array_over_a_read_only_page_is_read_only() -> None:
    array = as_numpy(b"\x00" * 8, "float16", (4,))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_a_tensor_over_a_read_only_page_raises_no_warning() -> None:
    page = bytearray(b"\x01\x02\x03\x04")
    as_torch(memoryview(page).toreadonly(), "uint8", (4,))
    tensor = as_torch(memoryview(page).toreadonly(), "uint8", (4,))
    assert tensor.tolist() == [1, 2, 3, 4]
    page[0] = 9
    assert tensor[0] == 9


@pytest.mark.parametrize("view", [as_numpy, as_torch])
@pytest.mark.parametrize("protection", [mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE])
def test_a_tensor_keeps_its_memory_mapped_when_everything_else_let_go(
    view: Callable[..., Any], protection: int
) -> None:
    mapped = mmap.mmap(-1, 1 << 16, prot=protection)
    page = memoryview(mapped)[4096 : 4096 + 64]
    tensor = view(page, "float32", (16,))
    with pytest.raises(BufferError):
        mapped.close()
    del page, mapped
    gc.collect()
    assert float(tensor.sum()) == 0.0


def test_bytes_of_what_cannot_be_sent_in_one_piece_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        as_bytes(torch.zeros(4, 4).t())
    with pytest.raises(ValueError, match="contiguous"):
        as_bytes(numpy.zeros((4, 4)).T)
    with pytest.raises(ValueError, match="CPU"):
        as_bytes(torch.zeros(4, device="meta"))


def test_bytes_of_a_tensor_can_be_landed_in() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    as_bytes(tensor)[:2] = numpy.ones(1, ml_dtypes.bfloat16).tobytes()
    assert tensor[0, 0] == 1
