"""The ladder keeps the errors that it promises, and its form for any shape, dtype and strides."""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from respkv.kernels.ladder import decode_planes, encode_planes
from respkv.kernels.layout import Codec, Side, plane_layout
from tests.kernels import data

CODECS = [codec for codec in Codec if codec >= Codec.F8]
SIDES: list[Side] = ["key", "value"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Relative L2 errors that must hold: of N(0, 1), of keys, of values.
BOUNDS = {
    Codec.F8: (0.0275, 0.0245, 0.0270),
    Codec.I8: (0.0060, 0.0024, 0.0095),
    Codec.I4: (0.083, 0.034, 0.093),
    Codec.RH4: (0.112, 0.045, 0.110),
    Codec.RH3: (0.200, 0.080, 0.200),
    Codec.RH2: (0.358, 0.143, 0.355),
    Codec.RHZ4: (0.163, 0.066, 0.163),
    Codec.RHZ3: (0.205, 0.083, 0.205),
    Codec.RHZ2: (0.288, 0.116, 0.288),
}


def bound_of(codec: Codec, name: str, side: Side) -> float:
    if codec == Codec.I8 and name == "gaussian" and side == "value":
        return 0.0070
    return BOUNDS[codec][["gaussian", "keys", "values"].index(name)]


def encode(codec: Codec, planes: Tensor, side: Side) -> Tensor:
    """Return planes that fit, encoded into memory full of ones."""
    num_planes, *shape = planes.shape
    layout = plane_layout(codec, side, *shape, planes.element_size())
    out = data.poisoned((num_planes, layout.nbytes))
    encoded, fits = encode_planes(codec, planes, side=side, out=out)
    assert encoded is out
    assert fits.tolist() == [True] * num_planes
    return encoded


def decode(codec: Codec, encoded: Tensor, side: Side, like: Tensor) -> Tensor:
    """Return planes, decoded into memory full of NaN."""
    out = data.poisoned(tuple(like.shape), like.dtype)
    assert decode_planes(codec, encoded, side=side, out=out) is out
    return out


def there_and_back(codec: Codec, planes: Tensor, side: Side) -> Tensor:
    return decode(codec, encode(codec, planes, side), side, planes)


def pieces(planes: Tensor, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield so many tokens of the planes at a time."""
    stops = list(accumulate(sizes))
    for size, stop in zip(sizes, stops, strict=True):
        yield planes[:, stop - size : stop]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("name", "side"),
    [("gaussian", "key"), ("gaussian", "value"), ("keys", "key"), ("values", "value")],
)
def test_errors_stay_within_the_bounds(codec: Codec, name: str, side: Side) -> None:
    planes = data.GENERATORS[name](8192, 1, 128, 1).unsqueeze(0)
    error = data.relative_error(there_and_back(codec, planes, side), planes)
    assert error <= bound_of(codec, name, side)


def test_eight_bits_of_keys_per_token_stay_within_their_bound_too() -> None:
    planes = data.keys(8192, 1, 128, 1).unsqueeze(0)
    assert data.relative_error(there_and_back(Codec.F8, planes, "value"), planes) <= 0.0245


@pytest.mark.parametrize(
    "ladder",
    [
        [Codec.I8, Codec.F8, Codec.I4, Codec.RH4, Codec.RH3, Codec.RH2],
        [Codec.RHZ4, Codec.RHZ3, Codec.RHZ2],
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "side"), [("keys", "key"), ("values", "value")])
def test_fewer_bits_are_more_error(ladder: list[Codec], name: str, side: Side) -> None:
    planes = data.GENERATORS[name](512, 2, 128, 1).unsqueeze(0)
    errors = [data.relative_error(there_and_back(codec, planes, side), planes) for codec in ladder]
    assert all(less < more for less, more in pairwise(errors))


def test_attention_over_encoded_keys_is_close() -> None:
    """64 Gaussian queries of logits of deviation 2.5 over 8192 keys, of four heads."""
    keys, heads = data.keys(8192, 4, 128, 1), 4
    values = data.gaussian(8192, heads, 128, 2, dtype=torch.float32).transpose(0, 1)
    queries = torch.randn(heads, 64, 128, generator=data.seeded(3))
    scale = 2.5 / (queries @ keys.float().permute(1, 2, 0)).std(-1, keepdim=True)

    def attend(plane: Tensor) -> Tensor:
        logits = queries @ plane.float().permute(1, 2, 0)
        return torch.softmax(logits * scale, -1) @ values

    exact = attend(keys)
    for codec, bound in ((Codec.I8, 0.03), (Codec.I4, 0.17), (Codec.RH4, 0.20)):
        ours = attend(there_and_back(codec, keys.unsqueeze(0), "key")[0])
        assert data.relative_error(ours, exact) <= bound


@pytest.mark.parametrize("codec", [Codec.I8, Codec.I4])
@pytest.mark.parametrize(("name", "side"), [("keys", "key"), ("values", "value")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_was_decoded_encodes_to_the_same_bytes(
    codec: Codec, name: str, side: Side, dtype: torch.dtype
) -> None:
    planes = data.GENERATORS[name](320, 2, 128, 1).unsqueeze(0)
    encoded = encode(codec, planes, side)
    decoded = decode(codec, encoded, side, planes.to(dtype))
    assert torch.equal(encode(codec, decoded, side), encoded)


@pytest.mark.parametrize("codec", CODECS)
def test_tokens_of_values_are_encoded_one_by_one(codec: Codec) -> None:
    planes = data.values(300, 2, 128, 1).unsqueeze(0)
    whole = there_and_back(codec, planes, "value")
    parts = [there_and_back(codec, part, "value") for part in pieces(planes, (1, 15, 200, 84))]
    assert torch.equal(torch.cat(parts, 1), whole)
    order = torch.randperm(300, generator=data.seeded(2))
    assert torch.equal(there_and_back(codec, planes[:, order], "value"), whole[:, order])


@pytest.mark.parametrize("codec", CODECS)
def test_groups_of_keys_are_encoded_one_by_one(codec: Codec) -> None:
    """The plane is large enough to be worked on in several blocks."""
    planes = data.keys(600, 4, 128, 1).unsqueeze(0)
    whole = there_and_back(codec, planes, "key")
    parts = [there_and_back(codec, part, "key") for part in pieces(planes, (256, 256, 88))]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("side", SIDES)
def test_planes_of_a_batch_are_encoded_one_by_one(codec: Codec, side: Side) -> None:
    """One of the planes does not fit; there are more than a block holds."""
    planes = torch.stack([data.gaussian(48, 2, 128, seed) for seed in range(30)])
    planes[7, 5, 1, 3] = float("nan")
    encoded, fits = encode_planes(codec, planes, side=side)
    assert fits.tolist() == [index != 7 for index in range(30)]
    for index in (0, 6, 8, 29):
        assert torch.equal(encode(codec, planes[index : index + 1], side)[0], encoded[index])


@given(
    st.sampled_from(CODECS),
    st.sampled_from(SIDES),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 3), st.integers(1, 70)),
    st.permutations(range(4)),
)
def test_any_shape_dtype_and_strides(
    codec: Codec,
    side: Side,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    order: list[int],
) -> None:
    num_planes, tokens, heads, dim = shape
    flat = data.GENERATORS[f"{side}s"](num_planes * tokens, heads, dim, tokens, dtype=dtype)
    planes = flat.view(shape)
    encoded, fits = encode_planes(codec, planes, side=side)
    layout = plane_layout(codec, side, tokens, heads, dim, dtype.itemsize)
    assert encoded.shape == (num_planes, layout.nbytes)
    scattered = torch.empty([shape[axis] for axis in order], dtype=dtype)
    scattered = scattered.permute(*[order.index(axis) for axis in range(4)])
    scattered.copy_(planes)
    # Rows of wider memory, which says what else was written.
    wide = data.poisoned((num_planes, layout.nbytes + 16))
    again, fits_again = encode_planes(codec, scattered, side=side, out=wide[:, : layout.nbytes])
    assert torch.equal(again, encoded)
    assert torch.equal(fits_again, fits)
    assert (wide[:, layout.nbytes :] == 255).all()
    decoded = decode(codec, encoded, side, planes)
    out = scattered.fill_(torch.nan)
    assert torch.equal(decode_planes(codec, again, side=side, out=out), decoded)
    if fits.all() and planes.numel():
        assert decoded.isfinite().all()
        # One step of two bits, at worst: a row is as far off as it is long.
        assert (decoded.double() - planes.double()).norm() <= planes.double().norm() * 1.001


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(0, 16, 2, 8), (2, 0, 2, 8), (2, 16, 0, 8), (1, 1, 1, 1)])
def test_nothing_is_encoded_to_nothing(codec: Codec, side: Side, shape: tuple[int, ...]) -> None:
    planes = torch.ones(shape, dtype=torch.bfloat16)
    assert torch.allclose(there_and_back(codec, planes, side), planes, rtol=0.01)


# Numbers among N(0, 1): whether a plane of them must fit, must not, or may.
NUMBERS = {
    "all patterns": ([], False),
    "zeros": ([0.0, -0.0], True),
    "nan": ([float("nan")], False),
    "infinity": ([float("inf")], False),
    "minus infinity": ([-float("inf")], False),
    "subnormal": ([2.0**-133, -(2.0**-130)], True),
    "large": ([1000.0, -1000.0], True),
    "huge": ([1e30, -3e38], None),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_a_codec_cannot_hold_does_not_fit(codec: Codec, side: Side, name: str) -> None:
    numbers, expected = NUMBERS[name]
    plane = data.gaussian(64, 2, 32, 1)
    plane.view(-1)[: len(numbers)] = torch.tensor(numbers)
    planes = data.every_pattern().unsqueeze(0) if name == "all patterns" else plane.unsqueeze(0)
    encoded, fits = encode_planes(codec, planes, side=side)
    assert expected is None or fits.item() == expected
    if fits:
        decoded = decode(codec, encoded, side, planes)
        assert data.relative_error(decoded, planes) < 0.4


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("side", SIDES)
def test_no_scale_of_numbers_is_decoded_wrongly(codec: Codec, side: Side) -> None:
    plane = data.gaussian(40, 1, 64, 1, dtype=torch.float32)
    for exponent in range(-140, 128, 4):
        planes = (plane * 2.0**exponent).unsqueeze(0)
        encoded, fits = encode_planes(codec, planes, side=side)
        assert fits or abs(exponent) > 8
        if fits:
            decoded = decode(codec, encoded, side, planes)
            assert data.relative_error(decoded, planes) <= 1.1 * BOUNDS[codec][0]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("side", SIDES)
def test_float16_is_filled_up_to_its_largest_number_and_not_beyond(
    codec: Codec, side: Side
) -> None:
    planes = torch.full((1, 40, 1, 32), 65504.0, dtype=torch.float16)
    planes[0, ::3] *= -1
    encoded, fits = encode_planes(codec, planes, side=side)
    assert decode(codec, encoded, side, planes).isfinite().all() or not fits


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_keep_their_meaning(codec: Codec) -> None:
    """What an earlier version stored must be readable for ever."""
    planes = (torch.arange(48 * 24) * 7919 % 1009 - 504).view(1, 48, 1, 24).to(torch.bfloat16)
    sums = []
    for side in SIDES:
        octets = encode(codec, planes / 256, side)[0].to(torch.int64)
        sums.append(int((octets * (torch.arange(1, octets.numel() + 1) % 251)).sum()))
    assert sums == GOLDEN[codec]


# Sums of the bytes of keys and of values, each times its place from 1 on modulo 251.
GOLDEN: dict[Codec, list[int]] = {
    Codec.F8: [27360496, 27360496],
    Codec.I8: [19975240, 19522822],
    Codec.I4: [11574399, 11778232],
    Codec.RH4: [13251338, 12571863],
    Codec.RH3: [10971537, 9972259],
    Codec.RH2: [7749080, 7173301],
    Codec.RHZ4: [12362280, 11736367],
    Codec.RHZ3: [12390707, 11839981],
    Codec.RHZ2: [12448586, 11832601],
}


def test_wrong_arguments_are_refused() -> None:
    planes = torch.zeros(2, 16, 2, 8, dtype=torch.bfloat16)
    encoded = encode(Codec.F8, planes, "key")
    for codec in (Codec.RAW, Codec.XS):
        with pytest.raises(ValueError, match="fixed size"):
            encode_planes(codec, planes, side="key")
        with pytest.raises(ValueError, match="fixed size"):
            decode_planes(codec, encoded, side="key", out=planes)
    for wrong in (planes[0], planes.double(), planes[..., :0]):
        with pytest.raises(ValueError, match=r"\[N, T, H, D\]"):
            encode_planes(Codec.F8, wrong, side="key")
    for out in (encoded[:1], encoded[:, :-1], encoded.view(torch.int8)):
        with pytest.raises(ValueError, match="must be"):
            encode_planes(Codec.F8, planes, side="key", out=out)
        with pytest.raises(ValueError, match="must be"):
            decode_planes(Codec.F8, out, side="key", out=planes)
    odd = data.poisoned((2, encoded.shape[1] + 1))[:, 1:]
    with pytest.raises(ValueError, match="contiguous"):
        encode_planes(Codec.F8, planes, side="key", out=odd)
    with pytest.raises(ValueError, match="side"):
        encode_planes(Codec.F8, planes, side="keys")  # type: ignore[arg-type]
