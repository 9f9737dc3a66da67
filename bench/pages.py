"""Row 8, the tier: pages written to and read from the nvme tier's files, verified, against fio.

The same as a server does for a cold hit, but for the socket: a page is read into its slot, and its
header, key, generation and checksum are checked.
"""

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from time import perf_counter

import anyio

from bench.blocks import TARGET, TARGET_BYTES, TARGET_DEPTH, aligned_memory
from bench.files import tier_folder
from bench.fio import Fio, Job, engine, filled_file
from bench.load import Values, WrongReplyError
from bench.result import Line, Result, size, throughput
from bench.rows import Bench
from respkv.tiers.file_tier import FileTier
from respkv.tiers.format import HEADER_BYTES, Header, hash64, write_header
from respkv.tiers.nvme import open_nvme
from respkv.tiers.record import Level, Meta, Record, Value

PAGE_BYTES, DEPTH = TARGET_BYTES, TARGET_DEPTH
IMAGE_BYTES = -(-(HEADER_BYTES + PAGE_BYTES) // 4096) * 4096


class Slot:
    """Memory for a page as the arena has it: a header, the payload, and what is left of 4096 bytes."""

    def __init__(self, image: memoryview) -> None:
        self.image = image
        self.payload = image[HEADER_BYTES:][:PAGE_BYTES]


class Pages:
    """Pages in a directory, and the slots that they are read into and written from."""

    def __init__(self, path: Path, values: Values, memory: memoryview) -> None:
        self._path = path
        self._values = values
        self._metas = [
            Meta(key, "kvpage", PAGE_BYTES, hash64(payload), generation)
            for generation, (key, payload) in enumerate(
                zip(values.keys, values.payloads, strict=True), start=1
            )
        ]
        self._slots = [
            Slot(memory[at : at + IMAGE_BYTES]) for at in range(0, len(memory), IMAGE_BYTES)
        ]
        self._memory = memory
        self._random = random.Random(8)

    def fill(self) -> None:
        """Write every page once."""
        anyio.run(self._fill, backend_options={"use_uvloop": True})

    def read(self, count: int) -> float:
        """Read ``count`` pages chosen at random; return the seconds that one took."""
        return anyio.run(self._read, count, backend_options={"use_uvloop": True})

    async def _fill(self) -> None:
        async with self._running() as (tier, _):
            pages = iter(zip(self._metas, self._values.payloads, strict=True))
            async with anyio.create_task_group() as tasks:
                for slot in self._slots:
                    tasks.start_soon(_write, tier, slot, pages)

    async def _read(self, count: int) -> float:
        async with self._running() as (tier, records):
            places = (self._random.randrange(len(self._metas)) for _ in range(count))
            chosen = ((records[self._metas[place].key], self._metas[place].key) for place in places)
            start = perf_counter()
            async with anyio.create_task_group() as tasks:
                for slot in self._slots:
                    tasks.start_soon(_read, tier, slot, chosen)
            return (perf_counter() - start) / count

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[tuple[FileTier, dict[bytes, Record]]]:
        """Open the tier; yield it with the records that it found."""
        metas = {meta.generation: meta for meta in self._metas}
        records: dict[bytes, Record] = {}

        def found(meta: Meta, record: Record) -> bool:
            records[meta.key] = record
            return True

        tier = open_nvme(self._path, capacity_bytes=2 * len(metas) * IMAGE_BYTES + (64 << 20))
        tier.describe = lambda record: metas[record.generation]
        tier.keep = lambda record: True
        await tier.start(found)
        tier.device.register(self._memory)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tier.run)
            try:
                yield tier, records
            finally:
                await tier.stop()
                tasks.cancel_scope.cancel()


async def _write(tier: FileTier, slot: Slot, pages: Iterator[tuple[Meta, memoryview]]) -> None:
    for meta, payload in pages:
        header = Header(0, 0, 0, hash64(meta.key), meta.generation, PAGE_BYTES, meta.checksum)
        write_header(slot.image, header)
        slot.payload[:] = payload
        (record,) = await tier.write([Value(meta, slot.payload, slot.image, None)], Level.WRITTEN)
        if record is None:
            raise WrongReplyError(f"the tier did not write: {tier.health}")


async def _read(tier: FileTier, slot: Slot, pages: Iterator[tuple[Record, bytes]]) -> None:
    for record, key in pages:
        await tier.read(record, key, slot.payload, slot.image)


def tier_pages(bench: Bench) -> Iterator[Result]:
    """Read pages through the tier and blocks by fio, in turns."""
    scale = bench.scale.files
    file_bytes = scale.file_bytes // 2
    values = Values(PAGE_BYTES, file_bytes // PAGE_BYTES)
    count = max(scale.turn_bytes // PAGE_BYTES, 2 * DEPTH)
    with tier_folder(bench.folder) as path, filled_file(bench.folder, file_bytes) as file:
        pages = Pages(path, values, aligned_memory(DEPTH * IMAGE_BYTES))
        bench.progress("row 8: writing pages")
        pages.fill()
        job = Job(file, file_bytes, "read", PAGE_BYTES, DEPTH, count)
        work = (
            f"read {size(PAGE_BYTES)} pages, depth {DEPTH}: the nvme tier, each verified,"
            f" against fio by {engine()}"
        )
        read = partial(pages.read, count)
        yield bench.compare(Line(8, work, TARGET, throughput(PAGE_BYTES), Fio(job).measure, read))
