"""The kernels of rh* and rhz* against the reference, bit for bit, and on tensor cores, compiled."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from respkv.kernels import bits, ladder, rotate_triton
from respkv.kernels.layout import ROTATED_BITS, Codec, Side, plane_layout
from respkv.kernels.paged import SIDES, PagedBuffer, blocks_of, read_tokens
from respkv.kernels.rotated import quantizer
from respkv.kernels.rotated_triton import decode_kernel, encode_kernel
from tests.kernels.caches import LAYOUTS, bytes_of, cache, filled, moved, some_slots
from tests.kernels.compiled import ARCHES, Compiled, compile_for
from tests.kernels.data import GENERATORS, poisoned

CPU = torch.device("cpu")
CODECS = (Codec.RH4, Codec.RH3, Codec.RH2, Codec.RHZ4, Codec.RHZ3, Codec.RHZ2)
CASES = [pytest.param(codec, side, id=f"{codec.name}-{side}") for codec in CODECS for side in SIDES]
WIDTHS_OF_CODES = [
    pytest.param(codec, side, id=f"{codec.name}-{side}")
    for codec in (Codec.RH4, Codec.RH3, Codec.RH2, Codec.RHZ3)
    for side in SIDES
]


def encode_both(
    codec: Codec,
    side: Side,
    buffer: PagedBuffer,
    slots: Tensor | None,
    page_tokens: int,
    *,
    exact: bool = True,
    unbiased: bool = False,
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
    rotate_triton.encode(
        codec, side, buffer, slots, page_tokens, ours, fits, unbiased=unbiased, exact=exact
    )
    expected, expected_fits = torch.empty_like(ours, device=CPU), torch.empty_like(fits, device=CPU)
    where = blocks_of(buffer, slots, tokens)
    for layer, plane in enumerate(buffer.planes(side)):
        planes = torch.unflatten(read_tokens(plane, where).cpu(), 0, (-1, page_tokens))
        expected[:, layer], expected_fits[:, layer] = ladder.encode_planes(
            codec, planes, side=side, unbiased=unbiased
        )
    return ours.cpu(), fits.cpu(), expected, expected_fits


def decode_both(
    codec: Codec,
    side: Side,
    buffer: PagedBuffer,
    slots: Tensor,
    page_tokens: int,
    encoded: Tensor,
    *,
    exact: bool = True,
) -> tuple[PagedBuffer, PagedBuffer]:
    """Decode into two caches like ``buffer`` but all NaN, by the kernel and by the reference."""
    ours, theirs = moved(buffer, buffer.device), moved(buffer, CPU)
    for plane in (*ours.keys, *ours.values, *theirs.keys, *theirs.values):
        plane.fill_(torch.nan)
    there = encoded.to(buffer.device)
    rotate_triton.decode(codec, side, ours, slots, page_tokens, there, exact=exact)
    block, offset, is_there = blocks_of(theirs, slots.cpu(), slots.numel())
    planes = poisoned((encoded.shape[0], page_tokens, *buffer.shape[2:]), buffer.dtype)
    for layer, plane in enumerate(theirs.planes(side)):
        ladder.decode_planes(codec, encoded[:, layer], side=side, out=planes)
        plane[block[is_there], offset[is_there]] = planes.flatten(0, 1)[is_there]
    return ours, theirs


def check(codec: Codec, side: Side, buffer: PagedBuffer, slots: Tensor, page_tokens: int) -> None:
    ours, fits, expected, expected_fits = encode_both(codec, side, buffer, slots, page_tokens)
    assert torch.equal(fits, expected_fits)
    assert fits.all()
    assert torch.equal(ours, expected)
    made, wanted = decode_both(codec, side, buffer, slots, page_tokens, expected)
    assert all(map(torch.equal, bytes_of(made), bytes_of(wanted)))


def planes_of(name: str, tokens: int, dtype: torch.dtype, device: torch.device) -> PagedBuffer:
    """Return one plane of one head of 128."""
    return PagedBuffer.from_planes(
        GENERATORS[name](tokens, 1, 128, 3, dtype=dtype)[None].to(device)
    )


@pytest.mark.parametrize(("codec", "side"), CASES)
def test_codes_and_numbers_are_those_of_the_reference(
    codec: Codec, side: Side, device: torch.device
) -> None:
    buffer = filled("nhd", (2, 3, 8, 2, 128), torch.bfloat16, device)
    check(codec, side, buffer, some_slots(buffer, 16), 8)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_numbers_are_those_of_the_reference_in_every_layout(
    side: Side, layout: str, device: torch.device
) -> None:
    buffer = filled(layout, (2, 9, 4, 2, 64), torch.bfloat16, device)
    check(Codec.RH3, side, buffer, some_slots(buffer, 32), 16)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_are_those_of_the_reference_on_what_models_have(
    side: Side, dtype: torch.dtype, device: torch.device
) -> None:
    # More than one group of tokens, and the last not full.
    buffer = planes_of(f"{side}s", 261, dtype, device)
    check(Codec.RH4, side, buffer, torch.arange(261, device=device), 261)


@pytest.mark.parametrize(("codec", "side"), WIDTHS_OF_CODES)
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_codes_are_those_of_the_reference_at_any_shape(
    codec: Codec, side: Side, data: st.DataObject, device: torch.device
) -> None:
    page_tokens = data.draw(st.integers(1, 40), label="T")
    heads = data.draw(st.integers(1, 3), label="H")
    dim = data.draw(st.integers(2, 150) | st.sampled_from([16, 32, 80, 96, 256]), label="D")
    layout = data.draw(st.sampled_from(list(LAYOUTS)), label="layout")
    dtype = data.draw(
        st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), label="dtype"
    )
    blocks = -(-page_tokens // 8) + 1
    buffer = filled(layout, (1, blocks, 8, heads, dim), dtype, device, seed=page_tokens)
    check(codec, side, buffer, some_slots(buffer, page_tokens), page_tokens)


@pytest.mark.parametrize("codec", [Codec.RH2, Codec.RHZ2], ids=lambda codec: codec.name)
def test_the_unbiased_gain_is_that_of_the_reference(codec: Codec, device: torch.device) -> None:
    buffer = planes_of("values", 20, torch.bfloat16, device)
    ours, _, expected, _ = encode_both(codec, "value", buffer, None, 20, unbiased=True)
    plain, _, _, _ = encode_both(codec, "value", buffer, None, 20)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, plain)


LEAST = 2.0**-13
EDGES: dict[str, list[float]] = {
    "zeros": [0.0, 0.0],
    "negative zeros": [-0.0, -0.0],
    "equal": [3.0, 3.0],
    "equal and large": [60000.0, 60000.0],
    "just within fp16": [65504.0, 0.0],
    "equal beyond fp16": [66000.0, 66000.0],
    "gains beyond fp16": [1e6, -1e6],
    "the least row": [LEAST, -LEAST],
    "a smaller row": [LEAST * (1 - 2.0**-7), LEAST / 2],
    "subnormal": [2.0**-130, 0.0],
    "great": [1e15, -1e15],
    "greater": [1e25, -1e25],
    "huge": [3e38, -3e38],
    "infinite": [torch.inf, 0.0],
    "minus infinite": [0.0, -torch.inf],
    "both infinite": [torch.inf, -torch.inf],
    "not a number": [torch.nan, 1.0],
}


@pytest.mark.parametrize("codec", [Codec.RH3, Codec.RHZ3], ids=lambda codec: codec.name)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("exact", [True, False], ids=["butterfly", "product"])
def test_the_same_planes_fit(codec: Codec, side: Side, exact: bool, device: torch.device) -> None:
    # A plane for each case, in its last token; the other tokens are harmless.
    planes = torch.ones(len(EDGES), 3, 1, 36)
    for plane, numbers in zip(planes, EDGES.values(), strict=True):
        plane[2, 0, ::2], plane[2, 0, 1::2] = numbers
    planes[list(EDGES).index("negative zeros")] = -0.0
    buffer = PagedBuffer.from_planes(planes.bfloat16().to(device))
    ours, fits, expected, expected_fits = encode_both(codec, side, buffer, None, 3, exact=exact)
    names = [name for name, fit in zip(EDGES, expected_fits[:, 0].tolist(), strict=True) if fit]
    assert [name for name, fit in zip(EDGES, fits[:, 0].tolist(), strict=True) if fit] == names
    assert "the least row" in names
    assert not {"a smaller row", "greater", "infinite", "not a number"} & set(names)
    if exact:
        assert torch.equal(ours[fits], expected[fits])


@pytest.mark.parametrize("side", SIDES)
def test_tokens_that_are_nowhere_are_zeros_and_are_not_written(
    side: Side, device: torch.device
) -> None:
    buffer = filled("hnd", (1, 3, 4, 2, 32), torch.bfloat16, device)
    slots = torch.tensor([3, -1, 8, 0, -1, -7, 11, 5], device=device)
    check(Codec.RH4, side, buffer, slots, 4)


def test_no_pages_are_no_launch(device: torch.device) -> None:
    buffer = filled("nhd", (1, 2, 4, 1, 16), torch.bfloat16, device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    ours, fits, _, _ = encode_both(Codec.RH4, "key", buffer, none, 4)
    assert not ours.numel()
    assert not fits.numel()


def codes_of(codec: Codec, side: Side, buffer: PagedBuffer, tokens: int, encoded: Tensor) -> Tensor:
    """Return the codes of planes, one number each."""
    _, _, heads, dim = buffer.shape
    section = plane_layout(codec, side, tokens, heads, dim, buffer.dtype.itemsize)["codes"]
    stored = encoded[..., section.offset : section.offset + section.nbytes]
    return bits.unpack(stored.reshape(-1, section.nbytes // (tokens * heads)), ROTATED_BITS[codec])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("codec", "dtype", "dim"),
    [
        (Codec.RH4, torch.bfloat16, 128),
        (Codec.RH3, torch.float16, 128),
        (Codec.RH2, torch.float32, 128),
        (Codec.RHZ3, torch.bfloat16, 80),
        (Codec.RH4, torch.bfloat16, 256),
    ],
    ids=str,
)
def test_products_on_tensor_cores_give_the_same_codes_but_on_borders(
    codec: Codec, dtype: torch.dtype, dim: int, side: Side, device: torch.device
) -> None:
    tokens = 261 if (codec, dim) == (Codec.RH4, 128) else 100
    planes = GENERATORS["keys"](tokens, 1, dim, 5, dtype=dtype)[None].to(device)
    buffer = PagedBuffer.from_planes(planes)
    ours, fits, expected, _ = encode_both(codec, side, buffer, None, tokens, exact=False)
    assert fits.all()
    difference = (
        codes_of(codec, side, buffer, tokens, ours).int()
        - codes_of(codec, side, buffer, tokens, expected).int()
    ).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= 1e-4 * difference.numel()

    slots = torch.arange(tokens, device=device)
    made, wanted = decode_both(codec, side, buffer, slots, tokens, expected, exact=False)
    torch.testing.assert_close(
        made.planes(side)[0].cpu(), wanted.planes(side)[0], rtol=2.0**-7, atol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("codec", "side"), CASES)
@pytest.mark.parametrize("exact", [True, False], ids=["butterfly", "product"])
def test_a_gpu_makes_the_codes_of_the_reference(
    codec: Codec, side: Side, exact: bool, device: torch.device
) -> None:
    buffer = filled("nhd", (4, 300, 16, 8, 128), torch.bfloat16, device)
    slots = some_slots(buffer, 4096)
    if exact:
        check(codec, side, buffer, slots, 256)
        return
    ours, fits, expected, _ = encode_both(codec, side, buffer, slots, 256, exact=False)
    assert fits.all()
    made = codes_of(codec, side, buffer, 256, ours).int()
    difference = (made - codes_of(codec, side, buffer, 256, expected).int()).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= 1e-4 * difference.numel()


TYPES = {
    "table": "*i64:16",
    "like": "*bf16:16",
    "slots": "*i64:16",
    "out": "*u8:16",
    "fits": "*u8:16",
    "encoded": "*u8:16",
    "matrix_ptr": "*bf16:16",
    "signs_ptr": "*fp32:16",
    "out_page": "i64:16",
    "out_layer": "i64:16",
    "encoded_page": "i64:16",
    "encoded_layer": "i64:16",
    "fits_page": "i32",
    "fits_layer": "i32",
}


def compiled(kernel: Any, codec: Codec, side: Side, arch: int) -> Compiled:
    buffer = cache("nhd", (1, 16, 16, 8, 128), torch.bfloat16, CPU)
    how = quantizer(codec)
    constants: dict[str, object] = {
        **rotate_triton.tile_shape(codec, side, buffer, 256, 1024),
        "EXACT": False,
        "INTERPRETED": False,
    }
    if kernel is encode_kernel:
        constants |= {"STEP_INVERSE": 1 / how.step, "ROUNDING": how.is_rounding, "UNBIASED": False}
    return compile_for(
        kernel,
        {name: TYPES[name] for name in kernel.arg_names if name in TYPES},
        constants,
        arch,
        num_warps=rotate_triton.warps_of(arch // 10),
        num_stages=rotate_triton.STAGES,
        enable_fp_fusion=True,
    )


# Of 64 rows of codes a thread of 128, or of 256, stores so much at once.
STORE_BITS = {Codec.RH4: 128, Codec.RH3: 32}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("codec", "side"),
    [(Codec.RH4, "key"), (Codec.RH3, "value")],
    ids=["RH4-key", "RH3-value"],
)
def test_the_kernels_compile_to_whole_vectors_without_spills(
    codec: Codec, side: Side, arch: int
) -> None:
    for kernel in (encode_kernel, decode_kernel):
        made = compiled(kernel, codec, side, arch)
        assert made.spill_bytes == 0
        assert 128 in made.load_bits
        assert max(made.store_bits) >= (128 if kernel is decode_kernel else STORE_BITS[codec])
        assert made.shared_bytes <= 99 * 1024, "one program on the smallest SM, two on others"
        if arch == 90:
            assert "wgmma" in made.ptx
            assert made.registers <= 168, "three programs an SM"
