"""Stand-ins for what a test must control: the clock and the socket. Everything else is real."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from respkv.config import Config
from respkv.engine.cache import Cache
from respkv.engine.clock import Clock
from respkv.server.session import Session
from respkv.server.state import Server
from respkv.tiers.arena import Arena
from respkv.tiers.slab import SlabAllocator

WALL_MS = 1_700_000_000_000


class ManualClock(Clock):
    """A clock that stands until it is told the time.

    read: where ``refresh`` gets the monotonic seconds from; None: it changes nothing.
    """

    __slots__ = ("_read",)

    def __init__(self, read: Callable[[], float] | None = None) -> None:
        self._read = read
        super().__init__()
        if read is None:
            self.set(1000.0)

    def refresh(self) -> None:
        """Read the clock that this one follows."""
        if self._read is not None:
            self.set(self._read())

    def set(self, now: float) -> None:
        """Make it ``now``; the wall clock goes with the monotonic one."""
        self.now = now
        self.wall_ms = WALL_MS + int(now * 1000)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.set(self.now + seconds)


def make_cache(
    arena_bytes: int = 2 << 20,
    *,
    small_max: int = 64 << 10,
    policy: str = "lru",
    unit_bytes: int = 64 << 10,
) -> tuple[Cache, ManualClock]:
    """Return a cache on heap memory and the clock that it follows."""
    clock = ManualClock()
    slabs = SlabAllocator(arena_bytes, unit_bytes=unit_bytes)
    memory = memoryview(bytearray(arena_bytes))
    return Cache(memory, slabs, policy=policy, small_max=small_max, clock=clock), clock


@contextmanager
def make_server(config: Config, clock: Clock, make: type[Cache] = Cache) -> Iterator[Server]:
    """Yield a server with a real arena and no sockets."""
    arena = Arena.create(config.maxmemory - config.small_value_bytes(), path=None, hugepages=False)
    try:
        cache = make(
            arena.view,
            SlabAllocator(arena.nbytes),
            policy=config.maxmemory_policy,
            small_max=config.small_value_bytes(),
            clock=clock,
        )
        yield Server(config, cache, arena, clock)
    finally:
        arena.close()


class FakeWire:
    """A transport whose kernel takes ``room`` bytes; what has left is in ``sent``.

    It does what server/transport.py does with a socket. Bytes are copied when the kernel takes
    them and not before, so that a slot which changes while it waits is noticed.
    """

    def __init__(self, server: Server, *, room: int = 1 << 60) -> None:
        self.room = room
        self.sent = bytearray()
        self.is_aborted = self.is_closed = False
        self._unsent: list[memoryview] = []
        self.session = Session(server, server.next_number, "127.0.0.1:1", "127.0.0.1:2", self)
        server.sessions[server.next_number] = self.session
        server.next_number += 1

    def write(self, data: bytes | memoryview) -> None:
        """Send an answer that stands alone."""
        assert not self.session.out
        assert not self._unsent
        self._unsent.append(memoryview(data))
        self._push()
        if self._unsent:
            self.session.draining()

    def wake(self) -> None:
        """Send what there is."""
        session = self.session
        while session.out and not session.promises and not session.is_lost:
            self._unsent += [memoryview(part) for part in session.take_output()]
            self._push()
            if self._unsent:
                session.draining()
                break
            session.sent()
        self.is_closed |= session.may_close

    def abort(self) -> None:
        """Note that the session asked for it; ``lose`` follows when the test says so."""
        self.is_aborted = True

    def unsent_bytes(self) -> int:
        """Return how much output has not left yet."""
        return sum(map(len, self._unsent))

    def feed(self, data: bytes, *, cuts: random.Random | None = None) -> int:
        """Deliver bytes as long as the session wants any; return how many it took."""
        position = 0
        while position < len(data) and self.session.wants_input:
            window = self.session.window()
            assert len(window), "an empty window would look like the end of the stream"
            count = min(len(window), len(data) - position)
            if cuts is not None:
                count = cuts.randint(1, count)
            window[:count] = data[position : position + count]
            position += count
            if self.session.received(count):
                self.wake()
        return position

    def drain(self, room: int = 1 << 60) -> bytes:
        """Let the kernel take more; return all that has left since the last ``drain``."""
        self.room = room
        if self.session.is_draining:
            self._push()
            if not self._unsent:
                self.session.drained()
                self.wake()
        data = bytes(self.sent)
        self.sent.clear()
        return data

    def lose(self) -> None:
        """Break the connection."""
        self._unsent.clear()
        self.session.server.sessions.pop(self.session.number, None)
        self.session.lost()

    def _push(self) -> None:
        while self._unsent and self.room > 0:
            part = self._unsent.pop(0)
            self.sent += part[: self.room]
            if len(part) > self.room:
                self._unsent.insert(0, part[self.room :])
            self.room -= min(len(part), self.room)
        self._unsent = [part for part in self._unsent if len(part)]
