"""What a file tier does when its device fails, and when that is over."""

import errno
from contextlib import suppress
from typing import Literal

import anyio
import pytest

from respkv.errors import PageCorrupt, TierError
from respkv.tiers.file_tier import FileTier
from respkv.tiers.parts import TierConfig
from respkv.tiers.record import Level
from respkv.tiers.segment_head import decode_segment_head, segment_name
from tests.tiers.faulty_device import FaultyDevice
from tests.tiers.faulty_device import Kind as FaultKind
from tests.tiers.memory_device import MemoryDevice
from tests.tiers.shelf import Shelf, page, running, until

pytestmark = pytest.mark.anyio
SEGMENT_BYTES = 256 << 10
CAPACITY_BYTES = 8 * SEGMENT_BYTES + (512 << 10)


def make(device: FaultyDevice, alignment: Literal[4096, 64] = 4096) -> FileTier:
    config = TierConfig("test", "t", alignment, CAPACITY_BYTES, SEGMENT_BYTES, depth=4)

    async def connect() -> FaultyDevice:
        return device

    return FileTier(config, connect)


def make_device(capacity_bytes: int = CAPACITY_BYTES) -> FaultyDevice:
    return FaultyDevice(MemoryDevice(capacity_bytes=capacity_bytes))


def device_again(device: FaultyDevice) -> FaultyDevice:
    inner = device.inner
    assert isinstance(inner, MemoryDevice)
    files = {name: bytes(data) for name, data in inner.files.items()}
    again = MemoryDevice(files, alignment=inner.alignment, capacity_bytes=inner.capacity_bytes)
    return FaultyDevice(again)


async def test_a_write_that_fails_is_tried_in_another_segment() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        first = await shelf.put(b"a", 3000)
        device.add("error", "write", name="segment-", times=1)
        second = await shelf.put(b"b", 3000)
        assert first is not None
        assert second is not None
        assert first.segment != second.segment
        failed = first.segment
        assert shelf.tier.health.state == "ok"
        assert shelf.tier.stats.write_errors == 1
        await shelf.check()
        # It is the first to be emptied when there is need for room, and its file is deleted.
        shelf.keeps = lambda record: record in (first, second)
        for number in range(60):
            await shelf.put(page(number), 30_000)
        assert shelf.held[b"a"].record is first
        assert first.segment != failed
        await shelf.check()
        assert shelf.tier._parts is not None
        states = [each.state for each in shelf.tier._parts.log.table.segments.values()]
        assert "fenced" not in states


async def test_a_failed_write_hurts_its_own_batch_alone() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        device.add("error", "write", name="segment-", skip=2, times=2)
        results = {}

        async def put(number: int) -> None:
            results[number] = await shelf.put(page(number), 30_000, has_image=True)

        async with anyio.create_task_group() as group:
            for number in range(12):
                group.start_soon(put, number)
        assert sum(record is not None for record in results.values()) >= 8
        await shelf.check()


async def test_a_device_that_cannot_write_is_read_only_until_it_can() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        await shelf.put(b"a", 3000)
        fault = device.add("error", "write")
        for number in range(4):
            assert await shelf.put(b"%d" % number) is None
        assert shelf.tier.health.state == "read-only"
        assert "3 writes in a row failed" in shelf.tier.health.reason
        with pytest.raises(TierError, match="read-only"):
            await shelf.tier.settle(shelf.tier.bury(b"x", 1), Level.WRITTEN)
        assert await shelf.get(b"a")
        device.heal(fault)
        await until(lambda: shelf.tier.health.can_write)
        assert await shelf.put(b"b", level=Level.DURABLE)
        await shelf.check()
        assert not shelf.gone
    async with running(make(device_again(device))) as (shelf, _):
        assert shelf.held.keys() == {b"a", b"b"}


async def test_a_read_that_fails_loses_that_copy_alone() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        await shelf.put_many([b"a", b"b"])
        device.add("error", "read", times=1)
        with pytest.raises(TierError, match="could not read"):
            await shelf.get(b"a")
        assert shelf.gone == [(b"a", 1, "lost")]
        await shelf.check()


async def test_a_passing_error_of_a_read_loses_nothing() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        await shelf.put(b"a")
        device.add("error", "read", code=errno.ENOMEM, times=1)
        with pytest.raises(TierError, match="could not read"):
            await shelf.get(b"a")
        await shelf.check()
        assert not shelf.gone


async def test_a_device_that_cannot_read_is_off_and_comes_back_empty() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        await shelf.put_many([b"%d" % number for number in range(20)], level=Level.DURABLE)
        fault = device.add("error", "read")
        for number in range(8):
            with pytest.raises(TierError):
                await shelf.get(b"%d" % number)
        assert shelf.tier.health.state == "off"
        await until(lambda: len(shelf.gone) == 20)
        device.heal(fault)
        await until(lambda: shelf.tier.health.can_write)
        assert shelf.tier.stats.records == 0
        await shelf.put(b"new", level=Level.DURABLE)
        await shelf.check()
        crashed = device_again(device)
    async with running(make(crashed)) as (shelf, _):
        assert shelf.held.keys() == {b"new"}


async def test_a_failed_sync_is_final_for_its_file() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        await shelf.put_many([b"a", page(1)], level=Level.DURABLE)
        note = shelf.tier.bury(b"old", 7)
        await shelf.tier.settle(note, Level.WRITTEN)
        fault = device.add("error", "sync", name="segment-", times=1)
        assert await shelf.put(b"b", level=Level.DURABLE) is None
        assert fault.hits == 1
        assert {key for key, _, why in shelf.gone if why == "lost"} == {b"a", page(1)}
        with pytest.raises(TierError, match="sync"):
            await shelf.tier.settle(note, Level.DURABLE)
        assert await shelf.put(b"c", level=Level.DURABLE)
        await until(lambda: shelf.tier.stats.reclaimed == 1)
        await shelf.check()
        inner = device.inner
        assert isinstance(inner, MemoryDevice)
        files = inner.after_crash(inner.num_events, "power", lambda n: n - 1)
    async with running(make(FaultyDevice(MemoryDevice(files)))) as (shelf, _):
        assert shelf.held.keys() == {b"c"}


async def test_a_full_file_system_is_lived_with() -> None:
    device = make_device(4 * SEGMENT_BYTES + (256 << 10))
    async with running(make(device)) as (shelf, _):
        for number in range(60):
            assert await shelf.put(page(number), 30_000, has_image=True)
        assert shelf.tier.health.state == "ok"
        assert shelf.tier.stats.evicted > 0
        assert shelf.tier._parts is not None
        assert await shelf.tier._parts.checkpointer.try_write()
        await shelf.check()
        count = len(shelf.held)
    async with running(make(device_again(device))) as (shelf, recovery):
        assert recovery.records == count
        await shelf.check()


async def test_no_space_at_all_is_read_only_until_there_is_some() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        fault = device.add("error", "create", "write", code=errno.ENOSPC)
        assert await shelf.put(b"a") is None
        assert shelf.tier.health.state == "read-only"
        assert "no space" in shelf.tier.health.reason
        device.heal(fault)
        await until(lambda: shelf.tier.health.can_write)
        assert await shelf.put(b"a", level=Level.DURABLE)
        await shelf.check()


async def test_one_refusal_of_space_costs_nothing_but_a_try() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        for number in range(10):
            await shelf.put(page(number), 30_000)
        device.add("error", "write", code=errno.ENOSPC, name="segment-", times=1)
        assert await shelf.put(b"a", 30_000)
        assert shelf.tier.health.state == "ok"
        await shelf.check()


@pytest.mark.parametrize("kind", ["flip", "misdirected", "torn", "dropped"])
@pytest.mark.parametrize("times", [1, 2])
async def test_a_segment_is_not_written_into_before_its_head_is_there(
    kind: FaultKind, times: int
) -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        device.add(kind, "write", name="segment-", times=times)
        record = await shelf.put(b"a", 3000)
        assert record is not None
        inner = device.inner
        assert isinstance(inner, MemoryDevice)
        name = segment_name(record.segment)
        head = decode_segment_head(bytes(inner.files[name]), alignment=4096)
        assert head.id == record.segment
        # A head that is lost twice is an error of its segment, and another one is taken.
        assert shelf.tier.stats.write_errors == times - 1
        assert shelf.tier.health.state == "ok"
        await shelf.check()


@pytest.mark.parametrize("alignment", [4096, 64])
@pytest.mark.parametrize("is_lost", [True, False])
async def test_a_lost_end_of_a_segment_is_noticed_though_what_told_of_it_was_used_again(
    is_lost: bool, alignment: Literal[4096, 64]
) -> None:
    """The head of the next segment tells of it; a checkpoint does when that one is emptied."""
    device = FaultyDevice(MemoryDevice(alignment=4096 if alignment == 4096 else 1))
    async with running(make(device, alignment), is_clean=False) as (shelf, _):
        parts = shelf.tier._parts
        assert parts is not None
        table, stats = parts.log.table, parts.log.stats
        assert await shelf.put(b"key", 3000, level=Level.DURABLE)
        fault = device.add("dropped", "write", name="segment-", times=int(is_lost))
        newer = await shelf.put(b"key", 3000, level=Level.DURABLE)
        assert newer is not None
        assert fault.hits == is_lost
        table.seal(table.segments[newer.segment])
        other = await shelf.put(page(1), 3000)
        assert other is not None
        told = table.segments[other.segment]
        table.seal(told)
        checkpoints = stats.checkpoints
        assert await parts.reclaimer.clear(told)
        assert stats.checkpoints == checkpoints + is_lost, "where all is there, it costs a read"
        again = await shelf.put(page(2), 3000)
        assert again is not None
        assert again.segment == told.id
    async with running(make(device_again(device), alignment)) as (shelf, _):
        with suppress(PageCorrupt):
            await shelf.get(b"key")
        left = shelf.held.get(b"key")
        assert (left.meta.generation if left else None) == (None if is_lost else 2)


@pytest.mark.parametrize("kind", ["flip", "misdirected", "torn", "dropped"])
async def test_a_device_that_lies_is_found_out(kind: FaultKind) -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        for number in range(30):
            await shelf.put(page(number), 20_000, has_image=number % 2 == 0)
        device.add(kind, "read", one_in=3)
        for key in list(shelf.held):
            with suppress(PageCorrupt):
                await shelf.get(key, has_image=True)
        assert shelf.tier.stats.corrupt == len(shelf.gone) > 0


async def test_a_slow_device_does_not_grow_without_bounds() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        device.add("slow", "write", delay_s=0.02)
        async with anyio.create_task_group() as group:
            for number in range(300):
                group.start_soon(shelf.put, b"%d" % number, 500)
        assert shelf.tier.stats.writes < 60
        await shelf.check()


async def test_memory_is_the_writers_until_the_write_has_ended() -> None:
    """The device asserts that what it writes does not change meanwhile."""
    device = make_device()
    async with running(make(device)) as (shelf, _):
        fault = device.add("hang", "write", name="segment-", skip=1)
        returned = anyio.Event()

        async def put() -> None:
            try:
                await shelf.put(b"a", 40_000, has_image=True)
            finally:
                returned.set()

        async with anyio.create_task_group() as group:
            group.start_soon(put)
            await until(lambda: fault.hits == 1)
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
                assert not returned.is_set()
                device.heal(fault)
        assert returned.is_set()
        assert shelf.tier.stats.records == 0


async def test_a_value_buried_while_it_waits_is_not_written() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        fault = device.add("error", "write", name="segment-", skip=1, times=1)
        hang = device.add("hang", "write", name="segment-", skip=1, times=1)
        shelf_put: list[object] = []

        async def put() -> None:
            shelf_put.append(await shelf.put(b"a", 3000))

        async with anyio.create_task_group() as group:
            group.start_soon(put)
            await until(lambda: hang.hits == 1)
            ticket = shelf.tier.bury(b"a", 1)
            device.heal(hang)
            await shelf.tier.settle(ticket, Level.WRITTEN)
        assert fault.hits == 1
        assert shelf_put == [None]


async def test_a_stop_with_a_dead_device_ends() -> None:
    device = make_device()
    async with running(make(device)) as (shelf, _):
        await shelf.put(b"a")
        device.add("error", "create", "write", "sync", "replace", "remove")


async def test_a_start_that_fails_gives_the_directory_back() -> None:
    device = make_device()
    device.add("error", "replace")
    shelf = Shelf(make(device))
    with pytest.raises(TierError, match="cannot start"):
        await shelf.tier.start(shelf.found)
    assert isinstance(device.inner, MemoryDevice)
    assert device.inner.is_closed
