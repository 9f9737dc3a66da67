"""One contract, kept by every device on every event loop it runs on."""

import errno
import gc
import mmap
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Literal

import anyio
import pytest
from anyio.lowlevel import checkpoint

from respkv.errors import TierError
from respkv.tiers.arena import Arena
from respkv.tiers.device import Device, Write
from respkv.tiers.directory import Directory
from respkv.tiers.probe import open_device
from respkv.tiers.uring import Ring
from tests.tiers.shelf import until

pytestmark = pytest.mark.anyio
Engine = Literal["io_uring", "threads", "aiofiles"]
PAGE = 4096
DEPTH = 4
MIB = 1 << 20

LOOPS: dict[str, tuple[str, dict[str, bool]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
CASES = [(engine, loop) for engine in ("io_uring", "threads") for loop in LOOPS]
CASES += [("aiofiles", "asyncio"), ("aiofiles", "uvloop")]


def why_no_ring() -> str:
    try:
        Ring(1).close()
    except OSError as error:
        return f"io_uring is refused here: {error}"
    return ""


WHY_NO_RING = why_no_ring()


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Engine, str]:
    if request.param[0] == "io_uring" and WHY_NO_RING:
        pytest.skip(WHY_NO_RING)
    return request.param[0], request.param[1]


@pytest.fixture
def anyio_backend(case: tuple[Engine, str]) -> tuple[str, dict[str, bool]]:
    return LOOPS[case[1]]


@pytest.fixture
def engine(case: tuple[Engine, str]) -> Engine:
    return case[0]


@pytest.fixture
async def device(engine: Engine, tmp_path: Path) -> AsyncIterator[Directory]:
    device = await open_device(tmp_path / "d", engine, DEPTH)
    yield device
    await device.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def aligned(nbytes: int, *, fill: bool = False) -> memoryview:
    memory = memoryview(mmap.mmap(-1, nbytes))
    if fill:
        memory[:] = random.Random(nbytes).randbytes(nbytes)
    return memory


def fails(code: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=rf"Errno {code}\b")


async def test_says_what_it_is(device: Directory, engine: Engine) -> None:
    checked: Device = device
    assert checked.engine == engine
    assert device.fallback_reason == ""
    assert checked.alignment == (64 if engine == "aiofiles" else PAGE)
    assert engine != "aiofiles" or not checked.is_direct


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, PAGE), (PAGE, PAGE), (15 * PAGE, PAGE), (PAGE, 15 * PAGE), (0, 16 * PAGE)],
)
async def test_reads_what_was_written_at_any_page(
    device: Directory, offset: int, nbytes: int
) -> None:
    await device.create("s", 16 * PAGE)
    data, found = aligned(nbytes, fill=True), aligned(16 * PAGE)
    await device.write("s", [Write(offset, data)])
    await device.read("s", 0, found)
    expected = bytearray(16 * PAGE)
    expected[offset : offset + nbytes] = data
    assert found == expected


@pytest.mark.parametrize("is_registered", [False, True])
async def test_writes_pieces_in_any_order(device: Directory, is_registered: bool) -> None:
    memory, found = aligned(64 * PAGE, fill=True), aligned(64 * PAGE)
    if is_registered:
        device.register(memory)
        device.register(found)
    order = list(range(64))
    random.Random(1).shuffle(order)
    await device.create("s", 64 * PAGE)
    pieces = [Write(at * PAGE, memory[at * PAGE : (at + 1) * PAGE]) for at in order]
    await device.write("s", pieces)
    await device.write("s", pieces[:1] * 3)
    await device.sync("s")
    await device.read("s", 0, found)
    assert found == memory


async def test_writes_read_only_memory(device: Directory) -> None:
    memory, found = aligned(PAGE, fill=True), aligned(PAGE)
    await device.create("s", PAGE)
    await device.write("s", [Write(0, memory.toreadonly())])
    await device.read("s", 0, found)
    assert found == memory


async def test_many_work_at_once_on_many_files(device: Directory) -> None:
    files, pages = 8, 32
    found: list[tuple[int, int, memoryview]] = []

    async def work(file: int, page: int) -> None:
        memory = aligned(PAGE)
        memory[:] = bytes([file * pages + page]) * PAGE
        await device.write(f"s{file}", [Write(page * PAGE, memory)])
        if page % 8 == 0:
            await device.sync(f"s{file}")
        again = aligned(PAGE)
        await device.read(f"s{file}", page * PAGE, again)
        found.append((file, page, again))

    for file in range(files):
        await device.create(f"s{file}", pages * PAGE)
    async with anyio.create_task_group() as group:
        for file in range(files):
            for page in range(pages):
                group.start_soon(work, file, page)
    assert len(found) == files * pages
    for file, page, memory in found:
        assert memory == bytes([file * pages + page]) * PAGE


async def test_random_cancellations_neither_hang_nor_harm(device: Directory) -> None:
    rng = random.Random(7)
    memory = aligned(64 * PAGE, fill=True)
    await device.create("s", 64 * PAGE)
    await device.write("s", [Write(0, memory)])
    wrong: list[int] = []

    async def read(page: int) -> None:
        into = aligned(PAGE)
        with anyio.move_on_after(rng.random() * 0.002) as scope:
            await device.read("s", page * PAGE, into)
        kept = bytes(into)
        await anyio.sleep(0.002)
        if kept != into or (not scope.cancelled_caught and into != memory[page * PAGE :][:PAGE]):
            wrong.append(page)

    async with anyio.create_task_group() as group:
        for _ in range(10):
            for page in range(64):
                group.start_soon(read, page)
            await anyio.sleep(0.003)
    assert wrong == []


async def test_the_end_of_the_file_inside_a_read_is_eio(device: Directory) -> None:
    await device.create("s", 2 * PAGE)
    for offset, nbytes in ((PAGE, 2 * PAGE), (2 * PAGE, PAGE), (8 * PAGE, PAGE)):
        with fails(errno.EIO):
            await device.read("s", offset, aligned(nbytes))
    os.truncate(device.path / "s", PAGE + 2048)
    with fails(errno.EIO):
        await device.read("s", 0, aligned(2 * PAGE))


async def test_nothing_holds_memory_after_a_read(device: Directory) -> None:
    await device.create("s", PAGE)
    mapping = mmap.mmap(-1, 2 * PAGE)
    await device.read("s", 0, memoryview(mapping)[:PAGE])
    with fails(errno.EIO):
        await device.read("s", 0, memoryview(mapping))
    with anyio.move_on_after(0):
        await device.read("s", 0, memoryview(mapping)[:PAGE])

    def is_free() -> bool:
        gc.collect()  # anyio's call of a thread that raised is a cycle
        with suppress(BufferError):
            mapping.close()
        return mapping.closed

    await until(is_free)


async def test_registers_the_arena(device: Directory) -> None:
    arena = Arena.create(4 * MIB, path=None, hugepages=True)
    arena.prefault()
    device.register(arena.view)
    await device.create("s", MIB)
    arena.view[:MIB] = random.Random(1).randbytes(MIB)
    await device.write("s", [Write(0, arena.view[:MIB])])
    await device.read("s", 0, arena.view[MIB : 2 * MIB])
    assert arena.view[:MIB] == arena.view[MIB : 2 * MIB]
    await device.close()
    arena.close()


async def test_files_that_are_not_open_are_refused(device: Directory) -> None:
    with pytest.raises(FileNotFoundError):
        await device.open("missing")
    with fails(errno.EBADF):
        await device.read("missing", 0, aligned(PAGE))
    await device.remove("missing")


async def test_opens_creates_and_removes(device: Directory, engine: Engine) -> None:
    await device.create("b", 4 * PAGE)
    await device.create("a", 2 * PAGE)
    data = aligned(PAGE, fill=True)
    await device.write("a", [Write(0, data)])
    assert await device.names() == ["a", "b"]
    assert (device.path / "b").stat().st_blocks * 512 >= 4 * PAGE
    await device.create("a", PAGE)  # is there: kept, cut
    assert await device.open("a") == PAGE
    found = aligned(PAGE)
    await device.read("a", 0, found)
    assert found == data
    await device.remove("a")
    assert await device.names() == ["b"]
    await device.replace("superblock", b"ours")
    await device.close()
    again = await open_device(device.path, engine, DEPTH)
    assert await again.open("b") == 4 * PAGE
    await again.close()


async def test_replaces_small_files_whole(device: Directory) -> None:
    assert await device.load("superblock") is None
    await device.replace("superblock", b"one")
    assert await device.load("superblock") == b"one"
    await device.replace("superblock", b"two" * MIB)
    assert await device.load("superblock") == b"two" * MIB
    assert sorted(os.listdir(device.path)) == ["lock", "superblock"]


async def test_clears_away_what_a_crash_left_half_replaced(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "superblock.tmp").write_bytes(b"half")
    device = await open_device(tmp_path, engine, DEPTH)
    assert os.listdir(tmp_path) == ["lock"]
    await device.close()


async def test_a_second_owner_is_refused_and_told_who_has_it(
    device: Directory, engine: Engine
) -> None:
    with pytest.raises(TierError, match=f"in use by process {os.getpid()}"):
        await open_device(device.path, engine, DEPTH)
    await device.close()
    again = await open_device(device.path, engine, DEPTH)
    await again.close()


async def test_a_full_disk_leaves_no_file_behind(small_disk: Path, engine: Engine) -> None:
    device = await open_device(small_disk, engine, DEPTH)
    await device.create("a", MIB // 2)
    await device.replace("b", b"old")
    with fails(errno.ENOSPC):
        await device.create("c", MIB)
    with fails(errno.ENOSPC):
        await device.replace("b", bytes(MIB))
    assert await device.load("b") == b"old"
    assert sorted(os.listdir(small_disk)) == ["a", "b", "lock"]
    await device.create("c", MIB // 4)
    await device.close()


async def test_a_disk_that_fills_inside_a_write_is_an_error(
    small_disk: Path, engine: Engine
) -> None:
    device = await open_device(small_disk, engine, DEPTH)
    (small_disk / "sparse").touch()
    await device.open("sparse")
    with fails(errno.ENOSPC):
        await device.write("sparse", [Write(0, aligned(2 * MIB, fill=True))])
    await device.remove("sparse")
    await device.create("s", MIB // 2)
    await device.close()


async def test_a_directory_that_vanished_is_an_error(device: Directory) -> None:
    (device.path / "lock").unlink()
    device.path.rmdir()
    for call in (device.create("s", PAGE), device.replace("s", b""), device.names()):
        with pytest.raises(FileNotFoundError):
            await call


async def test_nothing_leaks_over_a_thousand_files(engine: Engine) -> None:
    path = Path(f"/dev/shm/respkv-devices-{os.getpid()}")
    device = await open_device(path, engine, DEPTH)
    memory = aligned(PAGE)

    async def turn(index: int) -> None:
        await device.create(f"s{index}", PAGE)
        await device.write(f"s{index}", [Write(0, memory)])
        await device.read(f"s{index}", 0, memory)
        await device.remove(f"s{index}")

    for index in range(50):
        await turn(index)
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), _mapped_kib()
    for index in range(1000):
        await turn(index)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before[0]
    assert _mapped_kib() < before[1] + 2048
    await device.close()
    shutil.rmtree(path)


async def test_closing_twice_is_harmless_and_later_use_refused(device: Directory) -> None:
    await device.create("s", PAGE)
    await device.close()
    await device.close()
    with fails(errno.EBADF):
        await device.read("s", 0, aligned(PAGE))


async def test_close_waits_for_files_that_come_and_go(device: Directory) -> None:
    await device.create("b", PAGE)
    async with anyio.create_task_group() as group:
        group.start_soon(device.create, "a", MIB)
        group.start_soon(device.remove, "b")
        group.start_soon(device.replace, "c", bytes(MIB))
        await checkpoint()
        await checkpoint()
        await device.close()
        assert sorted(os.listdir(device.path)) == ["a", "c", "lock"]
    with fails(errno.EBADF):
        await device.replace("d", b"")


async def test_close_waits_for_what_is_in_flight(device: Directory) -> None:
    await device.create("s", 4 * MIB)
    ended = 0

    async def write(at: int) -> None:
        nonlocal ended
        await device.write("s", [Write(at * MIB, aligned(MIB, fill=True))])
        ended += 1

    async with anyio.create_task_group() as group:
        for at in range(4):
            group.start_soon(write, at)
        await checkpoint()
        await checkpoint()
        await device.close()
        assert ended == 4


def _mapped_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
