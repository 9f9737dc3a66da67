"""KV.SEQ.PUT of rectangles: each worker's layers and heads, put together to whole pages.

The pages are shared by all connections (engine/assembly.py). A rectangle is copied into its page a
part at a time between other commands, and its payload is held until then, whether or not the client
still waits: what came whole is not thrown away.
"""

from collections.abc import Awaitable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from respkv.engine.assembly import Assembly
from respkv.engine.entry import Entry
from respkv.engine.landing import Landing
from respkv.errors import CacheError, OutOfMemory, PinRefused, SequenceGap
from respkv.server.arguments import value_of
from respkv.server.keeping import pinned_until
from respkv.server.puts import (
    KEPT_S_MIN,
    SequencePut,
    Target,
    check_payloads,
    pin_end,
    plan,
    refresh,
    send_counts,
    store_part,
    targets_of,
)
from respkv.server.slices import check_schema, check_whole, pause, slices_of
from respkv.tiers.rectangles import STEP_BYTES, Rectangle, write_steps
from respkv.tiers.slab import Slot

if TYPE_CHECKING:
    from respkv.server.session import Session
    from respkv.server.state import Server

PAUSE_S = 0.05


def put_rectangles(session: "Session", put: SequencePut, rectangle: Rectangle) -> Awaitable[None]:
    """Add rectangles to their pages; answer with how many pages became whole by it.

    Pages that are there already are kept from now on as the put says.
    Returns: what does it; the payloads are held until then.
    """
    check_payloads(put, session.cache.history)
    check_whole(session, put)  # not when all but the last of them have come
    for payload in (*put.payloads, *put.parts.values()):
        value_of(payload)  # raises why there was no room for it
    slots: list[Slot] = []
    payloads = [_held(session, payload, slots) for payload in put.payloads]
    parts = {what: bytes(_held(session, payload, slots)) for what, payload in put.parts.items()}
    return _put_slices(session, replace(put, payloads=payloads, parts=parts), rectangle, slots)


def _held(session: "Session", payload: Any, slots: list[Slot]) -> memoryview:
    if not isinstance(payload, Landing):
        return memoryview(payload)
    # The session gives the landing back when the command has run, which is before it is copied.
    memory = payload.memory
    session.cache.borrow(payload.slot)
    slots.append(payload.slot)
    return memory


async def _put_slices(
    session: "Session", put: SequencePut, rectangle: Rectangle, slots: list[Slot]
) -> None:
    """Add rectangles to their pages, slice by slice, publish what is whole, and answer."""
    whole = there = 0
    noted: list[tuple[int, int]] = []
    try:
        for part in slices_of(put):
            if part.seen > put.seen:
                await pause(session, put)
            copies = await _copy_slice(session, part, rectangle)
            since = session.cache.copies.ticket
            made, found = _end_slice(session, part, copies)
            noted.append((since, session.cache.copies.ticket))
            whole, there = whole + made, there + found
    finally:
        for slot in slots:
            session.cache.restore(slot)
    send_counts(session, [whole, there], noted)


async def _copy_slice(
    session: "Session", put: SequencePut, rectangle: Rectangle
) -> list[tuple[Target, Assembly | None]]:
    """Copy rectangles into their pages; return the pages, without an assembly if they are there.

    Raises OutOfMemory when a page finds no room for long; the rectangles before it are kept.
    """
    server, cache, done = session.server, session.cache, list[tuple[Target, Assembly | None]]()

    def is_coming(key: bytes) -> bool:
        return server.assemblies.find(key) is not None or cache.has_page(key, nbytes) is not None

    nbytes = put.schema.geometry.page_bytes
    pieces = plan(session, put, is_coming) if put.payloads else []
    targets = targets_of(put, pieces, session)
    pin_end(session, put, targets)
    for target, payload in zip(targets, put.payloads, strict=True):
        if _find_there(session, target) is not None:
            done.append((target, None))
            continue
        piece = target.piece
        if put.group.name and not (piece.is_there or server.assemblies.find(piece.key)):
            raise SequenceGap(f"put the page from token {piece.first_token} on first")
        assembly = await _begin(session, put, target)
        assembly.pin_ms = max(assembly.pin_ms, put.pin_ms)
        done.append((target, assembly))
        if target is targets[-1] and not put.group.name:
            _add_parts(session, put, assembly)
        await _copy(session, assembly, rectangle, payload)
    return done


def _end_slice(
    session: "Session", put: SequencePut, done: Sequence[tuple[Target, Assembly | None]]
) -> tuple[int, int]:
    """Publish what is whole, and have what is there kept as the put says; return how many are which.

    Raises QuotaExceeded or PinRefused when that became of one of the pages; the others are stored.
    """
    server, whole, there, failures = session.server, 0, 0, list[CacheError]()
    server.clock.refresh()
    try:
        server.assemblies.publish(partial(_pin, session))
        for target, assembly in done:
            if assembly is None:
                there += 1
                failures += _refresh(session, put, target)
            elif assembly.failure is not None:
                failures.append(assembly.failure)
            elif assembly.is_news:
                assembly.is_news = False
                whole += 1
        if failures:
            raise failures[0]
        if put.parts and (not done or _find_there(session, done[-1][0]) is not None):
            _put_parts(session, put)
    finally:
        server.sequences.tidy()
        server.announce_room()
    return whole, there


def _refresh(session: "Session", put: SequencePut, target: Target) -> list[CacheError]:
    """Have a page that was there kept as a put says, as if it had come whole; return what refused.

    It may have gone while other rectangles were copied; then there is nothing to keep.
    """
    entry = _find_there(session, target)
    if entry is None:
        return []
    session.cache.stats.pages_skipped += 1
    refresh(session, put, target, entry)
    try:
        if put.pin_ms:
            _pin(session, entry, put.pin_ms)
    except PinRefused as error:
        return [error]
    return []


async def _begin(session: "Session", put: SequencePut, target: Target) -> Assembly:
    """Return the page that a rectangle is for, once there is room for it.

    A worker that is ahead of the others waits here until they have completed some pages, and is not
    read from meanwhile. Raises OutOfMemory after ``reserve-timeout``, and SchemaMismatch when the
    schema went meanwhile.
    """
    server = session.server
    give_up = anyio.current_time() + server.config.reserve_timeout / 1000
    while True:
        check_schema(session, put)
        _keep_front(session, put)
        try:
            return server.assemblies.begin(
                target.key, target.parent_key, target.shape, target.how, put.schema.identity
            )
        except OutOfMemory:
            if anyio.current_time() >= give_up or target.shape.page_bytes > _most(server):
                session.cache.stats.oom += 1
                raise
        await server.wait_for_news(PAUSE_S)
        server.clock.refresh()


def _keep_front(session: "Session", put: SequencePut) -> None:
    """Keep what the last slice stored a little longer, as this one takes many turns (plan in puts.py)."""
    cache = session.cache
    page = cache.find(put.prompt.key(put.seen)) if put.seen else None
    if page is not None:
        cache.promise(page, cache.clock.now + KEPT_S_MIN)


def _most(server: "Server") -> int:
    return min(server.assemblies.bytes_max, server.cache.slabs.payload_bytes_max)


def _find_there(session: "Session", target: Target) -> Entry | None:
    """Return what has a page by now, or None."""
    if target.there is not None and target.there.position >= 0:
        return target.there
    # Under a former schema, or as a string, the key says nothing about the page.
    return session.cache.has_page(target.key, target.shape.page_bytes)


def _pin(session: "Session", entry: Entry, ms: int) -> None:
    """Pin a page that is whole now. Raises PinRefused: others have pinned too much since it began."""
    session.cache.pin(entry, pinned_until(session, ms, entry.nbytes, entry))


def _add_parts(session: "Session", put: SequencePut, assembly: Assembly) -> None:
    """Have the parts of the prompt's end published with its last page."""
    tokens = assembly.shape.tokens
    how = replace(put.how, expires_ms=0, parent=assembly.key, tokens=tokens)
    how = replace(how, depth=put.prompt.num_tokens - tokens)
    for what, payload in put.parts.items():
        key = session.server.sequences.part_key(put.prompt, what)
        session.server.assemblies.add_part(assembly, key, payload, how)


def _put_parts(session: "Session", put: SequencePut) -> None:
    """Store the parts of a prompt whose end is there."""
    cache = session.cache
    for what, payload in put.parts.items():
        landing = cache.reserve(len(payload))
        try:
            landing.write(payload)
            store_part(session, put, what, landing)
        finally:
            cache.abandon(landing)


async def _copy(
    session: "Session", assembly: Assembly, rectangle: Rectangle, payload: memoryview
) -> None:
    """Copy one rectangle into its page, unless it is there by then; hash a page that is whole."""
    cells = rectangle.cells(assembly.shape)
    if not assembly.needs(cells):
        return
    copied = 0
    for nbytes in write_steps(assembly.landing.memory, assembly.shape, rectangle, payload):
        copied += nbytes
        if copied >= STEP_BYTES:
            copied = 0
            await anyio.lowlevel.checkpoint()
            if not assembly.needs(cells):  # others completed it, or it was dropped
                return
    assembly.cover(cells)
    if assembly.is_open and assembly.is_whole:
        for _ in assembly.hash_steps():
            await anyio.lowlevel.checkpoint()
        session.server.assemblies.end(assembly)
