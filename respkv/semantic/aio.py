"""The asynchronous face of the semantic cache."""

from collections.abc import Mapping
from typing import Any, Self, TypeVar, Unpack

import anyio

from respkv.client import AsyncClient, AsyncListening, PageEvent
from respkv.client.replies import Reply
from respkv.errors import ConnectionLost, ProtocolError
from respkv.semantic.answers import Hit, SemanticStats
from respkv.semantic.core import Core
from respkv.semantic.effects import Ask, Effect, Hear, Heard, Steps
from respkv.semantic.settings import Options, make_settings
from respkv.semantic.sync import EVENTS_MAX

T = TypeVar("T")


class AsyncSemanticCache:
    """``SemanticCache`` for asyncio and trio; tasks of one event loop may share it.

    cache: a ``respkv.client.AsyncClient``, an engine from ``respkv.open``, or the URL of a server.
    All else as for ``SemanticCache``. A search holds up the event loop for as long as it takes:
    a millisecond for ten thousand entries, so take hnsw for many more.
    Cancelled: a put may have been carried out or not; nothing else is left behind.
    """

    def __init__(
        self,
        cache: AsyncClient | str,
        namespace: str = "answers",
        *,
        dim: int,
        **options: Unpack[Options],
    ) -> None:
        self._core = Core(make_settings(namespace, dim, options))
        if not isinstance(cache, AsyncClient | str):
            raise TypeError(
                f"cache is an AsyncClient, an engine from respkv.open or a URL, not"
                f" {type(cache).__name__}"
            )
        self._cache = AsyncClient(cache) if isinstance(cache, str) else cache
        self._is_own = isinstance(cache, str)
        self._is_closed = False
        self._lock = anyio.Lock()
        self._events: AsyncListening[PageEvent] | None = None

    async def put(
        self,
        embedding: Any,
        payload: bytes | str,
        *,
        tenant: str = "",
        ttl_s: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> str:
        """Store a payload under an embedding; see ``SemanticCache.put``."""
        steps = self._core.put(
            embedding, payload, tenant=tenant, ttl_s=ttl_s, metadata=metadata, key=key
        )
        return await self._run(steps)

    async def get(
        self, embedding: Any, *, tenant: str = "", threshold: float | None = None
    ) -> Hit | None:
        """Return the nearest entry, or None; see ``SemanticCache.get``."""
        return await self._run(self._core.get(embedding, tenant=tenant, threshold=threshold))

    async def search(
        self,
        embedding: Any,
        k: int = 5,
        *,
        tenant: str = "",
        threshold: float | None = None,
    ) -> list[Hit]:
        """Return the k nearest entries; see ``SemanticCache.search``."""
        steps = self._core.search(embedding, k, tenant=tenant, threshold=threshold)
        return await self._run(steps)

    async def delete(self, key: str, *, tenant: str = "") -> bool:
        """Delete an entry; say whether it was there."""
        return await self._run(self._core.delete(key, tenant=tenant))

    async def clear(self, tenant: str = "") -> int:
        """Delete all entries of a tenant; return how many there were."""
        return await self._run(self._core.clear(tenant))

    def stats(self) -> SemanticStats:
        """Return what this object has done, and knows of the store."""
        return self._core.stats()

    async def close(self) -> None:
        """Stop listening, and close the client if it was opened here; later calls raise ConnectionLost."""
        self._is_closed = True
        if not self._lock.locked():  # else the call that runs stops it when it ends
            await self._stop_listening()
        if self._is_own:
            await self._cache.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        await self._lock.acquire()
        is_held = True
        try:
            effect = next(steps)
            while True:
                lets_others = isinstance(effect, Ask) and effect.lets_others
                if lets_others:
                    self._lock.release()
                    is_held = False
                try:
                    answer = await self._carry_out(effect)
                    if lets_others:
                        await self._lock.acquire()
                        is_held = True
                except BaseException as error:
                    # What it takes note of then, it does in one step: no lock is needed.
                    effect = steps.throw(error)
                else:
                    effect = steps.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            if is_held:
                if self._is_closed:
                    await self._stop_listening()
                self._lock.release()

    async def _carry_out(self, effect: Effect) -> list[Reply] | Heard:
        if self._is_closed:
            raise ConnectionLost("the semantic cache is closed")
        if isinstance(effect, Hear):
            return await self._hear(effect.namespace)
        pipeline = self._cache.pipeline()
        for command in effect.commands:
            pipeline.command(*command)
        return await pipeline.execute(raise_on_error=False)

    async def _hear(self, namespace: str) -> Heard:
        heard: list[PageEvent] = []
        if self._events is not None:
            try:
                while len(heard) < EVENTS_MAX:
                    event = await self._events.next(0.0)
                    if event is None:
                        break
                    heard.append(event)
            except (ConnectionLost, ProtocolError):
                await self._stop_listening()
            except BaseException:
                # Cancelled: what was heard is forgotten here, so it must be asked for again.
                await self._stop_listening()
                raise
        if self._events is not None:
            return Heard(heard, is_new=False)
        events = self._cache.events(namespace)
        await events.__aenter__()
        self._events = events
        return Heard((), is_new=True)

    async def _stop_listening(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            await events.__aexit__(None, None, None)
