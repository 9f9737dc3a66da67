"""The blocking face of an agent's working memory."""

import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

from respkv.agents.core import Ask, Core, Effect, Steps
from respkv.agents.document import Items, Values
from respkv.client import Client

T = TypeVar("T")


class WorkingMemory:
    """What an agent keeps during a session, shared by all processes that work on it.

    cache:     a ``respkv.client.Client``, an engine from ``respkv.open_sync``, or the URL of a
               server, to which a client is then opened and closed.
    agent, session: whose memory it is; any text. What others have cannot be reached by any name.
    ttl_s:     each call, reading ones too, begins it anew; None: the session stays until evicted.
    max_bytes: of the whole session: 1 MiB. max_items: of each list.

    Values are made of None, bool, int (64 bits), float, str, bytes, list and dict. A change is of
    the whole session and in one step: others see all of it or nothing, and no change of anyone is
    lost. It is read and written as a whole, so it is for what an agent thinks with; what is large
    belongs under keys of its own. Threads may share it.

    Every call raises ServerError, ConnectionLost or TimedOut when the server cannot be had; a change
    that ended so may have been carried out. Busy: too many others wrote at once; nothing changed.
    """

    def __init__(
        self,
        cache: Client | str,
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
        if not isinstance(cache, Client | str):
            raise TypeError(
                f"cache is a Client, an engine from respkv.open_sync or a URL, not"
                f" {type(cache).__name__}"
            )
        self._cache = Client(cache) if isinstance(cache, str) else cache
        self._is_own = isinstance(cache, str)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or the default when there is none."""
        return self._run(self._core.get(name, default))

    def set(self, name: str, value: Any) -> None:
        """Set a value. Raises TypeError or ValueError for one that cannot be kept."""
        self._run(self._core.set(name, value))

    def append(self, name: str, *items: Any) -> int:
        """Append to a list, which begins when it is not there; return its length.

        The oldest items leave when it would have more than ``max_items``, or the session more than
        ``max_bytes``. Raises TypeError when what is there is no list.
        """
        return self._run(self._core.append(name, [*items]))

    def list(self, name: str, last: int | None = None) -> Items:
        """Return the items of a list, oldest first; only the last ones, if a number is given."""
        return self._run(self._core.items(name, last))

    def update(self, name: str, function: Callable[[Any], Any], default: Any = None) -> Any:
        """Replace a value by what a function makes of it, in one step; return that.

        function: called with the value, or the default; again, when another was quicker.
        """
        return self._run(self._core.update(name, function, default))

    def delete(self, name: str) -> bool:
        """Delete a value; say whether it was there."""
        return self._run(self._core.delete(name))

    def names(self) -> Items:
        """Return the names of all values."""
        return self._run(self._core.names())

    def snapshot(self) -> Values:
        """Return all values by their names, as they were at one moment."""
        return self._run(self._core.snapshot())

    def clear(self) -> bool:
        """Delete the session; say whether it was there."""
        return self._run(self._core.clear())

    def touch(self) -> bool:
        """Begin the time to live anew; say whether the session is there."""
        return self._run(self._core.touch())

    def close(self) -> None:
        """Close the client if it was opened here."""
        if self._is_own:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        try:
            effect = next(steps)
            while True:
                effect = steps.send(self._carry_out(effect))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _carry_out(self, effect: Effect) -> Any:
        if isinstance(effect, Ask):
            return self._cache.command(*effect.command)
        return time.sleep(effect.seconds)
