"""Codes of 2, 3 and 4 bits in bytes, as kernels/layout.py has them.

What is stored or loaded is always contiguous: neighbours are brought together and taken apart by
``reshape`` with ``split`` and ``join``. Loading every other element instead would compile to loads
of two bytes. Three bits go through words of 32 bits: 32 codes are three of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What is a tensor, a constant or a tuple in a kernel, only Triton knows.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def store_codes(
    start, row, mask, codes,
    BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Store rows of codes.

    start: of the section, a pointer to bytes, a multiple of 16. row: [ROWS] int64. mask: [ROWS].
    codes: [ROWS, PADDED] int32, not negative; the first WIDTH of a row, a multiple of 16, count.
    """
    if BITS == 4:
        even, odd = tl.split(tl.reshape(codes, (ROWS, PADDED // 2, 2)))
        packed = even | (odd << 4)
        _store_bytes(start, row, mask, packed, WIDTH // 2, PADDED // 2)
    elif BITS == 2:
        even, odd = tl.split(tl.reshape(codes, (ROWS, PADDED // 4, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        packed = first | (second << 2) | (third << 4) | (fourth << 6)
        _store_bytes(start, row, mask, packed, WIDTH // 4, PADDED // 4)
    else:
        words = join_eights(tl.reshape(codes, (ROWS, PADDED // 8, 2, 2, 2)), 3)
        if WIDTH % 32 == 0:
            wide = words_of_three(tl.reshape(words, (ROWS, PADDED // 32, 2, 2)))
            number, inside = _three_of_four(WIDTH // 32, PADDED // 32)
            target = start.to(tl.pointer_type(tl.int32)) + row[:, None, None] * (WIDTH // 32 * 3)
            tl.store(target + number, wide, mask=mask[:, None, None] & inside)
        else:
            number, inside = _three_of_four(WIDTH // 8, PADDED // 8)
            each = words[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]
            target = start + row[:, None, None] * (WIDTH // 8 * 3)
            tl.store(target + number, each.to(tl.uint8), mask=mask[:, None, None] & inside)


@triton.jit
def load_codes(
    start, row, mask,
    BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Load rows of codes, [ROWS, PADDED] int32, zeros where there are none; as of ``store_codes``."""
    if BITS == 4:
        packed = _load_bytes(start, row, mask, WIDTH // 2, PADDED // 2)
        return tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, PADDED))
    if BITS == 2:
        packed = _load_bytes(start, row, mask, WIDTH // 4, PADDED // 4)
        even = tl.join(packed & 3, (packed >> 4) & 3)
        odd = tl.join((packed >> 2) & 3, packed >> 6)
        return tl.reshape(tl.join(even, odd), (ROWS, PADDED))
    if WIDTH % 32 == 0:
        number, inside = _three_of_four(WIDTH // 32, PADDED // 32)
        source = start.to(tl.pointer_type(tl.int32)) + row[:, None, None] * (WIDTH // 32 * 3)
        wide = tl.load(source + number, mask=mask[:, None, None] & inside, other=0)
        words = tl.reshape(three_to_words(wide), (ROWS, PADDED // 8))
    else:
        number, inside = _three_of_four(WIDTH // 8, PADDED // 8)
        source = start + row[:, None, None] * (WIDTH // 8 * 3)
        each = tl.load(source + number, mask=mask[:, None, None] & inside, other=0).to(tl.int32)
        words = tl.sum(each << (tl.arange(0, 4) * 8)[None, None, :], 2)
    return tl.reshape(split_eights(words, 3), (ROWS, PADDED))


@triton.jit
def join_eights(codes, BITS: tl.constexpr):
    """Return words of 8 * BITS bits, [..], of codes [.., 2, 2, 2] of BITS (3 or 4) bits."""
    even, odd = tl.split(codes)
    pairs = even | (odd << BITS)
    even, odd = tl.split(pairs)
    fours = even | (odd << (2 * BITS))
    even, odd = tl.split(fours)
    return even | (odd << (4 * BITS))


@triton.jit
def split_eights(words, BITS: tl.constexpr):
    """Return codes [.., 2, 2, 2] of BITS (3 or 4) bits of words of 8 * BITS bits."""
    FOUR: tl.constexpr = (1 << (4 * BITS)) - 1
    PAIR: tl.constexpr = (1 << (2 * BITS)) - 1
    ONE: tl.constexpr = (1 << BITS) - 1
    fours = tl.join(words & FOUR, (words >> (4 * BITS)) & FOUR)
    pairs = tl.join(fours & PAIR, fours >> (2 * BITS))
    return tl.join(pairs & ONE, pairs >> BITS)


@triton.jit
def join_bytes(numbers):
    """Return two words of 32 bits, [..] each, of the bytes [.., 2, 2, 2]: the first four, the others."""
    even, odd = tl.split(numbers)
    even, odd = tl.split(even | (odd << 8))
    return tl.split(even | (odd << 16))


@triton.jit
def split_bytes(first, second):
    """Return the bytes [.., 2, 2, 2] of two words; the last of each with its sign."""
    words = tl.join(first, second)
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.join(halves & 0xFF, halves >> 8)


@triton.jit
def words_of_three(words):
    """Return three words of 32 bits and a zero, [.., 4], of four of 24 bits, [R, N, 2, 2]."""
    even, odd = tl.split(words)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    a = first | (second << 24)
    b = (second >> 8) | (third << 16)
    c = (third >> 16) | (fourth << 8)
    joined = tl.join(tl.join(a, c), tl.join(b, tl.zeros_like(a)))
    return tl.reshape(joined, (words.shape[0], words.shape[1], 4))


@triton.jit
def three_to_words(wide):
    """Return four words of 24 bits, [R, N, 2, 2], of three of 32 bits and any fourth, [R, N, 4]."""
    even, odd = tl.split(tl.reshape(wide, (wide.shape[0], wide.shape[1], 2, 2)))
    a, c = tl.split(even)
    b, _ = tl.split(odd)
    first = a & 0xFFFFFF
    second = ((a >> 24) & 0xFF) | ((b & 0xFFFF) << 8)
    third = ((b >> 16) & 0xFFFF) | ((c & 0xFF) << 16)
    fourth = (c >> 8) & 0xFFFFFF
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def _three_of_four(COUNT: tl.constexpr, PADDED: tl.constexpr):
    group, part = tl.arange(0, PADDED), tl.arange(0, 4)
    number = group[None, :, None] * 3 + part[None, None, :]
    return number, (group < COUNT)[None, :, None] & (part < 3)[None, None, :]


@triton.jit
def _store_bytes(start, row, mask, packed, COUNT: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    inside = mask[:, None] & (column < COUNT)[None, :]
    tl.store(start + row[:, None] * COUNT + column[None, :], packed.to(tl.uint8), mask=inside)


@triton.jit
def _load_bytes(start, row, mask, COUNT: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    inside = mask[:, None] & (column < COUNT)[None, :]
    packed = tl.load(start + row[:, None] * COUNT + column[None, :], mask=inside, other=0)
    return packed.to(tl.int32)
