"""What every file tier does, whatever carries out its reads and writes."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import pytest

from respkv.errors import PageCorrupt, TierError
from respkv.tiers.disk import open_disk
from respkv.tiers.file_tier import FileTier
from respkv.tiers.nvme import open_nvme
from respkv.tiers.record import Level
from tests.tiers.shelf import Shelf, check_books, page, running, until

pytestmark = pytest.mark.anyio
CAPACITY_BYTES = 9 << 20
Make = Callable[[], FileTier]


@pytest.fixture(params=["io_uring", "threads", "zstd", "lz4", "raw"])
def make(request: pytest.FixtureRequest, tmp_path: Path, anyio_backend: str) -> Make:
    """Makes the tier of one directory, again and again."""
    if request.param in ("io_uring", "threads"):
        open_tier = partial(open_nvme, engine=request.param)
    elif anyio_backend == "asyncio":
        open_tier = partial(open_disk, codec=request.param)
    else:
        pytest.skip("aiofiles is of asyncio")
    path = tmp_path / "tier"
    return partial(open_tier, path, capacity_bytes=CAPACITY_BYTES, segment_bytes=1 << 20)


def size_of(path: Path) -> int:
    return sum(each.stat().st_size for each in path.iterdir())


@pytest.mark.parametrize("nbytes", [1, 63, 448, 4032, 65536, 200_001, 700_000])
async def test_what_is_written_is_read_back(make: Make, nbytes: int) -> None:
    async with running(make()) as (shelf, _):
        for has_image in (False, True):
            assert await shelf.put(b"key%d" % has_image, nbytes, has_image=has_image)
        await shelf.check()
        await shelf.check(has_image=True)
        assert shelf.tier.stats.reads == 4
        assert shelf.tier.stats.stored_bytes == 2 * nbytes


async def test_a_clean_stop_keeps_everything(make: Make) -> None:
    async with running(make()) as (shelf, recovery):
        assert recovery.is_new
        await shelf.put_many([b"k%d" % i for i in range(300)], 700)
        await shelf.put(page(1), 300_000, has_image=True)
    async with running(make()) as (shelf, recovery):
        assert (recovery.is_new, recovery.records) == (False, 301)
        assert recovery.counts.replayed == 0
        assert shelf.tier.next_generation == 302
        await shelf.check()


async def test_what_is_not_wanted_at_start_is_freed(make: Make) -> None:
    async with running(make()) as (shelf, _):
        await shelf.put_many([b"a", b"b"])
    tier = make()
    recovery = await tier.start(lambda meta, record: meta.key == b"a")
    assert recovery.records == 1
    check_books(tier)
    await tier.device.close()


async def test_after_a_crash_what_was_promised_is_there(make: Make) -> None:
    async with running(make(), is_clean=False) as (shelf, _):
        for level in Level:
            await shelf.put(b"string %d" % level, level=level)
            await shelf.put(page(level), level=level)
    async with running(make()) as (shelf, recovery):
        # The process died and the machine did not, so WRITTEN holds; what was at MEMORY may have
        # been overwritten there, unless its key names its content.
        assert shelf.held.keys() == {b"string 1", b"string 2", page(0), page(1), page(2)}
        assert recovery.counts.dropped_mutable == 1
        await shelf.check()


@pytest.mark.parametrize("level", [Level.WRITTEN, Level.DURABLE])
async def test_what_was_buried_or_changed_stays_so(make: Make, level: Level) -> None:
    async with running(make(), is_clean=False) as (shelf, _):
        await shelf.put_many([b"a", b"b"], level=level)
        held = shelf.held[b"b"]
        await shelf.tier.settle(shelf.tier.bury(b"a", 1), level)
        held.meta = held.meta._replace(expires_ms=77)
        await shelf.tier.settle(shelf.tier.change(held.meta), level)
        await shelf.tier.settle(12345, level)  # of a note that is long forgotten
    async with running(make()) as (shelf, _):
        assert shelf.held.keys() == {b"b"}
        assert shelf.held[b"b"].meta.expires_ms == 77


async def test_all_that_was_flushed_stays_away(make: Make) -> None:
    async with running(make(), is_clean=False) as (shelf, _):
        await shelf.put_many([b"a", page(1)], level=Level.DURABLE)
        shelf.held.clear()
        await shelf.tier.clear()
        assert shelf.tier.stats.records == 0
        await shelf.put(b"c", level=Level.DURABLE)
        await shelf.check()
    async with running(make()) as (shelf, _):
        assert shelf.held.keys() == {b"c"}


async def test_flushes_at_the_same_time_all_hold(make: Make) -> None:
    async with running(make(), is_clean=False) as (shelf, _):
        for round_ in range(5):
            await shelf.put(b"%d" % round_, level=Level.DURABLE)
            shelf.held.clear()
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(shelf.tier.clear)
        assert shelf.tier.health.state == "ok"
    async with running(make()) as (shelf, _):
        assert not shelf.held


async def test_the_cap_holds_and_reclaim_makes_room(make: Make, tmp_path: Path) -> None:
    async with running(make()) as (shelf, _):
        async with anyio.create_task_group() as group:
            for number in range(150):
                group.start_soon(shelf.put, page(number), 150_000)
        for number in range(150, 200):
            await shelf.put(page(number), 150_000, has_image=True)
            assert size_of(tmp_path / "tier") <= CAPACITY_BYTES
        assert shelf.tier.stats.file_bytes <= CAPACITY_BYTES
        assert shelf.tier.stats.evicted == len(shelf.gone) > 0
        assert {why for *_, why in shelf.gone} == {"evicted"}
        # Each was shown before it was dropped.
        assert len(shelf.left) >= len(shelf.gone)
        await shelf.check()
    assert size_of(tmp_path / "tier") <= CAPACITY_BYTES


async def test_reclaim_goes_on_even_if_all_is_to_be_kept(make: Make) -> None:
    async with running(make()) as (shelf, _):
        shelf.keeps = lambda record: True
        with anyio.fail_after(60):
            for number in range(120):
                await shelf.put(page(number), 150_000, level=Level(number % 3))
        assert shelf.tier.stats.relocated_bytes > 0
        await shelf.check()
    async with running(make()) as (shelf, _):
        await shelf.check()


async def test_what_is_kept_survives_reclaim_and_a_crash(make: Make) -> None:
    async with running(make(), is_clean=False) as (shelf, _):
        shelf.keeps = lambda record: record.level == Level.DURABLE
        for number in range(8):
            await shelf.put(b"kept %d" % number, 50_000, level=Level.DURABLE)
        for number in range(150):
            await shelf.put(page(number), 120_000)
        assert {key for key in shelf.held if key.startswith(b"kept")} == {
            b"kept %d" % number for number in range(8)
        }
        await shelf.check()
    async with running(make()) as (shelf, _):
        assert sum(key.startswith(b"kept") for key in shelf.held) == 8
        await shelf.check()


async def test_readers_never_see_reused_memory(make: Make) -> None:
    async with running(make()) as (shelf, _):
        shelf.keeps = lambda record: record.generation % 2 == 0
        is_over = False

        async def read() -> None:
            while not is_over:
                for key in list(shelf.held)[-40:]:
                    with suppress(TierError):  # evicted between the look and the read
                        await shelf.get(key, has_image=True)
                    await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(read)
            for number in range(120):
                await shelf.put(page(number), 150_000, has_image=True)
            is_over = True
        assert shelf.tier.stats.corrupt == 0
        assert shelf.tier.stats.reclaimed > 3


async def test_a_flipped_bit_is_never_served(make: Make, tmp_path: Path) -> None:
    async with running(make()) as (shelf, _):
        await shelf.put_many([b"a", b"b"], 3000)
        record = shelf.held[b"a"].record
        assert record is not None
        with (tmp_path / "tier" / f"segment-{record.segment:08}").open("r+b") as file:
            file.seek(record.offset + 100)
            byte = file.read(1)
            file.seek(record.offset + 100)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            os.fsync(file.fileno())
        with pytest.raises(PageCorrupt):
            await shelf.get(b"a")
        assert shelf.gone == [(b"a", 1, "corrupt")]
        assert shelf.tier.stats.corrupt == 1
        await shelf.check()


async def test_a_second_server_is_refused(make: Make) -> None:
    async with running(make()) as (shelf, _):
        with pytest.raises(TierError, match="in use by process"):
            await make().start(shelf.found)


async def test_what_is_too_large_is_not_written(make: Make) -> None:
    async with running(make()) as (shelf, _):
        assert await shelf.put(b"a", shelf.tier.payload_bytes_max)
        assert await shelf.put(b"b", shelf.tier.payload_bytes_max + 1) is None
        assert await shelf.put(b"k" * 20_000, 10) is None
        await shelf.check()


async def test_many_askers_share_syncs(make: Make) -> None:
    async with running(make()) as (shelf, _):
        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(partial(shelf.put, b"%d" % number, level=Level.DURABLE))
        assert len(shelf.held) == 200
        assert shelf.tier.stats.syncs < 50
        await shelf.check()


async def test_an_asker_that_goes_away_leaves_no_record(make: Make) -> None:
    async with running(make()) as (shelf, _):
        for moment in range(8):
            async with anyio.create_task_group() as group:
                for number in range(5):
                    group.start_soon(shelf.put, b"%d" % number, 20_000)
                for _ in range(moment):
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
            kept = sum(held.record is not None for held in shelf.held.values())
            assert shelf.tier.stats.records == kept
        await shelf.check()


async def test_a_cap_that_was_lowered_holds(tmp_path: Path) -> None:
    def make(capacity_bytes: int) -> FileTier:
        return open_nvme(tmp_path, capacity_bytes=capacity_bytes, segment_bytes=1 << 20)

    async with running(make(12 << 20)) as (shelf, _):
        for number in range(80):
            await shelf.put(page(number), 100_000)
        count = len(shelf.held)
    async with running(make(7 << 20)) as (shelf, _):
        assert size_of(tmp_path) <= 7 << 20
        assert 0 < len(shelf.held) < count
        await shelf.put(page(1000), 100_000)
        await shelf.check()
    async with running(make(12 << 20)) as (shelf, _):
        await shelf.check()


async def test_what_is_to_be_kept_stays_where_crashes_have_left_no_segment_free(
    tmp_path: Path,
) -> None:
    def make(capacity_bytes: int) -> FileTier:
        return open_nvme(tmp_path, capacity_bytes=capacity_bytes, segment_bytes=1 << 20)

    keys = [b"key %d" % number for number in range(5)]
    for key in keys:  # each in a segment of its own
        async with running(make(12 << 20), is_clean=False) as (shelf, _):
            await shelf.put(key, level=Level.DURABLE)
    for life in range(5):
        async with running(make(6 << 20), is_clean=False) as (shelf, _):
            assert size_of(tmp_path) <= 6 << 20
            shelf.keeps = lambda record: True
            if life:  # before, it is killed as soon as it has started
                await shelf.put(b"more %d" % life, level=Level.DURABLE)
            await shelf.check()
            assert shelf.gone == []
            assert shelf.held.keys() >= {*keys}
    async with running(make(6 << 20)) as (shelf, _):
        await shelf.check()
        assert len(shelf.held) == len(keys) + 4


async def test_too_few_segments_are_refused(tmp_path: Path) -> None:
    tier = open_nvme(tmp_path, capacity_bytes=4 << 20, segment_bytes=1 << 20)
    with pytest.raises(TierError, match="have room for 3 segments of 1048576 bytes"):
        await tier.start(lambda meta, record: True)
    shelf = Shelf(open_nvme(tmp_path, capacity_bytes=5 << 20, segment_bytes=1 << 20))
    await shelf.tier.start(shelf.found)  # the refused start let the directory go
    await shelf.tier.stop()


async def test_small_files_are_kept_beside_the_log(make: Make) -> None:
    async with running(make()) as (shelf, _):
        assert await shelf.tier.load("schemas.json") is None
        await shelf.tier.save("schemas.json", b"{}")
    async with running(make()) as (shelf, _):
        assert await shelf.tier.load("schemas.json") == b"{}"
        assert shelf.tier.stats.file_bytes > 0


async def test_a_reset_starts_empty(make: Make) -> None:
    tier = make()
    shelf = Shelf(tier)
    await tier.start(shelf.found)
    async with anyio.create_task_group() as group:
        group.start_soon(tier.run)
        await shelf.put_many([b"a", page(1)], level=Level.DURABLE)
        group.cancel_scope.cancel()
    await tier.reset()
    assert [why for *_, why in shelf.gone] == ["lost", "lost"]
    async with anyio.create_task_group() as group:
        group.start_soon(tier.run)
        await shelf.put(b"b", level=Level.DURABLE)
        await shelf.check()
        group.cancel_scope.cancel()
    await tier.device.close()
    async with running(make()) as (shelf, _):
        assert shelf.held.keys() == {b"b"}


async def test_a_directory_that_vanished_comes_back_empty(make: Make, tmp_path: Path) -> None:
    async with running(make()) as (shelf, _):
        await shelf.put(b"a", 3000)
        shutil.rmtree(tmp_path / "tier")
        assert shelf.tier._parts is not None
        await shelf.tier._parts.checkpointer.try_write()
        assert shelf.tier.health.state == "read-only"
        assert await shelf.get(b"a")  # the open file is still there
        assert await shelf.put(b"b") is None
        (tmp_path / "tier").mkdir()
        await until(lambda: shelf.tier.health.can_write)
        assert shelf.gone == [(b"a", 1, "lost")]
        assert await shelf.put(b"c", level=Level.DURABLE)
        await shelf.check()
    async with running(make()) as (shelf, _):
        assert shelf.held.keys() == {b"c"}


async def test_a_read_of_what_is_gone_is_an_error(make: Make) -> None:
    async with running(make()) as (shelf, _):
        record = await shelf.put(b"a")
        assert record is not None
        shelf.tier.free(record)
        shelf.tier.free(record)
        with pytest.raises(TierError, match="has this copy no more"):
            await shelf.get(b"a")
