"""Row 8, the device: blocks read and written by the nvme tier's device against fio.

Both use the same file, block size, depth and places chosen at random, both past the page cache.
"""

import mmap
import os
import random
from collections.abc import Iterator
from time import perf_counter
from typing import Literal, TypeAlias

import anyio

from bench.files import tier_folder
from bench.fio import WORDS, Fio, Job, filled_file
from bench.fio import engine as fio_engine
from bench.load import WrongReplyError
from bench.result import Line, Result, throughput
from bench.rows import Bench
from respkv.tiers.device import Device, Write
from respkv.tiers.probe import open_device

# The target is for reads of this size and depth; the other lines show what becomes of it elsewhere.
TARGET_BYTES, TARGET_DEPTH, TARGET = 1 << 20, 32, 0.8
NOISE_BYTES = 1 << 20

OurEngine: TypeAlias = Literal["auto", "threads"]


class Blocks:
    """One job, by a device of respkv.

    memory: a place for ``depth`` blocks, aligned for the device.
    """

    def __init__(self, job: Job, memory: memoryview, engine: OurEngine) -> None:
        self._job = job
        self._engine: OurEngine = engine
        self._memory = memory
        self._random = random.Random(job.name)
        self._read: list[tuple[int, memoryview]] = []

    def measure(self) -> float:
        """Return the seconds that one block took; opening and registering do not count."""
        took = anyio.run(self._measure, backend_options={"use_uvloop": True})
        self._check()
        return took

    async def _measure(self) -> float:
        job = self._job
        with tier_folder(job.file.parent) as folder:
            device = await open_device(folder, self._engine, job.depth)
            # A directory with files that are not a tier's would be refused.
            os.link(job.file, folder / job.file.name)
            try:
                device.register(self._memory)
                await device.open(job.file.name)
                return await self._run(device)
            finally:
                await device.close()

    async def _run(self, device: Device) -> float:
        job = self._job
        num_blocks = job.file_bytes // job.block_bytes
        places = (self._random.randrange(num_blocks) for _ in range(job.count))
        start = perf_counter()
        async with anyio.create_task_group() as tasks:
            for index in range(job.depth):
                block = self._memory[index * job.block_bytes :][: job.block_bytes]
                tasks.start_soon(self._move, device, block, places)
        return (perf_counter() - start) / job.count

    async def _move(self, device: Device, block: memoryview, places: Iterator[int]) -> None:
        name, nbytes = self._job.file.name, self._job.block_bytes
        offset = -1
        if self._job.word == "write":
            for place in places:
                await device.write(name, [Write(place * nbytes, block)])
            return
        for place in places:
            offset = place * nbytes
            await device.read(name, offset, block)
        if offset >= 0:
            self._read.append((offset, block))

    def _check(self) -> None:
        """Raise WrongReplyError unless the memory has what the file has where it was read last."""
        with self._job.file.open("rb") as file:
            for offset, block in self._read[:1]:
                file.seek(offset)
                if bytearray(file.read(len(block))) != block:
                    raise WrongReplyError(f"wrong bytes at {offset}: {self._job.name}")
            # Nor shall what this left in the page cache stay there.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._read.clear()


def device_blocks(bench: Bench) -> Iterator[Result]:
    """Read and write blocks of every size at every depth."""
    scale = bench.scale.files
    with filled_file(bench.folder, scale.file_bytes) as file:
        for block_bytes in scale.block_bytes:
            for depth in scale.depths:
                count = max(scale.turn_bytes // block_bytes, 2 * depth)
                memory = aligned_memory(block_bytes * depth)
                for word in WORDS:
                    job = Job(file, scale.file_bytes, word, block_bytes, depth, count)
                    for engine in ("auto", *_others(job)):
                        yield bench.compare(_line(job, memory, engine))


def _others(job: Job) -> Iterator[OurEngine]:
    # Where io_uring is refused, "auto" is this already.
    if _is_target(job):
        yield "threads"


def _line(job: Job, memory: memoryview, engine: OurEngine) -> Line:
    how = "" if engine == "auto" else f" with {engine}"
    return Line(
        8,
        f"{job.name}: the nvme tier's device{how}, against fio by {fio_engine()}",
        TARGET if _is_target(job) and engine == "auto" else None,
        throughput(job.block_bytes),
        Fio(job).measure,
        Blocks(job, memory, engine).measure,
    )


def _is_target(job: Job) -> bool:
    return (job.word, job.block_bytes, job.depth) == ("read", TARGET_BYTES, TARGET_DEPTH)


def aligned_memory(nbytes: int) -> memoryview:
    """Return memory that starts at a page and has all its pages."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    memory = memoryview(mmap.mmap(-1, nbytes, flags))
    noise = os.urandom(min(nbytes, NOISE_BYTES))
    for start in range(0, nbytes, len(noise)):
        memory[start : start + len(noise)] = noise[: nbytes - start]
    return memory
