"""Schemas in files: what is written is read, and nothing else."""

import json
from collections.abc import Sequence

import anyio
import pytest

from respkv.engine.namespaces import Group, Kind, Namespaces, Schema
from respkv.engine.spaces import Limits
from respkv.errors import PageCorrupt, TierError
from respkv.kernels.layout import Codec
from respkv.page import Geometry, Latents
from respkv.server.schema_files import FILE_NAME, SchemaFiles, checksum, decode, encode
from respkv.tiers.record import Level
from tests.fakes import make_cache

pytestmark = pytest.mark.anyio

SHAPE = Geometry(layers=2, heads=2, dim=16, tokens=4, dtype="float16")
SCHEMAS = [
    Schema(b"ns", SHAPE),
    Schema(b"\x00\xff{}", SHAPE, b"\x80f", b"md5", b"\n", ((b"cpu", b"raw"),), 7, Level.DURABLE),
    Schema(b"memory", SHAPE, level=Level.MEMORY),
    Schema(b"latents", Latents(2, 1, 16, 4, "float16")),
    Schema(
        b"hybrid",
        SHAPE,
        groups=(
            Group(b"full", Kind.FULL, Geometry(1, 1, 8, 4, "uint8")),
            Group(b"index", Kind.MLA, Latents(1, 1, 8, 4, "uint8")),
            Group(b"local", Kind.SLIDING, SHAPE, window=9),
            Group(b"mamba", Kind.STATE, nbytes=77),
        ),
    ),
]


class Shelf:
    """A tier as far as small files go."""

    def __init__(self, name: str, data: bytes | None = None) -> None:
        self.name = name
        self.data = data
        self.error = ""
        self.num_saves = 0

    async def load(self, name: str) -> bytes | None:
        assert name == FILE_NAME
        return self.data

    async def save(self, name: str, data: bytes) -> None:
        assert name == FILE_NAME
        await anyio.sleep(0.01)
        if self.error:
            raise TierError(self.error)
        self.num_saves += 1
        self.data = data


def files_on(*shelves: Shelf) -> tuple[SchemaFiles, Namespaces]:
    namespaces = Namespaces()
    tiers: Sequence[object] = shelves
    return SchemaFiles(namespaces, tiers), namespaces  # type: ignore[arg-type]


def test_all_of_a_schema_is_read_back() -> None:
    assert decode(encode(12, SCHEMAS)) == (12, SCHEMAS)
    assert decode(encode(0, [])) == (0, [])


def test_files_of_former_versions_are_read() -> None:
    body = json.loads(encode(3, SCHEMAS[:3]))
    del body["checksum"]
    for each in body["schemas"]:
        for name in ("kind", "groups"):
            del each[name]
    body["checksum"] = checksum(body)
    assert decode(json.dumps(body).encode()) == (3, SCHEMAS[:3])


async def test_what_was_chosen_by_measuring_survives_a_restart() -> None:
    shelf = Shelf("nvme")
    files, namespaces = files_on(shelf)
    namespaces.put(Schema(b"ns", SHAPE, codecs=((b"nvme", b"auto"),), error_max=0.1))
    namespaces.chosen[b"ns"] = ((Codec.RH4, Codec.I8), (Codec.XS, Codec.XS))
    await files.save()
    again, found = files_on(shelf)
    await again.load()
    assert found.chosen == namespaces.chosen


def test_every_flipped_bit_is_noticed_or_changes_nothing() -> None:
    data = encode(12, SCHEMAS[:2])
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            try:
                assert decode(bytes(flipped)) == (12, SCHEMAS[:2])
            except PageCorrupt:
                continue


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b"7", b"[" * 100_000, b'{"checksum": "0"}', b"\xff"]
)
def test_what_is_no_such_file_is_damaged(data: bytes) -> None:
    with pytest.raises(PageCorrupt):
        decode(data)


def test_a_torn_file_is_damaged() -> None:
    data = encode(12, SCHEMAS)
    for length in range(len(data)):
        with pytest.raises(PageCorrupt):
            decode(data[:length])


async def test_the_newest_of_the_tiers_counts_and_damaged_ones_do_not() -> None:
    nvme, disk = Shelf("nvme", encode(3, SCHEMAS[:1])), Shelf("disk", encode(4, SCHEMAS))
    files, namespaces = files_on(nvme, disk)
    assert await files.load() == SCHEMAS
    assert namespaces.find(b"memory") == SCHEMAS[2]
    disk.data = disk.data[:-20] if disk.data else b""
    files, _ = files_on(nvme, disk)
    assert await files.load() == SCHEMAS[:1]
    assert files.num_damaged == 1
    assert await files_on(Shelf("nvme"))[0].load() == []


async def test_after_a_load_what_is_saved_is_newer() -> None:
    old, new = Shelf("nvme", encode(3, SCHEMAS[:1])), Shelf("disk")
    files, namespaces = files_on(old, new)
    await files.load()
    old.error = "ENOSPC"
    namespaces.put(SCHEMAS[1])
    await files.save()
    assert files.num_failed == 1
    assert files.is_saved
    again, _ = files_on(old, new)
    assert {schema.namespace for schema in await again.load()} == {b"ns", b"\x00\xff{}"}


async def test_a_save_that_no_tier_takes_is_an_error_and_the_next_one_saves_all() -> None:
    shelf = Shelf("nvme")
    files, namespaces = files_on(shelf)
    shelf.error = "ENOSPC"
    namespaces.put(SCHEMAS[0])
    with pytest.raises(TierError, match="could not be saved: ENOSPC"):
        await files.save()
    assert not files.is_saved
    shelf.error = ""
    namespaces.put(SCHEMAS[2])
    await files.save()
    assert shelf.data is not None
    assert len(decode(shelf.data)[1]) == 2


async def test_those_who_save_at_once_share_writes_and_each_is_saved_when_told_so() -> None:
    shelf = Shelf("nvme")
    files, namespaces = files_on(shelf)

    async def add(number: int) -> None:
        namespaces.put(Schema(b"ns%d" % number, SHAPE))
        await files.save()
        assert shelf.data is not None
        assert b"ns%d" % number in [schema.namespace for schema in decode(shelf.data)[1]]

    async with anyio.create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(add, number)
    assert shelf.num_saves <= 3


async def test_quotas_are_saved_with_the_schemas_and_files_without_any_have_none() -> None:
    cache, _ = make_cache()
    shelf = Shelf("nvme", encode(3, SCHEMAS[:1]))
    files = SchemaFiles(cache.namespaces, [shelf], cache.accounts)  # type: ignore[list-item]
    await files.load()
    assert cache.accounts.saved() == []
    cache.accounts.set_limits(b"\xff:", Limits(7, 5, {b"\x00": 3, b"u": 0}))
    await files.save()
    other, _ = make_cache()
    await SchemaFiles(other.namespaces, [shelf], other.accounts).load()  # type: ignore[list-item]
    assert other.accounts.saved() == cache.accounts.saved()
    assert other.accounts.limits_of(b"\xff:") == Limits(7, 5, {b"\x00": 3, b"u": 0})
