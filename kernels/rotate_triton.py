"""``rh4``, ``rh3``, ``rh2`` and ``rhz*`` on a GPU: launches the kernels of rotated_triton.py."""

from typing import Any, Final

import torch
import triton
from torch import Tensor

from respkv.kernels import launch
from respkv.kernels.hadamard_triton import product_dim, rotation_of
from respkv.kernels.layout import (
    GROUP_TOKENS_MEAN,
    ROTATED_BITS,
    Codec,
    Side,
    hadamard_dim,
    num_groups,
    plane_layout,
    rotated_dim,
)
from respkv.kernels.paged import SIDES, PagedBuffer
from respkv.kernels.rotated import quantizer
from respkv.kernels.rotated_triton import decode_kernel, encode_kernel

STAGES: Final = 2
# A warp group of sm_90 multiplies by itself, 64 registers of results a thread, three programs an SM.
# Other products keep more in registers: they get twice the threads.
WARPS: Final = 8
WARPS_OF: Final = {9: 4}
# 64 rows of 128 numbers of 16 bits; half as many of float32, which takes three products.
TILE_BYTES: Final = 16384
ROWS_MAX: Final = 128
PROGRAMS_MIN: Final = 1024  # several for each SM, before a program gets more than it must
TILES_MAX: Final = 4  # of a program, unless a group has more


def encode(
    codec: Codec,
    side: Side,
    buffer: PagedBuffer,
    slots: Tensor | None,
    page_tokens: int,
    out: Tensor,
    fits: Tensor,
    *,
    unbiased: bool = False,
    exact: bool = launch.INTERPRETED,
) -> None:
    """Encode pages of one side of a worker's cache; arguments as paged_coding.py checked them.

    out:   [P, L, bytes of a plane] uint8, written but for padding. fits: [P, L] bool, all True.
    exact: add in the reference's order.
    """
    matrix_dtype = torch.float16 if buffer.dtype == torch.float16 else torch.bfloat16
    matrix, signs = rotation_of(buffer.shape[3], matrix_dtype, buffer.device, back=False)
    how = quantizer(codec)
    shape = tile_shape(codec, side, buffer, page_tokens, out.shape[0])
    flags = fits.view(torch.uint8)
    launch.run(
        encode_kernel,
        num_programs(shape, out.shape[0]),
        buffer.device,
        buffer.table,
        buffer.keys[0],
        slots,
        out,
        flags,
        matrix,
        signs,
        *out.stride()[:2],
        *flags.stride(),
        fuse=not exact,
        STEP_INVERSE=1 / how.step,
        ROUNDING=how.is_rounding,
        UNBIASED=unbiased,
        EXACT=exact,
        INTERPRETED=launch.INTERPRETED,
        num_warps=num_warps(buffer.device),
        num_stages=STAGES,
        **shape,
    )


def decode(
    codec: Codec,
    side: Side,
    buffer: PagedBuffer,
    slots: Tensor | None,
    page_tokens: int,
    encoded: Tensor,
    *,
    exact: bool = launch.INTERPRETED,
) -> None:
    """Decode planes of one side, [P, L, bytes] uint8; see ``paged_coding.decode_paged``.

    exact: add in the reference's order.
    """
    matrix, signs = rotation_of(buffer.shape[3], torch.bfloat16, buffer.device, back=True)
    shape = tile_shape(codec, side, buffer, page_tokens, encoded.shape[0])
    launch.run(
        decode_kernel,
        num_programs(shape, encoded.shape[0]),
        buffer.device,
        buffer.table,
        buffer.keys[0],
        slots,
        encoded,
        matrix,
        signs,
        *encoded.stride()[:2],
        fuse=not exact,
        EXACT=exact,
        INTERPRETED=launch.INTERPRETED,
        num_warps=num_warps(buffer.device),
        num_stages=STAGES,
        **shape,
    )


def tile_shape(
    codec: Codec, side: Side, buffer: PagedBuffer, page_tokens: int, num_pages: int
) -> dict[str, Any]:
    """Return the constexprs that the encoding and the decoding kernel have in common."""
    geometry = buffer.geometry()
    heads, dim = geometry["HEADS"], geometry["DIM"]
    layout = plane_layout(codec, side, page_tokens, heads, dim, buffer.dtype.itemsize)
    how = quantizer(codec)
    padded = triton.next_power_of_2(rotated_dim(dim))
    rows = max(16, min(ROWS_MAX, TILE_BYTES // (padded * buffer.dtype.itemsize)))
    num_planes = num_pages * geometry["LAYERS"]
    if side == "key":
        tokens = min(page_tokens, GROUP_TOKENS_MEAN)
        rows = max(16, min(rows, triton.next_power_of_2(tokens)))
        tiles = num_groups(tokens, rows)
        units = num_groups(page_tokens, GROUP_TOKENS_MEAN) * heads
        items = _shared(units, num_planes, TILES_MAX // tiles)
        parts = num_groups(units, items)
    else:
        units = num_groups(page_tokens * heads, rows)
        tiles, items = _shared(units, num_planes, TILES_MAX), 1
        parts = num_groups(units, tiles)
    return {
        **geometry,
        "TOKENS": page_tokens,
        "SIDE": SIDES.index(side),
        "GAINS": layout["gains"].offset,
        "CODES": layout["codes"].offset,
        "BITS": ROTATED_BITS[codec],
        "STEP": how.step,
        "LEVELS": how.code_max + 1,
        "WIDTH": rotated_dim(dim),
        "PADDED": padded,
        "BLOCK": hadamard_dim(dim),
        "PRODUCT": product_dim(dim),
        "SCALE": hadamard_dim(dim) ** -0.5,
        "ROWS": rows,
        "TILES": tiles,
        "ITEMS": items,
        "PARTS": parts,
    }


def num_programs(shape: dict[str, Any], num_pages: int) -> int:
    """Return how many programs pages take."""
    return int(num_pages * shape["LAYERS"] * shape["PARTS"])


def num_warps(device: torch.device) -> int:
    """Return how many warps a tile takes."""
    is_gpu = device.type == "cuda"
    return warps_of(torch.cuda.get_device_capability(device)[0]) if is_gpu else WARPS


def warps_of(generation: int) -> int:
    """Return how many warps a tile takes on sm_80, sm_90 and so on, generation 8 and 9."""
    return WARPS_OF.get(generation, WARPS)


def _shared(units: int, num_planes: int, most: int) -> int:
    # How many units a program does: more than one only where there are programs enough.
    share = max(1, most)
    while share > 1 and num_planes * num_groups(units, share) < PROGRAMS_MIN:
        share //= 2
    return share
