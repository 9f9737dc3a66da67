"""The devices on a file system that fails: what the system does in part is continued, the rest said."""

import errno
import mmap
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Literal, cast

import anyio
import pytest

from respkv.errors import TierError
from respkv.tiers.device import Device, Write
from respkv.tiers.probe import open_device
from tests.faults.fuse import can_mount, mounted
from tests.faults.table import Call, Faults, Kind, Rule

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not can_mount(), reason="may not mount"),
]

A = 4096
PIECES = 8
Engine = Literal["io_uring", "threads", "aiofiles"]
_numbers = count()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Faults, Path, Path]]:
    """The faults, the folder that has them, and where its files lie in truth."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    with mounted(source, target) as faults:
        yield faults, source, target


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # aiofiles knows no other


@pytest.fixture(params=["io_uring", "threads", "aiofiles"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return cast(Engine, request.param)


class Opened:
    """A device with a file ``f`` of 16 pieces, 1 to 8 in the first ones."""

    def __init__(self, device: Device, faults: Faults, file: Path) -> None:
        self.device = device
        self.faults = faults
        self.file = file


def pieces(first: int) -> list[Write]:
    memory = memoryview(mmap.mmap(-1, PIECES * A))
    for index in range(PIECES):
        memory[index * A : (index + 1) * A] = bytes([first + index]) * A
    return [Write(index * A, memory[index * A : (index + 1) * A]) for index in range(PIECES)]


def image(first: int) -> bytes:
    return b"".join(bytes([first + index]) * A for index in range(PIECES))


@asynccontextmanager
async def opened(disk: tuple[Faults, Path, Path], engine: Engine) -> AsyncIterator[Opened]:
    faults, source, target = disk
    name = str(next(_numbers))
    try:
        device = await open_device(target / name, engine, 8)
    except TierError:
        if engine == "io_uring":
            pytest.skip("no io_uring here")
        raise
    try:
        await device.create("f", 2 * PIECES * A)
        await device.write("f", pieces(1))
        yield Opened(device, faults, source / name / "f")
    finally:
        faults.heal()
        await device.close()


async def read(device: Device) -> bytes:
    into = memoryview(mmap.mmap(-1, PIECES * A))
    await device.read("f", 0, into)
    return bytes(into)


def wait_for_hit(faults: Faults, rule: Rule) -> None:
    deadline = time.monotonic() + 60
    while not faults.hits(rule):
        assert time.monotonic() < deadline
        time.sleep(0.001)


async def act(device: Device, what: str) -> None:
    match what:
        case "read":
            await read(device)
        case "write":
            await device.write("f", pieces(50))
        case "sync":
            await device.sync("f")
        case "create":
            await device.create("g", A)
        case "open":
            await device.open("f")
        case "replace":
            await device.replace("small", b"new")
        case "load":
            await device.load("small")
        case _:
            await device.remove("f")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("read", "read"),
        ("write", "write"),
        ("sync", "sync"),
        ("create", "open"),
        ("create", "allocate"),
        ("open", "open"),
        ("replace", "open"),
        ("replace", "write"),
        ("replace", "sync"),
        ("replace", "rename"),
        ("load", "open"),
        ("load", "read"),
    ],
)
async def test_an_error_of_the_system_is_raised_as_it_is(
    disk: tuple[Faults, Path, Path], engine: Engine, what: str, call: Call, code: int
) -> None:
    async with opened(disk, engine) as on:
        await on.device.replace("small", b"old")
        on.faults.set("error", call, code=code)
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            await act(on.device, what)
        assert caught.value.errno == code
        on.faults.heal()
        assert await on.device.load("small") == b"old"
        assert sorted(await on.device.names()) == ["f", "small"]
        if what != "write":  # a part of it may have been written
            assert await read(on.device) == image(1)
        await act(on.device, what)


@pytest.mark.parametrize("what", ["read", "write"])
async def test_what_was_done_in_part_is_continued(
    disk: tuple[Faults, Path, Path], engine: Engine, what: Call
) -> None:
    async with opened(disk, engine) as on:
        rule = on.faults.set("short", what)
        await on.device.write("f", pieces(50))
        assert await read(on.device) == image(50)
        assert on.faults.hits(rule) > 1
        assert on.file.read_bytes() == image(50) + bytes(PIECES * A)


@pytest.mark.parametrize("kind", ["torn", "dropped", "misdirected", "flip"])
async def test_a_disk_that_lies_is_believed(
    disk: tuple[Faults, Path, Path], engine: Engine, kind: Kind
) -> None:
    """These are found by checksums, not here; what matters is that the tool reaches every engine."""
    async with opened(disk, engine) as on:
        on.faults.set(kind, "write")
        await on.device.write("f", pieces(50))
        on.faults.heal()
        assert await read(on.device) != image(50)
        await on.device.write("f", pieces(50))
        assert await read(on.device) == image(50)
        on.faults.set(kind, "read")
        assert await read(on.device) != image(50)


async def test_reads_go_on_beside_one_that_hangs(
    disk: tuple[Faults, Path, Path], engine: Engine
) -> None:
    async with opened(disk, engine) as on:
        rule = on.faults.set("hang", "read", times=1)
        ended: list[int] = []

        async def one(number: int) -> None:
            assert await read(on.device) == image(1)
            ended.append(number)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, 1)
            await anyio.to_thread.run_sync(wait_for_hit, on.faults, rule)
            for number in range(2, 7):
                await one(number)
            assert ended == [2, 3, 4, 5, 6]
            on.faults.heal()
        assert ended[-1] == 1


@pytest.mark.alone
async def test_a_slow_disk_answers_late_and_the_loop_goes_on(
    disk: tuple[Faults, Path, Path], engine: Engine
) -> None:
    async with opened(disk, engine) as on:
        on.faults.set("slow", "read", "write", "sync", "open", "rename", delay_s=0.1)
        todo = ["read", "write", "sync", "create", "replace"]
        turns = 0

        async def one(what: str) -> None:
            await act(on.device, what)
            todo.remove(what)

        async with anyio.create_task_group() as tasks:
            for what in list(todo):
                tasks.start_soon(one, what)
            while todo:
                await anyio.sleep(0.001)
                turns += 1
        assert turns > 10
