"""Measuring codecs: what is exact measures as exact, and errors are those that were made."""

import pytest
import torch

from respkv.kernels.layout import Codec
from respkv.kernels.quality import measure, measure_pages, relative_l2
from respkv.page import Geometry
from tests.kernels import data

LADDER = [Codec.I8, Codec.RH4, Codec.RH3, Codec.RH2]


def planes(tokens: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    keys = data.keys(tokens, 2, 128, 1)
    return keys.view(4, -1, 2, 128), data.values(tokens, 2, 128, 2).view(4, -1, 2, 128)


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.XS])
def test_a_lossless_codec_has_no_error(codec: Codec) -> None:
    for quality in measure(codec, *planes()):
        assert (quality.relative_l2, quality.max_error, quality.attention_error) == (0, 0, 0)
        assert quality.bits <= 16


def test_fewer_bits_mean_more_error() -> None:
    found = [measure(codec, *planes()) for codec in LADDER]
    for side in (0, 1):
        bits = [pair[side].bits for pair in found]
        errors = [pair[side].relative_l2 for pair in found]
        attention = [pair[side].attention_error for pair in found]
        assert bits == sorted(bits, reverse=True)
        assert errors == sorted(errors)
        assert attention == sorted(attention)
        assert all(0 < error < 1 for error in (*errors, *attention))
        assert all(pair[side].max_error > 0 for pair in found)


def test_codes_that_go_through_zstd_cost_less_than_they_do_on_a_device() -> None:
    keys, values = measure(Codec.RHZ2, *planes(1024))
    assert keys.bits < 3.2
    assert values.bits < 3.2


def test_what_does_not_fit_a_codec_counts_as_raw() -> None:
    keys, values = planes()
    keys[1, 3, 0, 5] = torch.inf
    exact, _ = measure(Codec.I8, *planes())
    with_infinity, _ = measure(Codec.I8, keys, values)
    assert with_infinity.bits == pytest.approx(exact.bits * 3 / 4 + 4)


def test_layers_of_pages_are_measured_apart() -> None:
    shape = Geometry(2, 2, 64, 32, "bfloat16")
    calm = torch.randn(2, 2, 32, 2, 64, generator=torch.Generator().manual_seed(3))
    calm[1, 0, :, 0, 7] *= 100  # an outlier channel in the keys of layer 1
    payload = memoryview(calm.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    found = measure_pages([payload, payload], shape, [Codec.I4, Codec.F8])
    assert [len(layers) for layers in found] == [2, 2]
    assert found[0][1][0].max_error > 5 * found[0][0][0].max_error
    assert found[0][1][1].relative_l2 == pytest.approx(found[0][0][1].relative_l2, rel=0.2)


def test_the_error_of_nothing_is_nothing() -> None:
    zeros = torch.zeros(3, 3)
    assert relative_l2(zeros, zeros) == 0
    assert relative_l2(zeros, zeros + 1) == 3
