"""A pair of tensors as one value: every dtype and shape, bit by bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.errors import PageCorrupt
from respkv.simple.record import _DTYPES, ALIGN_BYTES, Pair, pack, unpack

CPU = torch.device("cpu")
# torch itself warns of complex32; integers are below.
FLOATS = ["bool", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
FLOATS += sorted(name for name in _DTYPES if name.startswith("float8"))


def joined(pair: Pair) -> memoryview:
    return memoryview(b"".join(pack(pair).views))


@pytest.mark.parametrize("name", FLOATS)
def test_floats_keep_every_bit(name: str) -> None:
    dtype = _DTYPES[name]
    keys = torch.randint(0, 256, (6 * dtype.itemsize,), dtype=torch.uint8)
    if dtype is torch.bool:
        keys = keys % 2
    keys = keys.view(dtype).reshape(2, 3)
    found = unpack(joined(Pair(keys, keys[:1].clone())), CPU)
    assert found.keys.dtype == dtype
    assert found.keys.shape == (2, 3)
    assert found.keys.reshape(-1).view(torch.uint8).equal(keys.reshape(-1).view(torch.uint8))


@given(
    shapes=st.tuples(*[st.lists(st.integers(0, 5), max_size=4)] * 2),
    dtypes=st.tuples(*[st.sampled_from([torch.bfloat16, torch.int64, torch.uint8])] * 2),
    layers=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_shapes_of_any_kind_come_back(
    shapes: tuple[list[int], list[int]], dtypes: tuple[torch.dtype, torch.dtype], layers: int
) -> None:
    keys, values = (
        torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    packed = pack(Pair(keys, values, layers))
    assert all(len(view) % ALIGN_BYTES == 0 for view in packed.views[:1])
    found = unpack(joined(Pair(keys, values, layers)), CPU)
    assert found.num_layers == layers
    for got, stored in ((found.keys, keys), (found.values, values)):
        assert got.dtype == stored.dtype
        assert torch.equal(got, stored)


def test_what_is_not_contiguous_or_needs_gradients_is_stored_all_the_same() -> None:
    keys = torch.randn(4, 6, requires_grad=True).T
    found = unpack(joined(Pair(keys, keys[::2])), CPU)
    assert torch.equal(found.keys, keys)
    assert torch.equal(found.values, keys[::2])
    assert not found.keys.requires_grad


def test_views_that_are_conjugated_or_negated_are_stored_as_what_they_say() -> None:
    whole = torch.randn(4, dtype=torch.complex64)
    keys, values = whole.conj(), whole.conj().imag
    assert keys.is_conj()
    assert values.is_neg()
    found = unpack(joined(Pair(keys, values)), CPU)
    assert torch.equal(found.keys, keys)
    assert torch.equal(found.values, values)


def test_a_nested_tensor_is_refused() -> None:
    parts = [torch.zeros(2), torch.zeros(3)]
    keys = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(ValueError, match="keys is nested on cpu; make it a dense tensor"):
        pack(Pair(keys, torch.zeros(1)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        b"RSKV",
        b"RSKV\x02\x00\x00\x00{}" + bytes(64),
        b"RSKV\xff\xff\xff\xff{}",
        bytes(joined(Pair(torch.zeros(100), torch.zeros(100))))[:-300],
        bytes(joined(Pair(torch.zeros(3), torch.zeros(3)))).replace(b"float32", b"nothing"),
        bytes(joined(Pair(torch.zeros(3), torch.zeros(3)))).replace(b"[3]", b"-31"),
        bytes(joined(Pair(torch.zeros(300), torch.zeros(3)))).replace(b"[300]", b"[-30]"),
        bytes(joined(Pair(torch.zeros(3), torch.zeros(3)))).replace(b"[3]", b'"3"'),
        bytes(joined(Pair(torch.zeros(3), torch.zeros(3)))).replace(b'{"pair"', b'["pair"'),
    ],
)
def test_what_is_no_pair_is_told(data: bytes) -> None:
    with pytest.raises(PageCorrupt, match="pair of tensors"):
        unpack(memoryview(data), CPU)


def test_a_device_that_has_no_room_is_no_fault_of_the_value() -> None:
    data = joined(Pair(torch.zeros(3), torch.zeros(3)))
    with pytest.raises(NotImplementedError):  # a device that holds no tensors at all
        unpack(data, torch.device("fpga"))
