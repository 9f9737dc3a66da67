"""Encode f8, i8 and i4 out of a worker's paged cache and decode them into it, on a GPU.

Encoding gathers and quantizes, decoding dequantizes and scatters: each number is read once and
written once. The codes and the parameters are those of kernels/f8.py, i8.py and i4.py, bit for bit:
the same operations in the same order, one IEEE division per group, nothing fused.

The kernels are in rows_triton.py, columns_triton.py and pieces_triton.py, by what shares a scale.
All of a cache's geometry is known to the compiler; so is the tile, which this file chooses.
"""

from typing import Any, Final

import torch
from torch import Tensor

from respkv.kernels import columns_triton, launch, pieces_triton, rows_triton
from respkv.kernels.layout import (
    GROUP_DIM_I4,
    GROUP_TOKENS_I4,
    GROUP_TOKENS_I8,
    Codec,
    Side,
    num_groups,
    plane_layout,
)
from respkv.kernels.paged import PagedBuffer

# A tile is 4096 numbers: a few blocks on a multiprocessor have enough of them on their way. Rows take
# 32 of them a thread. Columns have all tokens of a group, and each thread makes the parameters of
# each of its 16 columns, which is most of the work when it has two rows of them: so 64 a thread.
TILE_NUMBERS: Final = 4096
NUMBERS_PER_WARP_ROWS: Final = 1024
NUMBERS_PER_WARP_COLUMNS: Final = 2048
LEVELS_I4: Final = 15
GROUP_TOKENS: Final = {Codec.I8: GROUP_TOKENS_I8, Codec.I4: GROUP_TOKENS_I4}


def encode(
    codec: Codec,
    side: Side,
    buffer: PagedBuffer,
    slots: Tensor | None,
    page_tokens: int,
    out: Tensor,
    fits: Tensor,
) -> None:
    """Encode planes of one side; see ``paged_coding.encode_paged``, which checks the arguments.

    out:  [P, L, bytes of a plane] uint8.
    fits: [P, L] bool, all True; planes that do not fit become False.
    """
    shape = tile_shape(codec, side, buffer, page_tokens)
    if "F8" in shape:
        kernel = rows_triton.encode_rows_kernel
        shape["CAST"] = has_e4m3(buffer.device)
    elif "SPAN" in shape:
        kernel = columns_triton.encode_columns_kernel
    else:
        kernel = pieces_triton.encode_pieces_kernel
        shape["LEVELS"] = LEVELS_I4
    flags = fits.view(torch.uint8)
    launch.run(
        kernel,
        out.shape[0] * num_tiles(shape),
        buffer.device,
        buffer.table,
        buffer.keys[0],
        slots,
        out,
        *out.stride()[:2],
        flags,
        *flags.stride(),
        num_warps=num_warps(shape),
        **shape,
    )


def decode(
    codec: Codec,
    side: Side,
    buffer: PagedBuffer,
    slots: Tensor | None,
    page_tokens: int,
    encoded: Tensor,
) -> None:
    """Decode planes of one side, [P, L, bytes] uint8; see ``paged_coding.decode_paged``."""
    shape = tile_shape(codec, side, buffer, page_tokens)
    if "F8" in shape:
        kernel = rows_triton.decode_rows_kernel
    elif "SPAN" in shape:
        kernel = columns_triton.decode_columns_kernel
    else:
        kernel = pieces_triton.decode_pieces_kernel
    launch.run(
        kernel,
        encoded.shape[0] * num_tiles(shape),
        buffer.device,
        buffer.table,
        buffer.keys[0],
        slots,
        encoded,
        *encoded.stride()[:2],
        INTERPRETED=launch.INTERPRETED,
        num_warps=num_warps(shape),
        **shape,
    )


def has_e4m3(device: torch.device) -> bool:
    """Whether the device casts to e4m3 by itself: GPUs from sm_89 on; the interpreter truncates."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def tile_shape(codec: Codec, side: Side, buffer: PagedBuffer, page_tokens: int) -> dict[str, Any]:
    """Return the constexprs that the encoding and the decoding kernel have in common.

    ``F8`` is among those of the kernels of rows, ``SPAN`` among those of columns.
    """
    geometry = buffer.geometry()
    heads, dim = geometry["HEADS"], geometry["DIM"]
    layout = plane_layout(codec, side, page_tokens, heads, dim, buffer.dtype.itemsize)
    shape = {
        **geometry,
        "SIDE": 0 if side == "key" else 1,
        "CODES": layout["codes"].offset,
        "TOKENS": page_tokens,
    }
    if codec in GROUP_TOKENS and side == "key":
        bits = 8 if codec == Codec.I8 else 4
        span = dim + dim % 2 if bits == 4 else dim
        tokens = GROUP_TOKENS[codec]
        shape |= {"BITS": bits, "GROUP": tokens, "SPAN": span, "STEPS": layout["steps"].offset}
        shape["ROWS"] = min(tokens, _power(page_tokens))
        shape["WIDTH"] = max(16, min(_power(heads * span), TILE_NUMBERS // shape["ROWS"]))
        return shape
    if codec == Codec.I4:
        shape |= {"GROUP": GROUP_DIM_I4, "STEPS": layout["steps"].offset}
    else:
        shape["F8"] = codec == Codec.F8
    shape["WIDTH"] = max(GROUP_DIM_I4, _power(dim))
    shape["ROWS"] = max(1, min(_power(page_tokens * heads), TILE_NUMBERS // shape["WIDTH"]))
    return shape


def num_tiles(shape: dict[str, Any]) -> int:
    """Return how many programs a page takes."""
    if "SPAN" in shape:
        columns = num_groups(shape["HEADS"] * shape["SPAN"], shape["WIDTH"])
        tiles = num_groups(shape["TOKENS"], shape["GROUP"]) * columns
    else:
        tiles = num_groups(shape["TOKENS"] * shape["HEADS"], shape["ROWS"])
    return int(tiles * shape["LAYERS"])


def num_warps(shape: dict[str, Any]) -> int:
    """Return how many warps a tile takes."""
    per_warp = NUMBERS_PER_WARP_COLUMNS if "SPAN" in shape else NUMBERS_PER_WARP_ROWS
    return max(1, int(shape["ROWS"] * shape["WIDTH"]) // per_warp)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
