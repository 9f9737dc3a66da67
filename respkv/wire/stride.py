"""Arguments of equal length, one after the other: what a list of page keys looks like on the wire.

Page keys of a namespace are all as long, so their bulks repeat with a fixed stride. Then the framing
can be checked column by column with strided slices, and the arguments taken with one unpack, at a few
dozen nanoseconds each and as strictly as one by one.
"""

from itertools import chain
from struct import Struct

RUN_MIN = 4  # shorter runs are not worth it


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
    second = position + stride
    if count < RUN_MIN or buffer[second : second + len(head)] != head:
        return [], position
    for column, byte in chain(enumerate(head), ((stride - 2, 0x0D), (stride - 1, 0x0A))):
        first = position + column
        found = buffer[first : first + (count - 1) * stride + 1 : stride]
        if found.count(byte) != count:
            count = next(row for row, other in enumerate(found) if other != byte)
    if count < RUN_MIN:
        return [], position
    stop = position + count * stride
    rows = Struct(f"{len(head)}x{int(digits)}s2x").iter_unpack(memoryview(buffer)[position:stop])
    return list(chain.from_iterable(rows)), stop
