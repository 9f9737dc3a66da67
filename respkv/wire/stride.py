"""Arguments of equal length, one after the other: what a list of page keys looks like on the wire.

Page keys of a namespace are all as long, so their bulks repeat with a fixed stride. Then the framing
can be checked column by column with strided slices, and the arguments taken with one unpack, at a few
dozen nanoseconds each and as strictly as one by one.
"""

from functools import lru_cache
from itertools import chain
from struct import Struct

RUN_MIN = 4  # shorter runs are not worth it
ROWS_FIRST = 32  # looked at before all: a run that ends early must not cost as much as a long one
ROWS_AT_ONCE = 32  # taken by one call: half of what each by itself would cost


def take_run(buffer: bytearray, position: int, count_max: int) -> tuple[list[bytes], int]:
    """Take bulks of the same length from ``position`` on, where the first one begins.

    Returns: the arguments, and the position behind them; none when there is no such run.
    """
    end = buffer.find(b"\r\n", position, position + 8)
    digits = bytes(buffer[position + 1 : end])
    if end < 0 or not digits.isdigit() or digits[0] == 0x30:
        return [], position
    head = bytes(buffer[position : end + 2])
    stride = len(head) + int(digits) + 2
    count = min(count_max, (len(buffer) - position) // stride)
    second, last = position + stride, position + (RUN_MIN - 1) * stride
    if (
        count < RUN_MIN
        or not head == buffer[second : second + len(head)] == buffer[last : last + len(head)]
    ):
        return [], position
    found = _equal_rows(buffer, position, head, stride, min(count, ROWS_FIRST))
    if found == ROWS_FIRST:
        found = _equal_rows(buffer, position, head, stride, count)
    count = found
    if count < RUN_MIN:
        return [], position
    stop = position + count * stride
    args: list[bytes] = []
    many = _rows(len(head), int(digits), ROWS_AT_ONCE)
    for _ in range(count // ROWS_AT_ONCE):
        args += many.unpack_from(buffer, position)
        position += many.size
    if position < stop:
        rest = _rows(len(head), int(digits), 1)
        args += chain.from_iterable(rest.iter_unpack(memoryview(buffer)[position:stop]))
    return args, stop


@lru_cache(maxsize=64)
def _rows(head_bytes: int, arg_bytes: int, count: int) -> Struct:
    return Struct(f"{head_bytes}x{arg_bytes}s2x" * count)


def _equal_rows(buffer: bytearray, position: int, head: bytes, stride: int, count: int) -> int:
    """Return how many of ``count`` rows, from the first on, have this head and end with CR LF."""
    for column, byte in chain(enumerate(head), ((stride - 2, 0x0D), (stride - 1, 0x0A))):
        first = position + column
        found = buffer[first : first + (count - 1) * stride + 1 : stride]
        if found.count(byte) != count:
            count = next(row for row, other in enumerate(found) if other != byte)
    return count
