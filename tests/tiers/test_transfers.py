"""What the ring does with transfers that take their time. Pipes stand in for slow disks."""

import errno
import gc
import mmap
import os
import random
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskGroup

from respkv.tiers.device import Write
from respkv.tiers.probe import open_device
from respkv.tiers.ring import RingDevice
from respkv.tiers.transfers import advance
from respkv.tiers.uring import Ring, address_of
from tests.tiers.shelf import GIVE_UP_S, until
from tests.tiers.test_devices import LOOPS, WHY_NO_RING, aligned

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(bool(WHY_NO_RING), reason=WHY_NO_RING)]
PAGE = 4096
DEPTH = 4


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return LOOPS[request.param]


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[RingDevice]:
    """With files ``a`` .. ``f`` that answer only when something is written to ``path / name``."""
    device = await open_device(tmp_path / "d", "io_uring", DEPTH)
    assert isinstance(device, RingDevice)
    device.is_direct = False  # pipes are opened without O_DIRECT
    for name in "abcdef":
        os.mkfifo(device.path / name)
        await device.open(name)
    yield device
    await device.close()


def answer(device: RingDevice, name: str, data: bytes) -> None:
    fd = os.open(device.path / name, os.O_WRONLY | os.O_NONBLOCK)
    assert os.write(fd, data) == len(data)
    os.close(fd)


async def settle() -> None:
    for _ in range(20):  # turns, which a machine that stood still has not had after any time
        await anyio.lowlevel.checkpoint()
    await anyio.sleep(0.02)


async def test_a_cancelled_read_keeps_its_asker_until_the_memory_is_free(
    device: RingDevice,
) -> None:
    memory, events = aligned(PAGE), list[str]()

    async def read(scope: anyio.CancelScope) -> None:
        with scope:
            try:
                await device.read("a", 0, memory)
            finally:
                events.append("released")

    scope = anyio.CancelScope()
    async with anyio.create_task_group() as group:
        group.start_soon(read, scope)
        await settle()
        scope.cancel()
        await settle()
        assert events == []
        answer(device, "a", b"x" * PAGE)
    assert events == ["released"]
    assert scope.cancelled_caught
    assert memory == b"x" * PAGE


async def test_what_waits_in_line_can_be_cancelled_at_once(device: RingDevice) -> None:
    memory = aligned(PAGE)
    async with anyio.create_task_group() as group:
        for name in "abcd":
            group.start_soon(device.read, name, 0, aligned(PAGE))
        await settle()
        with anyio.move_on_after(0.02) as scope:
            await device.read("e", 0, memory)
        assert scope.cancelled_caught
        for name in "abcd":
            answer(device, name, bytes(PAGE))
    answer(device, "e", b"x" * PAGE)
    await settle()
    assert memory == bytes(PAGE)


async def test_a_full_queue_waits_and_loses_nothing(device: RingDevice) -> None:
    memory = {name: aligned(PAGE) for name in "abcdef"}
    async with anyio.create_task_group() as group:
        for name in memory:
            group.start_soon(device.read, name, 0, memory[name])
        await settle()
        for name in "fedcba":  # the last two are not with the kernel yet
            answer(device, name, name.encode() * PAGE)
            await settle()
    for name, found in memory.items():
        assert found == name.encode() * PAGE


async def test_one_read_that_never_ends_stops_nobody(device: RingDevice) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(device.read, "a", 0, aligned(PAGE))
        await settle()
        for index in range(100):
            memory = aligned(PAGE)
            answer(device, "b", bytes([index]) * PAGE)
            with anyio.fail_after(GIVE_UP_S):
                await device.read("b", 0, memory)
            assert memory == bytes([index]) * PAGE
        answer(device, "a", bytes(PAGE))


async def test_who_leads_may_be_cancelled(device: RingDevice) -> None:
    leader, found = anyio.CancelScope(), aligned(PAGE)

    async def lead() -> None:
        with leader:
            await device.read("a", 0, aligned(PAGE))

    async with anyio.create_task_group() as group:
        group.start_soon(lead)
        await settle()
        group.start_soon(device.read, "b", 0, found)
        await settle()
        leader.cancel()
        await settle()
        answer(device, "b", b"b" * PAGE)
        await until(lambda: found == b"b" * PAGE)
        answer(device, "a", b"a" * PAGE)


async def test_a_read_in_parts_goes_on_where_it_stopped(device: RingDevice) -> None:
    memory = aligned(4 * PAGE)
    async with anyio.create_task_group() as group:
        group.start_soon(device.read, "a", 0, memory)
        for part in range(4):
            await settle()
            answer(device, "a", bytes([part]) * PAGE)
    assert memory == b"".join(bytes([part]) * PAGE for part in range(4))


async def test_a_file_is_removed_when_its_reads_have_ended(device: RingDevice) -> None:
    events = list[str]()

    async def note(what: str, group: TaskGroup) -> None:
        await (device.read("a", 0, aligned(PAGE)) if what == "read" else device.remove("a"))
        events.append(what)

    async with anyio.create_task_group() as group:
        group.start_soon(note, "read", group)
        await settle()
        group.start_soon(note, "remove", group)
        await settle()
        with pytest.raises(OSError, match="not open"):
            await device.read("a", 0, aligned(PAGE))
        assert events == []
        answer(device, "a", bytes(PAGE))
    assert events == ["read", "remove"]


async def test_close_lets_go_of_a_disk_that_hangs(device: RingDevice) -> None:
    errors = list[int | None]()
    mapping = mmap.mmap(-1, 6 * PAGE)

    async def read(name: str) -> None:
        start = "abcdef".index(name) * PAGE
        try:
            await device.read(name, 0, memoryview(mapping)[start : start + PAGE])
        except OSError as error:
            errors.append(error.errno)

    async with anyio.create_task_group() as group:
        for name in "abcdef":
            group.start_soon(read, name)
        await settle()
        with anyio.fail_after(GIVE_UP_S):
            await device.close(0.05)
    assert errors == [errno.ETIMEDOUT] * 6
    gc.collect()
    with pytest.raises(BufferError):  # the kernel may still write to it
        mapping.close()


async def test_one_call_hands_over_all_that_a_turn_queued(device: RingDevice) -> None:
    await device.create("s", 64 * PAGE)
    before = device._ring.num_enters
    async with anyio.create_task_group() as group:
        for page in range(DEPTH):
            group.start_soon(device.read, "s", page * PAGE, aligned(PAGE))
    assert device._ring.num_enters == before + 1


async def test_memory_lives_until_the_kernel_is_done(device: RingDevice) -> None:
    mapping = mmap.mmap(-1, PAGE)
    async with anyio.create_task_group() as group:
        group.start_soon(device.read, "a", 0, memoryview(mapping))
        await settle()
        with pytest.raises(BufferError):
            mapping.close()
        answer(device, "a", bytes(PAGE))
    mapping.close()


async def test_the_first_error_of_a_batch_comes_when_all_have_ended(tmp_path: Path) -> None:
    device = await open_device(tmp_path, "io_uring", DEPTH)
    await device.create("s", 16 * PAGE)
    data = aligned(PAGE, fill=True)
    misaligned = Write(100, data) if device.is_direct else Write(-PAGE, data)
    with pytest.raises(OSError, match=f"Errno {errno.EINVAL}"):
        await device.write("s", [misaligned, *(Write(at * PAGE, data) for at in range(1, 16))])
    found = aligned(15 * PAGE)
    await device.read("s", PAGE, found)
    assert found == bytes(data) * 15
    await device.close()


async def test_a_kernel_short_of_memory_is_asked_again(device: RingDevice) -> None:
    class Reluctant(Ring):
        num_refusals = 50

        def enter(self) -> None:
            if self.num_refusals:
                self.num_refusals -= 1
            else:
                super().enter()

    ring = Reluctant(DEPTH)
    await device.create("s", 16 * PAGE)
    device._ring.close()
    device._ring = device._transfers._ring = ring
    device._files["s"].slot = -1
    async with anyio.create_task_group() as group:
        for page in range(16):
            group.start_soon(device.read, "s", page * PAGE, aligned(PAGE))
    assert ring.num_refusals == 0


async def test_registered_memory_is_found_by_address(device: RingDevice) -> None:
    first, second, other = (aligned(4 * PAGE) for _ in range(3))
    device.register(first)
    device.register(second)
    for memory, index in ((first, 0), (second, 1)):
        start, find = address_of(memory), device._ring._buffer_of
        assert [find(start, PAGE), find(start + 3 * PAGE, PAGE)] == [index, index]
        assert find(start + 3 * PAGE, 2 * PAGE) != index
    assert device._ring._buffer_of(address_of(other), PAGE) == -1


async def test_more_files_than_the_table_holds_do_without_it(device: RingDevice) -> None:
    device._ring._free_files.clear()
    await device.create("s", PAGE)
    assert device._files["s"].slot == -1
    data, found = aligned(PAGE, fill=True), aligned(PAGE)
    await device.write("s", [Write(0, data)])
    await device.sync("s")
    await device.read("s", 0, found)
    assert found == data
    await device.remove("s")


async def test_a_storm_of_cancellations_leaves_every_slot_free(device: RingDevice) -> None:
    rng = random.Random(11)
    await device.create("s", 64 * PAGE)

    async def read() -> None:
        with anyio.move_on_after(rng.random() * 0.003):
            await device.read("s", rng.randrange(64) * PAGE, aligned(PAGE))

    for _ in range(20):
        async with anyio.create_task_group() as group:
            for _ in range(32):
                group.start_soon(read)
            if rng.random() < 0.3:
                await anyio.sleep(rng.random() * 0.002)
                group.cancel_scope.cancel()
    transfers = device._transfers
    assert sorted(transfers._free) == list(range(DEPTH))
    assert not transfers._waiting
    assert not transfers._followers
    assert transfers._leader is None


@pytest.mark.parametrize(
    ("done", "moved", "nbytes", "alignment", "expected"),
    [
        (0, 8192, 8192, 4096, 8192),
        (0, 6144, 8192, 4096, 4096),
        (4096, 2048, 8192, 4096, 4096),
        (0, 2048, 8192, 1, 2048),
        (4096, 100, 4196, 4096, 4196),
    ],
)
def test_goes_on_at_a_multiple(
    done: int, moved: int, nbytes: int, alignment: int, expected: int
) -> None:
    assert advance(done, moved, nbytes, alignment) == expected


def test_addresses_of_slices() -> None:
    memory = aligned(2 * PAGE)
    find = partial(address_of)
    assert find(memory) % PAGE == 0
    assert find(memory[100:]) == find(memory) + 100
    assert find(memory[100:].toreadonly()) == find(memory) + 100
