"""What may happen to a tier while one of its parts waits, and that nobody waits for ever."""

import errno
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import anyio
import pytest

from respkv.errors import TierError
from respkv.tiers import caretaker, checkpointer, tickets
from respkv.tiers.batch import Bury
from respkv.tiers.file_tier import FileTier
from respkv.tiers.parts import Parts, TierConfig
from respkv.tiers.record import Level, Record
from tests.simulation.virtual import Jump, run
from tests.tiers.faulty_device import FaultyDevice
from tests.tiers.memory_device import MemoryDevice
from tests.tiers.shelf import GIVE_UP_S, Shelf, page, running, until

pytestmark = pytest.mark.anyio
SEGMENT_BYTES = 256 << 10
CAPACITY_BYTES = 8 * SEGMENT_BYTES + (512 << 10)


def make(
    device: FaultyDevice,
    capacity_bytes: int = CAPACITY_BYTES,
    clock: Callable[[], float] = time.monotonic,
) -> FileTier:
    config = TierConfig("test", "t", 4096, capacity_bytes, SEGMENT_BYTES, depth=4)

    async def connect() -> FaultyDevice:
        return device

    return FileTier(config, connect, clock=clock)


def memory_of(device: FaultyDevice) -> MemoryDevice:
    assert isinstance(device.inner, MemoryDevice)
    return device.inner


def parts_of(tier: FileTier) -> Parts:
    assert tier._parts is not None
    return tier._parts


async def test_a_segment_made_anew_while_reclaim_waited_is_left_alone() -> None:
    device = FaultyDevice(MemoryDevice())
    async with running(make(device)) as (shelf, _):
        is_left = anyio.Event()

        is_asked = anyio.Event()

        async def leave(records: list[Record]) -> None:
            is_asked.set()
            await is_left.wait()

        parts = parts_of(shelf.tier)
        parts.log.hooks.leave = leave
        record = await shelf.put(page(0), 30_000)
        assert record is not None
        old = parts.log.table.segments[record.segment]
        parts.log.table.seal(old)
        async with anyio.create_task_group() as group:
            group.start_soon(parts.reclaimer.clear, old)
            await is_asked.wait()
            shelf.tier.health.worsen("off", "test")
            await until(lambda: shelf.tier.health.can_write)
            for number in range(20):
                assert await shelf.put(b"%d" % number, 30_000, level=Level.DURABLE)
            assert parts.log.table.segments[old.id] is not old
            is_left.set()
        await shelf.check()
        assert len(shelf.held) == 20


async def test_a_segment_is_not_emptied_while_what_is_in_it_waits_to_be_durable() -> None:
    device = FaultyDevice(MemoryDevice())
    async with running(make(device)) as (shelf, _):
        parts = parts_of(shelf.tier)
        table, syncer = parts.log.table, parts.syncer
        hangs = device.add("hang", "sync", name="segment-", times=1)
        async with anyio.create_task_group() as group:
            for key in (b"a", b"b"):  # each in a segment of its own
                group.start_soon(partial(shelf.put, key, 150_000, level=Level.DURABLE))
            try:
                await until(lambda: hangs.hits == 1 and len(syncer._waiting) == 1)
                segment = table.segments[next(iter(syncer._waiting))]
                if segment.state == "open":
                    table.seal(segment)
                assert table.choose_victim(0.0) is segment
                for _ in range(3):
                    assert await parts.reclaimer._advance()
                assert len(parts.log.young) == 2
            finally:
                device.heal()
        assert sorted(shelf.held) == [b"a", b"b"]
        assert all(map(parts.reclaimer._may_clear, table.segments.values()))


async def test_what_is_evicted_before_its_asker_has_it_was_written_all_the_same() -> None:
    device = FaultyDevice(MemoryDevice())
    async with running(make(device)) as (shelf, _):
        parts = parts_of(shelf.tier)
        # The head of a second segment: the second value waits for it, and the first one with it.
        hangs = device.add("hang", "write", name="segment-", skip=2, times=1)
        answers: list[Record | None] = []
        async with anyio.create_task_group() as group:

            async def put() -> None:
                answers.extend(await shelf.put_many([b"a", b"b"], 150_000, level=Level.DURABLE))

            group.start_soon(put)
            try:
                await until(lambda: hangs.hits == 1 and parts.log.stats.syncs > 0)
                (record,) = parts.log.young
                assert await parts.reclaimer.clear(parts.log.table.segments[record.segment])
            finally:
                device.heal()
        assert sorted(answer is not None and answer.is_gone for answer in answers) == [False, True]
        ((key, _, why),) = shelf.gone
        assert why == "evicted"
        assert {key, *shelf.held} == {b"a", b"b"}
        await shelf.check()


@pytest.mark.parametrize("refusals", [1, 2])
async def test_what_is_wanted_again_is_neither_buried_nor_dropped(refusals: int) -> None:
    async with running(make(FaultyDevice(MemoryDevice()))) as (shelf, _):
        parts = parts_of(shelf.tier)
        for key in (b"a", b"b"):
            assert await shelf.put(key, 30_000, level=Level.DURABLE)
        record = shelf.held[b"a"].record
        assert record is not None
        segment = parts.log.table.segments[record.segment]
        parts.log.table.seal(segment)
        asked: list[Record] = []

        def release(each: Record) -> bool:
            """Refuse from the first question about ``record`` on, or from the second."""
            asked.append(each)
            return each is not record or asked.count(each) != refusals

        parts.log.hooks.release = release
        assert not await parts.reclaimer.clear(segment)
        assert [gone[0] for gone in shelf.gone] == [b"b"]
        notes = [each.note for some in parts.log.notes.values() for each in some]
        buried = {note.key for note in notes if isinstance(note, Bury)}
        assert buried == ({b"b"} if refusals == 1 else {b"a", b"b"})
        assert await shelf.get(b"a")
        assert await parts.reclaimer.clear(segment)
        assert shelf.held == {}


async def test_reclaim_takes_what_was_handed_over_before_what_was_not() -> None:
    device = FaultyDevice(MemoryDevice())
    async with running(make(device)) as (shelf, _):
        parts = parts_of(shelf.tier)
        for number in range(4):
            assert await shelf.put(b"%d" % number, 150_000)
        oldest, *others = list(parts.log.records())
        assert len({oldest.segment, *(each.segment for each in others)}) == 4
        parts.log.young[oldest] = shelf.held[b"0"].meta
        assert await parts.reclaimer._advance()
        assert parts.log.is_live(oldest)
        assert [gone[0] for gone in shelf.gone] == [b"1"]
        del parts.log.young[oldest]


async def test_a_checkpoint_never_waits_for_reclaim_while_reclaim_waits_for_it() -> None:
    device = FaultyDevice(MemoryDevice())
    async with running(make(device)) as (shelf, _):
        parts = parts_of(shelf.tier)
        for number in range(30):
            await shelf.put(page(number), 30_000)
        with anyio.fail_after(25):  # less than it waits where reclaim can help
            async with parts.checkpointer._turn:  # as the part of a checkpoint that writes
                parts.log.table.capacity_bytes = parts.log.table.file_bytes
                parts.space._capacity_bytes = parts.log.table.file_bytes
                with pytest.raises(OSError, match="no room") as caught:
                    await parts.checkpointer._create("checkpoint.a", SEGMENT_BYTES)
        assert caught.value.errno == errno.EDQUOT
        parts.space._capacity_bytes = CAPACITY_BYTES
        parts.space.try_again()
        assert await parts.checkpointer.try_write()
        await shelf.check()


async def test_the_cap_holds_at_every_moment_of_a_checkpoint() -> None:
    device = FaultyDevice(MemoryDevice())
    async with running(make(device)) as (shelf, _):
        for round_ in range(6):
            keys = [b"%d %d" % (round_, number) for number in range(1500)]
            await shelf.put_many(keys, 10)
            await parts_of(shelf.tier).checkpointer.try_write()
    assert memory_of(device).peak_bytes <= CAPACITY_BYTES


async def test_all_who_wait_for_a_segment_are_told_at_once_that_the_tier_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caretaker, "PROBE_S", 1000.0)  # so that nothing else comes to their help
    device = FaultyDevice(MemoryDevice())
    async with running(make(device)) as (shelf, _):
        parts = parts_of(shelf.tier)
        monkeypatch.setattr(parts.reclaimer, "_has_work", lambda: False)
        with anyio.fail_after(GIVE_UP_S):
            async with anyio.create_task_group() as group:
                for number in range(20):
                    group.start_soon(shelf.put, b"%d" % number, 150_000)
                await until(lambda: parts.writer._num_flights == 4 and len(shelf.held) > 6)
                parts.log.health.worsen("read-only", "a test says so")
        assert parts.writer.is_idle
        assert 0 < len(shelf.held) < 20
        await shelf.check()


async def test_answered_notes_are_small_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointer, "NOTES_MAX", 500)
    monkeypatch.setattr(tickets, "_FORGET_S", 0.05)
    device = FaultyDevice(MemoryDevice())
    async with running(make(device)) as (shelf, _):
        tier = shelf.tier
        last = 0
        for number in range(2000):
            last = tier.bury(b"%d" % number, number)
        await tier.settle(last, Level.DURABLE)
        assert tier._tickets._notes == {}  # of those in the log only the place is kept
        assert len(tier._tickets._answered) == 2000

        async def bury() -> None:
            while True:
                await tier.settle(tier.bury(b"k", 1), Level.WRITTEN)
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as group:
            group.start_soon(bury)
            await until(lambda: tier.stats.checkpoints >= 1)  # many notes are a reason for one
            await parts_of(tier).checkpointer.try_write()
            await parts_of(tier).checkpointer.try_write()
            await until(lambda: not tier._tickets._answered or 1 not in tier._tickets._answered)
            with anyio.fail_after(GIVE_UP_S):
                while 1 in tier._tickets._before:
                    await parts_of(tier).checkpointer.try_write()
                    await anyio.sleep(0.01)
            group.cancel_scope.cancel()
        await tier.settle(1, Level.DURABLE)
        assert 1 not in tier._tickets._before


async def test_a_note_that_failed_stays_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "_FAILED_MAX", 10)
    device = FaultyDevice(MemoryDevice())
    async with running(make(device)) as (shelf, _):
        await shelf.put(b"a")
        device.add("error", "write", "replace")
        shelf.tier.health.worsen("read-only", "test")
        failed = [shelf.tier.bury(b"%d" % number, 1) for number in range(50)]
        for ticket in failed:  # those that are not remembered one by one as well
            with pytest.raises(TierError):
                await shelf.tier.settle(ticket, Level.WRITTEN)
        device.heal()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("call", ["write", "sync", "replace"])
def test_a_stop_ends_in_its_time_though_the_device_hangs(
    call: Literal["write", "sync", "replace"], backend: str
) -> None:
    """In virtual time, in which no machine is slow or stands still."""

    async def stop(jump: Jump) -> None:
        device = FaultyDevice(MemoryDevice())
        shelf = Shelf(make(device, clock=anyio.current_time))
        await shelf.tier.start(shelf.found)
        async with anyio.create_task_group() as group:
            group.start_soon(shelf.tier.run)
            await shelf.put(b"a", level=Level.DURABLE)
            device.add("hang", call)
            group.start_soon(shelf.put, b"b")
            await anyio.sleep(0.02)
            with anyio.fail_after(1.5):
                await shelf.tier.stop(1.0)
        memory = memory_of(device)
        assert memory.is_closed
        files = {name: bytes(data) for name, data in memory.files.items()}
        again = make(FaultyDevice(MemoryDevice(files)), clock=anyio.current_time)
        async with running(again) as (shelf, _):
            assert b"a" in shelf.held

    run(stop, backend=backend, seed=1)


def _crash_order(parts: Parts) -> None:
    parts.order._record = _bomb  # type: ignore[method-assign, assignment]


def _crash_syncer(parts: Parts) -> None:
    parts.syncer._sync = _bomb  # type: ignore[method-assign, assignment]


def _bomb(*_: object) -> None:
    raise AssertionError("a bug")


@pytest.mark.parametrize("break_", [_crash_order, _crash_syncer])
async def test_after_a_crash_of_its_run_nobody_waits(break_: Callable[[Parts], None]) -> None:
    device = FaultyDevice(MemoryDevice())
    shelf = Shelf(make(device))
    await shelf.tier.start(shelf.found)
    results: list[Record | None] = []

    async def put(number: int) -> None:
        results.append(await shelf.put(b"%d" % number, 20_000, level=Level.DURABLE))

    with anyio.fail_after(GIVE_UP_S):
        async with anyio.create_task_group() as group:
            break_(parts_of(shelf.tier))
            for number in range(30):
                group.start_soon(put, number)
            ticket = shelf.tier.bury(b"x", 1)
            with pytest.raises(ExceptionGroup):
                await shelf.tier.run()
            await shelf.tier.reset()
            await shelf.tier.settle(ticket, Level.DURABLE)  # of what is void
    assert results == [None] * 30
    await shelf.tier.device.close()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EMFILE, errno.EACCES, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["segment-", "checkpoint."])
async def test_a_start_that_cannot_read_just_now_gives_nothing_up(code: int, name: str) -> None:
    device = FaultyDevice(MemoryDevice())
    async with running(make(device), is_clean=name != "segment-") as (shelf, _):
        await shelf.put_many([b"a", b"b"], level=Level.DURABLE)
    files = {each: bytes(data) for each, data in memory_of(device).files.items()}
    for call in ("open", "read"):
        device = FaultyDevice(MemoryDevice(files))
        device.add("error", call, code=code, name=name)
        tier = make(device)
        with pytest.raises(TierError, match="cannot start"):
            await tier.start(lambda meta, record: True)
        assert {each: bytes(data) for each, data in memory_of(device).files.items()} == files
    async with running(make(FaultyDevice(MemoryDevice(files)))) as (shelf, _):
        assert shelf.held.keys() == {b"a", b"b"}
