"""TTLs: when keys end. They follow the wall clock, in milliseconds."""

from collections.abc import Callable

from respkv.errors import CommandError
from respkv.server.arguments import WALL_MS_MAX, Words, integer, shown
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.wire import reply
from respkv.wire.parser import Args


@command("expire")
def expire(session: Session, args: Args) -> None:
    """Set a TTL in seconds."""
    _expire(session, args, 1000, session.server.clock.wall_ms)


@command("pexpire")
def pexpire(session: Session, args: Args) -> None:
    """Set a TTL in milliseconds."""
    _expire(session, args, 1, session.server.clock.wall_ms)


@command("expireat")
def expireat(session: Session, args: Args) -> None:
    """Set when a key ends, in seconds since the epoch."""
    _expire(session, args, 1000, 0)


@command("pexpireat")
def pexpireat(session: Session, args: Args) -> None:
    """Set when a key ends, in milliseconds since the epoch."""
    _expire(session, args, 1, 0)


def _expire(session: Session, args: Args, unit_ms: int, base_ms: int) -> None:
    name = args[0].decode().lower()
    conditions = _conditions(args)
    when = integer(args[2]) * unit_ms
    if not -WALL_MS_MAX - 1 <= when <= WALL_MS_MAX - base_ms:
        raise CommandError(f"invalid expire time in '{name}' command")
    when += base_ms
    cache = session.cache
    entry = cache.find(args[1])
    if entry is None or not _is_met(conditions, entry.expires_ms, when):
        session.out.append(reply.integer(0))
        return
    if when <= session.server.clock.wall_ms:
        cache.delete(entry)
    else:
        cache.expire_at(entry, when)
    session.out.append(reply.integer(1))


def _conditions(args: Args) -> set[bytes]:
    found: set[bytes] = set()
    words = Words(args, 3)
    while words:
        word = words.take()
        if word.upper() not in (b"NX", b"XX", b"GT", b"LT"):
            raise CommandError(f"Unsupported option {shown(word)}")
        found.add(word.upper())
    if b"NX" in found and len(found) > 1:
        raise CommandError("NX and XX, GT or LT options at the same time are not compatible")
    if {b"GT", b"LT"} <= found:
        raise CommandError("GT and LT options at the same time are not compatible")
    return found


def _is_met(conditions: set[bytes], current: int, when: int) -> bool:
    """A key without a TTL counts as one that never ends."""
    return (
        (b"NX" not in conditions or not current)
        and (b"XX" not in conditions or bool(current))
        and (b"GT" not in conditions or (bool(current) and when > current))
        and (b"LT" not in conditions or not current or when < current)
    )


@command("ttl")
def ttl(session: Session, args: Args) -> None:
    """Answer with the seconds that are left: -2 no key, -1 no TTL."""
    _time_left(session, args, lambda when, now: (when - now + 500) // 1000)


@command("pttl")
def pttl(session: Session, args: Args) -> None:
    """Answer with the milliseconds that are left."""
    _time_left(session, args, lambda when, now: when - now)


@command("expiretime")
def expiretime(session: Session, args: Args) -> None:
    """Answer with the second in which a key ends."""
    _time_left(session, args, lambda when, now: (when + 500) // 1000)


@command("pexpiretime")
def pexpiretime(session: Session, args: Args) -> None:
    """Answer with the millisecond in which a key ends."""
    _time_left(session, args, lambda when, now: when)


def _time_left(session: Session, args: Args, left: Callable[[int, int], int]) -> None:
    entry = session.cache.find(args[1])
    if entry is None:
        session.out.append(reply.integer(-2))
    elif not entry.expires_ms:
        session.out.append(reply.integer(-1))
    else:
        when = left(entry.expires_ms, session.server.clock.wall_ms)
        session.out.append(reply.integer(when))


@command("persist")
def persist(session: Session, args: Args) -> None:
    """Take a key's TTL away."""
    entry = session.cache.find(args[1])
    had_one = entry is not None and bool(entry.expires_ms)
    if entry is not None and had_one:
        session.cache.expire_at(entry, 0)
    session.out.append(reply.integer(had_one))
