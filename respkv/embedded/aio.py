"""The embedded engine for asynchronous code: it runs in the event loop that opens it."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from respkv.client.aio import AsyncClient
from respkv.client.core import Core
from respkv.config import Config
from respkv.embedded.bells import TaskBell
from respkv.embedded.engine import Engine, settings_for
from respkv.embedded.memory import OwnArenas, OwnGpus
from respkv.embedded.settings import read_settings
from respkv.embedded.stream import EngineStream
from respkv.errors import CacheError, ConfigError

logger = logging.getLogger(__name__)


class AsyncEmbeddedCache(AsyncClient):
    """An ``AsyncClient`` whose server is an engine in the same event loop; see ``open``."""

    def __init__(self, config: Config, *, pool_max: int, timeout_s: float) -> None:
        self._engine = Engine(config)
        self._settings = settings_for(self._dial, pool_max, timeout_s)
        self._core = Core(self._settings, anyio.Semaphore)
        self._tasks: TaskGroup | None = None
        self._started: anyio.Event  # these three belong to the event loop it is entered in
        self._ended: anyio.Event
        self._hosting: anyio.CancelScope

    async def __aenter__(self) -> Self:
        """Open the engine. Raises CacheError. Cancelled: nothing stays open."""
        if self._tasks is not None:
            raise CacheError("this embedded cache was opened before; respkv.open makes another")
        disk, loop = self._engine.config.disk_path, anyio.get_cancelled_exc_class().__module__
        if disk and loop.partition(".")[0] != "asyncio":
            raise ConfigError(
                f"disk-path = {disk!r}: the disk tier needs asyncio; without it, use open_sync,"
                " whose event loop is its own"
            )
        self._started, self._ended = anyio.Event(), anyio.Event()
        self._hosting = anyio.CancelScope(shield=True)
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._host)
        try:
            await self._started.wait()
        except BaseException as error:  # a cancellation, that is
            self._hosting.cancel()
            await self._end(error)
            raise
        server = self._engine.server
        if server is None or self._engine.failure is not None:
            await self._end(None)
            raise AssertionError("unreachable")
        self._core = Core(self._settings, anyio.Semaphore, OwnArenas(server), OwnGpus(server))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._core.pool.close()
        await self._end(error)

    async def close(self) -> None:
        """Close the engine, as a server is stopped; leaving the block does it, too.

        Commands that are being carried out end first; what only memory holds is written to the file
        tiers, if there are any, within ``shutdown_timeout``.
        Cancelled: when that has been done.
        """
        if self._tasks is None:  # it was never opened
            return
        self._core.pool.close()
        await self._stop()

    async def _host(self) -> None:
        # A cancellation of the block ends the engine as everything does that leaves it: see _end.
        try:
            with self._hosting:
                await self._engine.run(self._started.set)
        finally:
            self._started.set()
            self._ended.set()

    async def _stop(self) -> None:
        self._engine.stop()
        with anyio.CancelScope(shield=True):
            await self._ended.wait()

    async def _end(self, error: BaseException | None) -> None:
        """Stop the engine and leave the task group, which shall not wrap an error of the block."""
        await self._stop()
        assert self._tasks is not None
        is_cancelled = isinstance(error, anyio.get_cancelled_exc_class())
        passed = error if is_cancelled else None
        await self._tasks.__aexit__(type(passed) if passed else None, passed, None)
        failure, self._engine.failure = self._engine.failure, None
        if failure is None:
            return
        if error is not None:  # it is on its way, and must not be hidden
            logger.error("the embedded engine has crashed", exc_info=failure)
            return
        if isinstance(failure, CacheError):
            raise failure
        raise CacheError("the embedded engine has crashed") from failure

    def _dial(self) -> EngineStream:
        return self._engine.dial(TaskBell(), _now)


def _now(work: Callable[[], None]) -> None:
    work()


def open(  # noqa: A001  (it is called respkv.open)
    *,
    config: str | Path | Config | None = None,
    pool_max: int = 64,
    timeout_s: float = 30.0,
    **settings: object,
) -> AsyncEmbeddedCache:
    """Open a cache in this event loop: ``async with respkv.open(maxmemory="1gb") as cache``.

    It is open while the block runs. Arguments and errors, which entering the block raises, are those
    of ``open_sync``; a wrong setting is told at once.
    """
    return AsyncEmbeddedCache(
        read_settings(config, settings), pool_max=pool_max, timeout_s=timeout_s
    )
