"""Directories of every format version that was ever released are read, whatever was in them."""

import json
from pathlib import Path

import anyio
import pytest

from respkv.errors import TierError
from respkv.kernels.lossless import decode
from respkv.tiers.format import HEADER_BYTES, check_page, hash64
from respkv.tiers.record import Meta, Record
from respkv.tiers.recovery import Recovered, recover
from respkv.tiers.segment_head import segment_name
from respkv.tiers.superblock import FORMAT_VERSION, SUPERBLOCK_NAME
from tests.tiers.memory_device import MemoryDevice
from tests.tiers.small_log import BOOT

GOLDEN = Path(__file__).parent / "golden"
ALIGNMENTS = {"nvme": 4096, "disk": 64}
NAMES = [f"v{version}-{tier}" for version in range(1, FORMAT_VERSION + 1) for tier in ALIGNMENTS]


def files_of(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (GOLDEN / name).iterdir()}


def recovered_from(name: str, files: dict[str, bytes]) -> Recovered:
    tier = name.partition("-")[2]

    async def run() -> Recovered:
        return await recover(
            MemoryDevice(files, alignment=ALIGNMENTS[tier]),
            tier=tier,
            alignment=ALIGNMENTS[tier],
            segment_bytes=1 << 20,
            capacity_bytes=1 << 30,
            reserve_bytes=0,
            boot_id=BOOT,
            now=0.0,
        )

    return anyio.run(run)


def payload_of(files: dict[str, bytes], meta: Meta, record: Record) -> bytes:
    """Read and check a value as a tier does."""
    data = files[segment_name(record.segment)]
    image = data[record.offset : record.offset + record.stored_bytes]
    stored = image[HEADER_BYTES:]
    header = check_page(image, stored, key=meta.key, generation=meta.generation)
    assert header.codec == record.codec
    payload = bytearray(meta.payload_bytes)
    decode(record.codec, memoryview(stored), memoryview(payload))
    assert hash64(payload) == meta.checksum == record.checksum
    return bytes(payload)


@pytest.mark.parametrize("name", NAMES)
def test_every_version_is_read(name: str) -> None:
    files = files_of(name)
    recovered = recovered_from(name, files)
    found: dict[str, dict[str, object]] = {}
    for meta, record in recovered.found:
        fields = meta._asdict()
        fields |= {"key": meta.key.hex(), "parent": meta.parent.hex(), "more": meta.more.hex()}
        fields["payload"] = payload_of(files, meta, record).hex()
        found[meta.key.hex()] = fields
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    assert found == {key: {"more": "", **fields} for key, fields in expected.items()}
    assert recovered.counts.damaged == recovered.counts.torn == recovered.counts.lost == 0


def test_golden_directories_cover_both_ways_of_stopping_and_all_kinds_of_values() -> None:
    crashed, stopped = (recovered_from(name, files_of(name)) for name in ("v1-nvme", "v1-disk"))
    assert (crashed.counts.replayed, crashed.counts.dropped_mutable) == (3, 1)
    assert stopped.counts.replayed == 0
    assert {record.codec for _, record in stopped.found} == {0, 1}
    assert len(crashed.notes) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_is_refused_by_another_tier(name: str) -> None:
    files = files_of(name)
    other = "v1-disk" if name.endswith("nvme") else "v1-nvme"
    with pytest.raises(TierError, match="belong to the tier"):
        recovered_from(other, files)
    with pytest.raises(TierError, match="not one of respkv"):
        recovered_from(name, {**files, SUPERBLOCK_NAME: b"something else"})
