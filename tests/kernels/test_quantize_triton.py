"""The kernels of f8, i8 and i4 against the reference, bit for bit, and compiled."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from respkv.kernels import columns_triton, ladder, pieces_triton, quantize_triton, rows_triton
from respkv.kernels.layout import Codec, Side, plane_layout
from respkv.kernels.paged import SIDES, PagedBuffer, blocks_of, read_tokens
from tests.kernels.caches import LAYOUTS, bytes_of, cache, filled, moved, some_slots
from tests.kernels.compiled import ARCHES, compile_for
from tests.kernels.data import GENERATORS, poisoned

CPU = torch.device("cpu")
CODECS = (Codec.F8, Codec.I8, Codec.I4)
CASES = [pytest.param(codec, side, id=f"{codec.name}-{side}") for codec in CODECS for side in SIDES]


def encode_both(
    codec: Codec, side: Side, buffer: PagedBuffer, slots: Tensor | None, page_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return [P, L, bytes] and [P, L] of the kernel, then of the reference, all in memory.

    What a section has behind it is not the kernel's affair, and zero here.
    """
    blocks, block_tokens, heads, dim = buffer.shape
    tokens = blocks * block_tokens if slots is None else slots.numel()
    layout = plane_layout(codec, side, page_tokens, heads, dim, buffer.dtype.itemsize)
    ours = torch.zeros((tokens // page_tokens, buffer.num_layers, layout.nbytes), dtype=torch.uint8)
    for section in layout.sections:
        ours[..., section.offset : section.offset + section.nbytes] = 255
    ours = ours.to(buffer.device)
    fits = torch.ones(ours.shape[:2], dtype=torch.bool, device=buffer.device)
    quantize_triton.encode(codec, side, buffer, slots, page_tokens, ours, fits)

    expected, expected_fits = torch.empty_like(ours, device=CPU), torch.empty_like(fits, device=CPU)
    where = blocks_of(buffer, slots, tokens)
    for layer, plane in enumerate(buffer.planes(side)):
        planes = torch.unflatten(read_tokens(plane, where).cpu(), 0, (-1, page_tokens))
        expected[:, layer], expected_fits[:, layer] = ladder.encode_planes(codec, planes, side=side)
    return ours.cpu(), fits.cpu(), expected, expected_fits


def decode_both(
    codec: Codec, side: Side, buffer: PagedBuffer, slots: Tensor, page_tokens: int, encoded: Tensor
) -> None:
    """Decode into two caches like ``buffer``, by the kernel and by the reference; compare all."""
    ours, theirs = moved(buffer, buffer.device), moved(buffer, CPU)
    for plane in (*ours.keys, *ours.values, *theirs.keys, *theirs.values):
        plane.fill_(torch.nan)
    there = encoded.to(buffer.device)
    quantize_triton.decode(codec, side, ours, slots, page_tokens, there)
    block, offset, is_there = blocks_of(theirs, slots.cpu(), slots.numel())
    planes = poisoned((encoded.shape[0], page_tokens, *buffer.shape[2:]), buffer.dtype)
    for layer, plane in enumerate(theirs.planes(side)):
        ladder.decode_planes(codec, encoded[:, layer], side=side, out=planes)
        plane[block[is_there], offset[is_there]] = planes.flatten(0, 1)[is_there]
    assert all(map(torch.equal, bytes_of(ours), bytes_of(theirs)))


def check(codec: Codec, side: Side, buffer: PagedBuffer, slots: Tensor, page_tokens: int) -> None:
    ours, fits, expected, expected_fits = encode_both(codec, side, buffer, slots, page_tokens)
    assert torch.equal(fits, expected_fits)
    assert fits.all()
    assert torch.equal(ours, expected)
    decode_both(codec, side, buffer, slots, page_tokens, expected)


@pytest.mark.parametrize(("codec", "side"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_numbers_are_those_of_the_reference_in_every_layout(
    codec: Codec, side: Side, layout: str, device: torch.device
) -> None:
    buffer = filled(layout, (2, 9, 4, 2, 64), torch.bfloat16, device)
    check(codec, side, buffer, some_slots(buffer, 32), 16)


@pytest.mark.parametrize(("codec", "side"), CASES)
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_are_those_of_the_reference_on_what_models_have(
    codec: Codec, side: Side, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    # More than one group of tokens, and the last not full.
    planes = GENERATORS[name](70, 1, 128, 3, dtype=dtype)[None].to(device)
    check(codec, side, PagedBuffer.from_planes(planes), torch.arange(70, device=device), 70)


@pytest.mark.parametrize(("codec", "side"), CASES)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_codes_are_those_of_the_reference_at_any_shape(
    codec: Codec, side: Side, data: st.DataObject, device: torch.device
) -> None:
    page_tokens = data.draw(st.integers(1, 40) | st.sampled_from([64, 65, 96]), label="T")
    heads = data.draw(st.integers(1, 3), label="H")
    dim = data.draw(st.integers(1, 70) | st.just(130), label="D")
    layout = data.draw(st.sampled_from(list(LAYOUTS)), label="layout")
    dtype = data.draw(
        st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), label="dtype"
    )
    blocks = -(-page_tokens // 8) + 1
    buffer = filled(layout, (1, blocks, 8, heads, dim), dtype, device, seed=page_tokens)
    check(codec, side, buffer, some_slots(buffer, page_tokens), page_tokens)


STEP = 2.0**-18  # the least that is good, and the half of fp16's last bit below it
BELOW = STEP - 2.0**-25
EDGES: dict[str, list[float]] = {
    "zeros": [0.0, -0.0],
    "equal": [3.0, 3.0],
    "equal and negative": [-0.3, -0.3],
    "equal and subnormal in fp16": [2.0**-20, 2.0**-20],
    "equal and small": [STEP, STEP],
    "equal and smaller": [-STEP * (1 - 2.0**-24), -STEP * (1 - 2.0**-24)],
    "a small step of 255": [0.0, 255 * BELOW],
    "a smaller step of 255": [0.0, 255 * BELOW * (1 - 2.0**-20)],
    "a small step of 15": [-15 * BELOW, 0.0],
    "a smaller step of 15": [-15 * BELOW * (1 - 2.0**-20), 0.0],
    "a small step of 127": [0.0, 127 * BELOW * (1 + 2.0**-20)],
    "a smaller step of 127": [0.0, 127 * BELOW * (1 - 2.0**-20)],
    "no step to speak of": [2.0**-8, 2.0**-8 - 2.0**-20],
    "smaller numbers": [2.0**-9, 2.0**-9 - 2.0**-21],
    "the least step": [1.0, 1.0 + 2.0**-20],
    "two subnormal numbers": [2.0**-140, 2.0**-149],
    "far apart": [-65504.0, 65504.0],
    "beyond fp16": [1.0, 65521.0],
    "below fp16": [-65520.0, -65519.0],
    "just within fp16": [-65519.9, 0.0],
    "steps beyond fp16": [0.0, 65520.0 * 255],
    "huge": [-3e38, 3e38],
    "great": [2.0**127, 0.0],
    "greater": [2.0**127 * 1.01, 0.0],
    "subnormal": [2.0**-140, 0.0],
    "tiny": [448 * 2.0**-126, 0.0],
    "infinite": [torch.inf, 0.0],
    "minus infinite": [0.0, -torch.inf],
    "both infinite": [torch.inf, -torch.inf],
    "not a number": [torch.nan, 1.0],
}


@pytest.mark.parametrize(("codec", "side"), CASES)
def test_the_same_planes_fit_and_have_the_same_codes(
    codec: Codec, side: Side, device: torch.device
) -> None:
    # A plane for each case, in its last group of tokens and of channels; the others are harmless.
    planes = torch.ones(len(EDGES), 34, 1, 36)
    for plane, numbers in zip(planes, EDGES.values(), strict=True):
        plane[32:, :, 32:] = torch.tensor(numbers)[:, None, None]
        plane[32:, :, 33:] = torch.tensor(numbers[::-1])[:, None, None]
        plane[32:, :, :32] = plane[:32, :, 32:] = numbers[0]
    planes[list(EDGES).index("zeros"), 33, 0, :2] = torch.tensor([-0.0, 0.0])
    buffer = PagedBuffer.from_planes(planes.to(device))
    ours, fits, expected, expected_fits = encode_both(codec, side, buffer, None, 34)
    names = [name for name, fit in zip(EDGES, expected_fits[:, 0].tolist(), strict=True) if fit]
    assert [name for name, fit in zip(EDGES, fits[:, 0].tolist(), strict=True) if fit] == names
    assert "zeros" in names
    assert "not a number" not in names
    assert torch.equal(ours[fits], expected[fits])


@pytest.mark.parametrize(("codec", "side"), CASES)
def test_tokens_that_are_nowhere_are_zeros_and_are_not_written(
    codec: Codec, side: Side, device: torch.device
) -> None:
    buffer = filled("hnd", (1, 3, 4, 2, 32), torch.bfloat16, device)
    slots = torch.tensor([3, -1, 8, 0, -1, -7, 11, 5], device=device)
    check(codec, side, buffer, slots, 4)


def test_no_pages_are_no_launch(device: torch.device) -> None:
    buffer = filled("nhd", (1, 2, 4, 1, 8), torch.bfloat16, device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    ours, fits, _, _ = encode_both(Codec.I8, "key", buffer, none, 4)
    assert not ours.numel()
    assert not fits.numel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("codec", "side"), CASES)
def test_a_gpu_makes_the_codes_of_the_reference(
    codec: Codec, side: Side, device: torch.device
) -> None:
    buffer = filled("nhd", (4, 300, 16, 8, 128), torch.bfloat16, device)
    check(codec, side, buffer, some_slots(buffer, 4096), 256)


TYPES = {
    "table": "*i64:16",
    "like": "*bf16:16",
    "slots": "*i64:16",
    "out": "*u8:16",
    "out_page": "i64:16",
    "out_layer": "i64:16",
    "fits": "*u8:16",
    "fits_page": "i32",
    "fits_layer": "i32",
    "encoded": "*u8:16",
    "encoded_page": "i64:16",
    "encoded_layer": "i64:16",
}
# Codec, side, kernels, and the most registers: what leaves a multiprocessor enough tiles.
KERNELS: list[tuple[Codec, Side, Any, Any, int]] = [
    (Codec.F8, "value", rows_triton.encode_rows_kernel, rows_triton.decode_rows_kernel, 64),
    (Codec.I8, "value", rows_triton.encode_rows_kernel, rows_triton.decode_rows_kernel, 64),
    (Codec.I4, "value", pieces_triton.encode_pieces_kernel, pieces_triton.decode_pieces_kernel, 72),
    (Codec.I8, "key", columns_triton.encode_columns_kernel, columns_triton.decode_columns_kernel, 184),
    (Codec.I4, "key", columns_triton.encode_columns_kernel, columns_triton.decode_columns_kernel, 184),
]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("codec", "side", "encode", "decode", "registers"),
    KERNELS,
    ids=[f"{codec.name}-{side}" for codec, side, *_ in KERNELS],
)
def test_the_kernels_compile_to_whole_vectors_without_spills(
    codec: Codec, side: Side, encode: Any, decode: Any, registers: int, arch: int
) -> None:
    buffer = cache("nhd", (2, 4, 16, 8, 128), torch.bfloat16, CPU)
    shape = quantize_triton.tile_shape(codec, side, buffer, 64)
    own: dict[str, dict[str, object]] = {"encode": {}, "decode": {"INTERPRETED": False}}
    if "F8" in shape:
        own["encode"]["CAST"] = arch >= 89
    elif "SPAN" not in shape:
        own["encode"]["LEVELS"] = quantize_triton.LEVELS_I4
    for name, kernel in (("encode", encode), ("decode", decode)):
        types = {arg: TYPES[arg] for arg in kernel.arg_names if arg in TYPES}
        made = compile_for(
            kernel,
            types,
            {**shape, **own[name]},
            arch,
            num_warps=quantize_triton.num_warps(shape),
        )
        assert made.spill_bytes == 0
        assert "fma." not in made.ptx
        assert ".ftz" not in made.ptx
        assert made.registers <= registers
        assert 128 in made.load_bits
        assert 128 in made.store_bits or (name, codec) == ("encode", Codec.I4)
