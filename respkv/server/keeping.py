"""How clients may have pages kept: levels, and TTLs and pins, cut to what the settings allow.

A put says nothing about a value that was cut: KV.INFO shows the one in force. KV.RETAIN and KV.HINT
answer with it. A pin beyond the part of the arena that may be pinned is refused, not cut: whoever
pins relies on it.
"""

from typing import TYPE_CHECKING, Final

from respkv.engine.entry import Entry
from respkv.engine.sessions import Answer
from respkv.errors import CommandError, PinRefused
from respkv.tiers.record import Level

if TYPE_CHECKING:
    from respkv.server.session import Session

LEVELS: Final = {b"WRITTEN": Level.WRITTEN, b"DURABLE": Level.DURABLE}


def level_of(session: "Session", word: bytes) -> Level:
    """Return the level that a word stands for. Raises CommandError when no tier offers it."""
    if session.server.mover is None:
        raise CommandError(
            f"{word.decode()} needs a tier that survives a restart; this server has none"
        )
    return LEVELS[word]


def allowed_ttl(session: "Session", ms: int) -> Answer:
    """Say which TTL is in force when ``ms`` is asked for; 0 is none."""
    ms_max = session.server.config.ttl_max
    if ms > (ms_max or ms):
        return Answer("clipped", ms_max, f"ttl-max is {ms_max} ms")
    return Answer("accepted", ms, "")


def allowed_pin(session: "Session", ms: int, nbytes: int, pinned: int) -> Answer:
    """Say which pin is in force when one of ``ms`` is asked for.

    nbytes: of all pages that it is for; pinned: of those that are pinned already, without these.
    """
    config, budget = session.server.config, session.cache.slabs.budget_bytes
    share = budget * config.pinned_share_max // 100
    if ms and pinned + nbytes > share:
        return Answer(
            "rejected",
            0,
            f"{pinned} bytes are pinned and {nbytes} more would pass pinned-share-max, "
            f"{config.pinned_share_max} % of the arena, {share} bytes; unpin some, or pin less",
        )
    if ms > config.pin_max:
        return Answer("clipped", config.pin_max, f"pin-max is {config.pin_max} ms")
    return Answer("accepted", ms, "")


def expires_ms(session: "Session", ttl_ms: int) -> int:
    """Return when a TTL ends, on the wall clock in milliseconds, as it is allowed; 0 for never."""
    ms = allowed_ttl(session, ttl_ms).value
    return session.server.clock.wall_ms + ms if ms else 0


def pinned_until(session: "Session", ms: int, nbytes: int, *there: Entry | None) -> float:
    """Return when a pin ends, on the monotonic clock, as it is allowed; 0.0 when ``ms`` is 0.

    nbytes: of all pages that it is for. there: those of them that are there, whose pins it replaces.
    Raises PinRefused when too much is pinned already.
    """
    if not ms:
        return 0.0
    cache = session.cache
    answer = allowed_pin(session, ms, nbytes, cache.pins.nbytes_but(*there))
    if answer.status == "rejected":
        raise PinRefused(answer.reason)
    return cache.clock.now + answer.value / 1000
