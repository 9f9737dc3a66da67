"""What a server may answer, kept outside of it, for runs in which it is killed.

Every key belongs to one client, so what is done to it happens in order and its state is known but
for what was never acknowledged. A value follows from the seed, the key's number and its version, so
that any byte of another value, an older one of the same key included, is recognised.

Two kinds of keys. A *mutable* one gets a new version with every put. A *content-addressed* one (it
ends with 64 hex digits) has one version, put again and again: forgotten it may be, also deleted and
back again after a crash, but it has these bytes or none.
"""

import hashlib
import random
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

MEMORY, WRITTEN, DURABLE = LEVELS = range(3)
LEVEL_WORDS: list[tuple[bytes, ...]] = [(), (b"WRITTEN",), (b"DURABLE",)]

SIZES = [20, 300, 449, 4000, 20_000, 65_536, 70_000, 300_000, 1_000_000]
DIGEST_BYTES = 16
STORY_MAX = 12
NOISE_BYTES = 4 << 20
REPLY_S_MAX = 60.0
TTL_SLACK_S = 0.4  # how far a server that was just asked may be from our clock

State = int | None  # a version, or None: there is no value
Window = tuple[float, float]  # when a value expires: between these wall-clock seconds
NEVER: Window = (float("inf"), float("inf"))


class Values:
    """The only right bytes of every version of every key."""

    def __init__(self, seed: str) -> None:
        self._seed = seed.encode()
        rng = random.Random(seed)
        noise = rng.randbytes(NOISE_BYTES)
        # The second kind is compressible, as tensors are after their bytes were split.
        self._noise = [noise, bytes(byte & 3 for byte in noise[: NOISE_BYTES // 2]) * 2]

    def of(self, number: int, version: int) -> bytes:
        """Return the value of a version of a key."""
        digest = hashlib.blake2b(
            b"%d/%d/%b" % (number, version, self._seed), digest_size=DIGEST_BYTES
        ).digest()
        body_bytes = SIZES[(number + version * 5) % len(SIZES)] - DIGEST_BYTES
        noise = self._noise[number % 3 == 0]
        start = int.from_bytes(digest[:4]) % (NOISE_BYTES - body_bytes)
        return digest + noise[start : start + body_bytes]


@dataclass
class Key:
    """One key: what it may hold now.

    level:    of the last put that was acknowledged.
    allowed:  after a crash at this moment; None among them when it may be absent.
    expiries: for each version, the times at which it may expire.
    is_live_deleted: deleted, and only a crash may bring it back.
    story:    the last that was done to it.
    """

    name: bytes
    number: int
    is_content: bool
    last_version: int = 0
    level: int = MEMORY
    allowed: set[State] = field(default_factory=lambda: {None})
    expiries: dict[int, list[Window]] = field(default_factory=dict)
    is_live_deleted: bool = False
    story: deque[str] = field(default_factory=lambda: deque(maxlen=STORY_MAX))

    def note(self, what: str) -> None:
        """Remember what was done, for an error to tell."""
        self.story.append(f"{time.time() % 1000:.3f} {what}")


class Wrong(AssertionError):
    """The server gave what it may not give. ``key``: for which key."""

    def __init__(self, key: "Key", text: str) -> None:
        super().__init__(text)
        self.key = key


class Ledger:
    """All keys, and the rules.

    level_kept: the least level whose acknowledged values survive what is done to the server.
    may_evict:  anything may be absent at any time; what is there must still be right.
    """

    def __init__(
        self, values: Values, keys: list[Key], *, level_kept: int, may_evict: bool
    ) -> None:
        self.values = values
        self.keys = keys
        self.level_kept = level_kept
        self.may_evict = may_evict

    # What clients do: begin_x before it is sent, end_x once it was acknowledged.

    def begin_put(self, key: Key, level: int, px_ms: int | None = None) -> int:
        """Return the version to put."""
        version = 0
        key.is_live_deleted = False
        if not key.is_content:
            key.last_version += 1
            version = key.last_version
            # An overwrite that is answered may say less than what it replaces, and then takes it
            # away first; otherwise one of the two is always there.
            if not self._is_kept(level) or level < key.level:
                key.allowed.add(None)
        key.allowed.add(version)
        soon = time.time() + (px_ms or 0) / 1000
        window = NEVER if px_ms is None else (soon, soon + REPLY_S_MAX)
        key.expiries.setdefault(version, []).append(window)
        key.note(f"put {version}, level {level}, px {px_ms}")
        return version

    def end_put(self, key: Key, version: int, level: int, px_ms: int | None = None) -> None:
        """The put was acknowledged."""
        key.note("ok")
        if not key.is_content:
            key.allowed = {version} if self._is_kept(level) else {version, None}
            key.level = level
            first, _ = key.expiries[version][0]
            last = float("inf") if px_ms is None else time.time() + px_ms / 1000
            key.expiries = {version: [(first, last)]}
        elif self._is_kept(level):
            key.allowed = {version}

    def begin_delete(self, key: Key) -> None:
        """DEL is about to be sent."""
        key.note("delete")
        key.allowed.add(None)

    def end_delete(self, key: Key) -> None:
        """DEL was acknowledged."""
        key.note("ok")
        key.is_live_deleted = True
        if not key.is_content:
            self._forget(key)

    def begin_expire(self, key: Key, px_ms: int | None) -> Window:
        """PEXPIRE, or PERSIST for None, is about to be sent; return when it will have expired."""
        soon = time.time() + (px_ms or 0) / 1000
        window = NEVER if px_ms is None else (soon, soon + REPLY_S_MAX)
        key.note(f"expire {px_ms}")
        for version in key.allowed:
            if version is not None:
                key.expiries[version].append(window)
        return window

    def end_expire(self, key: Key, px_ms: int | None, window: Window, was_there: bool) -> None:
        """It was acknowledged."""
        key.note(f"ok: {was_there}")
        if not was_there:
            self.check(key, None)
            return
        if px_ms is not None:
            window = (window[0], time.time() + px_ms / 1000)
        for version in key.allowed:
            if version is not None:
                key.expiries[version] = [window]

    def begin_flush(self) -> None:
        """FLUSHALL is about to be sent, and nothing else is under way."""
        for key in self.keys:
            key.note("flush")
            key.allowed.add(None)

    def end_flush(self) -> None:
        """FLUSHALL was acknowledged; not even a crash brings anything back."""
        for key in self.keys:
            key.note("ok")
            self._forget(key)

    # What clients and the tester see.

    def check(self, key: Key, value: bytes | None, since: float | None = None) -> State:
        """Check an answer while the server runs. Raises Wrong.

        since: when the question was sent, wall-clock seconds. The answer was true at one moment
               between then and now: it may have waited behind others that promise more.
        """
        allowed: set[State] = {None} if key.is_live_deleted else self._allowed(key, since)
        return self._find(key, value, allowed)

    def check_recovered(
        self,
        key: Key,
        value: bytes | None,
        pttl_ms: int,
        *,
        clean: bool,
        since: float | None = None,
    ) -> State:
        """Check an answer after a restart, and take it for the key's state. Raises Wrong.

        clean: the server was stopped, not killed, so that it may not have brought back anything.
        since: when the question was sent, as in ``check``.
        """
        if clean and key.is_live_deleted:
            self._forget(key)
        was_kept = None not in key.allowed
        state = self._find(key, value, self._allowed(key, since))
        key.note(f"found {state} after a {'stop' if clean else 'crash'}")
        key.is_live_deleted = False
        if state is not None:
            if was_kept or clean:
                self._check_ttl(key, state, pttl_ms, since)
            key.allowed = {state} if was_kept and len(key.allowed) == 1 else {state, None}
            key.expiries = {state: key.expiries[state]}
        elif not self.may_evict and not key.is_content:
            self._forget(key)
        return state

    # The rules.

    def _is_kept(self, level: int) -> bool:
        return level >= self.level_kept and not self.may_evict

    def _forget(self, key: Key) -> None:
        key.allowed = {None}
        key.expiries.clear()
        key.is_live_deleted = False

    def _allowed(self, key: Key, since: float | None) -> set[State]:
        """Return the states allowed: at some moment from ``since`` on a value was there, or gone."""
        now = time.time()
        since = now if since is None else since
        found: set[State] = set()
        for state in key.allowed:
            windows = [] if state is None else key.expiries[state]
            if any(since <= last + TTL_SLACK_S for _, last in windows):
                found.add(state)
            if not all(now < first - TTL_SLACK_S for first, _ in windows) or state is None:
                found.add(None)
        return found

    def _find(self, key: Key, value: bytes | None, allowed: set[State]) -> State:
        """Return which of the states this is. Raises Wrong."""
        for state in allowed:
            if state is None:
                if value is None:
                    return None
            elif value == self.values.of(key.number, state):
                return state
        raise Wrong(
            key,
            f"{key.name!r} is {self._name(key, value)}, not {wanted(allowed)}; {list(key.story)}",
        )

    def _name(self, key: Key, value: bytes | None) -> str:
        """Say what this is, for an error."""
        if value is None:
            return "absent"
        for other in (key, *self.keys):
            for version in range(other.last_version, -1, -1):
                if value == self.values.of(other.number, version):
                    return f"version {version} of {other.name!r} (last put: {other.last_version})"
        for version in range(key.last_version, -1, -1):
            right = self.values.of(key.number, version)
            if value[:DIGEST_BYTES] == right[:DIGEST_BYTES]:
                differ = [
                    at
                    for at, pair in enumerate(zip(value, right, strict=False))
                    if len({*pair}) > 1
                ]
                return f"version {version} with {len(differ)} wrong bytes in {len(value)}, from {differ[:1]}"
        return f"{len(value)} bytes of nobody: {value[:24]!r}..."

    def _check_ttl(self, key: Key, version: int, pttl_ms: int, since: float | None) -> None:
        if pttl_ms == -2:  # it expired between the two questions
            return
        now = time.time()
        left_s = pttl_ms / 1000 if pttl_ms >= 0 else float("inf")
        least, most = (now if since is None else since) + left_s, now + left_s
        for first, last in key.expiries[version]:
            if first - TTL_SLACK_S <= most and least <= last + TTL_SLACK_S:
                return
        windows = [
            (first - time.time(), last - time.time()) for first, last in key.expiries[version]
        ]
        raise Wrong(key, f"{key.name!r} expires in {pttl_ms} ms, not in any of {windows} s")


def wanted(states: Iterable[State]) -> str:
    """Name states, for an error."""
    return " or ".join(
        sorted("absent" if state is None else f"version {state}" for state in states)
    )


def make_keys(clients: int, keys_per_client: int) -> list[list[Key]]:
    """Return each client's keys: three mutable ones to each content-addressed one."""
    found = []
    for client in range(clients):
        numbers = range(client * keys_per_client, (client + 1) * keys_per_client)
        found.append(
            [
                Key(b"page:%064x" % number, number, True)
                if number % 4 == 3
                else Key(b"key:%d" % number, number, False)
                for number in numbers
            ]
        )
    return found
