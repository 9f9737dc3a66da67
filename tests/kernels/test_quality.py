"""Measuring codecs: what is exact measures as exact, and errors are those that were made."""

from math import isfinite

import pytest
import torch

from respkv.kernels import quality
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
    for found in measure(codec, *planes()):
        assert (found.relative_l2, found.max_error, found.attention_error) == (0, 0, 0)
        assert found.bits <= 16


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


def test_planes_that_are_no_numbers_are_in_no_error() -> None:
    keys, values = planes()
    keys[1, 3, 0, 5] = torch.nan
    values[2, 0, 1, 0] = -torch.inf
    for found in measure(Codec.RH4, keys, values):
        assert 0.01 < found.relative_l2 < 0.15
        assert 0 < found.attention_error < 1
        assert 0 < found.max_error < 10
    for found in measure(Codec.RH4, torch.full_like(keys, torch.nan), values):
        assert found.attention_error == 0
        assert isfinite(found.relative_l2)


def test_pages_of_very_many_tokens_take_no_more_memory_for_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys, values = planes()
    exact, _ = measure(Codec.I4, keys, values)
    sizes: list[int] = []
    attend = quality._attend

    def noted(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        sizes.append(queries.shape[0] * queries.shape[1] * keys.shape[1])
        return attend(queries, keys, values)

    monkeypatch.setattr(quality, "_attend", noted)
    monkeypatch.setattr(quality, "LOGITS_MAX", 10_000)
    found, _ = measure(Codec.I4, keys, values)
    assert max(sizes) <= 10_000
    assert found.relative_l2 == exact.relative_l2
