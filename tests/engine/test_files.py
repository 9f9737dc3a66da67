"""File tiers under the cache: what is written, what is read back, and what replies wait for."""

import random

import anyio
import anyio.lowlevel
import pytest

from respkv.engine.entry import Entry, Put
from respkv.engine.files import open_files
from respkv.engine.placement import MoveSettings
from respkv.errors import OutOfMemory, TierError
from respkv.tiers.record import Level
from tests.engine.fake_tier import FakeLog, FakeTier
from tests.engine.files import (
    DURABLE,
    GIVE_UP_S,
    PAGE,
    WRITTEN,
    clean,
    get,
    load,
    make_cold,
    opened,
    settled,
    until,
)
from tests.fakes import make_cache

pytestmark = pytest.mark.anyio
ID = b"ns:" + b"ab" * 32
KEEP = MoveSettings(promote="first", reserve_timeout_s=GIVE_UP_S, shutdown_timeout_s=GIVE_UP_S)
NEVER = MoveSettings(promote="never", reserve_timeout_s=GIVE_UP_S, shutdown_timeout_s=GIVE_UP_S)


@pytest.mark.parametrize("nbytes", [0, 1, 448, 449, 5000, 70_000, 300_000])
async def test_what_went_to_a_file_comes_back_as_it_was(nbytes: int) -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    data = random.Random(nbytes).randbytes(nbytes)
    async with opened(cache, tier, settings=KEEP) as mover:
        entry = cache.put(b"k", data)
        await make_cold(cache, mover)
        assert entry.is_cold
        assert (cache.slabs.used_bytes, cache.room.small_bytes) == (0, 0)
        assert await get(cache, mover, b"k") == data
        assert not entry.is_cold
        cache.check()


async def test_a_cold_key_is_there_for_all_that_does_not_read_it() -> None:
    cache, clock = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        cache.put(b"a", b"v" * 5000, PAGE)
        cache.put(b"b", b"v" * 5000, Put("kvpage", parent=b"a", expires_ms=clock.wall_ms + 1000))
        await make_cold(cache, mover)
        assert [each.key for each in cache.match([b"a", b"b"], clock.now)] == [b"a", b"b"]
        assert cache.index.scan(0, 10)[1] == list(cache.entries.values())
        clock.advance(2)
        assert cache.find(b"b") is None
        found = cache.find(b"a")
        assert found is not None
        cache.delete(found)
        assert not cache.entries
        assert not tier.records
        assert tier.reads == []


async def test_eviction_takes_clean_values_and_loses_none() -> None:
    cache, clock = make_cache()
    async with opened(cache, FakeTier()) as mover:
        for number in range(200):
            cache.put(b"k%d" % number, b"%d" % number + b"v" * 50_000)
            clock.advance(1)
            await until(lambda: not cache.copies.is_behind)
        assert len(cache.entries) == 200
        assert cache.stats.evicted == 0
        assert cache.stats.demoted == cache.num_cold > 100
        for number in range(200):
            value = await get(cache, mover, b"k%d" % number)
            assert value == b"%d" % number + b"v" * 50_000


async def test_small_values_become_cold_too() -> None:
    cache, clock = make_cache(small_max=20_000)
    async with opened(cache, FakeTier()) as mover:
        for number in range(200):
            cache.put(b"k%d" % number, b"%d" % number)
            clock.advance(1)
            await anyio.lowlevel.checkpoint()
            await until(lambda: cache.copies.queued_small_bytes <= 10_000)
        assert len(cache.entries) == 200
        assert cache.num_cold > 100
        for number in range(200):
            assert await get(cache, mover, b"k%d" % number) == b"%d" % number


async def test_what_is_not_written_yet_goes_last_and_is_counted() -> None:
    cache, clock = make_cache(1 << 20)
    async with opened(cache, tier := FakeTier()) as mover:
        cache.put(b"clean", b"v" * 60_000)
        await clean(cache, mover)
        tier.close_gate()
        number = 0
        while not cache.stats.demoted:
            cache.put(b"k%d" % number, b"v" * 60_000)
            clock.advance(1)
            number += 1
        assert cache.stats.evicted == 0, "a value went that was nowhere else"
        with pytest.raises(OutOfMemory):
            cache.reserve(60_000, may_lose=False)
        cache.put(b"one more", b"v" * 60_000)
        assert cache.stats.evicted_dirty == cache.stats.evicted == 1
        assert cache.copies.hurried_bytes > 0
        tier.open_gate()
        await until(lambda: cache.copies.hurried_bytes == 0 and not cache.copies.writing)
        cache.abandon(cache.reserve(60_000, may_lose=False))


async def test_without_a_tier_that_works_eviction_is_as_it_was() -> None:
    cache, clock = make_cache(1 << 20)
    async with opened(cache, tier := FakeTier()):
        tier.health.state = "read-only"
        for number in range(50):
            cache.put(b"k%d" % number, b"v" * 60_000)
            clock.advance(1)
        assert cache.stats.evicted > 30
        assert cache.stats.evicted_dirty == 0
        assert cache.find(b"k49") is not None
        assert not cache.copies.is_behind


async def test_a_clean_parent_may_leave_memory_before_its_children() -> None:
    cache, clock = make_cache(1 << 20)
    async with opened(cache, FakeTier()) as mover:
        parent = cache.put(b"p", b"v" * 60_000, PAGE)
        clock.advance(1)
        child = cache.put(b"c", b"v" * 60_000, Put("kvpage", parent=b"p"))
        await clean(cache, mover)
        while not parent.is_cold:
            clock.advance(1)
            cache.use(b"c")
            cache.put(b"k%d" % clock.wall_ms, b"v" * 60_000)
        assert not child.is_cold
        assert child.parent is parent
        cache.check()


async def test_a_dirty_parent_waits_for_its_copy_and_goes_then() -> None:
    cache, clock = make_cache(1 << 20)
    async with opened(cache, tier := FakeTier()):
        tier.close_gate()
        cache.put(b"p", b"v" * 60_000, PAGE)
        cache.put(b"c", b"v" * 60_000, Put("kvpage", parent=b"p"))
        for number in range(12):
            clock.advance(1)
            cache.put(b"k%d" % number, b"v" * 60_000)
        tier.open_gate()
        await until(lambda: not cache.copies.is_behind)
        for number in range(30):
            clock.advance(1)
            cache.put(b"m%d" % number, b"v" * 60_000)
            await until(lambda: not cache.copies.is_behind)
            cache.check()
        assert cache.find(b"p") is not None
        assert cache.find(b"c") is not None
        assert cache.stats.evicted == 0


# -- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "level"), [(WRITTEN, Level.WRITTEN), (DURABLE, Level.DURABLE)])
@pytest.mark.parametrize("nbytes", [10, 5000])
async def test_a_reply_can_wait_until_the_value_is_written(
    how: Put, level: Level, nbytes: int
) -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        tier.close_gate()
        before = cache.copies.ticket
        entry = cache.put(b"k", b"v" * nbytes, how)
        assert cache.copies.ticket == before + 1
        is_settled = False

        async def wait() -> None:
            nonlocal is_settled
            await mover.settle(cache.copies.ticket, before)
            is_settled = True

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await until(lambda: bool(tier.writes))
            await anyio.sleep(0.01)
            assert not is_settled
            tier.open_gate()
        assert is_settled
        assert tier.levels == [level]
        assert entry.records[0].level == level
        await mover.settle(cache.copies.ticket, before)  # holds already


async def test_writes_that_are_asked_for_together_are_one_batch() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        for number in range(20):
            cache.put(b"k%d" % number, b"v" * 1000, WRITTEN)
        await settled(cache, mover)
        assert [len(keys) for keys in tier.writes] == [20]


async def test_a_put_that_cannot_be_written_says_why_and_the_value_stays() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        tier.health.state, tier.health.reason = "read-only", "no space"
        entry = cache.put(b"k", b"v", WRITTEN)
        with pytest.raises(TierError, match=r"nvme is read-only \(no space\)"):
            await settled(cache, mover)
        assert cache.copy(entry) == b"v"
        assert entry.level == Level.MEMORY
        tier.health.state = "ok"
        tier.payload_bytes_max = 3
        other = cache.copies.ticket
        cache.put(b"k", b"long", WRITTEN)
        with pytest.raises(TierError, match="at most 3 bytes, not 4"):
            await settled(cache, mover, other)
        third = cache.copies.ticket
        cache.put(b"k", b"abc", WRITTEN)
        await settled(cache, mover, third)  # the failures before it are not its own


async def test_a_put_goes_to_the_next_tier_when_the_first_fails() -> None:
    cache, _ = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        nvme.write_error = TierError("broken")
        entry = cache.put(b"k", b"v" * 1000, DURABLE)
        await settled(cache, mover)
        assert [record.tier for record in entry.records] == [1]
        assert disk.levels == [Level.DURABLE]
        nvme.write_error, nvme.refuses = None, True
        since = cache.copies.ticket
        cache.put(b"k2", b"v", DURABLE)
        await settled(cache, mover, since)
        assert disk.writes[-1] == [b"k2"]
        disk.refuses = True
        since = cache.copies.ticket
        cache.put(b"k3", b"v", DURABLE)
        with pytest.raises(TierError, match="disk: the value could not be written"):
            await settled(cache, mover, since)
        nvme.refuses = disk.refuses = False


async def test_values_that_are_too_large_for_a_tier_are_counted_there() -> None:
    cache, _ = make_cache()
    small, large = FakeTier(), FakeTier(name="disk")
    small.payload_bytes_max, large.payload_bytes_max = 1000, 100_000
    async with opened(cache, small, large) as mover:
        for nbytes in (1000, 1001, 100_000, 100_001, 150_000):
            cache.put(b"%d" % nbytes, b"v" * nbytes)
        await clean(cache, mover)
        assert (small.stats.too_large, large.stats.too_large) == (4, 2)
        cold = [[record.tier for record in entry.records] for entry in cache.entries.values()]
        assert cold == [[0], [1], [1], [], []]


@pytest.mark.parametrize("nbytes", [1, 5000])
async def test_a_put_that_a_full_tier_evicts_at_once_was_written_and_stays_in_memory(
    nbytes: int,
) -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        cache.put(b"k", b"old", DURABLE)
        await settled(cache, mover)
        since = cache.copies.ticket
        tier.evicts = True
        entry = cache.put(b"k", b"v" * nbytes, DURABLE)
        await settled(cache, mover, since)
        assert (entry.records, entry.level, cache.copy(entry)) == ((), 0, b"v" * nbytes)
        assert len(tier.writes) == 2
        assert (tier.records, cache.copies.ghosts) == ({}, set())
        assert cache.copies.num_dirty == 0
        cache.check()
        tier.evicts = False
        await clean(cache, mover)
        assert len(entry.records) == 1


async def test_what_was_overwritten_while_a_full_tier_evicted_it_is_answered_once() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        tier.evicts = True
        tier.close_gate()
        cache.put(b"k", b"first" * 1000, DURABLE)
        await until(lambda: len(tier.writes) == 1)
        entry = cache.put(b"k", b"second" * 1000, DURABLE)
        tier.open_gate()
        await settled(cache, mover)
        assert cache.copy(entry) == b"second" * 1000
        assert (entry.records, cache.copies.ghosts, cache.copies.owed) == ((), set(), {})
        cache.check()


async def test_a_copy_that_a_full_tier_below_evicts_at_once_has_not_moved() -> None:
    cache, _ = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entry = cache.put(b"k", b"v" * 5000, WRITTEN)
        await settled(cache, mover)
        disk.evicts = True
        await nvme.leave(list(entry.records))
        assert [record.tier for record in entry.records] == [0]
        assert cache.stats.moved_down == 0


async def test_the_level_of_a_page_that_is_there_is_raised_and_never_lowered() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier(), settings=KEEP) as mover:
        entry = cache.put(ID, b"v" * 5000, PAGE)
        await make_cold(cache, mover)
        cache.describe(entry, Put("kvpage", level=Level.DURABLE))
        since = cache.copies.ticket - 1
        await settled(cache, mover, since)
        assert [record.level for record in entry.records] == [Level.DURABLE]
        assert len(tier.records) == 1
        ticket = cache.copies.ticket
        cache.describe(entry, Put("kvpage", level=Level.MEMORY))
        assert cache.copies.ticket == ticket
        assert entry.level == Level.DURABLE


async def test_what_is_to_be_written_again_outlives_the_copy_that_it_is_read_from() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier(), settings=KEEP) as mover:
        entry = cache.put(ID, b"p" * 5000, Put("kvpage", level=Level.WRITTEN))
        await settled(cache, mover)
        await make_cold(cache, mover)
        since = cache.copies.ticket
        tier.close_gate()
        cache.describe(entry, Put("kvpage", level=Level.DURABLE))
        (record,) = entry.records
        assert tier.keep(record)
        is_over = False

        async def reclaim() -> None:
            nonlocal is_over
            await tier.leave([record])
            is_over = True
            if record in tier.records:  # else the new copy has taken its place already
                tier.drop(record, "evicted")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reclaim)
            await until(lambda: tier.reads == [ID])
            await anyio.sleep(0.02)
            assert not is_over
            for _ in range(70):
                cache.forget_cold()
            assert entry.position >= 0
            tier.open_gate()
        await settled(cache, mover, since)
        assert [each.level for each in entry.records] == [Level.DURABLE]
        assert await get(cache, mover, ID) == b"p" * 5000


async def test_a_log_forgets_no_generation_that_is_on_its_way_or_will_be_written() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier(), settings=KEEP) as mover:
        entry = cache.put(ID, b"p" * 5000, Put("kvpage", level=Level.WRITTEN))
        await settled(cache, mover)
        (record,) = entry.records
        since = cache.copies.ticket
        tier.close_gate()
        cache.describe(entry, Put("kvpage", level=Level.DURABLE))
        assert not tier.release(record)  # it is about to be written
        await until(lambda: len(tier.writes) == 2)
        assert not tier.release(record)  # it is on its way
        tier.open_gate()
        await settled(cache, mover, since)
        (record,) = entry.records
        before = record.generation
        assert tier.release(record)  # its log forgets all up to this generation
        tier.drop(record, "evicted")
        cache.describe(entry, Put("kvpage", level=Level.WRITTEN))
        await until(lambda: len(entry.records) == 1)
        assert entry.records[0].generation > before
        assert await get(cache, mover, ID) == b"p" * 5000


async def test_memory_gives_up_nothing_that_is_to_be_written_again() -> None:
    cache, clock = make_cache(1 << 20)
    async with opened(cache, tier := FakeTier()) as mover:
        entry = cache.put(ID, b"p" * 60_000, Put("kvpage", level=Level.WRITTEN))
        await settled(cache, mover)
        since = cache.copies.ticket
        tier.close_gate()
        cache.describe(entry, Put("kvpage", level=Level.DURABLE))
        for number in range(40):
            clock.advance(1)
            cache.put(b"%d" % number, b"v" * 60_000)
        assert not entry.is_cold
        tier.drop(entry.records[0], "evicted")
        tier.open_gate()
        await settled(cache, mover, since)
        assert [each.level for each in entry.records] == [Level.DURABLE]


async def test_a_default_level_holds_for_puts_that_name_none() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        cache.default_level = Level.WRITTEN
        for _ in range(2):
            cache.put(b"k", b"v")
        cache.put(b"l", b"v", Put(level=Level.MEMORY))
        await settled(cache, mover)
        assert tier.writes == [[b"k"]]
        cache.default_level = Level.MEMORY


# -- values that end ------------------------------------------------------------------------------


async def test_overwriting_or_deleting_what_would_survive_waits_for_its_burial() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        for again in (True, False):
            entry = cache.put(b"k", b"old", WRITTEN)
            await settled(cache, mover, cache.copies.ticket - 1)
            generation = entry.records[0].generation
            before = cache.copies.ticket
            if again:
                cache.put(b"k", b"new")
            else:
                cache.delete(entry)
            assert cache.copies.ticket > before
            await settled(cache, mover, before)
            assert tier.log.buried[b"k"] == generation
            assert not cache.copies.leaving


async def test_what_is_put_while_the_value_before_is_being_buried_waits_too() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        cache.delete(cache.put(b"k", b"old", WRITTEN))  # nothing was logged: nothing to bury
        assert not cache.copies.leaving
        entry = cache.put(b"k", b"old", WRITTEN)
        await settled(cache, mover)
        tier.close_gate()
        cache.delete(entry)
        for value in (b"new", b"two", b"new"):
            before = cache.copies.ticket
            cache.put(b"k", value)
            assert cache.copies.ticket == before + 1
        tier.open_gate()
        await settled(cache, mover)
        before = cache.copies.ticket
        cache.put(b"k", b"free")
        assert cache.copies.ticket == before


async def test_a_burial_that_failed_is_tried_again_when_the_key_is_put() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        entry = cache.put(b"k", b"old", WRITTEN)
        await settled(cache, mover)
        tier.health.state = "read-only"
        before = cache.copies.ticket
        cache.delete(entry)
        with pytest.raises(TierError, match="read-only"):
            await settled(cache, mover, before)
        before = cache.copies.ticket
        cache.put(b"k", b"new")
        with pytest.raises(TierError, match="read-only"):
            await settled(cache, mover, before)
        tier.health.state = "ok"
        before = cache.copies.ticket
        cache.put(b"k", b"new")
        await settled(cache, mover, before)
        assert b"k" in tier.log.buried
        assert not cache.copies.unburied


async def test_deleting_a_page_buries_it_and_waits_for_nothing() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        entry = cache.put(ID, b"v" * 5000, PAGE)
        await clean(cache, mover)
        before = cache.copies.ticket
        cache.delete(entry)
        assert cache.copies.ticket == before
        assert ID in tier.log.buried
        cache.put(ID, b"v" * 5000, PAGE)
        assert cache.copies.ticket == before
        cache.put(ID, b"a string that must not turn into the page again")
        assert cache.copies.ticket > before
        await settled(cache, mover, before)


async def test_values_of_the_lowest_level_leave_nothing_to_bury() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        cache.put(b"k", b"v" * 1000)
        await clean(cache, mover)
        cache.put(b"k", b"w" * 2000)
        await clean(cache, mover)
        cache.delete(cache.entries[b"k"])
        assert cache.copies.ticket == 0
        assert tier.log.buried == {}
        assert not tier.records


async def test_a_changed_ttl_or_pin_is_noted_if_the_value_survives() -> None:
    cache, clock = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        plain, kept = cache.put(b"plain", b"v"), cache.put(b"kept", b"v", WRITTEN)
        await settled(cache, mover)
        await clean(cache, mover)
        before = cache.copies.ticket
        cache.expire_at(plain, clock.wall_ms + 5000)
        cache.pin(plain, clock.now + 9)
        assert cache.copies.ticket == before
        cache.expire_at(kept, clock.wall_ms + 5000)
        cache.pin(kept, clock.now + 9)
        assert cache.copies.ticket == before + 2
        await settled(cache, mover, before)
        found = next(each.meta for each in tier.log.values if each.meta.key == b"kept")
        assert found.expires_ms == clock.wall_ms + 5000
        assert found.pinned_ms == clock.wall_ms + 9000


async def test_a_ttl_that_changes_while_the_value_is_written_is_noted_after_it() -> None:
    cache, clock = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        tier.close_gate()
        entry = cache.put(b"k", b"v", WRITTEN)
        await until(lambda: bool(cache.copies.writing))
        cache.expire_at(entry, clock.wall_ms + 5000)
        tier.open_gate()
        await settled(cache, mover)
        assert tier.log.values[-1].meta.expires_ms == clock.wall_ms + 5000


@pytest.mark.parametrize("nbytes", [5, 5000])
async def test_a_value_that_changes_while_it_is_written_is_written_again(nbytes: int) -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        tier.close_gate()
        entry = cache.put(b"k", b"a" * nbytes, WRITTEN)
        await until(lambda: bool(cache.copies.writing))
        cache.put(b"k", b"b" * nbytes)
        assert not entry.records
        tier.open_gate()
        await settled(cache, mover)
        assert not tier.records, "the old value was attached"
        await make_cold(cache, mover)
        assert await get(cache, mover, b"k") == b"b" * nbytes


@pytest.mark.parametrize("nbytes", [5, 5000])
async def test_a_value_that_nobody_waits_for_may_change_while_it_is_written(nbytes: int) -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        tier.close_gate()
        cache.put(b"k", b"a" * nbytes)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mover.drain, 5)
            await until(lambda: bool(tier.writes))
            cache.put(b"k", b"b" * nbytes)
            assert not cache.copies.writing
            tier.open_gate()
        await make_cold(cache, mover)
        assert await get(cache, mover, b"k") == b"b" * nbytes
        assert len(tier.records) == 1


async def test_a_put_over_one_that_waits_answers_both_when_the_second_is_written() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        cache.put(b"k", b"one", WRITTEN)
        cache.put(b"k", b"two", WRITTEN)
        await mover.settle(1)
        assert [each.data for each in tier.log.values] == [b"two"]
        await mover.settle(2)


async def test_a_flush_forgets_memory_and_files() -> None:
    cache, _ = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        cache.put(b"small", b"v", WRITTEN)
        cache.put(b"large", b"v" * 5000)
        await make_cold(cache, mover)
        nvme.close_gate()
        cache.put(b"late", b"v" * 5000, WRITTEN)
        await until(lambda: bool(cache.copies.writing))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mover.flush_all)
            await until(lambda: not cache.entries)
            cache.put(b"new", b"v" * 5000, WRITTEN)
            nvme.open_gate()
        await settled(cache, mover)
        assert [each.meta.key for each in nvme.log.values] == [b"new"]
        assert cache.num_cold == 0


# -- loads ----------------------------------------------------------------------------------------


async def test_all_who_want_a_value_share_one_read_and_then_it_goes_unless_promoted() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier(), settings=NEVER) as mover:
        entry = cache.put(b"k", b"v" * 5000)
        await make_cold(cache, mover)
        loads = [mover.start_load(entry) for _ in range(3)]
        for each in loads:
            await each.wait()
        assert tier.reads == [b"k"]
        assert cache.stats.loads_joined == 2
        for each in loads:
            assert not entry.is_cold
            mover.release(each)
        assert entry.is_cold
        assert cache.slabs.used_bytes == 0


async def test_the_second_touch_promotes_when_memory_is_short() -> None:
    cache, _ = make_cache(1 << 20)
    async with opened(cache, FakeTier()) as mover:
        entry = cache.put(b"k", b"v" * 5000)
        await make_cold(cache, mover)
        while cache.slabs.used_bytes < 0.8 * cache.slabs.budget_bytes:
            cache.put(b"%d" % cache.slabs.used_bytes, b"v" * 60_000)
        await load(mover, entry)
        assert entry.is_cold
        await load(mover, entry)
        assert not entry.is_cold
        assert cache.stats.promoted == 1


async def test_a_value_that_is_being_sent_stays_until_it_has_left() -> None:
    cache, _ = make_cache()
    async with opened(cache, FakeTier(), settings=NEVER) as mover:
        entry = cache.put(b"k", b"v" * 5000)
        await make_cold(cache, mover)
        found = mover.start_load(entry)
        await found.wait()
        slot = entry.slot
        assert slot is not None
        cache.borrow(slot)
        mover.release(found)
        assert entry.is_cold
        assert bytes(cache.payload(slot)) == b"v" * 5000
        cache.restore(slot)
        assert cache.slabs.used_bytes == 0


@pytest.mark.parametrize("change", ["overwrite", "delete", "flush", "expire"])
async def test_a_load_whose_value_ended_meanwhile_brings_nothing_back(change: str) -> None:
    cache, clock = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        entry = cache.put(b"k", b"v" * 5000, Put(expires_ms=clock.wall_ms + 1000))
        await make_cold(cache, mover)
        tier.close_gate()
        found = mover.start_load(entry)
        await until(lambda: bool(tier.reads))
        if change == "overwrite":
            cache.put(b"k", b"new" * 3000)
        elif change == "delete":
            cache.delete(entry)
        elif change == "flush":
            cache.flush()
        else:
            clock.advance(2)
            cache.find(b"k")
        tier.open_gate()
        await found.wait()
        assert found.error is None
        left = cache.find(b"k")
        assert (left is not None) == (change == "overwrite")
        if left is not None:
            assert cache.copy(left) == b"new" * 3000
        mover.release(found)


async def test_a_damaged_copy_is_never_served_and_the_next_one_is_tried() -> None:
    cache, _ = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk, settings=KEEP) as mover:
        entry = cache.put(b"k", b"v" * 5000)
        await make_cold(cache, mover)
        await nvme.leave(list(entry.records))
        assert [record.tier for record in entry.records] == [0, 1]
        nvme.flip(b"k")
        assert await get(cache, mover, b"k") == b"v" * 5000
        assert [record.tier for record in entry.records] == [1]
        cache.demote(entry)
        disk.flip(b"k")
        assert await get(cache, mover, b"k") is None
        assert cache.find(b"k") is None
        assert cache.history.find(b"k") == "corrupt"


async def test_a_copy_that_cannot_be_read_now_is_an_error_and_stays() -> None:
    cache, _ = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entry = cache.put(b"k", b"v" * 5000)
        await make_cold(cache, mover)
        nvme.read_error = TierError("no memory")
        with pytest.raises(TierError, match="no memory"):
            await get(cache, mover, b"k")
        assert entry.is_cold
        assert cache.stats.loads_failed == 1
        await nvme_leaves(nvme, entry)
        assert await get(cache, mover, b"k") == b"v" * 5000
        assert disk.reads == [b"k"]
        nvme.read_error = None


async def nvme_leaves(nvme: FakeTier, entry: Entry) -> None:
    """Move an entry down although its tier does not read now."""
    error, nvme.read_error = nvme.read_error, None
    await nvme.leave(list(entry.records))
    nvme.read_error = error


async def test_a_load_waits_for_room() -> None:
    cache, _ = make_cache(1 << 20)
    async with opened(cache, FakeTier()) as mover:
        entry = cache.put(b"k", b"v" * 400_000)
        await make_cold(cache, mover)
        held = cache.reserve(900_000)
        found = mover.start_load(entry)
        await anyio.sleep(0.03)
        assert not found.is_done
        cache.abandon(held)
        await found.wait()
        assert not entry.is_cold
        mover.release(found)


async def test_a_load_that_finds_no_room_says_so() -> None:
    cache, _ = make_cache(1 << 20)
    settings = MoveSettings(reserve_timeout_s=0.1, shutdown_timeout_s=GIVE_UP_S)
    async with opened(cache, FakeTier(), settings=settings) as mover:
        entry = cache.put(b"k", b"v" * 400_000)
        await make_cold(cache, mover)
        held = cache.reserve(900_000)
        found = mover.start_load(entry)
        await found.wait()
        assert isinstance(found.error, OutOfMemory)
        assert cache.find(b"k") is entry
        mover.release(found)
        cache.abandon(held)


async def test_loads_are_bounded_and_keep_their_order_with_advice_behind_them() -> None:
    cache, _ = make_cache()
    settings = MoveSettings(promote="never", move_bytes_max=5000, shutdown_timeout_s=GIVE_UP_S)
    async with opened(cache, tier := FakeTier(), settings=settings) as mover:
        entries = [cache.put(b"k%d" % number, b"v" * 5000) for number in range(8)]
        await make_cold(cache, mover)
        tier.close_gate()
        first = [mover.start_load(entry) for entry in (entries[0], entries[4])]
        assert mover.advise_prefetch(entries[1:4]) == 1
        assert cache.stats.prefetch_dropped == 2
        others = [mover.start_load(entries[5])]
        await until(lambda: len(tier.reads) == 1)
        assert mover.loader.bytes_in_flight == [5000]
        tier.open_gate()
        for each in (*first, *others):
            await each.wait()
            mover.release(each)
        await until(lambda: not len(mover.loader))
        assert tier.reads == [b"k0", b"k4", b"k5", b"k1"]
        assert not entries[1].is_cold, "what is advised stays"
        assert entries[0].is_cold


async def test_advice_makes_a_load_in_flight_stay() -> None:
    cache, _ = make_cache()
    async with opened(cache, FakeTier(), settings=NEVER) as mover:
        entry = cache.put(b"k", b"v" * 5000)
        await make_cold(cache, mover)
        found = mover.start_load(entry)
        assert mover.advise_prefetch([entry]) == 1
        mover.release(found)  # its client does not wait any longer
        await until(lambda: not entry.is_cold)
        await until(lambda: not len(mover.loader))
        assert not entry.is_cold


async def test_the_time_to_load_counts_what_is_cold() -> None:
    cache, _ = make_cache()
    async with opened(cache, FakeTier()) as mover:
        entries = [cache.put(b"k%d" % number, b"v" * 5000) for number in range(2)]
        assert mover.load_us(entries) == 0
        await make_cold(cache, mover)
        assert mover.load_us(entries) == 100 + 10
        assert mover.tier_of(entries[0].records[0]).letter == "n"


# -- tiers that lose, move down and crash ---------------------------------------------------------


async def test_what_a_tier_loses_is_written_again_while_it_is_in_memory() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        entry, kept = cache.put(b"k", b"v" * 5000), cache.put(b"kept", b"v" * 5000, DURABLE)
        await settled(cache, mover)
        await clean(cache, mover)
        before = kept.generation
        tier.drop(entry.records[0], "corrupt")
        tier.drop(kept.records[0], "corrupt")
        assert entry in cache.copies.dirty_large
        await until(lambda: bool(kept.records))
        assert kept.records[0].level == Level.DURABLE
        assert kept.generation > before, "the log was told to forget the other one"


async def test_what_reclaim_drops_is_written_again_when_memory_gives_it_up() -> None:
    cache, clock = make_cache(1 << 20)
    async with opened(cache, tier := FakeTier()) as mover:
        entry = cache.put(b"k", b"v" * 60_000, DURABLE)
        await settled(cache, mover)
        tier.drop(entry.records[0], "evicted")
        assert entry.level == Level.MEMORY
        num_writes = len(tier.writes)
        await anyio.sleep(0.01)
        assert len(tier.writes) == num_writes
        while not entry.is_cold:
            clock.advance(1)
            cache.put(b"%d" % clock.wall_ms, b"v" * 60_000)
            await anyio.sleep(0.001)
        assert entry.position >= 0
        assert await get(cache, mover, b"k") == b"v" * 60_000


async def test_a_page_that_leaves_the_last_tier_takes_those_behind_it_along() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        parent = cache.put(b"p", b"v" * 5000, PAGE)
        cache.put(b"c", b"v" * 5000, Put("kvpage", parent=b"p"))
        cache.put(b"d", b"v" * 5000, Put("kvpage", parent=b"c"))
        cache.put(b"other", b"v" * 5000, PAGE)
        await make_cold(cache, mover)
        tier.drop(parent.records[0], "evicted")
        assert list(cache.entries) == [b"other"]
        assert len(tier.records) == 1


async def test_reclaim_keeps_what_is_in_use_and_moves_the_rest_down() -> None:
    cache, clock = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entries = [cache.put(b"k%d" % number, b"v" * 5000) for number in range(10)]
        await make_cold(cache, mover)
        clock.advance(1000)
        assert not any(nvme.keep(entry.records[0]) for entry in entries)
        cache.use(b"k1")
        cache.pin(entries[2], clock.now + 5)
        kept = [entry.key for entry in entries if nvme.keep(entry.records[0])]
        assert kept == [b"k1", b"k2"]
        await nvme.leave([entry.records[0] for entry in entries])
        assert all([r.tier for r in entry.records] == [0, 1] for entry in entries)
        for entry in entries:
            nvme.drop(entry.records[0], "evicted")
        assert cache.stats.moved_down == len(cache.entries) == 10
        assert await get(cache, mover, b"k7") == b"v" * 5000
        assert not disk.keep(entries[0].records[0])


async def test_a_tier_that_crashes_is_emptied_and_the_others_go_on() -> None:
    cache, _ = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk, settings=KEEP) as mover:
        moved = cache.put(b"moved", b"v" * 5000)
        lost = cache.put(b"lost", b"v" * 5000)
        warm = cache.put(b"warm", b"v" * 5000)
        await make_cold(cache, mover)
        await nvme.leave(list(moved.records))
        await load(mover, warm)
        nvme.crash_with(RuntimeError("a bug"))
        await until(lambda: nvme.num_resets == 1)
        assert cache.entries.keys() == {b"moved", b"warm"}
        assert lost.position < 0
        assert cache.history.find(b"lost") == "lost"
        assert await get(cache, mover, b"moved") == b"v" * 5000
        await clean(cache, mover)
        assert warm.records


# -- restarts -------------------------------------------------------------------------------------


async def test_a_clean_stop_and_a_start_bring_everything_back() -> None:
    log = FakeLog()
    cache, clock = make_cache()
    async with opened(cache, FakeTier(log)):
        cache.put(b"small", b"v", Put(expires_ms=clock.wall_ms + 60_000))
        cache.put(b"p", b"v" * 5000, Put("kvpage", tokens=16, priority=3))
        child = cache.put(b"c", b"w" * 5000, Put("kvpage", parent=b"p"))
        cache.pin(child, clock.now + 60)
        gone = cache.put(b"gone", b"v", Put(expires_ms=clock.wall_ms + 1000))
        clock.advance(10)
        cache.use(b"small")
        last = cache.slabs.next_generation()
    assert gone.position >= 0
    again, _ = make_cache()
    again.clock.now, again.clock.wall_ms = clock.now, clock.wall_ms
    async with opened(again, FakeTier(log)) as mover:
        assert again.entries.keys() == {b"small", b"p", b"c"}
        assert again.num_cold == 3
        assert again.slabs.next_generation() > last
        small, parent, found = (again.entries[key] for key in (b"small", b"p", b"c"))
        assert small.expires_ms == clock.wall_ms + 50_000
        assert (small.touched, small.hits) == (clock.now, 1)
        assert (parent.tokens, parent.priority, parent.touched) == (16, 3, clock.now - 10)
        assert found.parent is parent
        assert found.pinned_until == pytest.approx(clock.now + 50)
        assert await get(again, mover, b"c") == b"w" * 5000
        assert await get(again, mover, b"small") == b"v"


async def test_the_newest_value_wins_over_the_tiers() -> None:
    old, new = FakeLog(), FakeLog()
    cache, _ = make_cache()
    async with opened(cache, FakeTier(old)):
        cache.put(b"k", b"old")
    later, _ = make_cache()
    async with opened(later, FakeTier(new)):
        for _ in range(100):
            later.slabs.next_generation()
        later.put(b"k", b"new" * 1000)
    for logs in ((old, new), (new, old)):
        again, _ = make_cache()
        tiers = [FakeTier(log, name=name) for log, name in zip(logs, ("a", "b"), strict=True)]
        async with open_files(again, tiers, KEEP) as mover:
            assert await get(again, mover, b"k") == b"new" * 1000
            assert sum(len(tier.records) for tier in tiers) == 1
            for tier in tiers:
                tier.log.clean = tier.log.values  # or stopping would change the logs


async def test_after_a_kill_no_stale_value_comes_back() -> None:
    log = FakeLog()
    cache, _ = make_cache()
    settings = MoveSettings(promote="first", shutdown_timeout_s=0.05)
    with anyio.CancelScope() as scope:
        async with open_files(cache, [FakeTier(log)], settings) as mover:
            cache.put(ID, b"page" * 1000, PAGE)
            cache.put(b"plain", b"v")
            cache.put(b"over", b"old", WRITTEN)
            cache.put(b"kept", b"v", WRITTEN)
            await settled(cache, mover)
            await clean(cache, mover)
            since = cache.copies.ticket
            cache.put(b"over", b"new")
            await settled(cache, mover, since)
            scope.cancel()
            log = FakeLog(list(log.values), dict(log.buried), None, log.next_generation)
            await anyio.lowlevel.checkpoint()
    again, _ = make_cache()
    async with opened(again, FakeTier(log)):
        assert again.entries.keys() == {ID, b"kept"}


async def test_shutdown_writes_parents_first_and_what_is_pinned_and_fresh() -> None:
    cache, clock = make_cache()
    tier = FakeTier()
    async with opened(cache, tier):
        cache.put(b"old", b"v" * 1000)
        clock.advance(1)
        cache.put(b"parent", b"v" * 1000, PAGE)
        clock.advance(1)
        pinned = cache.put(b"pinned", b"v" * 1000)
        cache.pin(pinned, clock.now + 100)
        clock.advance(1)
        cache.put(b"child", b"v" * 1000, Put("kvpage", parent=b"parent"))
    assert [key for keys in tier.writes for key in keys] == [b"pinned", b"parent", b"child", b"old"]


async def test_shutdown_takes_no_longer_than_it_may() -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    settings = MoveSettings(shutdown_timeout_s=0.05)
    with anyio.fail_after(9):  # less than the default
        async with open_files(cache, [tier], settings):
            cache.put(b"k", b"v" * 5000)
            tier.refuses = True


async def test_a_tier_that_cannot_start_closes_those_before_it() -> None:
    class Locked(FakeTier):
        async def start(self, found: object) -> None:
            raise TierError("in use by process 7")

    cache, _ = make_cache()
    log = FakeLog()
    with pytest.raises(TierError, match="process 7"):
        async with open_files(cache, [FakeTier(log), Locked()], KEEP):
            pass
    assert log.clean is not None


async def test_the_number_of_cold_entries_is_bounded() -> None:
    cache, clock = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        cache.copies.cold_max = 20
        for number in range(60):
            cache.put(b"k%d" % number, b"v" * 1000)
            clock.advance(1)
            await make_cold(cache, mover)
        assert cache.num_cold == 20
        assert len(tier.records) == 20
        assert b"k59" in cache.entries
        assert b"k0" not in cache.entries
