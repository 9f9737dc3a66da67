"""Keys, whatever their values: existence, deletion, iteration, what they cost.

KEYS looks at every key, so it runs as a task of its own that lets others in between, and ends when
its client leaves.
"""

import random
from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING

import anyio.lowlevel

from respkv.engine.copies import RECORD_BYTES
from respkv.engine.entry import ENTRY_BYTES, SMALL_BYTES_MAX, Entry
from respkv.engine.history import Reason
from respkv.errors import CommandError
from respkv.server.arguments import Words
from respkv.server.places import stored_in
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.tiers.format import HEADER_BYTES
from respkv.wire import reply
from respkv.wire.glob import Glob, compile_glob
from respkv.wire.parser import Args

if TYPE_CHECKING:
    from respkv.engine.mover import Mover

KEYS_STEP = 2000  # entries matched before others are let in
SCAN_COUNT = 10
SCAN_COUNT_MAX = 100_000
CURSOR_MAX = (1 << 64) - 1
CURSOR_DIGITS_MAX = 64


@command("exists")
def exists(session: Session, args: Args) -> None:
    """Count the keys that are there, and promise that a get which follows will find them."""
    cache = session.cache
    until = cache.clock.now + session.server.config.answer_lease / 1000
    found = 0
    for key in args[1:]:
        entry = cache.find(key)
        if entry is not None:
            found += 1
            entry.touched = cache.clock.now
            cache.promise(entry, until)
    session.out.append(reply.integer(found))


@command("touch")
def touch(session: Session, args: Args) -> None:
    """Count the keys that are there and mark them as used."""
    mark_used(session, args[1:])


def mark_used(session: Session, keys: Iterable[bytes]) -> None:
    """Mark keys as used; answer with how many are there."""
    cache = session.cache
    found = 0
    for key in keys:
        entry = cache.find(key)
        if entry is not None:
            entry.touched = cache.clock.now
            entry.hits += 1
            found += 1
    session.out.append(reply.integer(found))


@command("del")
def del_(session: Session, args: Args) -> None:
    """Delete keys; answer with how many there were."""
    session.out.append(reply.integer(_delete(session, args[1:], "deleted")))


@command("unlink")
def unlink(session: Session, args: Args) -> None:
    """Delete keys; memory comes back at once here too."""
    session.out.append(reply.integer(_delete(session, args[1:], "deleted")))


def _delete(session: Session, keys: Iterable[bytes], reason: Reason) -> int:
    deleted = 0
    for key in keys:
        entry = session.cache.find(key)
        if entry is not None:
            session.cache.delete(entry, reason)
            deleted += 1
    return deleted


@command("type")
def type_(session: Session, args: Args) -> None:
    """Answer with string, kvpage or none."""
    entry = session.cache.find(args[1])
    session.out.append(reply.simple("none" if entry is None else entry.kind))


@command("dbsize")
def dbsize(session: Session, args: Args) -> None:
    """Count the keys, those included whose TTL has just ended."""
    session.out.append(reply.integer(len(session.cache.entries)))


@command("randomkey")
def randomkey(session: Session, args: Args) -> None:
    """Answer with a key that is there, each with about the same chance."""
    index = session.cache.index
    while index.entries:
        entry = index.at(random.getrandbits(62))
        if entry is not None and session.cache.find(entry.key) is not None:
            session.send_value(entry.key)
            return
    session.send_nil()


@command("flushall")
def flushall(session: Session, args: Args) -> Awaitable[None] | None:
    """Delete every key."""
    return _flush(session, args)


@command("flushdb")
def flushdb(session: Session, args: Args) -> Awaitable[None] | None:
    """Delete every key; there is one database."""
    return _flush(session, args)


def _flush(session: Session, args: Args) -> Awaitable[None] | None:
    words = Words(args, 1)
    if words and words.word() not in (b"ASYNC", b"SYNC"):
        raise CommandError("syntax error")
    if words:
        raise CommandError("syntax error")
    mover = session.server.mover
    if mover is not None:
        return _flush_files(session, mover)
    session.cache.flush()
    session.out.append(reply.OK)
    return None


async def _flush_files(session: Session, mover: "Mover") -> None:
    """Delete every key, and answer when no file brings it back.

    Cancelled: memory is empty, some files may not know it.
    """
    await mover.flush_all()
    session.out.append(reply.OK)


@command("scan")
def scan(session: Session, args: Args) -> None:
    """Answer with the next cursor and some keys; a whole scan meets every lasting key once."""
    cursor = parse_cursor(args[1])
    step, glob, kind = SCAN_COUNT, None, None
    words = Words(args, 2)
    while words:
        word = words.word()
        if word == b"COUNT":
            step = min(_at_least(words, "COUNT", 1), SCAN_COUNT_MAX)
        elif word == b"MATCH":
            glob = compile_glob(words.take())
        elif word == b"TYPE":
            kind = words.take().decode(errors="replace").lower()
        else:
            raise words.unexpected()
    cursor, found = session.cache.index.scan(cursor, step)
    keys = [entry.key for entry in found if _is_wanted(session, entry, glob, kind)]
    session.send([str(cursor), keys])


def _is_wanted(session: Session, entry: Entry, glob: Glob | None, kind: str | None) -> bool:
    return (
        (glob is None or glob.match(entry.key))
        and (kind is None or entry.kind == kind)
        and session.cache.find(entry.key) is not None
    )


def _at_least(words: Words, what: str, least: int) -> int:
    """Take a number that makes the command a syntax error, in Redis's view, when it is too low."""
    number = words.integer()
    if number < least:
        raise CommandError(f"syntax error, {what} must be at least {least}, not {number}")
    return number


def parse_cursor(arg: bytes) -> int:
    """Read a SCAN cursor as C's strtoul does, so also a sign and nothing at all.

    Raises CommandError.
    """
    digits = arg[1:] if arg[:1] in (b"+", b"-") else arg
    if not arg:
        return 0
    if not digits.isdigit() or len(digits) > CURSOR_DIGITS_MAX or int(digits) > CURSOR_MAX:
        raise CommandError("invalid cursor")
    return -int(digits) % (CURSOR_MAX + 1) if arg[:1] == b"-" else int(digits)


@command("keys")
async def keys(session: Session, args: Args) -> None:
    """Answer with every key that a pattern matches.

    Cancelled: nothing was answered.
    """
    glob = compile_glob(args[1])
    cache = session.cache
    matching: list[bytes] = []
    cursor = 0
    while not session.is_lost:
        cursor, found = cache.index.scan(cursor, KEYS_STEP)
        for entry in found:
            if glob.match(entry.key) and not _has_ended(session, entry):
                matching.append(entry.key)
        if not cursor:
            session.send(matching)
            return
        await anyio.lowlevel.checkpoint()


def _has_ended(session: Session, entry: Entry) -> bool:
    return 0 < entry.expires_ms <= session.server.clock.wall_ms


@command("memory|usage")
def memory_usage(session: Session, args: Args) -> None:
    """Answer with the bytes of memory that a key takes: its slot, key, index entry and copies.

    With TIERS, answer with what it takes in each tier instead, and in which codec.
    """
    words = Words(args, 3)
    is_by_tier = False
    while words:
        word = words.word()
        if word == b"TIERS":
            is_by_tier = True
        elif word == b"SAMPLES":
            _at_least(words, "SAMPLES", 0)
        else:
            raise words.unexpected()
    entry = session.cache.find(args[2])
    if entry is None:
        session.send_nil()
        return
    if is_by_tier:
        places = stored_in(session, entry).items()
        session.send(
            {name: {"codec": place.codec, "bytes": place.nbytes} for name, place in places}
        )
        return
    value = 0 if entry.value is None else entry.nbytes
    if entry.slot is not None:
        value = HEADER_BYTES + entry.slot.payload_max
    records = len(entry.records) * RECORD_BYTES
    session.out.append(reply.integer(value + len(entry.key) + ENTRY_BYTES + records))


@command("object|encoding")
def object_encoding(session: Session, args: Args) -> None:
    """Answer with embstr for a value that is, or would be, on the heap, raw for one in a slot."""
    entry = _object(session, args)
    if entry is not None:
        is_small = entry.kind == "string" and entry.nbytes <= SMALL_BYTES_MAX
        session.send_value(b"embstr" if is_small else b"raw")


@command("object|refcount")
def object_refcount(session: Session, args: Args) -> None:
    """Answer with the number of holders of a value: the index and its readers."""
    entry = _object(session, args)
    if entry is not None:
        session.out.append(reply.integer(1 if entry.slot is None else entry.slot.holders))


@command("object|idletime")
def object_idletime(session: Session, args: Args) -> None:
    """Answer with the seconds since a key was last used."""
    entry = _object(session, args)
    if entry is not None:
        session.out.append(reply.integer(int(session.cache.clock.now - entry.touched)))


@command("object|freq")
def object_freq(session: Session, args: Args) -> None:
    """Answer with how often a key was used since it was stored."""
    entry = _object(session, args)
    if entry is not None:
        session.out.append(reply.integer(entry.hits))


def _object(session: Session, args: Args) -> Entry | None:
    """Return the entry, or answer null when there is none."""
    entry = session.cache.find(args[2])
    if entry is None:
        session.send_nil()
    return entry
