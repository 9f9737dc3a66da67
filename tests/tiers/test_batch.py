"""Batches: what was put in is read back, from where it says, and nothing else is taken for one."""

import mmap
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.errors import PageCorrupt
from respkv.tiers.batch import (
    HEAD_BYTES_MAX,
    ITEMS_MAX,
    PIECE_BYTES_MIN,
    TWIN_MAGIC,
    Batch,
    Bury,
    Change,
    Encoded,
    Note,
    ValueItem,
)
from respkv.tiers.batch_reader import check_image, decode_head, head_used_bytes
from respkv.tiers.format import HEADER_BYTES, Header, check_page, hash64, write_header
from respkv.tiers.meta import (
    KEY_BYTES_MAX,
    MORE_BYTES_MAX,
    is_content_addressed,
    pack_meta,
    unpack_meta,
)
from respkv.tiers.record import Level, Meta

NONCE = b"8 random"
OFFSET, SEQUENCE = 1 << 20, 77
ALIGNMENTS = (64, 4096)

uint64 = st.integers(0, 2**64 - 1)
keys = st.binary(min_size=1, max_size=600)
described_things = st.builds(
    Meta,
    key=keys,
    kind=st.sampled_from(["string", "kvpage"]),
    payload_bytes=uint64,
    checksum=uint64,
    generation=uint64,
    level=st.sampled_from(Level),
    expires_ms=uint64,
    pinned_ms=uint64,
    touched_ms=uint64,
    priority=st.integers(-(2**63), 2**63 - 1),
    tokens=uint64,
    hits=uint64,
    parent=st.binary(max_size=200),
    more=st.binary(max_size=200),
)
metas = described_things.map(
    lambda meta: meta if meta.kind == "kvpage" else meta._replace(more=b"")
)
payloads = st.one_of(
    st.binary(max_size=500),
    st.builds(
        lambda seed, nbytes: random.Random(seed).randbytes(nbytes),
        st.integers(0, 99),
        st.integers(0, 3 * PIECE_BYTES_MIN),
    ),
)
notes = st.one_of(st.builds(Bury, keys, uint64), st.builds(Change, metas))


def described(meta: Meta, payload: bytes) -> Meta:
    return meta._replace(payload_bytes=len(payload), checksum=hash64(payload))


def image_of(meta: Meta, payload: bytes) -> memoryview:
    """The payload as it is in a large slot: behind its header, in whole pages."""
    memory = memoryview(mmap.mmap(-1, (HEADER_BYTES + len(payload) + 4095) // 4096 * 4096))
    header = Header(0, 0, 9, hash64(meta.key), meta.generation, meta.payload_bytes, meta.checksum)
    write_header(memory, header)
    memory[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    return memory


def written(batch: Batch, *, acked: int = 0, noted: int = 0) -> tuple[bytes, Encoded]:
    """Encode a batch and lay its pieces where they belong, over what was there before."""
    into = memoryview(bytearray(b"\xee" * batch.staging_bytes))
    encoded = batch.encode(
        into, offset=OFFSET, nonce=NONCE, sequence=SEQUENCE, acked=acked, noted=noted
    )
    data = bytearray(b"\xdd" * batch.total_bytes)
    for piece in encoded.pieces:
        at = piece.offset - OFFSET
        assert at + piece.data.nbytes <= batch.total_bytes
        data[at : at + piece.data.nbytes] = piece.data
    return bytes(data), encoded


@settings(max_examples=100, deadline=None)
@given(
    alignment=st.sampled_from(ALIGNMENTS),
    values=st.lists(st.tuples(metas, payloads, st.booleans()), max_size=6),
    noted=st.lists(notes, max_size=4),
)
def test_a_batch_is_read_back_as_it_was_put_together(
    alignment: int, values: list[tuple[Meta, bytes, bool]], noted: list[Note]
) -> None:
    batch = Batch(alignment)
    given_ = [(described(meta, payload), payload, has_image) for meta, payload, has_image in values]
    for meta, payload, has_image in given_:
        has_image = has_image and alignment == 4096
        bound = batch.bytes_with(meta, len(payload), has_image=has_image)
        image = image_of(meta, payload) if has_image else None
        batch.add_value(meta, memoryview(payload), image=image)
        assert batch.total_bytes <= bound
    for note in noted:
        batch.add_note(note)
    data, encoded = written(batch, acked=70, noted=60)
    assert len(data) % alignment == 0
    head = decode_head(data, offset=OFFSET, nonce=NONCE)
    assert (head.sequence, head.acked, head.noted) == (SEQUENCE, 70, 60)
    assert head.total_bytes == len(data)
    assert head.head_bytes == batch.head_bytes
    assert list(head.items[len(given_) :]) == noted
    ends = [head.head_bytes]
    for item, place, (meta, payload, _) in zip(head.items, encoded.places, given_, strict=False):
        assert isinstance(item, ValueItem)
        assert item.meta == meta
        assert place == (OFFSET + item.offset, item.stored_bytes, item.codec)
        stop = item.offset + item.stored_bytes
        assert item.offset % 64 == 0
        check_image(data[item.offset :], item)
        page = data[item.offset : stop]
        check_page(page, page[HEADER_BYTES:], key=meta.key, generation=meta.generation)
        assert page[HEADER_BYTES:] == payload
        ends.append(stop)
    assert len(data) - max(ends) < alignment


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_pieces_are_aligned_and_large_values_are_not_copied(alignment: int) -> None:
    batch = Batch(alignment)
    payload = random.Random(1).randbytes(300_000)
    meta = described(Meta(b"k", "kvpage", 0, 0, 5), payload)
    small = described(Meta(b"s", "string", 0, 0, 6), b"small")
    image = image_of(meta, payload)
    batch.add_value(meta, image[64 : 64 + len(payload)], image=image)
    batch.add_value(small, memoryview(b"small"))
    _, encoded = written(batch)
    assert len(encoded.pieces) == 2
    for offset, data in encoded.pieces:
        assert offset % alignment == 0
        assert data.nbytes % alignment == 0
    assert encoded.pieces[1].data.obj is image.obj
    assert batch.staging_bytes == (4096 if alignment == 4096 else 448)


def test_an_encoded_payload_is_a_piece_of_its_own_where_alignment_allows() -> None:
    batch = Batch(64)
    stored = memoryview(random.Random(1).randbytes(PIECE_BYTES_MIN + 1))
    batch.add_value(Meta(b"k", "kvpage", 1 << 20, 99, 5), stored, codec=2)
    data, encoded = written(batch)
    assert [piece.data.nbytes for piece in encoded.pieces] == [192, 64, stored.nbytes]
    assert encoded.pieces[2].data.obj is stored.obj
    (item,) = decode_head(data, offset=OFFSET, nonce=NONCE).items
    assert isinstance(item, ValueItem)
    assert check_image(data[item.offset :], item).checksum == hash64(stored)


def test_nothing_of_older_memory_is_written() -> None:
    batch = Batch(4096)
    meta = described(Meta(b"k", "string", 0, 0, 5), b"x" * 100)
    batch.add_value(meta, memoryview(b"x" * 100))
    batch.add_note(Bury(b"k", 4))
    data, _ = written(batch)
    assert b"\xee" * 4 not in data
    assert b"\xdd" * 4 not in data


def test_a_batch_without_anything_says_what_was_acknowledged() -> None:
    data, encoded = written(Batch(64), acked=76)
    assert len(data) == 128
    assert not encoded.places
    assert decode_head(data, offset=OFFSET, nonce=NONCE).acked == 76


def noted_batch() -> bytes:
    batch = Batch(64)
    meta = described(Meta(b"key", "string", 0, 0, 5), b"payload")
    batch.add_value(meta, memoryview(b"payload"))
    batch.add_note(Bury(b"key", 4))
    return written(batch)[0]


def test_no_flipped_bit_in_a_head_passes() -> None:
    data = noted_batch()
    used_bytes = head_used_bytes(data, NONCE)
    whole = decode_head(data, offset=OFFSET, nonce=NONCE)
    for at in range(used_bytes):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            with pytest.raises(PageCorrupt):
                decode_head(changed, offset=OFFSET, nonce=NONCE)
            twin = changed[whole.head_bytes // 2 :]
            assert decode_head(twin, offset=None, nonce=NONCE) == whole


def test_no_flipped_bit_in_an_image_passes() -> None:
    data = noted_batch()
    item = decode_head(data, offset=OFFSET, nonce=NONCE).items[0]
    assert isinstance(item, ValueItem)
    for at in range(item.offset, item.offset + item.stored_bytes):
        changed = bytearray(data)
        changed[at] ^= 16
        image = changed[item.offset : item.offset + item.stored_bytes]
        try:
            header = check_image(image, item)
        except PageCorrupt:
            continue
        assert hash64(image[HEADER_BYTES:]) != header.checksum


def test_no_part_of_a_head_passes() -> None:
    data = noted_batch()
    for nbytes in range(head_used_bytes(data, NONCE)):
        with pytest.raises(PageCorrupt):
            decode_head(data[:nbytes], offset=OFFSET, nonce=NONCE)


@given(st.binary(max_size=300))
def test_garbage_is_no_head(garbage: bytes) -> None:
    with pytest.raises(PageCorrupt):
        decode_head(garbage, offset=OFFSET, nonce=NONCE)


def test_a_batch_elsewhere_or_of_another_use_is_not_taken() -> None:
    data = noted_batch()
    with pytest.raises(PageCorrupt, match="written for offset"):
        decode_head(data, offset=OFFSET + 64, nonce=NONCE)
    with pytest.raises(PageCorrupt, match="no batch of this segment"):
        decode_head(data, offset=OFFSET, nonce=b"another!")


def test_the_layout_on_disk_does_not_change() -> None:
    data = noted_batch()
    assert data[:16] == b"RKVbat1\n8 random"
    numbers = [int.from_bytes(data[at : at + 8], "little") for at in range(24, 64, 8)]
    assert numbers == [OFFSET, SEQUENCE, 0, 0, len(data)]
    assert data[192:208] == TWIN_MAGIC + NONCE
    assert f"{hash64(data):016x}" == "88033aa8158282d6"


LONGEST = [
    Meta(b"k" * KEY_BYTES_MAX, "kvpage", 0, 0, 1, parent=b"p" * KEY_BYTES_MAX),
    Meta(b"k" * 512, "kvpage", 0, 0, 1, parent=b"p" * 512, more=b"m" * MORE_BYTES_MAX),
]


@pytest.mark.parametrize("long", LONGEST, ids=["keys", "more"])
def test_there_is_room_for_items_up_to_the_limits(long: Meta) -> None:
    batch = Batch(4096)
    for number in range(ITEMS_MAX):
        assert batch.has_room()
        batch.add_note(Bury(b"%d" % number, 1))
    assert not batch.has_room()
    batch = Batch(4096)
    while batch.has_room():
        batch.add_note(Change(long))
    assert HEAD_BYTES_MAX // 2 < batch.head_bytes <= HEAD_BYTES_MAX
    data, _ = written(batch)
    assert len(decode_head(data, offset=OFFSET, nonce=NONCE).items) == batch.num_items


@given(metas)
def test_descriptions_are_read_back(meta: Meta) -> None:
    data = b"before" + pack_meta(meta)
    assert unpack_meta(data, 6) == (meta, len(data))
    with pytest.raises(PageCorrupt):
        unpack_meta(data[:-1], 6)


ADDRESSED = [
    (b"llama:" + b"0f" * 32, "kvpage", True),
    (b":" + b"0f" * 32, "kvpage", True),
    (b"llama:" + b"0f" * 32, "string", False),
    (b"llama:" + b"0F" * 32, "kvpage", False),
    (b"llama-" + b"0f" * 32, "kvpage", False),
    (b"0f" * 32, "kvpage", False),
    (b"llama:" + b"0f" * 32 + b".logits", "kvpage", True),
    (b"llama:" + b"0f" * 32 + b".g.mamba", "kvpage", True),
    (b"llama:" + b"0f" * 32 + b".other", "kvpage", False),
    (b"llama:" + b"0f" * 32 + b".logits", "string", False),
    (b"llama:" + b"0f" * 31, "kvpage", False),
    (b"", "kvpage", False),
]


@pytest.mark.parametrize(("key", "kind", "expected"), ADDRESSED)
def test_only_pages_named_by_a_hash_name_their_content(
    key: bytes, kind: str, expected: bool
) -> None:
    assert is_content_addressed(key, kind) == expected
