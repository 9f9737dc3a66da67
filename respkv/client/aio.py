"""The asynchronous face: drives operations by anyio, on asyncio, uvloop and trio."""

import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import anyio

from respkv.client import commands, retention, schemas
from respkv.client.commands import Command, Key, PutOptions
from respkv.client.core import Core
from respkv.client.effects import Effect, Event, Heed, Operation, Resolve, Seat, Wait
from respkv.client.gpu import GpuPage
from respkv.client.gpu_lease import GpuLeaseHold
from respkv.client.lease import LeaseHold, ReserveHold
from respkv.client.listen import AsyncListening, Message, PageEvent, listen_to, listen_to_events
from respkv.client.replies import Reply
from respkv.client.requests import Arg, check_offered
from respkv.client.sequence_faces import AsyncSequences
from respkv.client.url import DEFAULT_URL, Options, settings

P = ParamSpec("P")
T = TypeVar("T")


def _method(
    build: Callable[P, Command[T]],
) -> "Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]":
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(self._core.call(build(*args, **kwargs)))

    commands.describe(method, build)
    return method


class AsyncClient:
    """A client for one event loop at a time; tasks may share it. Methods are those of Client.

    url, options: as for ``Client``.
    Connections open when they are needed. After a fork the child opens its own.
    Every call raises ServerError, ConnectionLost or TimedOut.
    Cancelled: a call that is cancelled, or that times out, closes its connection, so nobody is ever
               given the answer that it left behind; what it sent may have been carried out.
    """

    _origin: "AsyncClient | None" = None

    def __init__(self, url: str = DEFAULT_URL, **options: Unpack[Options]) -> None:
        self._core = Core(settings(url, options), anyio.Semaphore)

    command = _method(commands.command)
    ping = _method(commands.ping)
    info = _method(commands.info)
    schema_set = _method(schemas.schema_set)
    schema_get = _method(schemas.schema_get)
    schema_list = _method(schemas.schema_list)
    quality = _method(schemas.quality)
    put = _method(commands.put)
    get = _method(commands.get)
    mget = _method(commands.mget)
    match = _method(commands.match)
    prefetch = _method(commands.prefetch)
    set = _method(commands.set_)
    delete = _method(commands.delete)
    exists = _method(commands.exists)
    touch = _method(commands.touch)
    pin = _method(commands.pin)
    unpin = _method(commands.unpin)
    retain = _method(retention.retain)
    quota = _method(retention.quota)
    end_session = _method(retention.end_session)
    expect_session = _method(retention.expect_session)
    demote_session = _method(retention.demote_session)
    page_info = _method(retention.page_info)
    explain = _method(retention.explain)

    @property
    def seq(self) -> AsyncSequences:
        """Prompts as tokens: match, put, get layer by layer."""
        return AsyncSequences(self)

    def within(self, seconds: float) -> "AsyncClient":
        """Return this client for calls that take at most so long; see ``Client.within``."""
        found = AsyncClient.__new__(AsyncClient)
        found._core = self._core.within(seconds)
        found._origin = self
        return found

    def pipeline(self) -> "AsyncPipeline":
        """Collect commands to send together."""
        return AsyncPipeline(self)

    def lease(self, keys: Iterable[Key], *, ms: int | None = None) -> "AsyncLease":
        """Read pages in the server's memory: ``async with client.lease(keys) as lease``."""
        return AsyncLease(self, LeaseHold(self._core, keys, ms))

    def lease_gpu(self, keys: Iterable[Key], *, ms: int | None = None) -> "AsyncGpuLease":
        """Read pages on the server's GPU: ``async with client.lease_gpu(keys) as lease``."""
        return AsyncGpuLease(self, GpuLeaseHold(self._core, keys, ms))

    def reserve(self, key: Key, nbytes: int, *, ms: int | None = None) -> "AsyncReservation":
        """Write a page in the server's memory: ``async with client.reserve(...) as slot``."""
        return AsyncReservation(self, ReserveHold(self._core, key, nbytes, ms))

    def listen(self, *channels: Key, patterns: Sequence[Key] = ()) -> AsyncListening[Message]:
        """Listen to channels: ``async with client.listen("news") as messages``, then iterate.

        patterns: listen to all channels that these cover, too.
        """
        return AsyncListening(listen_to(self._core.settings, channels, patterns), self._run)

    def events(self, *namespaces: Key) -> AsyncListening[PageEvent]:
        """Follow what becomes of the pages of namespaces, of all of them when none is named."""
        return AsyncListening(listen_to_events(self._core.settings, namespaces), self._run)

    async def close(self) -> None:
        """Close the idle connections, and the others when their calls end."""
        if self._origin is not None:
            await self._origin.close()
        self._core.pool.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._core.pool.close()

    async def _run(self, operation: Operation[T]) -> T:
        # Taking a seat is a checkpoint, so a call that never has to wait still lets others run.
        try:
            effect = next(operation)
            while True:
                try:
                    answer = await self._wait_for(effect)
                except BaseException as error:
                    effect = operation.throw(error)
                else:
                    effect = operation.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _wait_for(self, effect: Effect) -> Any:
        with anyio.move_on_after(effect.deadline - time.monotonic()):
            if isinstance(effect, Wait):
                if effect.events is Event.BOTH:
                    await _wait_either(effect.sock)
                elif effect.events is Event.READ:
                    await anyio.wait_readable(effect.sock)
                else:
                    await anyio.wait_writable(effect.sock)
                return True
            if isinstance(effect, Heed):
                await effect.bell.wait()
                return True
            if isinstance(effect, Seat):
                await self._core.pool.seats.acquire()
                return True
            if isinstance(effect, Resolve):
                return await anyio.getaddrinfo(effect.host, effect.port, type=socket.SOCK_STREAM)
            await anyio.sleep(effect.seconds)
            return True
        return None


async def _wait_either(sock: socket.socket) -> None:
    async with anyio.create_task_group() as waits:

        async def wait(ready: Callable[[socket.socket], Awaitable[None]]) -> None:
            await ready(sock)
            waits.cancel_scope.cancel()

        waits.start_soon(wait, anyio.wait_readable)
        waits.start_soon(wait, anyio.wait_writable)


class AsyncPipeline:
    """Commands to be sent together, in one go, and answered in order."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._commands: list[tuple[Arg, ...]] = []

    def command(self, *args: Arg) -> Self:
        """Add a command. Raises ValueError as ``AsyncClient.command`` does."""
        check_offered(args)
        self._commands.append(args)
        return self

    async def execute(self, *, raise_on_error: bool = True) -> list[Reply]:
        """Send what was collected, which is then forgotten, and return the replies in order.

        raise_on_error: raise the first ServerError once all replies are in; else they are in the
                        list where they belong.
        Cancelled: the connection is closed; any of the commands may have been carried out.
        """
        collected, self._commands = self._commands, []
        core = self._client._core
        return await self._client._run(core.call_all(collected, raise_on_error=raise_on_error))


class AsyncLease:
    """Pages leased for reading; see ``Client.lease``. Leaving raises LeaseGone if it lapsed.

    Cancelled: the connection is closed, which ends the lease.
    """

    def __init__(self, client: AsyncClient, hold: LeaseHold) -> None:
        self._client = client
        self._hold = hold

    @property
    def pages(self) -> list[memoryview | None]:
        """Return a read-only view of every key's page, None where there is none."""
        return self._hold.pages

    @property
    def memory(self) -> memoryview:
        """Return a read-only view of the server's memory, which ``places`` are in."""
        return self._hold.memory

    @property
    def places(self) -> list[tuple[int, int] | None]:
        """Return offset and bytes of every key's page in ``memory``, None where there is none.

        For many pages this is quicker than a view of each.
        """
        return self._hold.places

    async def __aenter__(self) -> Self:
        await self._client._run(self._hold.begin())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self._client._run(self._hold.end(failed=error is not None))


class AsyncGpuLease:
    """Pages leased on the GPU; see ``Client.lease_gpu``. Leaving raises LeaseGone if it lapsed.

    Leaving waits for what the current stream was given before; on others the caller waits.
    Cancelled: the connection is closed, which ends the lease.
    """

    def __init__(self, client: AsyncClient, hold: GpuLeaseHold) -> None:
        self._client = client
        self._hold = hold

    @property
    def pages(self) -> list[GpuPage | None]:
        """Return every key's page on the device, None where it has none there."""
        return self._hold.gpu_pages

    async def __aenter__(self) -> Self:
        await self._client._run(self._hold.begin())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self._client._run(self._hold.end(failed=error is not None))


class AsyncReservation:
    """A slot reserved for writing; see ``Client.reserve``. Leaving without commit aborts.

    Cancelled: the connection is closed, which aborts what was not committed.
    """

    def __init__(self, client: AsyncClient, hold: ReserveHold) -> None:
        self._client = client
        self._hold = hold

    @property
    def view(self) -> memoryview:
        """Return the slot, writable until commit."""
        return self._hold.view

    async def commit(self, **options: Unpack[PutOptions]) -> bool:
        """Publish what was written.

        options: those of ``put``.
        Returns: False when ``nx`` was given and the key is there.
        Raises:  LeaseGone when the time for writing is over.
        Cancelled: the page may have been published or not.
        """
        return await self._client._run(self._hold.commit(**options))

    async def __aenter__(self) -> Self:
        await self._client._run(self._hold.begin())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client._run(self._hold.end())
