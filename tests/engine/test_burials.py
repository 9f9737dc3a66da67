"""What logs have to forget, whatever order faults, restarts and overwrites come in."""

import anyio
import pytest

from respkv.engine.entry import Put
from respkv.errors import TierError
from respkv.tiers.record import Level, Record
from tests.engine.fake_tier import FakeLog, FakeTier, Logged
from tests.engine.files import DURABLE, WRITTEN, get, opened, settled, until
from tests.fakes import make_cache

pytestmark = pytest.mark.anyio


async def test_a_delete_is_told_that_a_log_which_took_no_burial_may_bring_the_value_back() -> None:
    cache, _ = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        cache.put(b"key", b"old", WRITTEN)
        await settled(cache, mover)
        nvme.health.state = "read-only"
        cache.put(b"key", b"new", WRITTEN)
        await settled(cache, mover)
        since = cache.copies.ticket
        cache.delete(cache.entries[b"key"])
        with pytest.raises(TierError):
            await settled(cache, mover, since)
        assert 0 in cache.copies.unburied[b"key"].generations
        nvme.health.state = "ok"
        await until(lambda: not cache.copies.unburied)  # it is tried again without being asked
        assert b"key" in nvme.log.buried


async def test_the_older_of_two_values_that_a_start_finds_is_buried() -> None:
    logs = FakeLog(), FakeLog()
    cache, _ = make_cache()
    nvme, disk = FakeTier(logs[0]), FakeTier(logs[1], name="disk")
    async with opened(cache, nvme, disk) as mover:
        cache.put(b"key", b"old", WRITTEN)
        await settled(cache, mover)
        nvme.health.state = "read-only"
        cache.put(b"key", b"new", WRITTEN)
        await settled(cache, mover)
    cache, _ = make_cache()
    nvme, disk = FakeTier(logs[0]), FakeTier(logs[1], name="disk")
    async with opened(cache, nvme, disk) as mover:
        assert await get(cache, mover, b"key") == b"new"
        await until(lambda: not cache.copies.leaving)
        assert not [
            each for each in nvme.log.values if each.meta.generation > nvme.log.buried[b"key"]
        ]


async def test_a_change_that_only_one_log_knows_after_a_crash_is_told_to_the_other() -> None:
    cache, clock = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entry = cache.put(b"key", b"value", DURABLE)
        await settled(cache, mover)
        await nvme.leave(list(entry.records))
        (known,), (unknown,) = nvme.log.values, disk.log.values
        changed = Logged(known.meta._replace(expires_ms=clock.wall_ms + 5000), known.data)
        logs = FakeLog([changed]), FakeLog([Logged(unknown.meta, unknown.data)])
    cache, _ = make_cache()
    nvme, disk = FakeTier(logs[0]), FakeTier(logs[1], name="disk")
    async with opened(cache, nvme, disk):
        assert cache.entries[b"key"].expires_ms == clock.wall_ms + 5000
        nvme.drop(cache.entries[b"key"].records[0], "evicted")
        (left,) = disk.log.values
        assert left.meta.expires_ms == clock.wall_ms + 5000


async def test_a_value_whose_time_is_over_keeps_the_older_one_away_and_is_buried() -> None:
    log = FakeLog()
    cache, clock = make_cache()
    tier = FakeTier(log)
    async with opened(cache, tier) as mover:
        cache.put(b"key", b"old", WRITTEN)
        cache.put(b"key", b"new", Put(level=Level.WRITTEN, expires_ms=clock.wall_ms + 1000))
        await settled(cache, mover)
        clock.advance(2)
        assert cache.find(b"key") is None
        await until(lambda: not cache.copies.leaving)
        assert log.buried[b"key"] >= max(each.meta.generation for each in log.values)


async def test_what_is_being_replaced_keeps_its_copy_until_the_new_value_is_written() -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        cache.put(b"key", b"old", DURABLE)
        await settled(cache, mover)
        (record,) = cache.entries[b"key"].records
        tier.close_gate()
        cache.put(b"key", b"newer", DURABLE)
        await until(lambda: len(tier.writes) == 2)
        assert record in tier.records
        assert tier.keep(record)
        assert tier.describe(record).payload_bytes == 3
        tier.open_gate()
        await settled(cache, mover)
        assert record not in tier.records
        assert not cache.copies.ghosts


class SlowToWrite(FakeTier):
    """A closed gate holds up its writes alone."""

    async def read(
        self, record: Record, key: bytes, into: memoryview, image: memoryview | None
    ) -> int:
        gate, self.gate = self.gate, None
        try:
            return await super().read(record, key, into, image)
        finally:
            self.gate = gate


async def test_one_of_those_that_are_replaced_is_there_until_the_last_is_written() -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        cache.put(b"key", b"old", DURABLE)
        await settled(cache, mover)
        (record,) = cache.entries[b"key"].records
        tier.close_gate()
        cache.put(b"key", b"newer", DURABLE)
        await until(lambda: len(tier.writes) == 2)
        cache.put(b"key", b"newest", DURABLE)
        gate, tier.gate = tier.gate, anyio.Event()
        assert gate is not None
        gate.set()
        await until(lambda: len(tier.writes) == 3)
        assert record in tier.records
        assert not tier.log.buried
        tier.open_gate()
        await settled(cache, mover)
        await until(lambda: not cache.copies.leaving)
        assert [each.data for each in tier.records.values()] == [b"newest"]
        assert not cache.copies.ghosts


async def test_a_put_is_answered_when_no_log_can_bring_back_the_value_before() -> None:
    cache, _ = make_cache()
    nvme, disk = SlowToWrite(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entry = cache.put(b"key", b"old", DURABLE)
        await settled(cache, mover)
        (record,) = entry.records
        await nvme.leave([record])
        nvme.drop(record, "evicted")
        await until(lambda: not cache.copies.leaving)
        since = cache.copies.ticket
        disk.close_gate()
        cache.put(b"key", b"newer", DURABLE)
        await until(lambda: bool(nvme.records))
        note = cache.copies.find(since + 1)
        assert note is not None
        assert note.todo
        disk.open_gate()
        await settled(cache, mover, since)
        assert disk.log.buried[b"key"] >= record.generation


async def test_what_is_being_replaced_moves_down_and_is_buried_where_it_went() -> None:
    cache, _ = make_cache()
    nvme, disk = SlowToWrite(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        cache.put(b"key", b"old", DURABLE)
        await settled(cache, mover)
        (record,) = cache.entries[b"key"].records
        nvme.close_gate()
        cache.put(b"key", b"newer", DURABLE)
        await until(lambda: len(nvme.writes) == 2)  # it waits at the gate now
        await nvme.leave([record])
        nvme.drop(record, "evicted")
        assert [each.generation for each in disk.records] == [record.generation]
        nvme.open_gate()
        await settled(cache, mover)
        await until(lambda: not cache.copies.leaving)
        assert not disk.records
        assert disk.log.buried[b"key"] >= record.generation


async def test_a_tier_that_drops_what_is_being_replaced_takes_nothing_else_along() -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        cache.put(b"key", b"old", DURABLE)
        await settled(cache, mover)
        (record,) = cache.entries[b"key"].records
        tier.close_gate()
        cache.put(b"key", b"newer", DURABLE)
        tier.drop(record, "corrupt")
        tier.open_gate()
        await settled(cache, mover)
        assert await get(cache, mover, b"key") == b"newer"


async def test_nothing_is_dropped_from_a_tier_that_is_far_from_full() -> None:
    cache, clock = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        cache.put(b"key", b"value", DURABLE)
        await settled(cache, mover)
        entry = cache.entries[b"key"]
        cache.demote(entry)
        clock.advance(1000)
        assert not tier.keep(entry.records[0])
        tier.stats.live_bytes = tier.capacity_bytes // 10
        assert tier.keep(entry.records[0])


async def test_while_nothing_is_put_all_is_written() -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    async with opened(cache, tier):
        for number in range(5):
            cache.put(b"%d" % number, bytes(5000))
        assert not tier.writes
        await until(lambda: not cache.copies.num_dirty)


async def test_a_flush_forgets_what_could_not_be_buried() -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        cache.put(b"key", b"value", WRITTEN)
        await settled(cache, mover)
        tier.health.state = "read-only"
        cache.delete(cache.entries[b"key"])
        await until(lambda: bool(cache.copies.unburied))
        await mover.flush_all()
        assert not cache.copies.unburied


async def test_what_is_emptied_after_a_crash_of_the_server_s_own_is_buried() -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        cache.put(b"key", b"value", WRITTEN)
        await settled(cache, mover)
        cache.flush()
        await until(lambda: not cache.copies.leaving)
        assert b"key" in tier.log.buried
