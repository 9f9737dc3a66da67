"""Packed codes are compared with one large integer made of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from respkv.kernels.bits import pack, unpack
from tests.kernels import data

# Codes in a word, of each width.
WORDS = {2: 4, 3: 8, 4: 2}


@given(st.sampled_from([2, 3, 4]), st.data())
def test_code_i_is_in_the_bits_from_i_times_the_width_on(bits: int, draw: st.DataObject) -> None:
    rows, words = draw.draw(st.integers(1, 4)), draw.draw(st.integers(1, 9))
    width = words * WORDS[bits]
    generator = data.seeded(rows * 100 + words)
    codes = torch.randint(0, 1 << bits, (rows, width), generator=generator, dtype=torch.uint8)
    # Every second byte of wider memory: the target need not be contiguous.
    out = data.poisoned((rows, width * bits // 8, 2))[..., 0]
    pack(codes, bits, out)
    for row, packed in zip(codes.tolist(), out.tolist(), strict=True):
        whole = sum(code << bits * index for index, code in enumerate(row))
        assert bytes(packed) == whole.to_bytes(width * bits // 8, "little")
    assert torch.equal(unpack(out, bits), codes)


@pytest.mark.parametrize("bits", WORDS)
def test_every_byte_unpacks_to_codes_that_pack_to_it(bits: int) -> None:
    octets = torch.arange(256, dtype=torch.uint8).repeat(3)
    out = data.poisoned((768,))
    codes = unpack(octets, bits)
    assert int(codes.max()) == (1 << bits) - 1
    pack(codes.view(torch.int8), bits, out)
    assert torch.equal(out, octets)
