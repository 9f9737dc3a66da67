"""Every fault of the faulty device really bites, and ends when it is healed."""

import errno
import mmap
import os
import random

import anyio
import pytest

from respkv.tiers.device import Device, Write
from tests.simulation.virtual import Jump, run
from tests.tiers.faulty_device import Call, FaultyDevice, Kind
from tests.tiers.memory_device import MemoryDevice

pytestmark = pytest.mark.anyio

A = 4096
PIECES = 8


def piece(fill: int, count: int = 1) -> memoryview:
    memory = memoryview(mmap.mmap(-1, count * A))
    memory[:] = bytes([fill]) * (count * A)
    return memory


def filled(first: int = 1) -> list[Write]:
    return [Write(index * A, piece(first + index)) for index in range(PIECES)]


async def fresh(seed: int = 5) -> tuple[FaultyDevice, MemoryDevice]:
    """Return a device with two files of 8 pieces, f with 1 to 8 in them, g with 101 to 108."""
    inner = MemoryDevice()
    device: Device
    device = faulty = FaultyDevice(inner, random.Random(seed).randrange)
    for name, first in (("f", 1), ("g", 101)):
        await device.create(name, PIECES * A)
        await device.write(name, filled(first))
    return faulty, inner


async def content(device: Device, name: str = "f") -> bytes:
    into = piece(0, PIECES)
    await device.read(name, 0, into)
    return bytes(into)


def image(*fills: int) -> bytes:
    return b"".join(bytes([fill]) * A for fill in fills)


async def call(device: Device, which: Call) -> None:
    match which:
        case "names":
            await device.names()
        case "create":
            await device.create("h", A)
        case "open":
            await device.open("f")
        case "read":
            await device.read("f", 0, piece(0))
        case "write":
            await device.write("f", [Write(0, piece(77))])
        case "sync":
            await device.sync("f")
        case "remove":
            await device.remove("f")
        case "load":
            await device.load("f")
        case "replace":
            await device.replace("f", b"new")
        case "close":
            await device.close()


CALLS: list[Call] = [
    "names",
    "create",
    "open",
    "read",
    "write",
    "sync",
    "remove",
    "load",
    "replace",
]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("which", [*CALLS, "close"])
async def test_an_error_is_raised_and_nothing_done(which: Call, code: int) -> None:
    faulty, inner = await fresh()
    before = {name: bytes(data) for name, data in inner.files.items()}
    fault = faulty.add("error", which, code=code)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        await call(faulty, which)
    assert caught.value.errno == code
    assert fault.hits == 1
    assert {name: bytes(data) for name, data in inner.files.items()} == before
    faulty.heal()
    await call(faulty, which)


async def test_skip_times_and_name_choose_the_calls() -> None:
    faulty, _ = await fresh()
    fault = faulty.add("error", "read", "sync", name="g", skip=1, times=2)
    outcomes = []
    for name in "fggggg":
        try:
            await faulty.sync(name)
            outcomes.append("ok")
        except OSError:
            outcomes.append("EIO")
    assert outcomes == ["ok", "ok", "EIO", "EIO", "ok", "ok"]
    assert fault.hits == 2


async def test_chance_hits_about_one_in_so_many_and_the_same_ones_for_a_seed() -> None:
    hits: list[list[int]] = []
    for _ in range(2):
        faulty, _inner = await fresh()
        fault = faulty.add("dropped", "sync", one_in=4)
        hits.append([])
        for _ in range(200):
            await faulty.sync("f")
            hits[-1].append(fault.hits)
    assert hits[0] == hits[1]
    assert 30 < hits[0][-1] < 70


async def test_a_dropped_write_or_sync_leaves_no_trace() -> None:
    faulty, inner = await fresh()
    before, num_operations = await content(faulty), len(inner.log)
    faulty.add("dropped", "write", "sync")
    await faulty.write("f", filled(50))
    await faulty.sync("f")
    assert await content(faulty) == before
    assert len(inner.log) == num_operations


@pytest.mark.parametrize("kind", ["torn", "short"])
async def test_of_a_torn_or_short_write_the_first_part_is_there(kind: Kind) -> None:
    seen: set[int] = set()
    for seed in range(60):
        faulty, _ = await fresh(seed)
        faulty.add(kind, "write", code=errno.ENOSPC)
        if kind == "torn":
            await faulty.write("f", filled(50))
        else:
            with pytest.raises(OSError, match="No space"):
                await faulty.write("f", filled(50))
        data = await content(faulty)
        moved = sum(fill >= 50 for fill in data[::A])
        assert data == image(*range(50, 50 + moved), *range(1 + moved, 1 + PIECES))
        seen.add(moved)
    assert seen == set(range(PIECES))  # never all of it


async def test_of_a_torn_read_the_first_part_is_there() -> None:
    faulty, _ = await fresh()
    fault = faulty.add("torn", "read")
    data = await content(faulty)
    assert fault.hits == 1
    assert data != image(*range(1, 1 + PIECES))
    assert all(fill in (0, index + 1) for index, fill in enumerate(data[::A]))
    faulty.heal()
    faulty.add("short", "read")
    with pytest.raises(OSError, match="Input/output"):
        await content(faulty)


async def test_a_misdirected_write_hits_another_place() -> None:
    faulty, inner = await fresh()
    before = {name: bytes(data) for name, data in inner.files.items()}
    faulty.add("misdirected", "write")
    await faulty.write("f", [Write(3 * A, piece(50))])
    changed = [
        (name, index)
        for name in before
        for index in range(PIECES)
        if inner.files[name][index * A] != before[name][index * A]
    ]
    assert len(changed) == 1
    assert changed != [("f", 3)]
    assert {len(data) for data in inner.files.values()} == {PIECES * A}


async def test_a_misdirected_or_dropped_read_gives_other_bytes() -> None:
    faulty, _ = await fresh()
    into = piece(0)
    fault = faulty.add("misdirected", "read")
    await faulty.read("f", 3 * A, into)
    assert into[0] in {*range(1, 9), *range(101, 109)} - {4}
    faulty.heal(fault)
    faulty.add("dropped", "read")
    into = piece(99)
    await faulty.read("f", 0, into)
    assert into == piece(99)


@pytest.mark.parametrize("which", ["read", "write"])
async def test_a_flip_changes_one_bit(which: Call) -> None:
    faulty, inner = await fresh()
    faulty.add("flip", which, times=1)
    pieces = filled()
    if which == "write":
        await faulty.write("f", pieces)
        assert [each.data for each in pieces] == [each.data for each in filled()]
    data = await content(faulty)
    right = image(*range(1, 1 + PIECES))
    assert sum((a ^ b).bit_count() for a, b in zip(data, right, strict=True)) == 1
    assert (inner.files["f"] == right) == (which == "read")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("which", CALLS)
def test_a_slow_call_takes_its_time_and_no_other_waits(which: Call, backend: str) -> None:
    """In virtual time, in which no machine is slow or stands still."""
    ended = []

    async def both(jump: Jump) -> None:
        faulty, _ = await fresh()
        faulty.add("slow", which, delay_s=5)

        async def one(name: Call) -> None:
            await call(faulty, name)
            ended.append(name)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, which)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            tasks.start_soon(one, "read" if which == "load" else "load")

    run(both, backend=backend, seed=1)
    assert ended[-1] == which


async def test_what_was_healed_while_a_call_was_slow_does_not_hang_it_any_more() -> None:
    faulty, _ = await fresh()
    faulty.add("slow", "sync", delay_s=0.3)
    faulty.add("hang", "sync")
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(faulty.sync, "f")
            await anyio.wait_all_tasks_blocked()
            faulty.heal()


async def test_a_hanging_call_goes_on_when_released_and_not_when_cancelled() -> None:
    faulty, inner = await fresh()
    fault = faulty.add("hang", "write")
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(faulty.write, "f", filled(50))
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
            await anyio.lowlevel.cancel_shielded_checkpoint()
            assert inner.files["f"][0] == 1
            faulty.release()
    assert fault.hits == 1
    faulty.heal(fault)
    await faulty.write("f", filled(60))
    assert await content(faulty) == image(*range(60, 60 + PIECES))


async def test_a_read_only_file_system_still_reads() -> None:
    faulty, _ = await fresh()
    faulty.make_read_only()
    changing: list[Call] = ["create", "write", "remove", "replace"]
    for which in changing:
        with pytest.raises(OSError, match="Read-only"):
            await call(faulty, which)
    for which in CALLS:
        if which not in changing:
            await call(faulty, which)


async def test_a_directory_vanishes_and_is_made_again() -> None:
    faulty, inner = await fresh()
    faulty.vanish()
    finding: list[Call] = ["names", "create", "open", "replace"]
    for which in finding:
        with pytest.raises(FileNotFoundError):
            await call(faulty, which)
    assert await faulty.load("f") is None
    await faulty.write("f", filled(50))  # an open file outlives its name
    assert await content(faulty) == image(*range(50, 50 + PIECES))

    faulty.come_back()
    assert await faulty.names() == []
    with pytest.raises(FileNotFoundError):
        await faulty.open("f")
    await faulty.replace("superblock", b"new")
    await faulty.create("f", A)
    assert await faulty.names() == ["f", "superblock"]
    assert await faulty.load("superblock") == b"new"
    assert inner.files["f"] == bytes(A)


async def test_a_directory_is_unmounted_and_mounted_again() -> None:
    faulty, _ = await fresh()
    faulty.vanish()
    faulty.come_back(is_empty=False)
    assert await faulty.names() == ["f", "g"]
    assert await faulty.open("f") == PIECES * A
    assert await content(faulty) == image(*range(1, 1 + PIECES))
