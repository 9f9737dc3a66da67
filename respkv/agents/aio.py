"""The asynchronous face of an agent's working memory."""

from collections.abc import Callable
from typing import Any, Self, TypeVar

import anyio

from respkv.agents.core import Ask, Core, Effect, Steps
from respkv.agents.document import Items, Values
from respkv.client import AsyncClient

T = TypeVar("T")


class AsyncWorkingMemory:
    """``WorkingMemory`` for asyncio and trio.

    cache: a ``respkv.client.AsyncClient``, an engine from ``respkv.open``, or the URL of a server.
    Cancelled: a change may have been carried out or not; nothing else is left behind.
    """

    def __init__(
        self,
        cache: AsyncClient | str,
        agent: str,
        session: str,
        *,
        ttl_s: float | None = 3600.0,
        namespace: str = "agents",
        max_bytes: int = 1 << 20,
        max_items: int = 1000,
    ) -> None:
        self._core = Core(
            agent,
            session,
            ttl_s=ttl_s,
            namespace=namespace,
            max_bytes=max_bytes,
            max_items=max_items,
        )
        if not isinstance(cache, AsyncClient | str):
            raise TypeError(
                f"cache is an AsyncClient, an engine from respkv.open or a URL, not"
                f" {type(cache).__name__}"
            )
        self._cache = AsyncClient(cache) if isinstance(cache, str) else cache
        self._is_own = isinstance(cache, str)

    async def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or the default when there is none."""
        return await self._run(self._core.get(name, default))

    async def set(self, name: str, value: Any) -> None:
        """Set a value. Raises TypeError or ValueError for one that cannot be kept."""
        await self._run(self._core.set(name, value))

    async def append(self, name: str, *items: Any) -> int:
        """Append to a list; return its length. See ``WorkingMemory.append``."""
        return await self._run(self._core.append(name, [*items]))

    async def list(self, name: str, last: int | None = None) -> Items:
        """Return the items of a list, oldest first; only the last ones, if a number is given."""
        return await self._run(self._core.items(name, last))

    async def update(self, name: str, function: Callable[[Any], Any], default: Any = None) -> Any:
        """Replace a value by what a function makes of it. See ``WorkingMemory.update``."""
        return await self._run(self._core.update(name, function, default))

    async def delete(self, name: str) -> bool:
        """Delete a value; say whether it was there."""
        return await self._run(self._core.delete(name))

    async def names(self) -> Items:
        """Return the names of all values."""
        return await self._run(self._core.names())

    async def snapshot(self) -> Values:
        """Return all values by their names, as they were at one moment."""
        return await self._run(self._core.snapshot())

    async def clear(self) -> bool:
        """Delete the session; say whether it was there."""
        return await self._run(self._core.clear())

    async def touch(self) -> bool:
        """Begin the time to live anew; say whether the session is there."""
        return await self._run(self._core.touch())

    async def close(self) -> None:
        """Close the client if it was opened here."""
        if self._is_own:
            await self._cache.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        try:
            effect = next(steps)
            while True:
                effect = steps.send(await self._carry_out(effect))
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _carry_out(self, effect: Effect) -> Any:
        if isinstance(effect, Ask):
            return await self._cache.command(*effect.command)
        return await anyio.sleep(effect.seconds)
