"""What a working memory does, without the I/O: operations that a face drives.

A change reads the session, makes the new one, and stores it only if what was read is still there
(SET with IFEQ, or NX when there was none); if it is not, somebody else was quicker, and it begins
again with what they made. So nobody's change is lost, no lock is left behind by one who dies, and
whoever loses a race has lost it to one who won: there is always progress.
"""

import copy
import math
import random
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from respkv.agents import document
from respkv.agents.document import Items, Values
from respkv.client.commands import unexpected
from respkv.client.replies import Reply
from respkv.client.requests import Arg
from respkv.errors import Busy, ConfigError, ServerError

T = TypeVar("T")

ATTEMPTS = 200
PAUSE_S = 0.001
PAUSE_MAX_S = 0.05
TTL_S_MAX = 10 * 365 * 86_400.0
_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a command; the answer is its reply, an error among them."""

    command: Sequence[Arg]


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for so long."""

    seconds: float


Effect: TypeAlias = Ask | Pause
Steps: TypeAlias = Generator[Effect, Any, T]


class Core:
    """One session, as the operations on it. It keeps no state of its own: the server has it."""

    def __init__(
        self,
        agent: str,
        session: str,
        *,
        ttl_s: float | None,
        namespace: str,
        max_bytes: int,
        max_items: int,
    ) -> None:
        if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
            raise ConfigError(
                f"namespace = {namespace!r}: accepted are 1 to 64 letters, digits and . _ -"
            )
        is_time = isinstance(ttl_s, int | float) and not isinstance(ttl_s, bool)
        if ttl_s is not None and not (is_time and 0 < ttl_s <= TTL_S_MAX):
            raise ConfigError(
                f"ttl_s = {ttl_s!r}: accepted are more than 0 and up to {TTL_S_MAX:g}, or None"
            )
        for name, value in (("max_bytes", max_bytes), ("max_items", max_items)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} = {value!r}: accepted are whole numbers from 1")
        self.key = document.key_of(namespace, agent, session)
        self._agent, self._session = agent, session
        self._px: list[Arg] = [] if ttl_s is None else ["PX", max(1, math.ceil(ttl_s * 1000))]
        self._max_bytes, self._max_items = max_bytes, max_items

    def get(self, name: str, default: Any = None) -> Steps[Any]:
        """Return a value."""
        document.check_name("name", name)
        values, _ = yield from self._read()
        return values.get(name, default)

    def names(self) -> Steps[list[str]]:
        """Return the names of all values."""
        values, _ = yield from self._read()
        return list(values)

    def items(self, name: str, last: int | None) -> Steps[Items]:
        """Return a list's items."""
        document.check_name("name", name)
        if last is not None and (not isinstance(last, int) or last < 0):
            raise ValueError(f"last = {last!r}: at least 0 items are asked for")
        values, _ = yield from self._read()
        items = document.items_of(values, name)
        return items if last is None else items[len(items) - min(last, len(items)) :]

    def snapshot(self) -> Steps[Values]:
        """Return all values, of one moment."""
        values, _ = yield from self._read()
        return values

    def set(self, name: str, value: Any) -> Steps[None]:
        """Set a value."""
        document.check_name("name", name)

        def change(values: Values) -> None:
            document.put(values, name, value)

        yield from self._change(change)

    def append(self, name: str, items: Items) -> Steps[int]:
        """Append to a list; return its length."""
        document.check_name("name", name)

        def change(values: Values) -> int:
            document.append(values, name, items, self._max_items)
            least = min(len(items), self._max_items)
            document.fit(values, name, least, self._max_bytes, self._nbytes)
            return len(values[name])

        return (yield from self._change(change))

    def update(self, name: str, function: Callable[[Any], Any], default: Any) -> Steps[Any]:
        """Replace a value by what a function makes of it."""
        document.check_name("name", name)

        def change(values: Values) -> Any:
            # A copy of the default: the function may write into it, and may be called again.
            made = function(values[name] if name in values else copy.deepcopy(default))
            document.put(values, name, made)
            return made

        return (yield from self._change(change))

    def delete(self, name: str) -> Steps[bool]:
        """Delete a value; say whether it was there."""
        document.check_name("name", name)

        def change(values: Values) -> bool:
            missing = object()
            return values.pop(name, missing) is not missing

        return (yield from self._change(change))

    def clear(self) -> Steps[bool]:
        """Delete the session; say whether it was there."""
        return bool((yield from self._ask(["DEL", self.key])))

    def touch(self) -> Steps[bool]:
        """Restart the time to live; say whether the session is there."""
        words: list[Arg] = ["PEXPIRE", self.key, self._px[1]] if self._px else ["EXISTS", self.key]
        return bool((yield from self._ask(words)))

    def _read(self) -> Steps[tuple[Values, bytes | None]]:
        """Return the values and the bytes that say them; None: there is no session."""
        reply = yield from self._ask(["GETEX", self.key, *self._px])
        if reply is None:
            return {}, None
        if not isinstance(reply, bytes | memoryview):
            raise unexpected("a session", reply)
        raw = bytes(reply)
        return document.decode(raw, self._agent, self._session), raw

    def _change(self, change: Callable[[Values], T]) -> Steps[T]:
        """Change the session in one step. ``change`` may be called again with other values."""
        for attempt in range(ATTEMPTS):
            values, before = yield from self._read()
            result = change(values)
            after = document.encode(values, self._agent, self._session)
            document.check_fits(len(after), self._max_bytes)
            if after == before or (before is None and not values):
                return result  # nothing has changed; a session begins with its first value
            condition: list[Arg] = ["NX"] if before is None else ["IFEQ", before]
            reply = yield from self._ask(["SET", self.key, after, *condition, *self._px])
            if reply is not None:
                return result
            yield Pause(random.uniform(0, min(PAUSE_MAX_S, PAUSE_S * 2**attempt)))
        raise Busy(f"session {self._session!r}: {ATTEMPTS} times another writer was quicker")

    def _ask(self, command: Sequence[Arg]) -> Steps[Reply]:
        reply: Reply = yield Ask(command)
        if isinstance(reply, ServerError):
            raise reply
        return reply

    def _nbytes(self, values: Values) -> int:
        return len(document.encode(values, self._agent, self._session))
