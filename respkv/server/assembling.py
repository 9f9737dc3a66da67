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
from respkv.engine.sequences import Piece
from respkv.errors import OutOfMemory, SchemaMismatch, SequenceGap
from respkv.server.arguments import shown, value_of
from respkv.server.keeping import pinned_until
from respkv.server.puts import (
    SequencePut,
    Target,
    check_number,
    check_payloads,
    kept_until,
    pin_end,
    store_part,
    targets_of,
)
from respkv.tiers.rectangles import STEP_BYTES, Rectangle, write_steps
from respkv.tiers.slab import Slot

if TYPE_CHECKING:
    from respkv.server.session import Session
    from respkv.server.state import Server

PAUSE_S = 0.05


def put_rectangles(session: "Session", put: SequencePut, rectangle: Rectangle) -> Awaitable[None]:
    """Add rectangles to their pages; answer with how many pages became whole by it.

    Returns: what does it; the payloads are held until then.
    """
    check_number(put)
    targets = targets_of(put, _plan(session, put), session) if put.payloads else []
    check_payloads(session, put, targets)
    pin_end(session, put, targets)  # not when all but the last of them have come
    for payload in (*put.payloads, *put.parts.values()):
        value_of(payload)  # raises why there was no room for it
    slots: list[Slot] = []
    payloads = [_held(session, payload, slots) for payload in put.payloads]
    parts = {what: bytes(_held(session, payload, slots)) for what, payload in put.parts.items()}
    copies = list(zip(targets, payloads, strict=True))
    return _assemble(session, put, rectangle, copies, parts, slots)


def _held(session: "Session", payload: Any, slots: list[Slot]) -> memoryview:
    if not isinstance(payload, Landing):
        return memoryview(payload)
    # The session gives the landing back when the command has run, which is before it is copied.
    memory = payload.memory
    session.cache.borrow(payload.slot)
    slots.append(payload.slot)
    return memory


def _plan(session: "Session", put: SequencePut) -> Sequence[Piece]:
    """Return the pages of a put, those before which are there or are being put together."""
    server, cache = session.server, session.cache

    def is_coming(key: bytes) -> bool:
        return server.assemblies.find(key) is not None or cache.has_page(key, nbytes) is not None

    nbytes = put.schema.geometry.page_bytes
    until = kept_until(session)
    return server.sequences.plan(put.prompt, put.first, until=until, is_coming=is_coming)


async def _assemble(
    session: "Session",
    put: SequencePut,
    rectangle: Rectangle,
    copies: Sequence[tuple[Target, memoryview]],
    parts: dict[bytes, bytes],
    slots: list[Slot],
) -> None:
    """Copy rectangles into their pages, publish what is whole, and answer.

    Raises OutOfMemory when a page finds no room for long; the rectangles before it are kept. Raises
    QuotaExceeded or PinRefused when that became of one of its pages; the others are stored.
    """
    server, there, begun = session.server, 0, list[Assembly]()
    try:
        for target, payload in copies:
            if _is_there(session, target):
                there += 1
                continue
            piece = target.piece
            if put.group.name and not (piece.is_there or server.assemblies.find(piece.key)):
                raise SequenceGap(f"put the page from token {piece.first_token} on first")
            assembly = await _begin(session, put, target)
            assembly.pin_ms = max(assembly.pin_ms, put.pin_ms)
            begun.append(assembly)
            if target is copies[-1][0] and not put.group.name:
                _add_parts(session, put, assembly, parts)
            await _copy(session, assembly, rectangle, payload)
    finally:
        for slot in slots:
            session.cache.restore(slot)
    server.clock.refresh()
    keys = {target.key for target, _ in copies}
    with session.promising():
        try:
            published = server.assemblies.publish(partial(_pin, session))
            for assembly in begun:
                if assembly.failure is not None:
                    raise assembly.failure
            if parts and (not copies or _is_there(session, copies[-1][0])):
                _put_parts(session, put, parts)
        finally:
            server.sequences.tidy()
            server.announce_room()
        session.send([sum(entry.key in keys for entry in published), there])


async def _begin(session: "Session", put: SequencePut, target: Target) -> Assembly:
    """Return the page that a rectangle is for, once there is room for it.

    A worker that is ahead of the others waits here until they have completed some pages, and is not
    read from meanwhile. Raises OutOfMemory after ``reserve-timeout``, and SchemaMismatch when the
    schema went meanwhile.
    """
    server = session.server
    give_up = anyio.current_time() + server.config.reserve_timeout / 1000
    while True:
        schema = session.cache.namespaces.find(put.schema.namespace)
        if schema is None or schema.identity != put.schema.identity:
            name = shown(put.schema.namespace)
            raise SchemaMismatch(f"the schema of namespace {name!r} was deleted meanwhile")
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


def _most(server: "Server") -> int:
    return min(server.assemblies.bytes_max, server.cache.slabs.payload_bytes_max)


def _is_there(session: "Session", target: Target) -> bool:
    if target.there is not None and target.there.position >= 0:
        return True
    # Under a former schema, or as a string, the key says nothing about the page.
    return session.cache.has_page(target.key, target.shape.page_bytes) is not None


def _pin(session: "Session", entry: Entry, ms: int) -> None:
    """Pin a page that is whole now. Raises PinRefused: others have pinned too much since it began."""
    session.cache.pin(entry, pinned_until(session, ms, entry.nbytes, entry))


def _add_parts(
    session: "Session", put: SequencePut, assembly: Assembly, parts: dict[bytes, bytes]
) -> None:
    """Have the parts of the prompt's end published with its last page."""
    tokens = assembly.shape.tokens
    how = replace(put.how, expires_ms=0, parent=assembly.key, tokens=tokens)
    how = replace(how, depth=put.prompt.num_tokens - tokens)
    for what, payload in parts.items():
        key = session.server.sequences.part_key(put.prompt, what)
        session.server.assemblies.add_part(assembly, key, payload, how)


def _put_parts(session: "Session", put: SequencePut, parts: dict[bytes, bytes]) -> None:
    """Store the parts of a prompt whose end is there."""
    cache = session.cache
    for what, payload in parts.items():
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
