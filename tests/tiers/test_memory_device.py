"""The device in memory crashes the way disks do."""

import random
from functools import partial

import anyio
import pytest

from respkv.tiers.device import Device, Write
from tests.tiers.memory_device import Kind, MemoryDevice

pytestmark = pytest.mark.anyio
OLD, NEW = memoryview(b"o" * 4096), memoryview(b"n" * 4096)


async def wrote(*, sync: bool) -> MemoryDevice:
    device = MemoryDevice(alignment=1)
    await device.create("a", 8192)
    await device.write("a", [Write(0, NEW), Write(4096, NEW)])
    if sync:
        await device.sync("a")
    return device


async def test_is_a_device() -> None:
    device: Device = MemoryDevice({"a": b"1"}, alignment=1)
    assert await device.names() == ["a"]
    assert await device.open("a") == 1
    await device.remove("b")
    await device.close()


async def test_a_killed_process_keeps_what_ended() -> None:
    device = await wrote(sync=False)
    choose = random.Random(1).randrange
    assert device.after_crash(device.num_events, "kill", choose)["a"] == b"n" * 8192
    seen = {device.after_crash(3, "kill", choose, sector_bytes=1)["a"] for _ in range(200)}
    assert {bytes(8192), b"n" * 8192} <= seen
    assert len(seen) > 50


async def test_a_power_cut_keeps_what_was_synced() -> None:
    choose = random.Random(2).randrange
    device = await wrote(sync=True)
    assert device.after_crash(device.num_events, "power", choose)["a"] == b"n" * 8192
    device = await wrote(sync=False)
    seen = [device.after_crash(device.num_events, "power", choose)["a"] for _ in range(200)]
    assert bytes(4096) + b"n" * 4096 in seen  # the later piece alone
    assert len(set(seen)) > 20


async def test_a_sync_covers_only_writes_that_had_ended() -> None:
    release = anyio.Event()

    async def pause(kind: Kind, name: str) -> None:
        if kind == "write":
            await release.wait()

    device = MemoryDevice(alignment=1, pause=pause)
    await device.create("a", 4096)
    async with anyio.create_task_group() as group:
        group.start_soon(device.write, "a", [Write(0, NEW)])
        await anyio.wait_all_tasks_blocked()
        await device.sync("a")
        release.set()
    choose = random.Random(3).randrange
    seen = {device.after_crash(device.num_events, "power", choose)["a"] for _ in range(99)}
    assert bytes(4096) in seen


async def test_a_replaced_file_is_the_old_or_the_new_one() -> None:
    device = MemoryDevice({"a": bytes(OLD)})
    await device.replace("a", bytes(NEW))
    for crash in ("kill", "power"):
        choose = random.Random(4).randrange
        seen = {files["a"] for event, files in device.crashes(crash, choose, variants=20)}
        assert seen == {bytes(OLD), bytes(NEW)}
        assert device.after_crash(2, crash, choose)["a"] == bytes(NEW)


async def test_a_removed_file_may_come_back_until_the_directory_is_synced() -> None:
    device = MemoryDevice({"a": bytes(OLD)})
    await device.remove("a")
    crash = partial(device.after_crash, crash="power", choose=random.Random(5).randrange)
    assert {"a" in crash(2) for _ in range(50)} == {True, False}
    await device.create("b", 1)
    assert {"a" in crash(4) for _ in range(50)} == {False}


async def test_memory_that_changes_while_written_is_caught() -> None:
    memory = bytearray(OLD)

    async def pause(kind: Kind, name: str) -> None:
        memory[0] ^= kind == "write"

    device = MemoryDevice(alignment=1, pause=pause)
    await device.create("a", 4096)
    with pytest.raises(AssertionError, match="changed while"):
        await device.write("a", [Write(0, memoryview(memory))])


async def test_space_is_bounded_and_its_peak_known() -> None:
    device = MemoryDevice(capacity_bytes=100)
    await device.create("a", 60)
    with pytest.raises(OSError, match="No space"):
        await device.create("b", 60)
    assert await device.names() == ["a"]
    await device.replace("c", b"x" * 20)
    await device.replace("c", b"x" * 20)
    assert device.peak_bytes == 100
