"""Copies on their way to a slower tier while their values change, end, or are replaced."""

import anyio
import anyio.lowlevel
import pytest

from respkv.tiers.record import Record
from tests.engine.fake_tier import FakeTier
from tests.engine.files import DURABLE, get, opened, settled, until
from tests.fakes import make_cache

pytestmark = pytest.mark.anyio


async def test_what_changes_while_a_copy_moves_is_told_to_the_tier_that_it_moves_to() -> None:
    cache, clock = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entry = cache.put(b"key", b"value", DURABLE)
        await settled(cache, mover)
        since, (record,) = cache.copies.ticket, entry.records
        disk.close_gate()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave, nvme, record)
            await until(lambda: bool(disk.writes))
            cache.expire_at(entry, clock.wall_ms + 5000)
            cache.pin(entry, clock.now + 9)
            await until(lambda: len(nvme.settled) == 2)
            assert cache.copies.find(since + 1), "the reply does not wait for the copy that moves"
            disk.open_gate()
        nvme.drop(record, "evicted")
        await settled(cache, mover, since)
        (left,) = disk.log.values
        assert left.meta.expires_ms == clock.wall_ms + 5000
        assert left.meta.pinned_ms == clock.wall_ms + 9000


async def test_what_changes_while_a_copy_is_about_to_move_is_told_to_its_tier_too() -> None:
    cache, clock = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entry = cache.put(b"key", b"value", DURABLE)
        await settled(cache, mover)
        since, (record,) = cache.copies.ticket, entry.records
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave, nvme, record)
            while not cache.copies.moving:
                await anyio.lowlevel.checkpoint()
            cache.expire_at(entry, clock.wall_ms + 5000)
            assert not disk.writes
        nvme.drop(record, "evicted")
        await settled(cache, mover, since)
        (left,) = disk.log.values
        assert left.meta.expires_ms == clock.wall_ms + 5000


@pytest.mark.parametrize("end", ["deleted", "refused"])
async def test_a_change_is_not_waited_for_where_no_copy_arrives(end: str) -> None:
    cache, clock = make_cache()
    nvme, disk = FakeTier(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entry = cache.put(b"key", b"value", DURABLE)
        await settled(cache, mover)
        since, (record,) = cache.copies.ticket, entry.records
        disk.close_gate()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave, nvme, record)
            await until(lambda: bool(disk.writes))
            cache.expire_at(entry, clock.wall_ms + 5000)
            if end == "deleted":
                cache.delete(entry)
            disk.refuses = end == "refused"
            disk.open_gate()
        await settled(cache, mover, since)
        assert not disk.records
        assert not cache.copies.moving


async def test_a_change_of_what_is_being_replaced_is_told_where_its_copy_arrives() -> None:
    cache, clock = make_cache()
    nvme, disk = SlowToWrite(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entry = cache.put(b"key", b"old", DURABLE)
        await settled(cache, mover)
        (record,) = entry.records
        nvme.close_gate()
        disk.close_gate()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave, nvme, record)
            await until(lambda: bool(disk.writes))
            cache.expire_at(entry, clock.wall_ms + 5000)
            cache.put(b"key", b"newer", DURABLE)
            disk.open_gate()
        await until(lambda: len(disk.settled) == 1)
        (left,) = disk.log.values
        assert left.meta.expires_ms == clock.wall_ms + 5000
        nvme.open_gate()
        await settled(cache, mover)


async def test_a_change_of_what_is_replaced_while_it_is_written_is_told_to_its_log() -> None:
    cache, clock = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        tier.close_gate()
        entry = cache.put(b"key", b"old", DURABLE)
        await until(lambda: bool(tier.writes))
        cache.expire_at(entry, clock.wall_ms + 5000)
        cache.put(b"key", b"newer", DURABLE)
        gate, tier.gate = tier.gate, anyio.Event()
        assert gate is not None
        gate.set()
        await until(lambda: bool(tier.records))
        (left,) = tier.log.values
        assert (left.data, left.meta.expires_ms) == (b"old", clock.wall_ms + 5000)
        tier.open_gate()
        await settled(cache, mover)


async def test_what_is_replaced_while_it_is_about_to_move_moves_all_the_same() -> None:
    cache, _ = make_cache()
    nvme, disk = SlowToWrite(), FakeTier(name="disk")
    async with opened(cache, nvme, disk) as mover:
        entry = cache.put(b"key", b"old", DURABLE)
        await settled(cache, mover)
        (record,) = entry.records
        nvme.close_gate()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave, nvme, record)
            while not cache.copies.moving:
                await anyio.lowlevel.checkpoint()
            assert not disk.writes
            cache.put(b"key", b"newer", DURABLE)
        nvme.drop(record, "evicted")
        assert [each.data for each in disk.records.values()] == [b"old"]
        nvme.open_gate()
        await settled(cache, mover)
        await until(lambda: not cache.copies.leaving)
        assert not disk.records
        assert await get(cache, mover, b"key") == b"newer"


async def leave(tier: FakeTier, record: Record) -> None:
    """Do as reclaim does with what it is about to drop."""
    await tier.leave([record])


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
