"""Copies to the gpu tier and back, while the pages they are of change, move and go."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from respkv.engine import gpu_actor
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry
from respkv.engine.gpu_actor import GpuActor, open_gpu
from respkv.engine.mover import Mover
from respkv.engine.placement import GpuPromote
from respkv.errors import ActorDown, TierError
from tests.engine.fake_gpu import NBYTES, FakeGpu, check_bytes, declare, put_page, read_page
from tests.engine.fake_tier import FakeTier
from tests.engine.files import clean, get, load, make_cold, opened, until
from tests.fakes import make_cache

pytestmark = pytest.mark.anyio

SLOTS = 8


@asynccontextmanager
async def running(
    promote: GpuPromote = "second", *, cache: Cache | None = None, **how: Any
) -> AsyncIterator[tuple[Cache, FakeGpu, GpuActor]]:
    """Yield a cache with a gpu tier, and check both at the end."""
    cache = cache or make_cache(1 << 20)[0]
    gpu = FakeGpu(SLOTS * NBYTES)
    declare(cache, **how)
    async with open_gpu(cache, gpu, promote) as actor:
        yield cache, gpu, actor
        cache.check()
        check_bytes(cache, gpu)
        if gpu.gate is not None:
            gpu.gate.set()
    assert not cache.gpu.is_on
    assert not cache.gpu.by_entry
    assert cache.in_flight() == (0, 0)
    assert gpu.slots.used_bytes == 0


@asynccontextmanager
async def with_files(
    promote: GpuPromote = "second", **how: Any
) -> AsyncIterator[tuple[Cache, FakeGpu, Mover, FakeTier]]:
    """Yield a cache between a gpu tier and a file tier."""
    cache, tier = make_cache(1 << 20)[0], FakeTier()
    async with opened(cache, tier) as mover:
        async with running(promote, cache=cache, **how) as (_, gpu, actor):
            mover.loader.gpu = actor
            yield cache, gpu, mover, tier
            mover.loader.gpu = None


async def lifted(cache: Cache, *entries: Entry) -> None:
    await until(lambda: all(cache.gpu.find(entry) for entry in entries))


# -- up -----------------------------------------------------------------------------------------


async def test_a_page_that_is_read_twice_is_copied() -> None:
    async with running() as (cache, gpu, _):
        entry = put_page(cache, b"ns:1", 1)
        read_page(cache, b"ns:1")
        await anyio.sleep(0.01)
        assert cache.gpu.find(entry) is None
        read_page(cache, b"ns:1")
        await lifted(cache, entry)
        assert entry.slot is not None, "it is in memory as well"
        assert gpu.num_writes == 1
        read_page(cache, b"ns:1", 5)
        await anyio.sleep(0.01)
        assert gpu.num_writes == 1


async def test_two_askers_wait_for_one_copy() -> None:
    async with running("never") as (cache, gpu, actor):
        entry = put_page(cache, b"ns:1", 1)
        gpu.gate = anyio.Event()
        attached: list[int] = []
        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(actor.bring, entry, lambda n=number: attached.append(n))
            await until(lambda: gpu.num_writes == 1)
            assert not attached
            gpu.gate.set()
        assert sorted(attached) == [0, 1, 2]
        assert gpu.num_writes == 1


async def test_an_asker_is_told_in_the_turn_in_which_the_copy_is_there() -> None:
    async with running("never") as (cache, _, actor):
        entry = put_page(cache, b"ns:1", 1)
        seen: list[bool] = []
        await actor.bring(entry, lambda: seen.append(cache.gpu.find(entry) is not None))
        await actor.bring(entry, lambda: seen.append(cache.gpu.find(entry) is not None))
        assert seen == [True, True]


@pytest.mark.parametrize("change", ["put", "delete", "flush"])
async def test_a_page_that_changes_while_it_is_copied_has_no_copy(change: str) -> None:
    async with running("never") as (cache, gpu, actor):
        entry = put_page(cache, b"ns:1", 1)
        gpu.gate = anyio.Event()
        attached: list[int] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(actor.bring, entry, lambda: attached.append(1))
            await until(lambda: gpu.num_writes == 1)
            if change == "put":
                put_page(cache, b"ns:1", 2)
            elif change == "delete":
                cache.delete(entry)
            else:
                cache.flush()
            cache.check()
            gpu.gate.set()
        assert not attached
        assert cache.gpu.stats.void == 1
        assert gpu.slots.used_bytes == 0


async def test_the_bytes_of_a_page_stay_while_it_is_copied() -> None:
    """Its slot in the arena is not used again under the copy."""
    cache, _ = make_cache(8 * NBYTES + 65536, unit_bytes=4096)
    async with running("never", cache=cache) as (_, gpu, actor):
        entry = put_page(cache, b"ns:1", 1)
        slot = entry.slot
        assert slot is not None
        gpu.gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(actor.bring, entry, lambda: None)
            await until(lambda: gpu.num_writes == 1)
            cache.delete(entry)
            for number in range(40):
                put_page(cache, b"ns:%d" % (100 + number), 7)
            assert cache.payload(slot) == bytes([1]) * NBYTES
            gpu.gate.set()


async def test_an_asker_that_goes_away_leaves_nothing_behind() -> None:
    async with running("never") as (cache, gpu, actor):
        entry = put_page(cache, b"ns:1", 1)
        gpu.gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(actor.bring, entry, lambda: None)
            await until(lambda: gpu.num_writes == 1)  # what was not begun would be skipped
            tasks.cancel_scope.cancel()
        gpu.gate.set()
        await lifted(cache, entry)
        await until(lambda: cache.in_flight() == (0, 0))


async def test_a_page_that_its_codec_cannot_hold_is_raw() -> None:
    async with running("first", codecs=((b"gpu", b"i8"),)) as (cache, gpu, _):
        one, two = put_page(cache, b"ns:1", 1), put_page(cache, b"ns:2", 2)
        read_page(cache, b"ns:1")
        await lifted(cache, one)
        gpu.is_unfit = True
        read_page(cache, b"ns:2")
        await lifted(cache, two)
        forms = [copy.form.name for copy in cache.gpu.by_entry.values()]
        assert forms == ["i8", "raw"]
        assert gpu.num_writes == 3


async def test_advice_beyond_the_mailbox_is_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_actor, "MAILBOX_MAX", 2)
    monkeypatch.setattr(gpu_actor, "JOBS_MAX", 1)
    async with running("first") as (cache, gpu, _):
        gpu.gate = anyio.Event()
        for number in range(SLOTS):
            put_page(cache, b"ns:%d" % number, number)
            read_page(cache, b"ns:%d" % number)
            await anyio.lowlevel.checkpoint()
        assert cache.gpu.stats.dropped > 0
        gpu.gate.set()
        await until(lambda: cache.gpu.stats.lifted + cache.gpu.stats.dropped == SLOTS)


# -- back ---------------------------------------------------------------------------------------


async def test_a_page_that_leaves_memory_keeps_its_copy_and_comes_back_from_it() -> None:
    async with with_files("first") as (cache, gpu, mover, tier):
        entry = put_page(cache, b"ns:1", 1)
        read_page(cache, b"ns:1")
        await lifted(cache, entry)
        await make_cold(cache, mover)
        assert cache.gpu.find(entry) is not None
        tier.gate = anyio.Event()  # no file can be read
        assert await get(cache, mover, b"ns:1") == bytes([1]) * NBYTES
        assert gpu.num_reads == 1
        assert cache.gpu.stats.raised == 1
        cache.check()


async def test_a_copy_that_changed_is_dropped_and_the_file_is_read() -> None:
    async with with_files("first") as (cache, gpu, mover, _):
        entry = put_page(cache, b"ns:1", 1)
        read_page(cache, b"ns:1")
        await lifted(cache, entry)
        await make_cold(cache, mover)
        copy = cache.gpu.find(entry)
        assert copy is not None
        gpu.memory[copy.slot.offset + 1000] ^= 4
        assert await get(cache, mover, b"ns:1") == bytes([1]) * NBYTES
        assert cache.gpu.stats.corrupt == 1
        assert cache.gpu.find(entry) is not copy


async def test_a_lossy_copy_never_comes_back_into_memory() -> None:
    async with with_files("first", codecs=((b"gpu", b"i8"),)) as (cache, gpu, mover, _):
        entry = put_page(cache, b"ns:1", 1)
        read_page(cache, b"ns:1")
        await lifted(cache, entry)
        await make_cold(cache, mover)
        assert await get(cache, mover, b"ns:1") == bytes([1]) * NBYTES
        assert gpu.num_reads == 0
        assert cache.gpu.find(entry) is not None


@pytest.mark.parametrize("change", ["put", "delete"])
async def test_a_page_that_changes_while_its_copy_is_read_is_not_what_was(change: str) -> None:
    async with with_files("first") as (cache, gpu, mover, _):
        entry = put_page(cache, b"ns:1", 1)
        read_page(cache, b"ns:1")
        await lifted(cache, entry)
        await make_cold(cache, mover)
        gpu.gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load, mover, entry)
            await until(lambda: gpu.num_reads == 1)
            if change == "put":
                put_page(cache, b"ns:1", 2)
            else:
                cache.delete(entry)
            cache.check()
            gpu.gate.set()
        expected = bytes([2]) * NBYTES if change == "put" else None
        assert await get(cache, mover, b"ns:1") == expected


async def test_a_prefetch_to_the_gpu_comes_from_a_file_through_memory() -> None:
    async with with_files("never") as (cache, _, mover, _):
        entry = put_page(cache, b"ns:1", 1)
        await make_cold(cache, mover)
        assert cache.gpu.want(entry)
        assert mover.advise_prefetch([entry]) == 1
        await lifted(cache, entry)
        assert not entry.is_cold
        assert not cache.gpu.want(entry), "it is there"


async def test_a_prefetch_of_what_is_in_memory_begins_at_once() -> None:
    async with running("never") as (cache, _, _):
        entry = put_page(cache, b"ns:1", 1)
        assert cache.gpu.want(entry)
        assert cache.gpu.want(entry)
        await lifted(cache, entry)
        free = cache.put(b"free:1", bytes(NBYTES))
        assert not cache.gpu.want(free)


async def test_a_copy_is_never_the_only_one() -> None:
    async with with_files("first") as (cache, _, mover, _):
        entry = put_page(cache, b"ns:1", 1)
        read_page(cache, b"ns:1")
        await lifted(cache, entry)
        await make_cold(cache, mover)
        await mover.forget(0)  # the file's copy is lost, and with it the page
        assert cache.find(b"ns:1") is None
        assert not cache.gpu.by_entry


# -- faults -------------------------------------------------------------------------------------


async def test_a_device_that_fails_is_off_and_the_server_goes_on() -> None:
    async with with_files("first") as (cache, gpu, mover, _):
        one, two = put_page(cache, b"ns:1", 1), put_page(cache, b"ns:2", 2)
        read_page(cache, b"ns:1")
        await lifted(cache, one)
        await clean(cache, mover)
        gpu.stop_working()
        read_page(cache, b"ns:2")
        await until(lambda: not cache.gpu.by_entry)
        assert cache.gpu.stats.lost == 1
        read_page(cache, b"ns:2", 3)
        assert not cache.gpu.want(two)
        await anyio.sleep(0.01)
        assert gpu.num_writes == 2
        await make_cold(cache, mover)
        assert await get(cache, mover, b"ns:1") == bytes([1]) * NBYTES


async def test_a_device_that_fails_while_it_is_read_costs_no_page() -> None:
    async with with_files("first") as (cache, gpu, mover, _):
        entry = put_page(cache, b"ns:1", 1)
        read_page(cache, b"ns:1")
        await lifted(cache, entry)
        await make_cold(cache, mover)
        gpu.stop_working()
        assert await get(cache, mover, b"ns:1") == bytes([1]) * NBYTES
        assert not cache.gpu.by_entry


@pytest.mark.parametrize("way", ["up", "back"])
async def test_a_crash_empties_the_tier_and_it_goes_on(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with with_files("first") as (cache, gpu, mover, _):
        one, two = put_page(cache, b"ns:1", 1), put_page(cache, b"ns:2", 2)
        read_page(cache, b"ns:1")
        await lifted(cache, one)
        lease = cache.gpu.begin_lease(7, 1e9)
        assert cache.gpu.add_to_lease(lease, one)
        await make_cold(cache, mover)
        gpu.error = ZeroDivisionError("a bug")
        if way == "up":
            await load(mover, two)
            read_page(cache, b"ns:2")
            await until(lambda: cache.gpu.stats.lost == 1)
        assert await get(cache, mover, b"ns:1") == bytes([1]) * NBYTES
        await until(lambda: cache.gpu.stats.lost == 1)
        assert "actor tier gpu crashed, restarting" in caplog.text
        assert gpu.slots.used_bytes == NBYTES, "what is leased stays readable"
        assert cache.gpu.leases.end(7, lease.number)
        await until(lambda: cache.in_flight() == (0, 0))
        cache.check()
        await load(mover, two)
        read_page(cache, b"ns:2", 2)
        await lifted(cache, two)


async def test_a_crash_is_told_to_those_who_wait() -> None:
    async with running("never") as (cache, gpu, actor):
        entry = put_page(cache, b"ns:1", 1)
        gpu.error = ZeroDivisionError("a bug")
        with pytest.raises(ActorDown):
            await actor.bring(entry, lambda: None)
        await actor.bring(entry, lambda: None)
        assert cache.gpu.find(entry) is not None


async def test_a_page_that_could_not_be_copied_is_an_answer() -> None:
    async with running("never") as (cache, gpu, actor):
        entry = put_page(cache, b"ns:1", 1)
        gpu.error = TierError("out of memory")
        with pytest.raises(TierError, match="out of memory"):
            await actor.bring(entry, lambda: None)
        assert gpu.slots.used_bytes == 0


# -- all together -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_no_read_ever_meets_an_old_value(seed: int) -> None:
    """Pages are put, read, deleted, chilled and leased, and askers cancelled, in any order."""
    rng = random.Random(seed)
    async with with_files("first") as (cache, gpu, mover, _):
        model: dict[bytes, int] = {}
        values = iter(range(256))  # each but once: a value that came again would look unchanged
        keys = [b"ns:%d" % number for number in range(2 * SLOTS)]

        async def reader() -> None:
            key = rng.choice(keys)
            with anyio.move_on_after(rng.random() / 100):
                before = model.get(key)
                found = await get(cache, mover, key)
                if model.get(key) == before:
                    assert found == (None if before is None else bytes([before]) * NBYTES)

        async with anyio.create_task_group() as tasks:
            for step in range(300):
                key, choice = rng.choice(keys), rng.random()
                entry = cache.find(key)
                if choice < 0.25:
                    model[key] = next(values)
                    put_page(cache, key, model[key])
                elif choice < 0.3 and entry is not None:
                    cache.delete(entry)
                    del model[key]
                elif choice < 0.55 and entry is not None and not entry.is_cold:
                    read_page(cache, key)
                elif choice < 0.8:
                    tasks.start_soon(reader)
                elif choice < 0.9 and entry is not None and entry.records and not entry.is_cold:
                    if not cache.room.is_held(entry) and entry not in cache.copies.writing:
                        cache.demote(entry)
                elif choice < 0.95 and gpu.gate is None:
                    gpu.gate = anyio.Event()
                elif gpu.gate is not None:
                    gpu.gate.set()
                    gpu.gate = None
                await anyio.lowlevel.checkpoint()
                if step % 20 == 0:
                    await anyio.sleep(0.005)
                    cache.check()
                    check_bytes(cache, gpu)
            if gpu.gate is not None:
                gpu.gate.set()
                gpu.gate = None
        assert cache.gpu.stats.lifted > 5
