"""Tiers that give back other bytes than they were given: every copy is described as it is."""

import anyio
import pytest

from respkv.engine.entry import Entry, Put
from respkv.engine.placement import MoveSettings
from respkv.errors import TierError
from respkv.tiers.format import check_page, hash64, read_header
from respkv.tiers.record import Level
from tests.engine.fake_tier import LOSSY, FakeTier, coarse
from tests.engine.files import GIVE_UP_S, clean, get, make_cold, opened, settled, until
from tests.fakes import make_cache

pytestmark = pytest.mark.anyio

KEY = b"ns:" + b"ab" * 32
EXACT = bytes(range(256)) * 40
COARSE = coarse(EXACT)
PAGE = Put("kvpage")
KEEP = MoveSettings(promote="first", reserve_timeout_s=GIVE_UP_S, shutdown_timeout_s=GIVE_UP_S)


def lossy_tier(name: str = "nvme", **settings: object) -> FakeTier:
    tier = FakeTier(name=name, **settings)  # type: ignore[arg-type]
    tier.is_lossy = True
    return tier


def checksums(entry: Entry) -> list[int]:
    return [record.checksum for record in entry.records]


async def test_what_was_promoted_has_the_checksum_of_its_own_bytes() -> None:
    cache, _ = make_cache()
    async with opened(cache, lossy_tier(), settings=KEEP) as mover:
        entry = cache.put(KEY, EXACT, PAGE)
        await make_cold(cache, mover)
        assert checksums(entry) == [hash64(EXACT)], "of what was put"
        assert await get(cache, mover, KEY) == COARSE
        assert entry.slot is not None
        header = check_page(cache.header(entry.slot), cache.payload(entry.slot), key=KEY)
        assert (header.checksum, header.generation) == (hash64(COARSE), entry.generation)
        assert checksums(entry) == [hash64(EXACT)], "the copy in the file is what it was"
        cache.demote(entry)
        assert await get(cache, mover, KEY) == COARSE


async def test_what_moves_down_is_described_as_what_was_read() -> None:
    cache, _ = make_cache()
    nvme, disk = lossy_tier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk, settings=KEEP) as mover:
        entry = cache.put(KEY, EXACT, PAGE)
        await make_cold(cache, mover)
        await nvme.leave(list(entry.records))
        assert checksums(entry) == [hash64(EXACT), hash64(COARSE)]
        assert [record.codec for record in entry.records] == [LOSSY, 0]
        assert disk.log.values[0].data == COARSE
        nvme.drop(entry.records[0], "evicted")
        assert await get(cache, mover, KEY) == COARSE


async def test_a_lossless_copy_moves_down_into_a_lossy_tier() -> None:
    cache, _ = make_cache()
    nvme, disk = FakeTier(), lossy_tier("disk")
    async with opened(cache, nvme, disk, settings=KEEP) as mover:
        entry = cache.put(KEY, EXACT, PAGE)
        await make_cold(cache, mover)
        await nvme.leave(list(entry.records))
        assert checksums(entry) == [hash64(EXACT)] * 2
        assert await get(cache, mover, KEY) == EXACT, "the faster copy is read"
        cache.demote(entry)
        nvme.drop(entry.records[0], "evicted")
        assert await get(cache, mover, KEY) == COARSE


async def test_what_was_promoted_is_written_again_as_what_it_is() -> None:
    cache, _ = make_cache()
    tier = lossy_tier()
    async with opened(cache, tier, settings=KEEP) as mover:
        entry = cache.put(KEY, EXACT, Put("kvpage", level=Level.WRITTEN))
        await settled(cache, mover)
        cache.demote(entry)
        assert await get(cache, mover, KEY) == COARSE
        # Its only copy in a file is lost: what is in memory is what there is.
        tier.drop(entry.records[0], "lost")
        await clean(cache, mover)
        await until(lambda: bool(entry.records))
        assert checksums(entry) == [hash64(COARSE)]
        assert entry.slot is not None
        assert read_header(cache.header(entry.slot)).checksum == hash64(COARSE)
        cache.demote(entry)
        assert await get(cache, mover, KEY) == COARSE


async def test_copies_of_one_value_may_have_different_checksums_after_a_restart() -> None:
    cache, _ = make_cache()
    nvme, disk = lossy_tier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk, settings=KEEP) as mover:
        entry = cache.put(KEY, EXACT, PAGE)
        await make_cold(cache, mover)
        await nvme.leave(list(entry.records))
        generation = entry.generation
    again, _ = make_cache()
    first, second = lossy_tier(log=nvme.log), FakeTier(disk.log, name="disk")
    async with opened(again, first, second, settings=KEEP) as mover:
        entry = again.entries[KEY]
        assert entry.generation == generation
        assert checksums(entry) == [hash64(EXACT), hash64(COARSE)]
        assert await get(again, mover, KEY) == COARSE
        again.demote(entry)
        first.drop(entry.records[0], "evicted")
        assert await get(again, mover, KEY) == COARSE


async def test_each_log_is_told_of_a_change_with_the_checksum_that_it_knows() -> None:
    cache, clock = make_cache()
    nvme, disk = lossy_tier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk, settings=KEEP) as mover:
        entry = cache.put(KEY, EXACT, Put("kvpage", level=Level.WRITTEN))
        await settled(cache, mover)
        await nvme.leave(list(entry.records))
        since = cache.copies.ticket
        cache.expire_at(entry, clock.wall_ms + 5000)
        await settled(cache, mover, since)
        for tier, checksum in ((nvme, hash64(EXACT)), (disk, hash64(COARSE))):
            (left,) = tier.log.values
            assert (left.meta.checksum, left.meta.expires_ms) == (checksum, clock.wall_ms + 5000)


async def test_many_loads_of_lossy_pages_keep_the_books() -> None:
    cache, _ = make_cache(1 << 20)
    async with opened(cache, lossy_tier(), lossy_tier("disk"), settings=KEEP) as mover:
        for number in range(60):
            cache.put(b"ns:%064x" % number, EXACT, PAGE)
        await clean(cache, mover)
        async with anyio.create_task_group() as tasks:
            for number in range(60):
                tasks.start_soon(get, cache, mover, b"ns:%064x" % number)
        for entry in cache.entries.values():
            if entry.slot is not None:
                check_page(cache.header(entry.slot), cache.payload(entry.slot), key=entry.key)
        cache.check()


async def test_stored_bytes_come_from_the_fastest_copy_that_can_be_read() -> None:
    cache, _ = make_cache()
    nvme, disk = lossy_tier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk, settings=KEEP) as mover:
        entry = cache.put(KEY, EXACT, PAGE)
        assert await mover.read_stored(entry) is None, "it is in memory alone"
        await make_cold(cache, mover)
        await nvme.leave(list(entry.records))
        fast, slow = entry.records
        assert await mover.read_stored(entry) == (LOSSY, EXACT, fast)
        assert entry.is_cold, "nothing was brought into memory"
        nvme.read_error = TierError("it hangs")
        assert await mover.read_stored(entry) == (0, COARSE, slow)
        disk.read_error = TierError("it hangs too")
        with pytest.raises(TierError, match="hangs too"):
            await mover.read_stored(entry)
        nvme.read_error = disk.read_error = None
        nvme.flip(KEY)
        assert await mover.read_stored(entry) == (0, COARSE, slow)
        assert entry.records == (slow,)


async def test_stored_bytes_of_a_value_that_has_ended_are_none() -> None:
    cache, _ = make_cache()
    tier = lossy_tier()
    async with opened(cache, tier, settings=KEEP) as mover:
        entry = cache.put(KEY, EXACT, PAGE)
        await make_cold(cache, mover)
        tier.close_gate()
        found: list[object] = []

        async def read() -> None:
            found.append(await mover.read_stored(entry))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await until(lambda: bool(tier.reads))
            cache.delete(entry)
            tier.open_gate()
        assert found == [None]
