"""What the devices of threads do with work that takes its time, and with pieces in parts."""

import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import anyio
import pytest

from respkv.tiers.aio import AioDevice
from respkv.tiers.claim import open_directory
from respkv.tiers.device import Write
from respkv.tiers.pool import PoolDevice, _from, _runs
from tests.tiers.shelf import until
from tests.tiers.test_devices import aligned

pytestmark = pytest.mark.anyio
PAGE = 4096
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Gate:
    """Holds threads between ``shut`` and ``open``."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.num_inside = 0
        self.peak = 0
        self._lock = threading.Lock()

    def hold(self, work: Callable[[*Ts], T]) -> Callable[[*Ts], T]:
        def held(*arguments: *Ts) -> T:
            with self._lock:
                self.num_inside += 1
                self.peak = max(self.peak, self.num_inside)
            self.is_open.wait(30)
            with self._lock:
                self.num_inside -= 1
            return work(*arguments)

        return held


class GatedPool(PoolDevice):
    gate: Gate

    async def _call(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        return await super()._call(self.gate.hold(work), *arguments)


class GatedAio(AioDevice):
    gate: Gate

    async def _call(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        return await super()._call(self.gate.hold(work), *arguments)


@pytest.fixture(params=[GatedPool, GatedAio])
def kind(request: pytest.FixtureRequest) -> type[GatedPool] | type[GatedAio]:
    kind: type[GatedPool] | type[GatedAio] = request.param
    return kind


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": bool(request.param)}


@pytest.fixture
async def device(
    kind: type[GatedPool] | type[GatedAio], tmp_path: Path
) -> AsyncIterator[GatedPool | GatedAio]:
    device = kind(open_directory(tmp_path, want_direct=False), 2)
    device.gate = Gate()
    await device.create("s", 16 * PAGE)
    yield device
    device.gate.is_open.set()
    await device.close()


async def test_a_cancelled_read_keeps_its_asker_until_the_memory_is_free(
    device: GatedPool | GatedAio,
) -> None:
    data, memory, released = aligned(PAGE, fill=True), aligned(PAGE), list[bool]()
    await device.write("s", [Write(0, data)])
    device.gate.is_open.clear()
    scope = anyio.CancelScope()

    async def read() -> None:
        with scope:
            try:
                await device.read("s", 0, memory)
            finally:
                released.append(memory == data)

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await until(lambda: device.gate.num_inside == 1)
        scope.cancel()
        await anyio.sleep(0.02)
        assert released == []
        device.gate.is_open.set()
    assert released == [True]


async def test_no_more_threads_than_the_depth(device: GatedPool | GatedAio) -> None:
    device.gate.peak = 0
    device.gate.is_open.clear()
    async with anyio.create_task_group() as group:
        for page in range(16):
            group.start_soon(device.read, "s", page * PAGE, aligned(PAGE))
        await until(lambda: device.gate.num_inside == 2)
        await anyio.sleep(0.02)
        with anyio.move_on_after(0.02) as scope:  # waits in line, so it can go at once
            await device.read("s", 0, aligned(PAGE))
        assert scope.cancelled_caught
        device.gate.is_open.set()
    assert device.gate.peak == 2


async def test_close_lets_go_of_a_disk_that_hangs(device: GatedPool | GatedAio) -> None:
    device.gate.is_open.clear()
    fd, errors = device._files["s"].fd, list[int | None]()

    async def read() -> None:
        try:
            await device.read("s", 0, aligned(PAGE))
        except OSError as error:
            errors.append(error.errno)

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        group.start_soon(read)
        await until(lambda: device.gate.num_inside == 2)
        group.start_soon(device.close, 0.05)
        await until(lambda: len(errors) == 2)  # while the threads still hang
        device.gate.is_open.set()
    assert errors == [errno.ETIMEDOUT] * 2
    os.fstat(fd)  # the threads may still read from it, so it must not become another file's
    os.close(fd)
    os.close(device._lock_fd)


def test_pieces_that_touch_are_one_run() -> None:
    memory = aligned(PAGE)
    pieces = [Write(at, memory[:length]) for at, length in ((0, 10), (10, 5), (20, 1), (5, 2))]
    found = [(start, [part.nbytes for part in run]) for start, run in _runs(pieces)]
    assert found == [(0, [10, 5]), (20, [1]), (5, [2])]
    assert list(_runs([])) == []


def test_no_run_is_longer_than_the_system_takes() -> None:
    memory = aligned(1)
    runs = list(_runs([Write(at, memory) for at in range(2500)]))
    assert [(start, len(run)) for start, run in runs] == [(0, 1024), (1024, 1024), (2048, 452)]


def test_a_run_goes_on_inside_a_piece() -> None:
    run = [memoryview(b"abc"), memoryview(b"de"), memoryview(b"f")]
    for done in range(7):
        assert b"".join(_from(run, done)) == b"abcdef"[done:]
