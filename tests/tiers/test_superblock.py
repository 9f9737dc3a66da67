"""The superblock: read back, refused with a reason, or damaged, and nothing else."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from respkv.errors import PageCorrupt, TierError
from respkv.tiers.format import hash64
from respkv.tiers.superblock import (
    FORMAT_VERSION,
    MAGIC,
    Superblock,
    decode_superblock,
    encode_superblock,
    read_boot_id,
)

OURS = Superblock("nvme", 4096, 1 << 28, False, "a" * 36, 7, 8, 9)


def decode(data: bytes) -> Superblock:
    return decode_superblock(data, tier="nvme", alignment=4096)


@given(
    st.builds(
        Superblock,
        tier=st.just("nvme"),
        alignment=st.just(4096),
        segment_bytes=st.integers(0, 2**63),
        is_clean=st.booleans(),
        boot_id=st.text("0123456789abcdef-", max_size=64),
        void_below=st.integers(0, 2**63),
        next_sequence=st.integers(0, 2**63),
        next_generation=st.integers(0, 2**63),
    )
)
def test_it_is_read_back_as_it_was_written(superblock: Superblock) -> None:
    assert decode(encode_superblock(superblock)) == superblock


def test_a_newer_format_is_refused() -> None:
    data = bytearray(encode_superblock(OURS))
    for copy in (0, 4096):
        data[copy + 8] = FORMAT_VERSION + 1
        data[copy + 24 : copy + 32] = hash64(data[copy : copy + 24]).to_bytes(8, "little")
    with pytest.raises(TierError, match="format 3, this program reads formats up to 2"):
        decode(bytes(data))


def test_another_tier_and_another_alignment_are_refused() -> None:
    with pytest.raises(TierError, match="belong to the tier disk, not nvme"):
        decode(encode_superblock(OURS._replace(tier="disk")))
    with pytest.raises(TierError, match="have the alignment 64, not 4096"):
        decode(encode_superblock(OURS._replace(alignment=64)))


@given(st.binary(max_size=200))
def test_other_files_are_refused(garbage: bytes) -> None:
    assume(not garbage.startswith(MAGIC))
    with pytest.raises(TierError, match="not one of respkv"):
        decode(garbage)


def test_any_flipped_bit_is_harmless() -> None:
    data = encode_superblock(OURS)
    for at in [*range(256), *range(4096, 4096 + 256)]:
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            assert decode(bytes(changed)) == OURS


def test_one_with_both_copies_damaged_is_ours_but_damaged() -> None:
    data = bytearray(encode_superblock(OURS))
    data[40] ^= 1
    data[4096 + 50] ^= 1
    with pytest.raises(PageCorrupt):
        decode(bytes(data))
    with pytest.raises(PageCorrupt):
        decode(bytes(data[:30]))


def test_the_machine_says_which_run_this_is() -> None:
    assert read_boot_id() == read_boot_id()
    assert len(read_boot_id()) <= 64
