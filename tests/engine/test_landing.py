"""A value on its way in: any parts make the same value and the same checksum."""

import random

import pytest

from respkv.engine.landing import Landing
from respkv.tiers.format import HEADER_BYTES, hash64
from respkv.tiers.slab import SlabAllocator


def make(nbytes: int) -> tuple[Landing, memoryview]:
    allocator = SlabAllocator(1 << 20)
    arena = memoryview(bytearray(allocator.capacity_bytes))
    slot = allocator.take(nbytes)
    assert slot is not None
    return Landing(slot, arena, nbytes), arena


@pytest.mark.parametrize("nbytes", [0, 1, 63, 70_000])
def test_parts_of_any_size_give_the_checksum_of_the_whole(nbytes: int) -> None:
    rng = random.Random(nbytes)
    data = rng.randbytes(nbytes)
    landing, arena = make(nbytes)
    while not landing.is_full:
        stop = rng.randint(landing.filled + 1, nbytes)
        landing.write(data[landing.filled : stop])
    assert landing.checksum() == hash64(data)
    start = landing.slot.offset + HEADER_BYTES
    assert arena[start : start + nbytes] == data


def test_bytes_that_a_socket_wrote_are_hashed_where_they_are() -> None:
    landing, _ = make(100)
    part = landing.memory[:60]
    part[:] = b"a" * 60
    landing.advance(part)
    landing.write(b"b" * 40)
    assert landing.checksum() == hash64(b"a" * 60 + b"b" * 40)


def test_the_memory_is_exactly_the_values() -> None:
    landing, _ = make(1000)  # its slot is larger
    assert len(landing.memory) == 1000
    with pytest.raises(ValueError, match="structures"):
        landing.write(b"x" * 1001)


def test_there_is_no_checksum_before_the_last_byte() -> None:
    landing, _ = make(10)
    landing.write(b"x" * 9)
    with pytest.raises(AssertionError):
        landing.checksum()
