"""What every kernel over a worker's paged cache does first: find its plane and its rows."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def place_of_program(LAYERS: tl.constexpr, TILES: tl.constexpr):
    """Return page and layer (int64) and tile of this program; tiles of a plane are neighbours."""
    program = tl.program_id(0)
    plane = program // TILES
    return (plane // LAYERS).to(tl.int64), (plane % LAYERS).to(tl.int64), program % TILES


@triton.jit
def plane_base(table, like, layer, SIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where a layer's keys (SIDE 0) or values (1) begin, a pointer to the type of ``like``.

    The compiler cannot know the alignment of an address that it loads: it is told.
    """
    base = tl.load(table + layer * 2 + SIDE).to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit
def token_starts(
    slots,
    token,
    mask,
    BLOCK_TOKENS: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
):
    """Return the offsets (int64, in elements) of tokens in a plane, and which of them there are.

    slots: where each token is, negative for one that is nowhere; None when token i is at slot i.
    token: int64, its index in ``slots``.
    """
    if slots is None:
        slot = token
        is_there = mask
    else:
        slot = tl.load(slots + token, mask=mask, other=-1)
        is_there = slot >= 0
        slot = tl.where(is_there, slot, 0)
    return (slot // BLOCK_TOKENS) * STRIDE_BLOCK + (slot % BLOCK_TOKENS) * STRIDE_TOKEN, is_there
