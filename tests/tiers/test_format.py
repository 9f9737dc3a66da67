"""Headers: what was written is read back, and nothing else passes."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from respkv.errors import PageCorrupt
from respkv.tiers.format import (
    HEADER_BYTES,
    Checksum,
    Header,
    check_page,
    hash64,
    read_header,
    write_header,
)

KEY = b"llama:" + b"0f" * 32
PAYLOAD = bytes(range(256)) * 3
uint64 = st.integers(0, 2**64 - 1)


def record(key: bytes = KEY, payload: bytes = PAYLOAD, generation: int = 7) -> bytearray:
    page = bytearray(HEADER_BYTES) + payload
    header = Header(
        codec=0,
        flags=0,
        namespace=hash64(b"llama"),
        key_hash=hash64(key),
        generation=generation,
        payload_bytes=len(payload),
        checksum=hash64(payload),
    )
    write_header(memoryview(page), header)
    return page


def check(page: bytes | bytearray, key: bytes = KEY, generation: int | None = 7) -> Header:
    return check_page(page, memoryview(page)[HEADER_BYTES:], key=key, generation=generation)


@given(st.builds(Header, st.integers(0, 255), st.integers(0, 65535), *[uint64] * 5))
def test_a_header_is_read_back_as_it_was_written(header: Header) -> None:
    into = bytearray(b"\xff" * HEADER_BYTES)
    write_header(memoryview(into), header)
    assert read_header(into) == header


def test_the_layout_on_disk_does_not_change() -> None:
    into = bytearray(HEADER_BYTES)
    write_header(memoryview(into), Header(2, 3, 4, 5, 6, 7, 8))
    assert into[:8] == b"RKV1\x01\x02\x03\x00"
    numbers = [int.from_bytes(into[at : at + 8], "little") for at in range(8, 64, 8)]
    assert numbers[:6] == [4, 5, 6, 7, 8, 0]
    assert numbers[6] == xxhash.xxh3_64_intdigest(bytes(into[:56]))


def test_a_good_page_passes() -> None:
    assert check(record()).payload_bytes == len(PAYLOAD)
    assert check(record(), generation=None).generation == 7
    assert check(record(payload=b"")).payload_bytes == 0


def test_every_flipped_bit_of_header_and_payload_is_found() -> None:
    page = record()
    for bit in range(len(page) * 8):
        page[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PageCorrupt):
            check(page, generation=None)
        page[bit // 8] ^= 1 << bit % 8
    check(page)


def test_a_record_of_another_key_is_found() -> None:
    with pytest.raises(PageCorrupt, match="another key than b'llama:"):
        check(record(key=b"llama:other"))


def test_a_record_of_an_earlier_use_is_found() -> None:
    with pytest.raises(PageCorrupt, match="generation 6, not 7"):
        check(record(generation=6))


@pytest.mark.parametrize("size", [0, len(PAYLOAD) - 1, len(PAYLOAD) + 1])
def test_a_payload_of_another_size_is_found(size: int) -> None:
    with pytest.raises(PageCorrupt, match=f"with {len(PAYLOAD)} bytes, not {size}"):
        check_page(record(), (PAYLOAD + b"x")[:size], key=KEY)


def test_an_old_header_before_a_new_payload_is_found() -> None:
    torn = record()[:HEADER_BYTES] + PAYLOAD[::-1]
    with pytest.raises(PageCorrupt, match="checksum"):
        check(torn)


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_garbage_is_no_header(garbage: bytes) -> None:
    with pytest.raises(PageCorrupt):
        read_header(garbage)


def test_a_cut_header_and_one_of_a_later_version_are_told_apart() -> None:
    page = record()
    with pytest.raises(PageCorrupt, match="there are 63"):
        read_header(page[: HEADER_BYTES - 1])
    page[4] = 2
    page[56:64] = hash64(page[:56]).to_bytes(8, "little")
    with pytest.raises(PageCorrupt, match="version 2"):
        read_header(page)


@given(st.lists(st.binary(max_size=300)))
def test_a_checksum_does_not_depend_on_the_pieces(pieces: list[bytes]) -> None:
    checksum = Checksum()
    for piece in pieces:
        checksum.update(memoryview(piece))
    assert checksum.digest() == hash64(b"".join(pieces))
