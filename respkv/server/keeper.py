"""The keeper: what the server looks after by the clock, ten times a second."""

import gc
import itertools
import logging

import anyio

from respkv.engine.actor import Actor
from respkv.engine.messages import Check, Sweep
from respkv.server.session import Session
from respkv.server.state import Server

logger = logging.getLogger(__name__)

TICK_S = 0.1
TICKS_PER_OLDER = 10
# Over the output limit one large value may wait, as long as it leaves.
STALL_OVER_LIMIT_S = 1.0
# What was read ahead for it is given back.
STALL_AHEAD_S = 1.0
# What is resident is examined only when nobody waits, and when that takes no more than some 50 ms.
ENTRIES_EXAMINED_MAX = 50_000


async def keep(server: Server, janitor: Actor) -> None:
    """Lapse leases, close stalled and idle connections, and set the janitor to work, until cancelled."""
    checked_s = server.clock.now
    commands = server.num_commands
    for tick in itertools.count():
        await anyio.sleep(TICK_S)
        # The collector runs here and not in the middle of a command: a full one would look at every
        # entry, which never are garbage. Young objects are few and quickly looked at.
        if not server.is_embedded:
            gc.collect(1 if tick % TICKS_PER_OLDER == 0 else 0)
        server.clock.refresh()
        now = server.clock.now
        for owner in server.cache.lapse():
            _disconnect(server, owner, "kept a reservation past its deadline")
            server.num_overdue_writers += 1
        server.assemblies.expire()
        server.announce_room()
        for session in list(server.sessions.values()):
            _look_at(server, session, now)
        janitor.advise(Sweep())
        interval = server.config.check_interval
        if interval and now - checked_s >= interval:
            is_idle, commands = server.num_commands == commands, server.num_commands
            is_small = len(server.cache.entries) <= ENTRIES_EXAMINED_MAX
            if is_idle and is_small and janitor.advise(Check()):
                checked_s = now
                if not server.is_embedded:
                    gc.collect()


def _look_at(server: Server, session: Session, now: float) -> None:
    config = server.config
    if session.is_draining:
        unsent, stalled_s = session.wire.unsent_bytes(), session.stalled_s(now)
        if stalled_s >= STALL_AHEAD_S:
            session.stop_reading_ahead()
        if unsent > config.client_output_buffer_limit and stalled_s >= STALL_OVER_LIMIT_S:
            reason = f"{unsent} bytes of output wait, over client-output-buffer-limit"
        elif stalled_s >= config.output_timeout:
            reason = f"took no byte for {config.output_timeout} s"
        else:
            return
        server.num_slow_readers += 1
        _disconnect(server, session.number, reason)
    elif session.holds_slot_for_body and session.wants_input:
        if now - session.last_active >= config.output_timeout:
            server.num_idle_closed += 1
            _disconnect(server, session.number, "stopped in the middle of a value")
    elif session.promises:
        return  # it is not the client who is slow
    elif session.subscriptions is not None:
        return  # it listens
    elif config.timeout and session.wants_input and now - session.last_active >= config.timeout:
        server.num_idle_closed += 1
        _disconnect(server, session.number, "idle")


def _disconnect(server: Server, number: int, reason: str) -> None:
    session = server.sessions.get(number)
    if session is not None:
        logger.info("closing client %d: %s", number, reason)
        session.wire.abort()
