"""KV.SEQ.PUT: the pages of a prompt, whole or as rectangles.

By the time the command runs all payloads are there, most of them in slots of their own. So a put of
whole pages is one step: room is found for the small ones first, and then nothing can fail, so the
pages are published in order, each behind its parent. When a payload had no room, those before it are
stored all the same: they are a prefix, and the client goes on from there.

Rectangles are copied into pages that are shared by all connections (engine/assembly.py), a part at a
time between other commands. Their payloads are held until that is done, whether or not the client
still waits: what came whole is not thrown away.
"""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from respkv.chain import Prompt
from respkv.engine.assembly import Assembly
from respkv.engine.entry import Entry, Put
from respkv.engine.landing import Landing
from respkv.engine.namespaces import Schema
from respkv.engine.sequences import Piece
from respkv.errors import CacheError, CommandError, SchemaMismatch, SequenceGap
from respkv.page import Geometry
from respkv.server.arguments import Words, count, count_ms, shown, value_of
from respkv.server.body import Refused
from respkv.server.commands.pages import LEVELS, level_of
from respkv.server.prompts import ChainWords, Portion, prompt_of, schema_of
from respkv.tiers.rectangles import STEP_BYTES, Rectangle, write_steps
from respkv.tiers.slab import Slot
from respkv.wire.parser import Args

if TYPE_CHECKING:
    from respkv.server.session import Session

FIRST_PAYLOAD = 4


@dataclass(slots=True)
class SequencePut:
    """One call of KV.SEQ.PUT.

    payloads: bytes, full landings, or what stands for those that found no room.
    parts:    logits and hidden state of the prompt's end, by name.
    """

    prompt: Prompt
    schema: Schema
    payloads: Sequence[Any]
    first: int
    portion: Portion
    rectangle: Rectangle
    how: Put
    pin_s: float
    parts: dict[bytes, Any] = field(default_factory=dict)

    def shape(self, piece: Piece) -> Geometry:
        """Return the shape of a whole page, or of the partial one at the end."""
        return replace(self.schema.geometry, tokens=piece.num_tokens)


def read_put(session: "Session", args: Args) -> SequencePut:
    """Read a call of KV.SEQ.PUT. Raises CommandError or SchemaMismatch."""
    number = count(args[3], "numpayloads")
    if number > len(args) - FIRST_PAYLOAD:
        raise CommandError("Number of payloads can't be greater than number of args")
    words = Words(args, FIRST_PAYLOAD + number)
    chain, portion = ChainWords(), Portion()
    parts: dict[bytes, Any] = {}
    values: dict[bytes, int] = {}
    level = None
    seen: set[bytes] = set()
    while words:
        word = words.word()
        if chain.take(word, words) or portion.take(word, words):
            continue
        if word in seen:
            raise words.unexpected()
        seen.add(word)
        if word in (b"LOGITS", b"HIDDEN"):
            parts[word.lower()] = words.payload()
        elif word == b"FROM":
            values[word] = words.count("FROM")
        elif word in (b"PX", b"PIN"):
            values[word] = count_ms(words.take(), word.decode())
        elif word == b"PRIORITY":
            values[word] = words.integer()
        elif word in LEVELS and not seen & (LEVELS.keys() - {word}):
            level = level_of(session, word)
        else:
            raise words.unexpected()
    prompt = prompt_of(session, args[1], args[2], chain.extras())
    schema = schema_of(session, prompt.namespace)
    if not prompt.num_tokens:
        raise CommandError("a put needs at least 1 token")
    if not number and not parts:
        raise CommandError("numpayloads 0 needs LOGITS or HIDDEN")
    ttl_ms = values.get(b"PX", schema.ttl_ms)
    how = Put(
        "kvpage",
        expires_ms=session.server.clock.wall_ms + ttl_ms if ttl_ms else 0,
        priority=values.get(b"PRIORITY", 0),
        level=level,
        tenant=chain.tenant,
        session=chain.session,
    )
    return SequencePut(
        prompt,
        schema,
        args[FIRST_PAYLOAD : FIRST_PAYLOAD + number],
        values.get(b"FROM", 0),
        portion,
        portion.rectangle(schema),
        how,
        values.get(b"PIN", 0) / 1000,
        parts,
    )


# -- whole pages ------------------------------------------------------------------------------


def put_pages(session: "Session", put: SequencePut) -> None:
    """Store pages, then what belongs to the end of the prompt; answer with how many.

    Raises OutOfMemory, QuotaExceeded; the pages before the one without room are stored.
    """
    cache, sequences = session.cache, session.server.sequences
    until = cache.clock.now + session.server.config.answer_lease / 1000
    pieces = sequences.plan(put.prompt, put.first, until=until) if put.payloads else []
    _check_payloads(session, put, pieces)
    made: list[Landing] = []
    stored = there = 0
    try:
        values, failure = _find_room(session, put, pieces, made)
        for piece, value in zip(pieces, values, strict=False):
            entry, is_new = _store(session, put, piece, value)
            stored += is_new
            there += not is_new
            if put.pin_s:
                _pin(session, entry, put.pin_s)
        if failure is None:
            for what, value in zip(put.parts, values[len(pieces) :], strict=True):
                _store_part(session, put, what, value)
    finally:
        for landing in made:
            cache.abandon(landing)
        sequences.tidy()
    if failure is not None:
        raise failure
    session.send([stored, there])


def _find_room(
    session: "Session", put: SequencePut, pieces: Sequence[Piece], made: list[Landing]
) -> tuple[list[Any], CacheError | None]:
    """Return a landing for each page that is not there, as far as there is room, and why not.

    Afterwards nothing is evicted any more. made: what was reserved here is added to it.
    """
    values: list[Any] = []
    theres = [piece.there for piece in pieces] + [None] * len(put.parts)
    for payload, there in zip([*put.payloads, *put.parts.values()], theres, strict=True):
        if there is not None or isinstance(payload, Landing):
            values.append(payload)
            continue
        try:
            payload = value_of(payload)  # raises why there is no room
            landing = session.cache.reserve(len(payload))
        except CacheError as error:
            return values, error
        made.append(landing)
        landing.write(payload)
        values.append(landing)
    return values, None


def _store(session: "Session", put: SequencePut, piece: Piece, value: Any) -> tuple[Entry, bool]:
    """Return the entry of a page, and whether it is new."""
    cache = session.cache
    sequences = session.server.sequences
    if piece.there is None:
        entry = cache.commit(piece.key, value, sequences.put_options(piece, put.how))
        cache.stats.pages_put += 1
        return entry, True
    if piece.there.position < 0:
        raise CommandError("a page left while its copy arrived; put it again", "BUSY")
    sequences.describe(piece, put.how)
    cache.stats.pages_skipped += 1
    return piece.there, False


def _store_part(session: "Session", put: SequencePut, what: bytes, value: Landing) -> None:
    cache, sequences = session.cache, session.server.sequences
    key = sequences.part_key(put.prompt, what)
    how = sequences.part_options(put.prompt, put.how)
    there = cache.has_page(key, value.nbytes)
    if there is not None:
        cache.describe(there, how)
    else:
        cache.commit(key, value, how)


def _pin(session: "Session", entry: Entry, seconds: float) -> None:
    session.cache.pin(entry, session.cache.clock.now + seconds)


def _check_payloads(session: "Session", put: SequencePut, pieces: Sequence[Piece]) -> None:
    """Raise unless there is a payload of the right size for each page, and none is empty."""
    if len(put.payloads) != len(pieces):
        raise CommandError(
            f"tokens {put.first} to {put.prompt.num_tokens - 1} are {len(pieces)} pages of"
            f" {put.prompt.page_tokens} tokens, and {len(put.payloads)} payloads came"
        )
    for piece, payload in zip(pieces, put.payloads, strict=True):
        expected = put.rectangle.shape(put.shape(piece)).page_bytes
        if _size(payload) != expected:
            session.cache.history.note(piece.key, "schema")
            last = piece.first_token + piece.num_tokens - 1
            raise SchemaMismatch(
                f"tokens {piece.first_token} to {last} of namespace"
                f" {shown(put.schema.namespace)!r} have {expected} bytes, their payload has"
                f" {_size(payload)}"
            )
    for what, payload in put.parts.items():
        if not _size(payload):
            raise CommandError(f"{what.decode().upper()} has at least 1 byte")


def _size(payload: Any) -> int:
    return payload.nbytes if isinstance(payload, Landing | Refused) else len(payload)


# -- rectangles -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Copy:
    """One rectangle on its way into its page."""

    piece: Piece
    how: Put
    payload: bytes | memoryview


def put_rectangles(session: "Session", put: SequencePut) -> Awaitable[None]:
    """Add rectangles to their pages; answer with how many pages became whole by it.

    Returns: what does it; the payloads are held until then.
    """
    sequences = session.server.sequences
    pieces = _plan(session, put) if put.payloads else []
    _check_payloads(session, put, pieces)
    for payload in (*put.payloads, *put.parts.values()):
        value_of(payload)  # raises why there was no room for it
    slots: list[Slot] = []
    copies = []
    for piece, payload in zip(pieces, put.payloads, strict=True):
        how = sequences.put_options(piece, put.how)
        copies.append(_Copy(piece, how, _held(session, payload, slots)))
    parts = {what: bytes(_held(session, payload, slots)) for what, payload in put.parts.items()}
    return _assemble(session, put, copies, parts, slots)


def _held(session: "Session", payload: Any, slots: list[Slot]) -> bytes | memoryview:
    if not isinstance(payload, Landing):
        data: bytes = payload
        return data
    # The session gives the landing back when the command has run, which is before it is copied.
    memory = payload.memory
    session.cache.borrow(payload.slot)
    slots.append(payload.slot)
    return memory


def _plan(session: "Session", put: SequencePut) -> Sequence[Piece]:
    """Return the pages of a put, those before which are there or are being put together."""
    cache, server = session.cache, session.server
    until = cache.clock.now + server.config.answer_lease / 1000
    try:
        return server.sequences.plan(put.prompt, put.first, until=until)
    except SequenceGap:
        pieces = server.sequences.plan(put.prompt, 0, until=until)
        index = put.first // put.prompt.page_tokens
        if all(each.is_there or server.assemblies.find(each.key) for each in pieces[:index]):
            return pieces[index:]
        raise


async def _assemble(
    session: "Session",
    put: SequencePut,
    copies: Sequence[_Copy],
    parts: dict[bytes, bytes],
    slots: list[Slot],
) -> None:
    """Copy rectangles into their pages, publish what is whole, and answer.

    Raises OutOfMemory when a page finds no room; the rectangles before it are kept.
    """
    cache, server = session.cache, session.server
    there = 0
    try:
        for copy in copies:
            is_last = copy is copies[-1]
            if cache.find(copy.piece.key) is not None or _covers(copy.piece.there):
                there += 1
                continue
            shape = put.shape(copy.piece)
            assembly = server.assemblies.begin(
                copy.piece.key, copy.piece.parent_key, shape, copy.how, put.schema.identity
            )
            assembly.pin_s = max(assembly.pin_s, put.pin_s)
            if is_last:
                _add_parts(session, put, assembly, parts)
            await _copy(session, assembly, put.rectangle, copy.payload)
    finally:
        for slot in slots:
            cache.restore(slot)
    server.clock.refresh()
    keys = {copy.piece.key for copy in copies}
    with session.promising():
        try:
            published = server.assemblies.publish()
            if parts and (not copies or _is_there(session, copies[-1].piece)):
                _put_parts(session, put, parts)
        finally:
            server.sequences.tidy()
        session.send([sum(entry.key in keys for entry in published), there])


def _covers(there: Entry | None) -> bool:
    return there is not None and there.position >= 0


def _is_there(session: "Session", piece: Piece) -> bool:
    return session.cache.find(piece.key) is not None or _covers(piece.there)


def _add_parts(
    session: "Session", put: SequencePut, assembly: Assembly, parts: dict[bytes, bytes]
) -> None:
    """Have the parts of the prompt's end published with its last page."""
    sequences = session.server.sequences
    for what, payload in parts.items():
        key = sequences.part_key(put.prompt, what)
        how = replace(
            put.how,
            expires_ms=0,
            parent=assembly.key,
            tokens=assembly.shape.tokens,
            depth=put.prompt.num_tokens - assembly.shape.tokens,
        )
        session.server.assemblies.add_part(assembly, key, payload, how)


def _put_parts(session: "Session", put: SequencePut, parts: dict[bytes, bytes]) -> None:
    """Store the parts of a prompt whose end is there."""
    cache = session.cache
    for what, payload in parts.items():
        landing = cache.reserve(len(payload))
        try:
            landing.write(payload)
            _store_part(session, put, what, landing)
        finally:
            cache.abandon(landing)


async def _copy(
    session: "Session", assembly: Assembly, rectangle: Rectangle, payload: bytes | memoryview
) -> None:
    """Copy one rectangle into its page, unless it is there by then; hash a page that is whole."""
    cells = rectangle.cells(assembly.shape)
    if assembly.needs(cells):
        memory, copied = assembly.landing.memory, 0
        for nbytes in write_steps(memory, assembly.shape, rectangle, memoryview(payload)):
            copied += nbytes
            if copied >= STEP_BYTES:
                copied = 0
                await anyio.lowlevel.checkpoint()
                if not assembly.needs(cells):
                    break
        else:
            assembly.cover(cells)
            if assembly.is_open and assembly.is_whole:
                for _ in assembly.hash_steps():
                    await anyio.lowlevel.checkpoint()
                session.server.assemblies.end(assembly)
