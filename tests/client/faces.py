"""Both faces behind one blocking form, so that each test of behaviour is written once.

The asynchronous client runs on a loop in a thread of its own; calls go there and wait.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeAlias, cast

from anyio.from_thread import BlockingPortal, start_blocking_portal

import respkv
from respkv.client import AsyncClient, Client
from respkv.client.sequence_faces import AsyncLayers

FACES = ["sync", "asyncio", "uvloop", "trio"]

Face: TypeAlias = Any  # Client, or a Blocking that behaves as one


class Blocking:
    """Calls the methods of an asynchronous object from blocking code."""

    def __init__(self, portal: BlockingPortal, target: Any) -> None:
        self.portal = portal
        self.target = target

    def __getattr__(self, name: str) -> Any:
        found: Any = getattr(self.target, name)
        if name == "seq":
            return Blocking(self.portal, found)
        if not callable(found):
            return found
        return partial(self._call, cast(Callable[..., Awaitable[Any]], found))

    def within(self, seconds: float) -> "Blocking":
        return Blocking(self.portal, self.target.within(seconds))

    def pipeline(self) -> "Blocking":
        return Blocking(self.portal, self.target.pipeline())

    def command(self, *args: Any, **options: Any) -> Any:
        found = self.target.command(*args, **options)
        return self if found is self.target else self._await(found)

    def lease(self, *args: Any, **options: Any) -> AbstractContextManager["Blocking"]:
        return self._entered(self.target.lease(*args, **options))

    def listen(self, *args: Any, **options: Any) -> AbstractContextManager["Blocking"]:
        return self._entered(self.target.listen(*args, **options))

    def events(self, *args: Any) -> AbstractContextManager["Blocking"]:
        return self._entered(self.target.events(*args))

    def reserve(self, *args: Any, **options: Any) -> AbstractContextManager["Blocking"]:
        return self._entered(self.target.reserve(*args, **options))

    @contextmanager
    def _entered(self, manager: Any) -> Iterator["Blocking"]:
        with self.portal.wrap_async_context_manager(manager) as entered:
            yield Blocking(self.portal, entered)

    def _call(self, method: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
        result = self.portal.call(partial(method, *args, **options))
        return Blocking(self.portal, result) if isinstance(result, AsyncLayers) else result

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                yield self.portal.call(self.target.__anext__)
            except StopAsyncIteration:
                return

    def _await(self, awaitable: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await awaitable

        return self.portal.call(wait)


@contextmanager
def open_face(face: str, url: str, options: dict[str, Any]) -> Iterator[Face]:
    """Open a client of one of FACES and close it at the end."""
    if face == "sync":
        with Client(url, **options) as client:
            yield client
        return
    backend = "trio" if face == "trio" else "asyncio"
    loop_options = {"use_uvloop": True} if face == "uvloop" else {}
    with start_blocking_portal(backend, loop_options) as portal:
        target = AsyncClient(url, **options)
        try:
            yield Blocking(portal, target)
        finally:
            portal.call(target.close)


@contextmanager
def open_embedded_face(face: str, settings: dict[str, Any]) -> Iterator[Face]:
    """Open an engine in this process behind one of FACES and close it at the end."""
    if face == "sync":
        with respkv.open_sync(**settings) as client:
            yield client
        return
    backend = "trio" if face == "trio" else "asyncio"
    with start_blocking_portal(backend) as portal:
        with portal.wrap_async_context_manager(respkv.open(**settings)) as target:
            yield Blocking(portal, target)
