"""Measuring codecs on live pages, and choosing them for namespaces that said "auto".

A choice is made from a sample of the pages that a namespace has, in a thread, and made again when
``AGAIN`` times as many pages have been put, since the first prompts of a day may not be like the
rest. Pages that are stored already stay as they are.
"""

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel
import anyio.to_thread

from respkv.engine.entry import Entry
from respkv.engine.namespaces import Schema
from respkv.engine.rungs import Plane, Rung, choose_ratio, choose_within
from respkv.errors import CacheError
from respkv.kernels.container import is_lossless
from respkv.kernels.layout import Codec
from respkv.page import DTYPE_BYTES, Geometry
from respkv.server.loads import is_cold
from respkv.tiers import lossy
from respkv.tiers.format import read_header
from respkv.tiers.slab import Slot

if TYPE_CHECKING:
    from respkv.kernels.quality import Quality
    from respkv.server.state import Server

logger = logging.getLogger(__name__)

LADDER: Final = tuple(codec for codec in Codec if codec != Codec.RAW)
LOOK_S: Final = 1.0
PAGES_MIN: Final = 4  # before the first choice
PAGES_MAX: Final = 8  # of a sample
SAMPLE_BYTES_MAX: Final = 32 << 20  # of a sample, unless one page is larger
AGAIN: Final = 16
STEP: Final = 2000  # keys looked at before others are let in
LOOK_KEYS_MAX: Final = 100_000  # for pages in memory when there are others
REST: Final = 20  # times as long as the keys were looked at they are not looked at


@dataclass(frozen=True, slots=True)
class Sample:
    """What codecs do to some pages: for each codec, for each layer, of keys and of values."""

    pages: int
    measured: "list[list[tuple[Quality, Quality]]]"


async def measure_namespace(
    server: "Server", schema: Schema, codecs: Sequence[Codec]
) -> Sample | None:
    """Measure codecs on pages of a namespace; None: there are none.

    One at a time, since it takes all of a processor for seconds; the pages are held meanwhile.
    Raises TierError when those in files cannot be read, or torch is not there.
    """
    async with server.measuring:
        page_bytes, bytes_max = schema.geometry.page_bytes, server.budget.each_max
        pages_max = min(PAGES_MAX, min(SAMPLE_BYTES_MAX, bytes_max) // page_bytes)
        held: list[Slot] = []
        try:
            for entry in await _sample(server, schema, max(1, pages_max)):
                if _is_as_put(server, entry):
                    await _hold(server, schema, entry, held)
            if not held:
                return None
            pages = [server.cache.payload(slot) for slot in held]
            measured = await anyio.to_thread.run_sync(_measure, pages, schema.geometry, codecs)
            return Sample(len(pages), measured)
        finally:
            for slot in held:
                server.cache.restore(slot)


def _measure(
    pages: Sequence[memoryview], geometry: Geometry, codecs: Sequence[Codec]
) -> "list[list[tuple[Quality, Quality]]]":
    lossy.load()  # torch, which takes seconds to import, and this thread alone from then on
    from respkv.kernels.quality import measure_pages

    return measure_pages(pages, geometry, codecs)


async def _hold(server: "Server", schema: Schema, entry: Entry, held: list[Slot]) -> None:
    """Borrow a page, unless it has gone; one that is in files alone is brought into memory."""
    mover = server.mover
    load = mover.start_load(entry) if mover is not None and is_cold(entry) else None
    try:
        if load is not None:
            await load.wait()
            if load.error is not None and is_cold(entry):
                raise load.error
        is_wanted = entry.position >= 0 and _is_of(entry, schema) and _is_as_put(server, entry)
        if is_wanted and entry.slot is not None:
            server.cache.borrow(entry.slot)
            held.append(entry.slot)
    finally:
        if load is not None and mover is not None:
            mover.release(load)


async def _sample(server: "Server", schema: Schema, pages_max: int) -> list[Entry]:
    """Return some pages of a namespace; those in memory first, if there are some near."""
    found: list[Entry] = []
    async with aclosing(_steps(server)) as steps:
        async for entries, looked_at in steps:
            found += [
                entry for entry in entries if _is_of(entry, schema) and _is_as_put(server, entry)
            ]
            found.sort(key=is_cold)
            del found[pages_max:]
            is_full = len(found) == pages_max
            if is_full and (not is_cold(found[-1]) or looked_at >= LOOK_KEYS_MAX):
                break
    return found


async def _steps(server: "Server") -> AsyncGenerator[tuple[list[Entry], int], None]:
    """Yield all entries, some at a time, and how many were looked at; others are let in between."""
    cursor = looked_at = 0
    while True:
        cursor, found = server.cache.index.scan(cursor, STEP)
        looked_at += STEP
        yield found, looked_at
        if not cursor:
            return
        await anyio.lowlevel.checkpoint()


def _is_of(entry: Entry, schema: Schema) -> bool:
    return (
        entry.kind == "kvpage"
        and entry.part is None
        and entry.namespace == schema.namespace
        and entry.nbytes == schema.geometry.page_bytes
    )


def _is_as_put(server: "Server", entry: Entry) -> bool:
    """Whether a page would be read as it was put: not from a copy that lost something.

    What such a copy gives back lies on the steps of its codec, so the next one would seem exact.
    """
    if entry.slot is None:
        return not entry.records or is_lossless(entry.records[0].codec)
    checksum = read_header(server.cache.header(entry.slot)).checksum
    return all(record.checksum == checksum for record in entry.records)


def choose(schema: Schema, sample: Sample) -> tuple[tuple[Codec, Codec], ...]:
    """Return the codecs of keys and values, by layer, that keep to what a namespace asked for."""
    raw_bits = 8.0 * DTYPE_BYTES[schema.geometry.dtype]
    rungs: dict[Plane, list[Rung]] = {}
    for layer in range(schema.geometry.layers):
        for side in (0, 1):
            rungs[layer, side] = [Rung(Codec.RAW, raw_bits, 0.0)]
            for codec, layers in zip(LADDER, sample.measured, strict=True):
                quality = layers[layer][side]
                rungs[layer, side].append(Rung(codec, quality.bits, quality.relative_l2))
    if schema.error_max:
        chosen = choose_within(rungs, schema.error_max)
    else:
        chosen = choose_ratio(rungs, schema.ratio_min, raw_bits)
    return tuple((chosen[layer, 0], chosen[layer, 1]) for layer in range(schema.geometry.layers))


async def tune(server: "Server") -> None:
    """Choose codecs for the namespaces that want that, until cancelled."""
    num_pages: dict[bytes, int] = {}  # that had been put when a namespace was measured last
    complaints: dict[bytes, str] = {}
    rest_s = LOOK_S
    while True:
        await anyio.sleep(rest_s)
        schemas = _due(server, num_pages)
        began_s = anyio.current_time()
        names = await _filled(server, schemas)
        rest_s = max(LOOK_S, REST * (anyio.current_time() - began_s))
        for schema in schemas:
            name = schema.namespace
            if name in names:
                num_pages[name] = max(server.cache.stats.pages_put, 1)
                try:
                    await _tune(server, schema)
                except CacheError as error:
                    if complaints.get(name) != str(error):
                        logger.warning("namespace %r: not measured: %s", name, error)
                    complaints[name] = str(error)
        for gone in num_pages.keys() - set(server.cache.namespaces.names()):
            del num_pages[gone]
            complaints.pop(gone, None)


def not_tuned() -> None:
    """Say what a crash of ``tune`` means: nothing is lost but the choosing."""
    logger.error("codecs are not chosen any more until the server starts again")


def _due(server: "Server", num_pages: dict[bytes, int]) -> list[Schema]:
    """Return the namespaces whose codecs are to be chosen, for the first time or again."""
    namespaces, put = server.cache.namespaces, server.cache.stats.pages_put
    due: list[Schema] = []
    for name in namespaces.names():
        schema = namespaces.find(name)
        if schema is None or not schema.is_tuned:
            continue
        if num_pages.get(name, 0) > put:  # CONFIG RESETSTAT
            num_pages[name] = max(put, 1)
        if name not in namespaces.chosen or put >= AGAIN * num_pages.get(name, 0):
            due.append(schema)
    return due


async def _filled(server: "Server", schemas: list[Schema]) -> set[bytes]:
    """Return the names of those namespaces that have enough pages to choose by."""
    left = {schema.namespace: schema for schema in schemas}
    counts: Counter[bytes] = Counter()
    async with aclosing(_steps(server)) as steps:
        async for entries, _ in steps:
            for entry in entries if left else ():
                schema = left.get(entry.namespace)
                if schema is not None and _is_of(entry, schema) and _is_as_put(server, entry):
                    counts[entry.namespace] += 1
                    if counts[entry.namespace] == PAGES_MIN:
                        del left[entry.namespace]
            if not left:
                break
    return {name for name, count in counts.items() if count >= PAGES_MIN}


async def _tune(server: "Server", schema: Schema) -> None:
    name, namespaces = schema.namespace, server.cache.namespaces
    sample = await measure_namespace(server, schema, LADDER)
    if sample is None or namespaces.find(name) != schema:
        return
    chosen = namespaces.chosen[name] = choose(schema, sample)
    if server.schema_files is not None:
        await server.schema_files.save()
    logger.info(
        "namespace %r: codecs chosen from %d pages: %s",
        name.decode(errors="replace"),
        sample.pages,
        " ".join(f"{key.name}/{value.name}".lower() for key, value in chosen),
    )
