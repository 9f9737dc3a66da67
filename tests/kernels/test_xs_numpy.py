"""The lossless codec with numpy alone: the same bytes as the reference, and every bit back."""

import random

import numpy as np
import pytest
import torch

from respkv.errors import PageCorrupt
from respkv.kernels import xs, xs_numpy
from respkv.kernels.layout import XS_BLOCK, xs_layout
from tests.kernels import data

SIZES = [1, 7, 8, 31, 33, 100, 4095, 4096, 4097, 65535, 65536, 65537, 300_001]


def words_of(kind: str, count: int) -> xs_numpy.Words:
    """Return numbers as they are in memory."""
    rng = np.random.default_rng(count)
    if kind == "zero":
        return np.zeros(count, np.uint16)
    if kind == "noise":
        return rng.integers(0, 1 << 16, count, dtype=np.uint16)
    numbers = rng.standard_normal(count)
    if kind == "wide":
        numbers *= np.exp(2 * rng.standard_normal(count))
    words = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if kind == "odd ones":
        words[:: max(1, count // 50)] = 0x7FC1
    return words


def decoded(stored: bytes | bytearray, count: int) -> xs_numpy.Words:
    into = np.full(count, 0xABCD, np.uint16)
    xs_numpy.decode(memoryview(stored), into)
    return into


@pytest.mark.parametrize("kind", ["gaussian", "wide", "odd ones", "zero", "noise"])
@pytest.mark.parametrize("count", SIZES)
def test_it_makes_the_bytes_of_the_reference(kind: str, count: int) -> None:
    words = words_of(kind, count)
    stored = xs_numpy.encode(words)
    expected = xs.encode(torch.from_numpy(words.view(np.int16)).view(torch.bfloat16))
    if expected is None:
        assert stored is None
        return
    assert stored is not None
    assert bytes(stored) == expected.numpy().tobytes()
    assert (decoded(stored, count) == words).all()


def test_every_pattern_of_16_bits_comes_back() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    usual = words_of("gaussian", 1 << 18)
    words = np.concatenate([usual, patterns, usual])
    stored = xs_numpy.encode(words)
    assert stored is not None
    assert (decoded(stored, words.size) == words).all()


@pytest.mark.parametrize(
    ("generate", "ratio"), [(data.gaussian, 1.37), (data.keys, 1.36), (data.values, 1.36)]
)
def test_numbers_of_a_model_become_smaller(generate: data.Generate, ratio: float) -> None:
    words = generate(1024, 2, 128, 5).view(torch.int16).numpy().view(np.uint16).reshape(-1)
    stored = xs_numpy.encode(np.ascontiguousarray(words))
    assert stored is not None
    assert 2 * words.size / len(stored) >= ratio


def test_what_would_not_become_smaller_is_left_alone() -> None:
    assert xs_numpy.encode(words_of("noise", 10_000)) is None
    assert xs_numpy.encode(words_of("gaussian", 1)) is None
    assert xs_numpy.encode(np.zeros(0, np.uint16)) is None


def test_the_window_is_the_lowest_of_the_best_and_the_codes_no_wider_than_needed() -> None:
    flat = np.ones(256, np.intp)
    assert xs_numpy.choose_window(flat, 256)[0] == 0
    few = np.zeros(256, np.intp)
    few[[100, 106]] = 8000
    assert xs_numpy.choose_window(few, 16000) == (100, 3, 0)
    few[[99, 110]] = 4000
    base, width, outside = xs_numpy.choose_window(few, 24000)
    assert (base, width, outside) == (96, 4, 0)
    sizes = [xs_layout(24000, width=w, num_escapes=n).nbytes for w, n in ((3, 4000), (4, 0))]
    assert sizes[1] < sizes[0] + 8000


def test_every_flipped_byte_is_noticed_or_stays_in_its_numbers() -> None:
    words = words_of("odd ones", XS_BLOCK + 300)
    stored = xs_numpy.encode(words)
    assert stored is not None
    rng = random.Random(1)
    noticed = 0
    for at in [*range(40), *sorted(rng.sample(range(40, len(stored)), 300))]:
        damaged = bytearray(stored)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            decoded(damaged, words.size)
        except PageCorrupt:
            noticed += 1
    assert noticed > 24, "base, width, counts and starts"


def test_a_plane_of_another_size_is_refused() -> None:
    words = words_of("gaussian", 1000)
    stored = xs_numpy.encode(words)
    assert stored is not None
    for damaged, count in [
        (stored[:8], 1000),
        (stored[:-16], 1000),
        (stored + bytes(16), 1000),
        (stored, 999),
        (stored, 2000),
    ]:
        with pytest.raises(PageCorrupt):
            decoded(damaged, count)
