"""``xs`` gives back every bit, or says that it would not be smaller."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from respkv.errors import PageCorrupt
from respkv.kernels import xs
from respkv.kernels.ladder import decode_xs, encode_xs
from respkv.kernels.layout import XS_BLOCK, Codec, plane_layout, xs_layout
from tests.kernels import data


def words(plane: Tensor) -> Tensor:
    return plane.contiguous().view(torch.int16)


def check_round_trip(plane: Tensor) -> Tensor:
    """Return the encoded plane, after decoding it into memory full of NaN."""
    (encoded,) = encode_xs(plane.unsqueeze(0))
    assert encoded is not None
    out = data.poisoned(tuple(plane.shape), torch.bfloat16)
    assert decode_xs(encoded, out) is out
    assert torch.equal(words(out), words(plane))
    return encoded


@pytest.mark.parametrize(("name", "ratio"), [("gaussian", 1.37), ("keys", 1.36), ("values", 1.36)])
def test_numbers_of_models_come_back_from_less(name: str, ratio: float) -> None:
    plane = data.GENERATORS[name](8192, 1, 128, 1)
    assert plane.nbytes / check_round_trip(plane).nbytes >= ratio


def test_every_pattern_comes_back_among_common_numbers() -> None:
    """NaN with every payload, infinities, zeros and subnormals, as escapes."""
    common = data.gaussian(8192, 1, 128, 2)
    check_round_trip(torch.cat((data.every_pattern(), common)))
    check_round_trip(torch.cat((common, data.every_pattern())))


@pytest.mark.parametrize("exponents", ["low", "high", "both ends"])
def test_windows_reach_both_ends_of_the_exponents(exponents: str) -> None:
    every = words(data.every_pattern()).flatten()
    exponent = (every >> 7) & 255
    low, high = exponent < 15, exponent > 240
    chosen = {"low": low, "high": high, "both ends": (exponent < 4) | high}[exponents]
    encoded = check_round_trip(every[chosen].view(torch.bfloat16).view(-1, 1, 128))
    base, width, escapes = xs.INFO.unpack(bytes(encoded[:16].tolist()))
    assert width == 4
    assert base == {"low": 0, "high": 241, "both ends": 241}[exponents]
    assert escapes == {"low": 0, "high": 0, "both ends": 4 * 256}[exponents]


def test_what_would_not_be_smaller_is_left() -> None:
    assert encode_xs(data.every_pattern().unsqueeze(0)) == [None]
    assert encode_xs(data.random_words(300, 2, 33, 1).unsqueeze(0)) == [None]
    assert encode_xs(torch.zeros(2, 0, 8, 128, dtype=torch.bfloat16)) == [None, None]
    assert encode_xs(torch.zeros(0, 16, 8, 128, dtype=torch.bfloat16)) == []
    assert encode_xs(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)) == [None]


def test_a_batch_is_encoded_plane_by_plane() -> None:
    planes = torch.stack(
        (data.gaussian(40, 2, 64, 1), data.random_words(40, 2, 64, 1), data.keys(40, 2, 64, 1))
    )
    first, second, third = encode_xs(planes)
    assert first is not None
    assert second is None
    assert third is not None
    assert torch.equal(third, check_round_trip(planes[2]))


def test_the_sections_are_what_the_layout_says() -> None:
    """Exponents 127 are in the window, one 3 before and one 200 after it are escapes."""
    plane = torch.full((XS_BLOCK + 5,), -1.5, dtype=torch.bfloat16)
    plane[7] = 2.0**-124
    plane[XS_BLOCK + 1] = 2.0**73
    encoded = xs.encode(plane)
    assert encoded is not None
    layout = xs_layout(plane.numel(), width=3, num_escapes=2)
    # The lowest of the bases that hold 127: 121. Codes are 6, and 7 for escapes.
    assert bytes(encoded[:16].tolist()) == struct.pack("<BBHIQ", 121, 3, 0, 2, 0)
    stored = {
        name: bytes(encoded[offset : offset + nbytes].tolist())
        for name, offset, nbytes in layout.sections
    }
    assert stored["starts"] == struct.pack("<II", 0, 1)
    codes = [6] * plane.numel()
    codes[7] = codes[XS_BLOCK + 1] = 7
    packed = sum(code << 3 * index for index, code in enumerate(codes))
    assert stored["codes"] == packed.to_bytes(layout["codes"].nbytes, "little")
    assert stored["rest"][0] == 0b1100_0000
    assert stored["rest"][7] == 0
    assert stored["escapes"] == bytes([3, 200])
    assert encoded.numel() == layout.nbytes
    assert not encoded[layout["escapes"].offset + 2 :].any()


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 40), st.integers(0, 3), st.data())
def test_any_shape_and_strides_come_back(
    tokens: int, heads: int, dim: int, rare: int, draw: st.DataObject
) -> None:
    plane = data.gaussian(heads, tokens, dim, tokens).transpose(0, 1)
    for _ in range(rare):
        where = [draw.draw(st.integers(0, size - 1)) for size in plane.shape]
        plane[tuple(where)] = draw.draw(st.floats(width=16))
    (encoded,) = encode_xs(plane.unsqueeze(0))
    if encoded is None:
        assert plane.numel() < 200
        return
    assert encoded.numel() < plane_layout(Codec.RAW, "key", tokens, heads, dim, 2).nbytes
    out = data.poisoned((dim, tokens, heads), torch.bfloat16).permute(1, 2, 0)
    assert torch.equal(words(decode_xs(encoded, out)), words(plane))


def damages(good: Tensor) -> dict[str, Tensor]:
    def changed(at: int, value: int) -> Tensor:
        bad = good.clone()
        bad[at] = value
        return bad

    layout = xs_layout(40 * 128, width=int(good[1]), num_escapes=int(good[4]))
    return {
        "nothing": good[:0],
        "a part of the info": good[:15],
        "a part": good[:-16],
        "more": torch.cat((good, good[:16])),
        "a width": changed(1, 5),
        "a width that does not fit": changed(1, 7 - int(good[1])),
        "a base beyond the exponents": changed(0, 250),
        "reserved bytes": changed(3, 1),
        "other reserved bytes": changed(12, 1),
        "fewer escapes": changed(4, int(good[4]) - 1),
        "4 billion escapes": changed(7, 255),
        "a start": changed(layout["starts"].offset, 1),
        "codes of another number of escapes": changed(layout["codes"].offset + 1500, 255),
    }


GOOD = encode_xs(data.keys(40, 1, 128, 5).unsqueeze(0))[0]
assert GOOD is not None


@pytest.mark.parametrize("name", damages(GOOD))
def test_damage_is_an_error(name: str) -> None:
    assert GOOD is not None
    with pytest.raises(PageCorrupt):
        decode_xs(damages(GOOD)[name], data.poisoned((40, 1, 128), torch.bfloat16))


@given(st.integers(0, 255), st.integers(0), st.binary(max_size=40))
def test_garbage_is_an_error_or_numbers(value: int, at: int, garbage: bytes) -> None:
    assert GOOD is not None
    bad = GOOD.clone()
    bad[at % bad.numel()] = value
    for each in (bad, torch.tensor(list(garbage), dtype=torch.uint8)):
        try:
            decode_xs(each, data.poisoned((40, 1, 128), torch.bfloat16))
        except PageCorrupt:
            continue


def test_codes_after_the_last_number_are_damage() -> None:
    encoded = xs.encode(torch.ones(1003, dtype=torch.bfloat16))
    assert encoded is not None
    _, offset, nbytes = xs_layout(1003, width=3, num_escapes=0)["codes"]
    encoded[offset + nbytes - 1] |= 128
    with pytest.raises(PageCorrupt):
        xs.decode(encoded, data.poisoned((1003,), torch.bfloat16))


def test_wrong_tensors_are_refused() -> None:
    assert GOOD is not None
    with pytest.raises(ValueError, match="bfloat16"):
        encode_xs(torch.zeros(1, 4, 1, 8))
    with pytest.raises(ValueError, match="bfloat16"):
        decode_xs(GOOD, torch.zeros(4, 1, 8))
    with pytest.raises(ValueError, match="uint8"):
        decode_xs(GOOD.view(torch.int8), torch.zeros(40, 1, 128, dtype=torch.bfloat16))
