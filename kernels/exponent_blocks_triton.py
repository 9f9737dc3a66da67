"""``xs`` in kernels: blocks of ``XS_BLOCK`` numbers, in programs of their own.

What a block must know of others, the window of its plane and how many escapes come before it, the
kernel of exponent_window_triton.py has found out. Eight codes make a word of one thread. Of words it
is that escapes are looked for and counted, and where they go is a prefix sum over words; an escape is
then moved for each word at a time, as often as the word that has most of them needs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What is a tensor, a constant or a tuple in a kernel, only Triton knows.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from respkv.kernels.layout import ALIGN_BYTES, XS_BLOCK, XS_INFO_BYTES
from respkv.kernels.packing_triton import (
    join_bytes,
    join_eights,
    split_bytes,
    split_eights,
    three_to_words,
    words_of_three,
)
from respkv.kernels.paged_triton import place_of_program, plane_base, token_starts

BLOCK = tl.constexpr(XS_BLOCK)
EIGHTS = tl.constexpr(XS_BLOCK // 8)
ALIGN = tl.constexpr(ALIGN_BYTES)
INFO = tl.constexpr(XS_INFO_BYTES)


@triton.jit
def encode_block_kernel(
    table, like, slots, out, sizes, out_page, out_layer,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr,
    ALIGNED: tl.constexpr, TOKENS: tl.constexpr, SIDE: tl.constexpr, NUMBERS: tl.constexpr,
    BLOCKS: tl.constexpr, FLAT: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Write codes, rest and escapes of SHARE blocks; after ``window_kernel``."""
    page, layer, part = place_of_program(LAYERS, (BLOCKS + SHARE - 1) // SHARE)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    plane = tl.multiple_of(out + page * out_page + layer * out_layer, 16)
    ints = plane.to(tl.pointer_type(tl.int32))
    info = tl.load(ints)
    num_escapes = tl.load(ints + 1)
    if tl.load(sizes + page * LAYERS + layer) == 0:
        return
    lowest = info & 255
    width = info >> 8
    rest_at = rest_of(width, NUMBERS, BLOCKS)
    list_at = plane + rest_at + padded(NUMBERS, ALIGN)
    for block in range(part * SHARE, tl.minimum(part * SHARE + SHARE, BLOCKS)):
        # What is not there becomes code 0 and rest 0.
        words = load_words(
            base, slots, page, block, lowest << 7, HEADS, DIM, BLOCK_TOKENS, STRIDE_BLOCK,
            STRIDE_TOKEN, STRIDE_HEAD, TOKENS, NUMBERS, FLAT, BLOCK,
        )  # fmt: skip
        start = tl.load(ints + INFO // 4 + block)
        exponents = (words >> 7) & 255
        # What is below the window wraps around and so is beyond it as well.
        codes = tl.minimum((exponents - lowest).to(tl.uint32), ((1 << width) - 1).to(tl.uint32))
        eights = tl.reshape(codes.to(tl.int32), (EIGHTS, 2, 2, 2))
        marks = store_block(ints, block, eights, width, NUMBERS, BLOCKS)
        number = tl.arange(0, BLOCK)
        rest = ((words >> 8) & 128) | (words & 127)
        target = plane + tl.multiple_of(rest_at + block * BLOCK, 16)
        is_padded = number < padded(NUMBERS, ALIGN) - block * BLOCK
        tl.store(target + number, rest.to(tl.uint8), mask=is_padded)
        low, high = join_bytes(tl.reshape(exponents, (EIGHTS, 2, 2, 2)))
        counts = marked(marks, width)
        place = start + tl.cumsum(counts, 0) - counts
        for turn in range(tl.max(counts, 0)):
            mark = marks & -marks
            index = index_of(mark, width)
            byte = tl.where(index < 4, low, high) >> ((index & 3) * 8)
            tl.store(list_at + place + turn, byte.to(tl.uint8), mask=marks != 0)
            marks ^= mark
    if part == 0:
        pad = num_escapes + tl.arange(0, ALIGN)
        tl.store(
            list_at + pad, tl.zeros_like(pad).to(tl.uint8), mask=pad < padded(num_escapes, ALIGN)
        )


@triton.jit
def decode_block_kernel(
    table, like, slots, encoded, sizes, good,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr,
    ALIGNED: tl.constexpr, TOKENS: tl.constexpr, SIDE: tl.constexpr, NUMBERS: tl.constexpr,
    BLOCKS: tl.constexpr, FLAT: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Decode SHARE blocks.

    encoded: [planes] int64, their addresses, multiples of 16. sizes: [planes] int64, at least
             XS_INFO_BYTES. good: [planes] uint8, all 1; 0 is written for a plane whose bytes cannot
             be right, and nothing outside its bytes is read.
    """
    page, layer, part = place_of_program(LAYERS, (BLOCKS + SHARE - 1) // SHARE)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    number_of_plane = page * LAYERS + layer
    address = tl.load(encoded + number_of_plane)
    plane = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
    ints = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
    info = tl.load(ints)
    num_escapes = tl.load(ints + 1)
    lowest = info & 255
    width = tl.where(info >> 8 == 3, 3, 4)
    size = size_of(width, num_escapes, NUMBERS, BLOCKS)
    is_good = (info == lowest + width * 256) & (lowest + (1 << width) <= 257)
    is_good = is_good & (num_escapes >= 0) & (num_escapes <= NUMBERS)
    is_good = is_good & (tl.load(ints + 2) == 0) & (tl.load(ints + 3) == 0)
    is_good = is_good & (tl.load(sizes + number_of_plane) == size)
    if is_good == 0:
        tl.store(good + number_of_plane, 0)
        return
    rest_at = rest_of(width, NUMBERS, BLOCKS)
    list_at = plane + rest_at + padded(NUMBERS, ALIGN)
    number = tl.arange(0, BLOCK)
    for block in range(part * SHARE, tl.minimum(part * SHARE + SHARE, BLOCKS)):
        is_there = number < NUMBERS - block * BLOCK
        source = plane + tl.multiple_of(rest_at + block * BLOCK, 16)
        rest = tl.load(source + number, mask=is_there, other=0).to(tl.int32)
        start = tl.load(ints + INFO // 4 + block)
        stop = tl.load(ints + INFO // 4 + block + 1, mask=block + 1 < BLOCKS, other=0)
        stop = tl.where(block + 1 < BLOCKS, stop, num_escapes)
        codes, marks = load_block(ints, block, width, NUMBERS, BLOCKS)
        counts = marked(marks, width)
        is_good = (stop == start + tl.sum(counts, 0)) & ((block > 0) | (start == 0))
        if BLOCKS * BLOCK != NUMBERS:
            absent = tl.reshape(codes, (BLOCK,)) * (1 - is_there.to(tl.int32))
            is_good = is_good & (tl.max(absent, 0) == 0)
        if is_good == 0:
            tl.store(good + number_of_plane, 0)
        place = start + tl.cumsum(counts, 0) - counts
        low, high = lacks(list_at, place, counts, marks, width, lowest, num_escapes)
        exponents = tl.reshape(codes + split_bytes(low, high) + lowest, (BLOCK,))
        words = ((rest * 0x101) & 0x807F) | ((exponents << 7) & 0x7F80)
        to, is_wanted = places_of_numbers(
            slots, page, block, HEADS, DIM, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN, STRIDE_HEAD,
            TOKENS, NUMBERS, FLAT, BLOCK,
        )  # fmt: skip
        made = tl.reshape(words.to(tl.uint16), to.shape).to(like.dtype.element_ty, bitcast=True)
        tl.store(base + to, made, mask=is_wanted)


@triton.jit
def lacks(list_at, place, counts, marks, width, lowest, num_escapes):
    """Return what the codes of escapes lack to their exponents, a byte each, in two words of four.

    place: of each word's first escape in the list; one that is not in the list lacks nothing.
    """
    low = tl.zeros_like(marks)
    high = tl.zeros_like(marks)
    for turn in range(tl.max(counts, 0)):
        mark = marks & -marks
        index = index_of(mark, width)
        at = place + turn
        is_listed = (marks != 0) & (at >= 0) & (at < num_escapes)
        listed = tl.load(list_at + at, mask=is_listed, other=0).to(tl.int32)
        lack = ((listed - lowest - (1 << width) + 1) & 255) << ((index & 3) * 8)
        lack = tl.where(is_listed, lack, 0)
        low |= tl.where(index < 4, lack, 0)
        high |= tl.where(index < 4, 0, lack)
        marks ^= mark
    return low, high


@triton.jit
def padded(count, ALIGNMENT: tl.constexpr):
    """Return the multiple of ALIGNMENT that is not below ``count``."""
    return (count + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@triton.jit
def rest_of(width, NUMBERS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return where ``rest`` begins."""
    return INFO + padded(4 * BLOCKS, ALIGN) + padded((NUMBERS + 7) // 8 * width, ALIGN)


@triton.jit
def size_of(width, num_escapes, NUMBERS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return how many bytes a plane comes to."""
    return rest_of(width, NUMBERS, BLOCKS) + padded(NUMBERS, ALIGN) + padded(num_escapes, ALIGN)


@triton.jit
def store_block(ints, block, codes, width, NUMBERS: tl.constexpr, BLOCKS: tl.constexpr):
    """Store the codes of a block, [EIGHTS, 2, 2, 2] int32; the last one's end with zeros.

    Returns: marks of escapes, [EIGHTS]: the lowest bit of each code of a word that is all ones.
    """
    target = ints + (INFO + padded(4 * BLOCKS, ALIGN)) // 4
    if width == 3:
        words = join_eights(codes, 3)
        marks = words & (words >> 1) & (words >> 2) & 0o11111111
        wide = words_of_three(tl.reshape(words, (1, EIGHTS // 4, 2, 2)))
        number, is_there = threes_of(block, NUMBERS)
        tl.store(target + number, tl.reshape(wide, number.shape), mask=is_there)
    else:
        words = join_eights(codes, 4)
        marks = words & (words >> 1) & (words >> 2) & (words >> 3) & 0x11111111
        number_4, is_there_4 = fours_of(block, NUMBERS)
        tl.store(target + number_4, words, mask=is_there_4)
    return marks


@triton.jit
def load_block(ints, block, width, NUMBERS: tl.constexpr, BLOCKS: tl.constexpr):
    """Load the codes of a block, zeros after the section; returns them and marks, as above."""
    source = ints + (INFO + padded(4 * BLOCKS, ALIGN)) // 4
    if width == 3:
        number, is_there = threes_of(block, NUMBERS)
        wide = tl.load(source + number, mask=is_there, other=0)
        words = tl.reshape(three_to_words(tl.reshape(wide, (1, EIGHTS // 4, 4))), (EIGHTS,))
        marks = words & (words >> 1) & (words >> 2) & 0o11111111
        codes = split_eights(words, 3)
    else:
        number_4, is_there_4 = fours_of(block, NUMBERS)
        words = tl.load(source + number_4, mask=is_there_4, other=0)
        marks = words & (words >> 1) & (words >> 2) & (words >> 3) & 0x11111111
        codes = split_eights(words, 4)
    return codes, marks


@triton.jit
def marked(marks, width):
    """Return how many marks there are in each word: those below the last in its field, and it."""
    of_3 = (((marks * 0o11111110) >> 21) & 7) + (marks >> 21)
    of_4 = (((marks * 0x11111110) >> 28) & 15) + (marks >> 28)
    return tl.where(width == 3, of_3, of_4)


@triton.jit
def index_of(mark, width):
    """Return which code of a word, 0 to 7, has this one mark, by its exponent as float32."""
    bit = (mark.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.where(width == 3, (bit * 11) >> 5, bit >> 2)


@triton.jit
def threes_of(block, NUMBERS: tl.constexpr):
    """Return which words of 32 bits hold codes of 3: three for each 32 codes, and one of none."""
    group, part = tl.arange(0, EIGHTS // 4)[:, None], tl.arange(0, 4)[None, :]
    number = block * (EIGHTS // 4 * 3) + group * 3 + part
    return number, (part < 3) & (number < padded((NUMBERS + 7) // 8 * 3, ALIGN) // 4)


@triton.jit
def fours_of(block, NUMBERS: tl.constexpr):
    """Return which words of 32 bits hold codes of 4."""
    number = block * EIGHTS + tl.arange(0, EIGHTS)
    return number, number < padded((NUMBERS + 7) // 8 * 4, ALIGN) // 4


@triton.jit
def load_words(
    base, slots, page, first, absent,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr, TOKENS: tl.constexpr,
    NUMBERS: tl.constexpr, FLAT: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Load LENGTH numbers from a block on, [LENGTH] int32 from 0 to 65535.

    absent: the word that stands for numbers after the last one; None: any. Tokens that are nowhere
            are zeros.
    """
    place, is_there = places_of_numbers(
        slots, page, first, HEADS, DIM, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN, STRIDE_HEAD,
        TOKENS, NUMBERS, FLAT, LENGTH,
    )  # fmt: skip
    TAIL: tl.constexpr = NUMBERS // BLOCK * BLOCK != NUMBERS
    if FLAT and TAIL and absent is not None:
        other = absent.to(tl.uint16).to(base.dtype.element_ty, bitcast=True)
    else:
        other = 0.0
    words = tl.load(base + place, mask=is_there, other=other).to(tl.uint16, bitcast=True)
    words = tl.reshape(words.to(tl.int32), (LENGTH,))
    if not FLAT and TAIL and absent is not None:
        words = tl.where(tl.arange(0, LENGTH) < NUMBERS - first * BLOCK, words, absent)
    return words


@triton.jit
def places_of_numbers(
    slots, page, first,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr, TOKENS: tl.constexpr,
    NUMBERS: tl.constexpr, FLAT: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Return where LENGTH numbers from a block on are, and which there are: [rows, columns].

    FLAT: page p is block p of the cache, without gaps. Otherwise DIM is a power of two up to LENGTH.
    """
    if FLAT:
        number = first * BLOCK + tl.arange(0, LENGTH)[None, :]
        return page * STRIDE_BLOCK + number, number < NUMBERS
    else:
        row = first * (BLOCK // DIM) + tl.arange(0, LENGTH // DIM)
        start, is_there = token_starts(
            slots, page * TOKENS + row // HEADS, row < TOKENS * HEADS, BLOCK_TOKENS, STRIDE_BLOCK,
            STRIDE_TOKEN,
        )  # fmt: skip
        start += (row % HEADS).to(tl.int64) * STRIDE_HEAD
        column = tl.arange(0, DIM)[None, :]
        return start[:, None] + column, is_there[:, None] & (column < DIM)
