"""The embedded engine for blocking code: its event loop runs in a thread of its own."""

import atexit
import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import anyio
import uvloop

from respkv.client.core import Core
from respkv.client.sync import Client
from respkv.config import Config
from respkv.embedded.bells import ThreadBell
from respkv.embedded.engine import Engine, Post, settings_for
from respkv.embedded.memory import OwnArenas, OwnGpus
from respkv.embedded.settings import read_settings
from respkv.embedded.stream import EngineStream
from respkv.errors import CacheError
from respkv.server.transport import calling_from_threads


class Runner:
    """An engine and the thread that it runs in."""

    def __init__(self, config: Config) -> None:
        self.engine = Engine(config)
        self._pid = os.getpid()
        self._post: Post | None = None  # until there is an event loop
        self._error: BaseException | None = None
        self._has_started = threading.Event()
        # A daemon, and with it the threads that it starts: an engine that nobody closed shall not
        # keep the process from ending, at which it is closed (_close_all).
        self._thread = threading.Thread(target=self._run, name="respkv-engine", daemon=True)

    def start(self) -> None:
        """Return when the engine can be talked to. Raises CacheError when it cannot start."""
        self._thread.start()
        try:
            self._has_started.wait()
        except BaseException:
            self.stop()
            raise
        if self.engine.failure is not None or self._error is not None:
            self.join()

    def dial(self) -> EngineStream:
        """Open a connection. Raises ConnectionLost."""
        assert self._post is not None, "the engine has not started"
        return self.engine.dial(ThreadBell(), self._post, self._thread.ident)

    def stop(self) -> None:
        """Have the engine end; a second call does nothing. It does not wait."""
        if os.getpid() != self._pid:
            return
        if self._post is None:
            self.engine.stop()
            return
        with suppress(RuntimeError):  # its loop has ended
            self._post(self.engine.stop)

    def join(self) -> None:
        """Wait for the end. Raises CacheError: what the engine failed of, once."""
        if os.getpid() != self._pid or threading.current_thread() is self._thread:
            return  # the latter when the collector finds there what is to be closed
        self._thread.join()
        error, self._error = self._error, None
        failure, self.engine.failure = self.engine.failure, None
        if isinstance(failure, CacheError):
            raise failure
        if failure is not None or error is not None:
            raise CacheError("the embedded engine has crashed") from failure or error

    def _run(self) -> None:
        try:
            anyio.run(self._main, backend_options={"loop_factory": uvloop.new_event_loop})
        except BaseException as error:
            self._error = error
        finally:
            _running.discard(self)
            self._has_started.set()

    async def _main(self) -> None:
        post = calling_from_threads()
        _running.add(self)
        self._post = post
        if self.engine.is_unwanted:  # it was told so meanwhile
            self.engine.stop()
        await self.engine.run(self._has_started.set)


class EmbeddedCache(Client):
    """A ``Client`` whose server is an engine of this process; see ``open_sync``.

    Threads may share it. Errors are those of a client, and ConnectionLost once it is closed.
    """

    def __init__(self, config: Config, *, pool_max: int, timeout_s: float) -> None:
        self._runner = Runner(config)
        settings = settings_for(self._runner.dial, pool_max, timeout_s)
        self._runner.start()
        server = self._runner.engine.server
        assert server is not None
        self._core = Core(settings, threading.Semaphore, OwnArenas(server), OwnGpus(server))
        weakref.finalize(self, self._runner.stop).atexit = False

    def close(self) -> None:
        """Close the engine, as a server is stopped; a second call does nothing.

        Commands that are being carried out end first; what only memory holds is written to the file
        tiers, if there are any, within ``shutdown_timeout``. Calls of other threads that come too
        late raise ConnectionLost.
        Raises CacheError: the engine had crashed.
        """
        super().close()
        self._runner.stop()
        self._runner.join()


def open_sync(
    *,
    config: str | Path | Config | None = None,
    pool_max: int = 64,
    timeout_s: float = 30.0,
    **settings: object,
) -> EmbeddedCache:
    """Open a cache in this process: ``with respkv.open_sync(maxmemory="1gb") as cache``.

    It is open when this returns, and until it is closed, at the end of the process at the latest.

    config:    a TOML file as a server has it, or a Config.
    pool_max:  calls that are served at a time, leases included; one more waits.
    timeout_s: for a whole call.
    settings:  those of docs/config.md with underscores, but those of sockets; sizes in bytes or as
               "1gb". They win over ``config``.
    Raises ConfigError naming a setting that is wrong; CacheError when memory or a tier cannot be had.
    """
    return EmbeddedCache(read_settings(config, settings), pool_max=pool_max, timeout_s=timeout_s)


_running: set[Runner] = set()


def _close_all() -> None:
    for runner in list(_running):
        runner.stop()
    for runner in list(_running):
        runner.join()


atexit.register(_close_all)
