"""The engine of this process: a server without sockets, run by a task or by a thread of its own."""

import os
import threading
import weakref
from collections.abc import Callable

import anyio

from respkv.client.url import Settings
from respkv.config import Config
from respkv.embedded.bells import Bell
from respkv.embedded.stream import EngineStream
from respkv.errors import CacheError, ConfigError, ConnectionLost
from respkv.server.files import check_directories
from respkv.server.publishing import begin_publishing
from respkv.server.serve import having_engine, working
from respkv.server.state import Server

Post = Callable[[Callable[[], None]], None]


class Engine:
    """What an embedded cache talks to.

    server:  once it runs.
    failure: why it could not start, or has ended before it was told to.
    is_unwanted: it was told to end.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.server: Server | None = None
        self.failure: BaseException | None = None
        self._pid = os.getpid()
        self._stop: anyio.Event | None = None
        self.is_unwanted = False
        self._is_open = False
        self._streams: weakref.WeakSet[EngineStream] = weakref.WeakSet()
        self._registering = threading.Lock()

    async def run(self, started: Callable[[], None]) -> None:
        """Run until it is stopped; what went wrong is in ``failure``.

        started: called when it can be talked to.
        Cancelled: as if it had been stopped; what only memory held may not have been written.
        """
        self._stop = anyio.Event()
        if self.is_unwanted:
            self._stop.set()
        try:
            check_directories(self.config)
            async with having_engine(self.config, is_embedded=True) as server, working(server):
                self.server = server
                begin_publishing(server)
                self._is_open = not self.is_unwanted
                started()
                try:
                    await self._stop.wait()
                finally:
                    self._is_open = False
        except (CacheError, BaseExceptionGroup) as error:
            self.failure = error
        finally:
            self._give_up()

    def stop(self) -> None:
        """Have it end, once it has started. To be called in its event loop, or before there is one."""
        self.is_unwanted = True
        if self._stop is not None:
            self._stop.set()

    def dial(self, bell: Bell, post: Post, own_thread: int | None = None) -> EngineStream:
        """Open a connection. Raises ConnectionLost.

        own_thread: of the engine, which must not wait for itself.
        """
        if os.getpid() != self._pid:
            raise ConnectionLost(
                "the engine is in the process that has opened it, of which this one is a fork;"
                " open one here, or let both use a server"
            )
        with self._registering:
            if not self._is_open or self.server is None:
                if self.server is None and self.failure is None:
                    raise ConnectionLost("the engine is not open yet: async with respkv.open(...)")
                why = f": {self.failure}" if self.failure is not None else ""
                raise ConnectionLost(f"the engine is closed{why}")
            stream = EngineStream(self.server, bell, post, own_thread)
            self._streams.add(stream)
        return stream

    def _give_up(self) -> None:
        with self._registering:
            self._is_open = False
            left = list(self._streams)
        for stream in left:
            stream.give_up()


def settings_for(dial: Callable[[], EngineStream], pool_max: int, timeout_s: float) -> Settings:
    """Return how a client connects to an engine of its own process. Raises ConfigError."""
    if isinstance(pool_max, bool) or not isinstance(pool_max, int):
        raise ConfigError(f"pool_max is {pool_max!r}; it must be a whole number from 1 on")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise ConfigError(f"timeout_s is {timeout_s!r}; it must be a number of seconds")
    return Settings(
        pool_max=pool_max,
        timeout_s=timeout_s,
        connect_timeout_s=timeout_s,
        reconnect_max=0,  # a connection breaks when the engine ends, or says so
        dial=dial,
    )
