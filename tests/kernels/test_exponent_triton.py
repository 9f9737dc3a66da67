"""The kernels of xs against the reference, bit for bit, on damaged bytes, and compiled."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from respkv.errors import PageCorrupt
from respkv.kernels import exponent_triton, xs
from respkv.kernels.exponent_blocks_triton import decode_block_kernel, encode_block_kernel
from respkv.kernels.exponent_window_triton import window_kernel
from respkv.kernels.layout import XS_BLOCK, Side, xs_layout
from respkv.kernels.paged import blocks_of, read_tokens
from tests.kernels.caches import LAYOUTS, cache, filled, some_slots
from tests.kernels.compiled import ARCHES, Compiled, compile_for
from tests.kernels.data import (
    GENERATORS,
    every_pattern,
    gaussian,
    poisoned,
    random_words,
    seeded,
)

CPU = torch.device("cpu")


def bits_of(numbers: Tensor) -> Tensor:
    """Return bfloat16 numbers as integers in memory: NaN is equal to itself."""
    return numbers.cpu().contiguous().view(torch.int16)


def check(planes: Tensor, device: torch.device) -> list[Tensor | None]:
    """Encode and decode planes as the reference does; return what the reference encodes them to."""
    ours = exponent_triton.encode(planes.to(device))
    expected = [xs.encode(plane) for plane in planes]
    assert [made is None for made in ours] == [made is None for made in expected]
    for plane, made, wanted in zip(planes, ours, expected, strict=True):
        if made is None or wanted is None:
            continue
        assert torch.equal(made.cpu(), wanted)
        out = poisoned(tuple(plane.shape), torch.bfloat16).to(device)
        exponent_triton.decode(wanted.to(device), out)
        assert torch.equal(bits_of(out), bits_of(plane))
    return expected


@pytest.mark.parametrize("name", GENERATORS)
def test_bytes_and_numbers_are_those_of_the_reference(name: str, device: torch.device) -> None:
    # Blocks with one that is not full; the planes take their own base each.
    planes = torch.stack([GENERATORS[name](33, 3, 128, seed) for seed in range(2)])
    planes[1] *= 8
    expected = check(planes, device)
    assert all(each is not None for each in expected)


def test_planes_of_few_exponents_and_of_many_are_those_of_the_reference(
    device: torch.device,
) -> None:
    wide = gaussian(32, 2, 64, 1) * 2.0 ** torch.randint(-7, 7, (32, 2, 64), generator=seeded(2))
    rare = torch.ones(32, 2, 64, dtype=torch.bfloat16)
    rare[::5, 1, 3] = 2.0**100
    rare[7, 0, :9] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 1, 3e38, -1])
    zeros = torch.zeros(32, 2, 64, dtype=torch.bfloat16)
    large = torch.full((32, 2, 64), torch.nan, dtype=torch.bfloat16)
    noise = random_words(32, 2, 64, 5)
    planes = torch.stack([wide.bfloat16(), rare, zeros, large, noise])
    widths = [None if each is None else int(each[1]) for each in check(planes, device)]
    assert widths == [4, 3, 3, 3, None]


def of_exponents(counts: dict[int, int]) -> Tensor:
    """Return one plane [1, T, 1, 64] with so many numbers of each exponent, shuffled."""
    exponents = torch.cat([torch.full((n,), e, dtype=torch.int32) for e, n in counts.items()])
    assert exponents.numel() % 64 == 0
    mixed = exponents[torch.randperm(exponents.numel(), generator=seeded(9))]
    return (mixed << 7).to(torch.int16).view(torch.bfloat16).view(1, -1, 1, 64)


@pytest.mark.parametrize(
    ("counts", "base", "width"),
    [
        # A sample tells where to look; what it shows nothing of must be looked for.
        pytest.param({119: 96, 120: 8000, 126: 96}, 114, 3, id="two windows, the lower one"),
        pytest.param({119: 95, 120: 8000, 126: 97}, 120, 3, id="two windows, the higher one"),
        pytest.param({60: 4096, 200: 4096}, 54, 3, id="far apart, the lower one"),
        pytest.param({60: 4032, 200: 4160}, 194, 3, id="far apart, the higher one"),
        pytest.param({0: 8128, 255: 64}, 0, 3, id="the lowest"),
        pytest.param({255: 8128, 0: 64}, 249, 3, id="the highest"),
        pytest.param({3: 5000, 9: 3192}, 3, 3, id="near the lowest"),
        pytest.param({250: 5000, 241: 3192}, 236, 4, id="near the highest"),
        pytest.param(dict.fromkeys(range(100, 116), 512), 100, 4, id="sixteen alike"),
        pytest.param(dict.fromkeys(range(100, 108), 1024), 100, 3, id="eight alike"),
    ],
)
def test_windows_are_the_best_wherever_the_sample_points(
    counts: dict[int, int], base: int, width: int, device: torch.device
) -> None:
    (made,) = check(of_exponents(counts), device)
    assert made is not None
    assert (int(made[0]), int(made[1])) == (base, width)


def test_every_pattern_of_16_bits_comes_back(device: torch.device) -> None:
    # Each in a plane of others that make it worth while; and all of them, which is not.
    patterns = every_pattern().flatten()
    mixed = torch.cat((patterns, torch.ones_like(patterns)))
    plane = mixed[torch.randperm(mixed.numel(), generator=seeded(3))]
    assert check(plane.view(1, -1, 8, 128), device)[0] is not None
    assert check(every_pattern()[None], device) == [None]


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_bytes_are_those_of_the_reference_at_any_shape(
    data: st.DataObject, device: torch.device
) -> None:
    tokens = data.draw(st.integers(1, 40), label="T")
    heads = data.draw(st.integers(1, 3), label="H")
    dim = data.draw(st.integers(1, 130), label="D")
    spread = data.draw(st.sampled_from([0, 1, 4, 16]), label="spread")
    seed = tokens * heads * dim
    plane = torch.randn(1, tokens, heads, dim, generator=seeded(seed))
    plane *= 2.0 ** torch.randint(-spread, spread + 1, plane.shape, generator=seeded(seed))
    check(plane.bfloat16(), device)


@pytest.mark.parametrize(
    ("dim", "side"), [(64, "key"), (24, "value")], ids=["power of two", "other"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planes_go_out_of_and_into_a_cache_of_any_layout(
    layout: str, dim: int, side: Side, device: torch.device
) -> None:
    shape = (2, 9, 8, 3, dim)
    buffer = filled(layout, shape, torch.bfloat16, device)
    slots = some_slots(buffer, 64)
    slots[5] = -1
    encoded, sizes = exponent_triton.encode_paged(buffer, side, slots, page_tokens=32, num_pages=2)
    where = blocks_of(buffer, slots, 64)
    planes: list[Tensor] = []
    for layer, plane in enumerate(buffer.planes(side)):
        for page, numbers in enumerate(
            torch.unflatten(read_tokens(plane, where).cpu(), 0, (2, 32))
        ):
            expected = xs.encode(numbers)
            assert expected is not None
            assert torch.equal(encoded[page, layer, : int(sizes[page, layer])].cpu(), expected)
    for page, layer in ((0, 0), (0, 1), (1, 0), (1, 1)):
        planes.append(encoded[page, layer, : int(sizes[page, layer])].clone())

    ways: list[tuple[list[Tensor] | Tensor, Tensor | None]] = [(planes, None), (encoded, sizes)]
    for stored, lengths in ways:
        target = cache(layout, shape, torch.bfloat16, device)
        good = exponent_triton.decode_paged(
            stored, target, side, slots, page_tokens=32, sizes=lengths
        )
        assert good.all()
        for old, new in zip(buffer.planes(side), target.planes(side), strict=True):
            assert torch.equal(bits_of(read_tokens(old, where)), bits_of(read_tokens(new, where)))
            assert int(new.isnan().sum()) == new.numel() - 63 * 3 * dim, "wrote elsewhere"


def test_no_planes_are_no_launch(device: torch.device) -> None:
    assert (
        exponent_triton.encode(torch.empty(0, 4, 1, 8, dtype=torch.bfloat16, device=device)) == []
    )
    empty = torch.empty(2, 0, 1, 8, dtype=torch.bfloat16, device=device)
    assert exponent_triton.encode(empty) == [None, None]


def test_numbers_that_are_not_bfloat16_are_refused(device: torch.device) -> None:
    planes = torch.zeros(1, 4, 1, 8, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="bfloat16"):
        exponent_triton.encode(planes)


def test_damaged_bytes_are_found_and_read_nothing_else(device: torch.device) -> None:
    plane = gaussian(20, 2, 128, 7)  # a block and a quarter
    made = xs.encode(plane)
    assert made is not None
    layout = xs_layout(plane.numel(), width=3, num_escapes=int(made[4:8].view(torch.int32)))
    assert layout.nbytes == made.numel()
    starts, codes = layout["starts"].offset, layout["codes"].offset
    damages: dict[str, Tensor] = {"nothing": made[:0], "half a head": made[:8], "cut": made[:-16]}
    for name, at, value in (
        ("base", 0, 254),
        ("width", 1, 5),
        ("width of 4", 1, 4),
        ("a third byte", 2, 1),
        ("escapes", 6, 1),
        ("negative escapes", 7, 255),
        ("reserved", 11, 1),
        ("first start", starts, 1),
        ("second start", starts + 4, int(made[starts + 4]) ^ 1),
        ("huge start", starts + 7, 127),
        ("negative start", starts + 7, 255),
        ("an escape more", codes, 255),
    ):
        damages[name] = made.clone()
        damages[name][at] = value
    out = torch.empty(plane.shape, dtype=torch.bfloat16, device=device)
    for damaged in damages.values():
        with pytest.raises(PageCorrupt):
            exponent_triton.decode(damaged.to(device), out)
    exponent_triton.decode(made.to(device), out)
    assert torch.equal(bits_of(out), bits_of(plane))


def test_codes_after_the_last_number_are_damage(device: torch.device) -> None:
    plane = gaussian(5, 3, 29, 7)  # 435 numbers: 3 of the last 8 codes are padding
    made = xs.encode(plane)
    assert made is not None
    layout = xs_layout(
        plane.numel(), width=int(made[1]), num_escapes=int(made[4:8].view(torch.int32))
    )
    last = layout["codes"].offset + layout["codes"].nbytes - 1
    made[last] |= 64
    out = torch.empty(plane.shape, dtype=torch.bfloat16, device=device)
    with pytest.raises(PageCorrupt):
        exponent_triton.decode(made.to(device), out)
    with pytest.raises(PageCorrupt):
        xs.decode(made, out.cpu())


def test_a_tensor_that_is_not_contiguous_or_aligned_is_decoded(device: torch.device) -> None:
    plane = gaussian(9, 2, 40, 7)
    made = xs.encode(plane)
    assert made is not None
    shifted = torch.empty(made.numel() + 1, dtype=torch.uint8, device=device)[1:]
    shifted.copy_(made)
    out = poisoned((2, 9, 40), torch.bfloat16).to(device).transpose(0, 1)
    exponent_triton.decode(shifted, out)
    assert torch.equal(bits_of(out), bits_of(plane))


def test_programs_share_blocks_only_where_there_are_many() -> None:
    assert exponent_triton.share_of(64, 16) == 1
    assert exponent_triton.share_of(4096, 64) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_bytes_of_the_reference(device: torch.device) -> None:
    planes = torch.stack([GENERATORS["keys"](256, 8, 128, seed) for seed in range(40)])
    check(planes, device)


TYPES = {
    "table": "*i64:16",
    "like": "*bf16:16",
    "slots": "*i64:16",
    "out": "*u8:16",
    "out_page": "i64:16",
    "out_layer": "i64:16",
    "counts": "*i16:16",
    "encoded": "*i64:16",
    "good": "*u8:16",
}


def compiled(kernel: Any, arch: int, *, is_flat: bool) -> Compiled:
    buffer = cache("nhd", (1, 4, 256 if is_flat else 16, 8, 128), torch.bfloat16, CPU)
    slots = None if is_flat else torch.zeros(256, dtype=torch.int64)
    constants: dict[str, object] = exponent_triton.plane_shape(buffer, "key", slots, 256)
    assert constants["FLAT"] == is_flat
    types = {name: TYPES[name] for name in kernel.arg_names if name in TYPES}
    types["sizes"] = "*i64:16" if kernel is decode_block_kernel else "*i32:16"
    if is_flat:
        del types["slots"]
        constants["slots"] = None
    if kernel is window_kernel:
        return compile_for(kernel, types, constants, arch, **exponent_triton.WINDOW_OPTIONS)
    constants["SHARE"] = exponent_triton.SHARE_MAX
    return compile_for(kernel, types, constants, arch, num_warps=exponent_triton.BLOCK_WARPS)


@pytest.mark.parametrize(
    ("is_flat", "arch"), [*((True, arch) for arch in ARCHES), (False, 90)], ids=str
)
def test_the_kernels_compile_to_whole_vectors_without_spills(is_flat: bool, arch: int) -> None:
    for kernel in (window_kernel, encode_block_kernel, decode_block_kernel):
        made = compiled(kernel, arch, is_flat=is_flat)
        assert made.spill_bytes == 0
        assert 128 in made.load_bits
        assert 128 in made.store_bits or kernel is window_kernel
        assert made.registers <= (112 if kernel is window_kernel else 128), "16 warps an SM"


def test_blocks_are_those_of_the_layout() -> None:
    assert (
        exponent_triton.plane_shape(
            cache("nhd", (1, 1, 33, 1, 128), torch.bfloat16, CPU), "key", None, 33
        )["BLOCKS"]
        == 1 + (33 * 128 - 1) // XS_BLOCK
    )
