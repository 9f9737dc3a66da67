"""GET, SET and their kin, with Redis 7's semantics and error texts.

A value that is a page can be read with them too, and a SET over a page makes it a string: whoever
speaks only Redis still sees every key.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from respkv.engine.entry import PLAIN, SMALL_BYTES_MAX, Entry, Put
from respkv.engine.landing import Landing
from respkv.errors import CommandError
from respkv.server.arguments import Words, expiry_ms, integer, value_of
from respkv.server.loads import is_cold
from respkv.server.registry import Later, command, one_key
from respkv.server.session import Session
from respkv.server.streams import stream_values
from respkv.wire import reply
from respkv.wire.calls import Calls
from respkv.wire.parser import Args

_EXPIRY = (b"EX", b"PX", b"EXAT", b"PXAT")
_KEEP_TTL = Put(expires_ms=None)


def _get_together(session: Session, calls: Calls) -> int:
    """Answer with small values that are in memory and have no end, and that there are none."""
    cache, protocol = session.cache, session.protocol
    now, lengths = cache.clock.now, reply.BULK_LINE
    lines: list[bytes] = []
    num_hits = num_misses = 0
    for entry in map(cache.entries.get, calls.args):
        if entry is None:
            lines.append(reply.NIL_LINE[protocol])
            num_misses += 1
            continue
        value = entry.value
        if value is None or entry.expires_ms:
            break
        entry.touched = now
        entry.hits += 1
        lines += (lengths[len(value)], value)
        num_hits += 1
    if lines:
        cache.stats.hits += num_hits
        cache.stats.misses += num_misses
        lines.append(b"")
        session.out.append(reply.CRLF.join(lines))
    return num_hits + num_misses


@command("get", one_key, together=_get_together)
def get(session: Session, args: Args) -> None:
    """Answer with the value of a key."""
    cache = session.cache
    entry = cache.entries.get(args[1])
    if entry is None or entry.expires_ms:
        entry = cache.find(args[1])
        if entry is None:
            cache.stats.misses += 1
            session.send_nil()
            return
    value = entry.value
    if value is None and entry.slot is None:  # it could not be loaded
        cache.stats.misses += 1
        session.send_nil()
        return
    entry.touched = cache.clock.now
    entry.hits += 1
    cache.stats.hits += 1
    if value is not None:
        session.out += (reply.BULK_PREFIX[len(value)], value, reply.CRLF)
    else:
        send_entry(session, entry)


def use_loaded(session: Session, key: bytes) -> Entry | None:
    """Return the entry of a key whose bytes are in memory and count a hit, or count a miss."""
    cache = session.cache
    entry = cache.find(key)
    if entry is not None and is_cold(entry):
        cache.stats.misses += 1
        return None
    return cache.use(key)


def send_entry(session: Session, entry: Entry) -> None:
    """Answer with an entry's value."""
    if entry.slot is not None:
        session.send_slot(entry.slot)
    else:
        assert entry.value is not None
        session.send_value(entry.value)


def store(session: Session, key: bytes, value: Any, how: Put) -> None:
    """Make bytes or a landing the value of a key."""
    if isinstance(value, Landing):
        session.cache.commit(key, value, how)
    else:
        session.cache.put(key, value, how)


def _key_if_read(args: Args) -> Sequence[bytes]:
    """Return the key of a SET that answers with what was there, or depends on it."""
    words = (word.upper() for word in args[3:] if isinstance(word, bytes))
    return args[1:2] if any(word in (b"GET", b"IFEQ") for word in words) else ()


def _set_together(session: Session, calls: Calls) -> int:
    """Store small values over others of their size."""
    if calls.width != 2:
        return 0
    count = session.cache.overwrite_small(calls.args[::2], calls.args[1::2])
    if count:
        session.out.append(reply.OK * count)
    return count


@command("set", _key_if_read, reads_from=4, together=_set_together)
def set_(session: Session, args: Args) -> None:
    """Store a value, with all options of Redis 7 and Valkey's IFEQ."""
    if len(args) == 3:
        value = args[2]
        if type(value) is bytes and len(value) <= SMALL_BYTES_MAX:  # the hot path of small values
            session.cache.put_small(args[1], value, PLAIN)
        else:
            store(session, args[1], value_of(value), PLAIN)
        session.out.append(reply.OK)
        return
    how, condition, wants_old = _set_options(session, args)
    value = value_of(args[2])
    old = session.cache.find(args[1])
    is_met = condition is None or condition.is_met(session, old)
    if wants_old and is_met:
        _swap(session, args[1], value, how)
    elif wants_old and old is not None:
        send_entry(session, old)
    elif is_met:
        store(session, args[1], value, how)
        session.out.append(reply.OK)
    else:
        session.send_nil()


class Condition(NamedTuple):
    """When SET stores: word is NX, XX or IFEQ; expected: the value that IFEQ names."""

    word: bytes
    expected: bytes = b""

    def is_met(self, session: Session, old: Entry | None) -> bool:
        """Whether what is there lets the value be stored."""
        if self.word != b"IFEQ":
            return (old is not None) == (self.word == b"XX")
        if old is None or old.nbytes != len(self.expected):
            return False
        return session.cache.copy(old) == self.expected


def _set_options(session: Session, args: Args) -> tuple[Put, Condition | None, bool]:
    """Return how to keep the value, on which condition, and whether GET was given.

    As in Redis a word may be repeated, and a wrong time is noticed after every wrong word.
    """
    expiry: tuple[bytes, bytes] | None = None
    keeps_ttl = wants_old = False
    condition: Condition | None = None
    words = Words(args, 3)
    while words:
        word = words.word()
        if word in (b"NX", b"XX") and condition in (None, Condition(word)):
            condition = Condition(word)
        elif word == b"IFEQ" and condition is None:
            condition = Condition(word, words.take())
        elif word == b"GET":
            wants_old = True
        elif word == b"KEEPTTL" and expiry is None:
            keeps_ttl = True
        elif word in _EXPIRY and not keeps_ttl and (expiry is None or expiry[0] == word):
            expiry = word, words.take()
        else:
            raise words.unexpected()
    if expiry is None:
        return _KEEP_TTL if keeps_ttl else PLAIN, condition, wants_old
    return Put(expires_ms=_end_of(session, expiry, "set")), condition, wants_old


def _end_of(session: Session, expiry: tuple[bytes, bytes], command_name: str) -> int:
    """Return the wall-clock millisecond that EX, PX, EXAT or PXAT and its argument stand for."""
    unit, number = expiry
    return expiry_ms(unit, integer(number), session.server.clock.wall_ms, command_name)


def _swap(session: Session, key: bytes, value: Any, how: Put) -> None:
    """Store a value and answer with the one before; when there is no room, with the error alone."""
    cache = session.cache
    old = cache.find(key)
    slot, before = (None, None) if old is None else (old.slot, old.value)
    if slot is not None:
        cache.borrow(slot)
    try:
        store(session, key, value, how)
        if slot is not None:
            session.send_slot(slot)
        elif before is not None:
            session.send_value(before)
        else:
            session.send_nil()
    finally:
        if slot is not None:
            cache.restore(slot)


@command("setnx")
def setnx(session: Session, args: Args) -> None:
    """Store a value unless the key is there."""
    value = value_of(args[2])
    is_free = session.cache.find(args[1]) is None
    if is_free:
        store(session, args[1], value, PLAIN)
    session.out.append(reply.integer(is_free))


@command("setex")
def setex(session: Session, args: Args) -> None:
    """Store a value with a TTL in seconds."""
    _set_with_ttl(session, args, b"EX", "setex")


@command("psetex")
def psetex(session: Session, args: Args) -> None:
    """Store a value with a TTL in milliseconds."""
    _set_with_ttl(session, args, b"PX", "psetex")


def _set_with_ttl(session: Session, args: Args, unit: bytes, name: str) -> None:
    when = expiry_ms(unit, integer(args[2]), session.server.clock.wall_ms, name)
    store(session, args[1], value_of(args[3]), Put(expires_ms=when))
    session.out.append(reply.OK)


@command("getset", one_key)
def getset(session: Session, args: Args) -> None:
    """Store a value and answer with the one before."""
    _swap(session, args[1], value_of(args[2]), PLAIN)


@command("getdel", one_key)
def getdel(session: Session, args: Args) -> None:
    """Answer with the value of a key and delete it."""
    entry = use_loaded(session, args[1])
    if entry is None:
        session.send_nil()
        return
    send_entry(session, entry)
    session.cache.delete(entry)


@command("getex", one_key)
def getex(session: Session, args: Args) -> None:
    """Answer with the value of a key and change its TTL."""
    expiry: tuple[bytes, bytes] | None = None
    is_persisting = False
    words = Words(args, 2)
    while words:
        word = words.word()
        if word == b"PERSIST" and expiry is None:
            is_persisting = True
        elif word in _EXPIRY and not is_persisting and (expiry is None or expiry[0] == word):
            expiry = word, words.take()
        else:
            raise words.unexpected()
    entry = use_loaded(session, args[1])
    if entry is None:
        session.send_nil()
        return
    when = None if expiry is None else _end_of(session, expiry, "getex")
    send_entry(session, entry)
    if when is not None and when <= session.server.clock.wall_ms:
        session.cache.delete(entry)
    elif when is not None or is_persisting:
        session.cache.expire_at(entry, when or 0)


@command("strlen")
def strlen(session: Session, args: Args) -> None:
    """Answer with the bytes of a value; 0 when there is none."""
    entry = session.cache.use(args[1])
    session.out.append(reply.integer(0 if entry is None else entry.nbytes))


@command("getrange", one_key)
def getrange(session: Session, args: Args) -> None:
    """Answer with the bytes from one position to another, both counted from the end if negative."""
    first, last = integer(args[2]), integer(args[3])
    entry = use_loaded(session, args[1])
    if entry is None:
        session.send_value(b"")
        return
    # As in Redis: one that lies before the value is its first byte.
    start = max(0, first + entry.nbytes if first < 0 else first)
    stop = min(entry.nbytes, max(0, last + entry.nbytes if last < 0 else last) + 1)
    if first < 0 and last < 0 and first > last:
        stop = 0
    if start >= stop:
        session.send_value(b"")
    elif entry.slot is not None:
        session.send_slot(entry.slot, start, stop)
    else:
        assert entry.value is not None
        session.send_value(entry.value[start:stop])


@command("mget", lambda args: args[1:], streams="large")
def mget(session: Session, args: Args) -> Later:
    """Answer with the values of keys, absent ones null."""
    return stream_values(session, args[1:])


@command("mset")
def mset(session: Session, args: Args) -> None:
    """Store several values at once."""
    _store_all(session, _pairs(args, "mset"))
    session.out.append(reply.OK)


@command("msetnx")
def msetnx(session: Session, args: Args) -> None:
    """Store several values unless one of the keys is there."""
    pairs = _pairs(args, "msetnx")
    is_free = all(session.cache.find(key) is None for key, _ in pairs)
    if is_free:
        _store_all(session, pairs)
    session.out.append(reply.integer(is_free))


def _store_all(session: Session, pairs: list[tuple[bytes, Any]]) -> None:
    """Store several values; whatever needs a slot has one before the first of them is stored."""
    cache = session.cache
    taken: list[Landing] = []
    try:
        for position, (key, value) in enumerate(pairs):
            if isinstance(value, bytes) and len(value) > SMALL_BYTES_MAX:
                landing = cache.reserve(len(value))
                taken.append(landing)
                landing.write(value)
                pairs[position] = key, landing
                cache.check_key(key, landing.nbytes)
            elif isinstance(value, Landing):
                cache.check_key(key, value.nbytes)
        for key, value in pairs:
            store(session, key, value, PLAIN)
    finally:
        for landing in taken:
            cache.abandon(landing)


def _pairs(args: Args, name: str) -> list[tuple[bytes, Any]]:
    if len(args) % 2 == 0:
        raise CommandError(f"wrong number of arguments for '{name}' command")
    return [(args[i], value_of(args[i + 1])) for i in range(1, len(args), 2)]
