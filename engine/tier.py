"""What the engine asks of a file tier.

The engine knows file tiers by this protocol alone, so that its tests can do without files. What
each method does in detail is said where it is built, in tiers/file_tier.py.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol

from respkv.tiers.record import Level, Meta, Record, Value


class Health(Protocol):
    """Whether a tier reads and writes, reads only, or is of no use now, and why."""

    @property
    def state(self) -> Literal["ok", "read-only", "off"]: ...

    @property
    def reason(self) -> str: ...


class Stats(Protocol):
    """What a tier counts.

    live_bytes: of the copies that are wanted.
    too_large:  values that came to be written and are larger than the tier takes; the engine counts
                them, because it does not ask for what cannot be.
    stale:      values that it offered and that may be old; counted by the engine, too.
    """

    too_large: int
    stale: int

    @property
    def live_bytes(self) -> int: ...


class Tier(Protocol):
    """A log of values in files.

    The hooks are set before ``start`` and called synchronously; ``dropped`` may call ``free`` and
    ``bury`` of the same tier.
    """

    name: str
    letter: str
    payload_bytes_max: int
    capacity_bytes: int
    describe: Callable[[Record], Meta]
    keep: Callable[[Record], bool]
    leave: Callable[[list[Record]], Awaitable[None]]
    release: Callable[[Record], bool]
    dropped: Callable[[Record, str], None]
    generation: Callable[[], int]

    @property
    def health(self) -> Health: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def next_generation(self) -> int: ...

    async def start(self, found: Callable[[Meta, Record], bool]) -> Any: ...

    async def run(self) -> None: ...

    async def write(self, values: Sequence[Value], level: Level) -> list[Record | None]: ...

    async def read(
        self, record: Record, key: bytes, into: memoryview, image: memoryview | None
    ) -> int: ...

    async def read_stored(self, record: Record, key: bytes) -> tuple[int, bytes]: ...

    def free(self, record: Record) -> None: ...

    def bury(self, key: bytes, generation: int) -> int: ...

    def change(self, meta: Meta) -> int: ...

    async def settle(self, ticket: int, level: Level) -> None: ...

    async def clear(self) -> None: ...

    async def stop(self, seconds: float = 10.0) -> None: ...

    async def reset(self) -> None: ...

    def load_us(self, nbytes: int) -> int: ...
