"""Checkpoints: read back whole or not at all."""

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.errors import PageCorrupt
from respkv.tiers.checkpoint import (
    BLOCK_BYTES,
    CheckpointHead,
    Found,
    checkpoint_bytes_max,
    decode_checkpoint,
    encode_checkpoint,
)
from respkv.tiers.format import Buffer, hash64
from respkv.tiers.meta import BEHIND_BYTES_MAX, KEY_BYTES_MAX, MORE_BYTES_MAX, behind_bytes
from respkv.tiers.record import Level, Meta, Record
from respkv.tiers.segments import SegmentRow

HEAD = CheckpointHead(1000, 77, 1001, 5, 1_700_000_000_000, True)
NONCE = b"8 random"


def rows(count: int) -> list[SegmentRow]:
    return [
        SegmentRow(3 * index, b"%08d" % index, index % 4, index, 9000, 8000, 500, index, 1)
        for index in range(count)
    ]


def found(
    count: int, *, key_bytes: int = 40, segments: int = 4, has_more: bool = True
) -> list[Found]:
    made: list[Found] = []
    for number in range(count):
        meta = Meta(
            b"%0*d" % (key_bytes, number), "kvpage", 1 << 20, number * 7, number + 1,
            Level(number % 3), number, 2, 3, -number, 16, number, b"parent" * (number % 2),
            bytes(range(has_more * number % 7)),
        )  # fmt: skip
        where = (3 * (number % segments), 4096 + number, 500)
        made.append(
            (meta, Record(*where, 1 << 20, number % 3, number + 1, number * 7, 1 + number % 1000,
                          meta.level, "owner"))
        )  # fmt: skip
    return made


def encode(given_: list[Found], num_rows: int = 4) -> bytes:
    return b"".join(encode_checkpoint(HEAD, rows(num_rows), given_, nonce=NONCE))


def fields(record: Record) -> tuple[object, ...]:
    return (
        record.segment, record.offset, record.stored_bytes, record.payload_bytes, record.codec,
        record.generation, record.checksum, record.sequence, record.level,
    )  # fmt: skip


def check(data: Buffer, given_: list[Found], num_rows: int = 4) -> None:
    checkpoint = decode_checkpoint(data)
    assert checkpoint.head == HEAD
    assert checkpoint.rows == rows(num_rows)
    assert [meta for meta, _ in checkpoint.found] == [meta for meta, _ in given_]
    assert [fields(record) for _, record in checkpoint.found] == [
        fields(record) for _, record in given_
    ]
    assert all(record.owner is None for _, record in checkpoint.found)


@pytest.mark.parametrize("count", [0, 1, 5, 350, 3000])
@pytest.mark.parametrize("num_rows", [4, 1000, 3000])
def test_a_checkpoint_is_read_back_as_it_was_written(count: int, num_rows: int) -> None:
    given_ = found(count)
    data = encode(given_, num_rows)
    check(data, given_, num_rows)
    check(data + b"\xff" * BLOCK_BYTES, given_, num_rows)  # left there by a longer one
    key_bytes = sum(behind_bytes(meta) for meta, _ in given_)
    assert len(data) <= checkpoint_bytes_max(count, key_bytes, num_rows)


def test_blocks_are_whole_but_the_last_and_none_takes_long() -> None:
    pulled = 0

    def count() -> Iterator[Found]:
        nonlocal pulled
        for each in found(5000, key_bytes=4):
            pulled += 1
            yield each

    before, sizes = 0, []
    for block in encode_checkpoint(HEAD, rows(4), count(), nonce=NONCE):
        sizes.append(len(block))
        assert pulled - before <= 2000
        before = pulled
    assert set(sizes[:-1]) == {BLOCK_BYTES}
    assert sizes[-1] % 4096 == 0


@pytest.mark.parametrize(("key_bytes", "more_bytes"), [(KEY_BYTES_MAX, 0), (512, MORE_BYTES_MAX)])
def test_the_longest_descriptions_fit(key_bytes: int, more_bytes: int) -> None:
    meta, record = found(1)[0]
    long = meta._replace(key=b"k" * key_bytes, parent=b"p" * key_bytes, more=b"m" * more_bytes)
    given_ = [(long, record)] * 5
    data = encode(given_)
    check(data, given_)
    assert len(data) <= checkpoint_bytes_max(5, 5 * BEHIND_BYTES_MAX, 4)


def test_what_is_newer_or_in_a_segment_without_a_row_is_left_out() -> None:
    old, newer, elsewhere = found(3)
    newer[1].sequence = HEAD.sequence + 1
    elsewhere[1].segment = 2
    check(encode([newer, old, elsewhere]), [old])


def test_no_flipped_bit_passes() -> None:
    given_ = found(20)
    data = encode(given_)
    used_bytes = len(data.rstrip(b"\0"))
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        if at < used_bytes:
            with pytest.raises(PageCorrupt):
                decode_checkpoint(changed)
        else:
            check(changed, given_)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_of_a_long_one_passes(data: st.DataObject) -> None:
    given_ = found(1200)
    changed = bytearray(encode(given_))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(PageCorrupt):  # raised but for a bit of the padding
        check(changed, given_)


def test_no_part_passes() -> None:
    data = encode(found(1200))
    for nbytes in (0, 1, 63, 4096, BLOCK_BYTES - 1, BLOCK_BYTES, len(data) - 4096):
        with pytest.raises(PageCorrupt):
            decode_checkpoint(data[:nbytes])


def test_a_mixture_of_two_does_not_pass() -> None:
    one = encode(found(1200))
    blocks = list(encode_checkpoint(HEAD, rows(4), found(1200), nonce=b"another!"))
    for index in range(1, len(blocks)):
        mixed = bytearray(one)
        start = index * BLOCK_BYTES
        mixed[start : start + len(blocks[index])] = blocks[index]
        with pytest.raises(PageCorrupt, match="another checkpoint"):
            decode_checkpoint(mixed)
    with pytest.raises(PageCorrupt, match="another checkpoint"):
        decode_checkpoint(one[:BLOCK_BYTES] + one[2 * BLOCK_BYTES :])


@given(st.binary(max_size=500))
def test_garbage_is_no_checkpoint(garbage: bytes) -> None:
    with pytest.raises(PageCorrupt):
        decode_checkpoint(garbage)


def test_the_layout_on_disk_does_not_change() -> None:
    data = encode(found(3, has_more=False))
    assert data[:8] == b"RKVchk1\n"
    assert data[16:24] == NONCE
    assert len(data) == 4096
    assert f"{hash64(data):016x}" == "f5eea464a5902cde"
    assert f"{hash64(encode(found(3))):016x}" == "ffa6d0e6e408b496"  # since format 2
