"""Start a server, serve until told to stop, and stop without breaking an answer in two."""

import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import uvloop

import respkv.server.commands  # noqa: F401  (registers the handlers)
from respkv.config import Config
from respkv.engine.cache import Cache
from respkv.engine.clock import Clock
from respkv.engine.janitor import make_janitor
from respkv.engine.supervisor import contain, supervise
from respkv.errors import CacheError
from respkv.server.files import check_directories, using_files
from respkv.server.gpu import having_gpu, using_gpu
from respkv.server.info import resident_bytes
from respkv.server.keeper import keep
from respkv.server.listeners import close_listeners, open_tcp, open_unix
from respkv.server.publishing import begin_publishing, publishing
from respkv.server.session import Session
from respkv.server.state import Server
from respkv.server.transport import accept
from respkv.server.tuning import not_tuned, tune
from respkv.tiers.arena import Arena
from respkv.tiers.slab import SlabAllocator

logger = logging.getLogger(__name__)

EXIT_CANNOT_START = 2
DRAIN_STEP_S = 0.01
_LEVELS = {"debug": 10, "verbose": 15, "notice": 20, "warning": 30}


def main(config: Config) -> int:
    """Run a server until SIGTERM, SIGINT or SHUTDOWN; return the exit code of the process.

    2 means that it could not start; one line on standard error says why.
    """
    try:
        _log_to(config)
        anyio.run(_main, config, backend="asyncio", backend_options={"loop_factory": _new_loop})
    except CacheError as error:
        print(f"respkv: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    return 0


def _new_loop() -> uvloop.Loop:
    return uvloop.new_event_loop()


def _log_to(config: Config) -> None:
    """Log to the file, or to standard error. Raises CacheError when it cannot be opened."""
    try:
        handler = logging.FileHandler(config.logfile) if config.logfile else logging.StreamHandler()
    except OSError as error:
        raise CacheError(f"logfile {config.logfile}: {error.strerror}") from error
    logging.basicConfig(
        level=_LEVELS[config.loglevel],
        handlers=[handler],
        format="%(asctime)s %(process)d %(levelname)s %(message)s",
    )


async def _main(config: Config) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with running(config) as server, anyio.create_task_group() as tasks:

            async def stop_on_signal() -> None:
                async for number in signals:
                    logger.log(20, "%s: stopping", signal.Signals(number).name)
                    server.stopping.set()

            tasks.start_soon(stop_on_signal)
            where = [f"{config.host}:{server.port}"] if server.port else []
            logger.log(
                20, "ready on %s", " and ".join([*where, *filter(None, [config.unixsocket])])
            )
            await server.stopping.wait()
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Server]:
    """Serve while the block runs; raises CacheError when the server cannot start.

    When it is left, no new client is accepted, answers on their way have ``shutdown-timeout`` to
    leave, then every connection is closed. What only memory holds has as long to get into files,
    and the memory is given back.
    """
    async with AsyncExitStack() as stack:
        check_directories(config)
        listeners = open_tcp(config)
        stack.callback(close_listeners, listeners)
        gc.disable()  # what is recovered stays, and later the keeper collects
        stack.callback(gc.enable)
        port = max((each.port for each in listeners), default=0)
        server = await stack.enter_async_context(having_engine(config, port))
        gc.freeze()  # what is here now stays
        listeners += open_unix(config)
        stops: list[Callable[[], None]] = []
        await stack.enter_async_context(working(server, stops))
        stops += [await accept(server, each.socket, config.tcp_backlog) for each in listeners]
        begin_publishing(server)
        yield server


@asynccontextmanager
async def having_engine(
    config: Config, port: int = 0, *, is_embedded: bool = False
) -> AsyncIterator[Server]:
    """Have memory and tiers while the block runs, with what files hold; nobody is served yet.

    Afterwards what only memory holds is written to files, and the memory is given back.
    port:        that clients come by.
    is_embedded: the process is not the server's own; see ``Server``.
    Raises CacheError when a tier cannot be had.
    """
    async with AsyncExitStack() as stack:
        server = await _make_server(config, port, is_embedded=is_embedded)
        stack.callback(server.arena.close)
        stack.enter_context(publishing(server))
        gpu_tier = await stack.enter_async_context(having_gpu(server))
        await stack.enter_async_context(using_files(server))
        await stack.enter_async_context(using_gpu(server, gpu_tier))
        yield server


@asynccontextmanager
async def working(server: Server, stops: Sequence[Callable[[], None]] = ()) -> AsyncIterator[None]:
    """Serve sessions while the block runs; then let their answers leave and close all of them.

    stops: called first at the end: they keep new clients away.
    """
    async with anyio.create_task_group() as tasks:
        server.run_in(tasks)
        janitor = make_janitor(server.cache)

        async def forget() -> None:
            if server.mover is None:
                server.cache.flush()
            else:
                await server.mover.flush_all()

        tasks.start_soon(supervise, janitor, forget)
        tasks.start_soon(keep, server, janitor)
        tasks.start_soon(contain, partial(tune, server), not_tuned)
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                for stop in stops:
                    stop()
                await _drain(server)
            tasks.cancel_scope.cancel()


async def _make_server(config: Config, port: int, *, is_embedded: bool) -> Server:
    nbytes = config.maxmemory - config.small_value_bytes()
    path = config.arena_path(port) if config.shm != "off" else None
    arena = Arena.create(nbytes, path=path, hugepages=config.hugepages)
    before = resident_bytes()
    if config.prefault:
        await anyio.to_thread.run_sync(arena.prefault)
    clock = Clock()
    cache = Cache(
        arena.view,
        SlabAllocator(arena.nbytes),
        policy=config.maxmemory_policy,
        small_max=config.small_value_bytes(),
        clock=clock,
    )
    server = Server(config, cache, arena, clock, is_embedded=is_embedded)
    server.port = port
    server.base_bytes = before
    return server


async def _drain(server: Server) -> None:
    """Give answers time to leave, then close every connection and wait until all are gone."""
    give_up = anyio.current_time() + server.config.shutdown_timeout
    while any(map(_is_waited_for, server.sessions.values())):
        if anyio.current_time() > give_up:
            break
        await anyio.sleep(DRAIN_STEP_S)
    while server.sessions:
        for session in list(server.sessions.values()):
            session.wire.abort()
        await anyio.lowlevel.checkpoint()
    for wire in list(server.parting):
        wire.abort()


def _is_waited_for(session: Session) -> bool:
    """Whether there is something that the client will be told if it is given time."""
    # A reader in this process may be the very thread that waits for the end.
    return session.is_busy and not (session.is_draining and session.server.is_embedded)
