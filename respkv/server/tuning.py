"""Measuring codecs on live pages, and choosing them for namespaces that said "auto".

A choice is made from a sample of the pages that a namespace has, in a thread, and made again when
it has ``AGAIN`` times as many, since the first prompts of a day may not be like the rest. Pages
that are stored already stay as they are.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel
import anyio.to_thread

from respkv.engine.entry import Entry
from respkv.engine.namespaces import Schema
from respkv.engine.rungs import Plane, Rung, choose_ratio, choose_within
from respkv.errors import CacheError
from respkv.kernels.layout import Codec
from respkv.page import DTYPE_BYTES
from respkv.server.loads import is_cold

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
LOOK_KEYS_MAX: Final = 100_000


@dataclass(frozen=True, slots=True)
class Sample:
    """What codecs do to some pages: for each codec, for each layer, of keys and of values."""

    pages: int
    measured: "list[list[tuple[Quality, Quality]]]"


async def measure_namespace(
    server: "Server", schema: Schema, codecs: Sequence[Codec]
) -> Sample | None:
    """Measure codecs on pages of a namespace; None: there are none.

    The pages are held meanwhile. Raises TierError when those in files cannot be read.
    """
    pages_max = max(1, min(PAGES_MAX, SAMPLE_BYTES_MAX // schema.geometry.page_bytes))
    entries = await _sample(server, schema, pages_max)
    from respkv.kernels.quality import measure_pages  # torch: only who measures needs it

    payloads: list[bytes] = []
    for entry in entries:
        if is_cold(entry) and server.mover is not None:
            load = server.mover.start_load(entry)
            try:
                await load.wait()
                if load.error is not None:
                    raise load.error
                _copy(server, entry, payloads)
            finally:
                server.mover.release(load)
        else:
            _copy(server, entry, payloads)
    if not payloads:
        return None
    views = [memoryview(payload) for payload in payloads]
    measured = await anyio.to_thread.run_sync(
        measure_pages, views, schema.geometry, codecs, limiter=server.form_threads
    )
    return Sample(len(payloads), measured)


def _copy(server: "Server", entry: Entry, payloads: list[bytes]) -> None:
    if entry.slot is not None:
        payloads.append(bytes(server.cache.payload(entry.slot)))
    elif entry.value is not None:
        payloads.append(entry.value)


async def _sample(server: "Server", schema: Schema, pages_max: int) -> list[Entry]:
    """Return some pages of a namespace, those in memory first."""
    cache, found = server.cache, list[Entry]()
    cursor = looked_at = 0
    while looked_at < LOOK_KEYS_MAX:
        cursor, entries = cache.index.scan(cursor, STEP)
        looked_at += STEP
        found += [entry for entry in entries if _is_of(entry, schema)]
        found.sort(key=is_cold)
        del found[pages_max:]
        if not cursor or (len(found) == pages_max and not is_cold(found[-1])):
            break
        await anyio.lowlevel.checkpoint()
    return found


def _is_of(entry: Entry, schema: Schema) -> bool:
    return (
        entry.kind == "kvpage"
        and entry.namespace == schema.namespace
        and entry.nbytes == schema.geometry.page_bytes
    )


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
    num_pages: dict[bytes, int] = {}  # of a namespace, when it was looked at last
    while True:
        await anyio.sleep(LOOK_S)
        namespaces = server.cache.namespaces
        tuned = [namespaces.find(name) for name in namespaces.names()]
        for schema in tuned:
            if schema is not None and schema.is_tuned:
                try:
                    await _tune(server, schema, num_pages)
                except CacheError as error:
                    logger.warning("namespace %r: not measured: %s", schema.namespace, error)


def not_tuned() -> None:
    """Say what a crash of ``tune`` means: nothing is lost but the choosing."""
    logger.error("codecs are not chosen any more until the server starts again")


async def _tune(server: "Server", schema: Schema, num_pages: dict[bytes, int]) -> None:
    name, namespaces, put = schema.namespace, server.cache.namespaces, server.cache.stats.pages_put
    is_chosen = name in namespaces.chosen
    if is_chosen and put < AGAIN * num_pages.get(name, 0):
        return
    if not is_chosen and len(await _sample(server, schema, PAGES_MIN)) < PAGES_MIN:
        return
    num_pages[name] = max(put, 1)
    sample = await measure_namespace(server, schema, LADDER)
    if sample is None or namespaces.find(name) is not schema:
        return
    namespaces.chosen[name] = choose(schema, sample)
    logger.info(
        "namespace %r: codecs chosen from %d pages: %s",
        name.decode(errors="replace"),
        sample.pages,
        " ".join(f"{key.name}/{value.name}".lower() for key, value in namespaces.chosen[name]),
    )
