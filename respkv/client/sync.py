"""The blocking face: drives operations by poll(2), in the thread that calls."""

import math
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from respkv.client import commands, retention, schemas
from respkv.client.commands import Command, Key, PutOptions
from respkv.client.core import Core
from respkv.client.effects import Effect, Event, Heed, Operation, Resolve, Seat, Wait
from respkv.client.gpu import GpuPage
from respkv.client.gpu_lease import GpuLeaseHold
from respkv.client.lease import LeaseHold, ReserveHold
from respkv.client.listen import Listening, Message, PageEvent, listen_to, listen_to_events
from respkv.client.replies import Reply
from respkv.client.requests import Arg, check_offered
from respkv.client.sequence_faces import Sequences
from respkv.client.url import DEFAULT_URL, Options, settings

P = ParamSpec("P")
T = TypeVar("T")

_POLL = {Event.READ: select.POLLIN, Event.WRITE: select.POLLOUT}
_POLL[Event.BOTH] = select.POLLIN | select.POLLOUT


def _method(build: Callable[P, Command[T]]) -> "Callable[Concatenate[Client, P], T]":
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(self._core.call(build(*args, **kwargs)))

    commands.describe(method, build)
    return method


class Client:
    """A client for blocking code. Threads may share it; each call has a connection of its own.

    url:     respkv://, redis:// (TCP), respkvs://, rediss:// (TLS) or unix:///path.
    options: username, password, name, protocol=3, pool_max=8, timeout_s=30.0,
             connect_timeout_s=5.0, reconnect_max=5, tls=None; see ``url.Settings``.
    Connections open when they are needed. After a fork the child opens its own.
    Every call raises ServerError, ConnectionLost or TimedOut, and one that does not run to its end,
    be it by a timeout or KeyboardInterrupt, closes its connection; what it sent may then have been
    carried out.
    """

    _origin: "Client | None" = None  # which an embedded engine lives as long as

    def __init__(self, url: str = DEFAULT_URL, **options: Unpack[Options]) -> None:
        self._core = Core(settings(url, options), threading.Semaphore)

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
    def seq(self) -> Sequences:
        """Prompts as tokens: match, put, get layer by layer."""
        return Sequences(self)

    def within(self, seconds: float) -> "Client":
        """Return this client for calls that take at most so long, and no longer than its own.

        It has the same connections: to close one is to close both.
        Raises ConfigError when seconds is not more than 0.
        """
        found = Client.__new__(Client)
        found._core = self._core.within(seconds)
        found._origin = self
        return found

    def pipeline(self) -> "Pipeline":
        """Collect commands to send together."""
        return Pipeline(self)

    def lease(self, keys: Iterable[Key], *, ms: int | None = None) -> "Lease":
        """Read pages in the server's memory: ``with client.lease(keys) as lease``.

        ms: how long it may take, by the server's default when None.
        """
        return Lease(self, LeaseHold(self._core, keys, ms))

    def lease_gpu(self, keys: Iterable[Key], *, ms: int | None = None) -> "GpuLease":
        """Read pages on the server's GPU: ``with client.lease_gpu(keys) as lease``."""
        return GpuLease(self, GpuLeaseHold(self._core, keys, ms))

    def reserve(self, key: Key, nbytes: int, *, ms: int | None = None) -> "Reservation":
        """Write a page in the server's memory: ``with client.reserve(key, nbytes) as slot``.

        ms: how long the writing may take; 5000 when None.
        """
        return Reservation(self, ReserveHold(self._core, key, nbytes, ms))

    def listen(self, *channels: Key, patterns: Sequence[Key] = ()) -> Listening[Message]:
        """Listen to channels: ``with client.listen("news") as messages``, then iterate.

        patterns: listen to all channels that these cover, too.
        """
        return Listening(listen_to(self._core.settings, channels, patterns), self._run)

    def events(self, *namespaces: Key) -> Listening[PageEvent]:
        """Follow what becomes of the pages of namespaces, of all of them when none is named."""
        return Listening(listen_to_events(self._core.settings, namespaces), self._run)

    def close(self) -> None:
        """Close the idle connections, and the others when their calls end."""
        if self._origin is not None:
            self._origin.close()
        self._core.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, operation: Operation[T]) -> T:
        try:
            effect = next(operation)
            while True:
                try:
                    answer = self._wait_for(effect)
                except BaseException as error:
                    effect = operation.throw(error)
                else:
                    effect = operation.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _wait_for(self, effect: Effect) -> Any:
        left = max(0.0, effect.deadline - time.monotonic())
        if isinstance(effect, Wait):
            poller = select.poll()
            poller.register(effect.sock, _POLL[effect.events])
            return bool(poller.poll(None if left == math.inf else math.ceil(left * 1000)))
        if isinstance(effect, Heed):
            return effect.bell.wait(left)
        if isinstance(effect, Seat):
            return self._core.pool.seats.acquire(timeout=min(left, threading.TIMEOUT_MAX))
        if isinstance(effect, Resolve):
            return socket.getaddrinfo(effect.host, effect.port, type=socket.SOCK_STREAM)
        time.sleep(min(left, effect.seconds))
        return True


class Pipeline:
    """Commands to be sent together, in one go, and answered in order."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._commands: list[tuple[Arg, ...]] = []

    def command(self, *args: Arg) -> Self:
        """Add a command. Raises ValueError as ``Client.command`` does."""
        check_offered(args)
        self._commands.append(args)
        return self

    def execute(self, *, raise_on_error: bool = True) -> list[Reply]:
        """Send what was collected, which is then forgotten, and return the replies in order.

        raise_on_error: raise the first ServerError once all replies are in; else they are in the
                        list where they belong.
        """
        collected, self._commands = self._commands, []
        core = self._client._core
        return self._client._run(core.call_all(collected, raise_on_error=raise_on_error))


class Lease:
    """Pages leased for reading; see ``Client.lease``. Leaving raises LeaseGone if it lapsed."""

    def __init__(self, client: Client, hold: LeaseHold) -> None:
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

    def __enter__(self) -> Self:
        self._client._run(self._hold.begin())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._client._run(self._hold.end(failed=error is not None))


class GpuLease:
    """Pages leased on the GPU; see ``Client.lease_gpu``. Leaving raises LeaseGone if it lapsed.

    Leaving waits for what the current stream was given before; on others the caller waits.
    """

    def __init__(self, client: Client, hold: GpuLeaseHold) -> None:
        self._client = client
        self._hold = hold

    @property
    def pages(self) -> list[GpuPage | None]:
        """Return every key's page on the device, None where it has none there."""
        return self._hold.gpu_pages

    def __enter__(self) -> Self:
        self._client._run(self._hold.begin())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._client._run(self._hold.end(failed=error is not None))


class Reservation:
    """A slot reserved for writing; see ``Client.reserve``. Leaving without commit aborts."""

    def __init__(self, client: Client, hold: ReserveHold) -> None:
        self._client = client
        self._hold = hold

    @property
    def view(self) -> memoryview:
        """Return the slot, writable until commit."""
        return self._hold.view

    def commit(self, **options: Unpack[PutOptions]) -> bool:
        """Publish what was written.

        options: those of ``put``.
        Returns: False when ``nx`` was given and the key is there.
        Raises:  LeaseGone when the time for writing is over.
        """
        return self._client._run(self._hold.commit(**options))

    def __enter__(self) -> Self:
        self._client._run(self._hold.begin())
        return self

    def __exit__(self, *_: object) -> None:
        self._client._run(self._hold.end())
