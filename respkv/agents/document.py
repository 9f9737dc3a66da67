"""The state of one agent's session as one value: what is in it, how it changes, what bounds it.

One value for all names, because then every change is of the whole session and in one step: an
append, a transfer from one list to another, a clear. Nothing of it can expire or be evicted apart
from the rest, and one time to live is the session's.
"""

from collections.abc import Callable, Iterable
from enum import Enum
from hashlib import blake2b
from types import NoneType
from typing import Any, TypeAlias

import msgspec

from respkv.errors import PageCorrupt

Values: TypeAlias = dict[str, Any]
Items: TypeAlias = list[Any]

MAGIC = b"KVMEM\x01"
NAME_BYTES_MAX = 1024
NAMES_MAX = 1024
DEPTH_MAX = 100  # of lists and dicts in each other: whoever reads a value shall be able to


class Document(msgspec.Struct, frozen=True, array_like=True):
    """A session. agent, session: whose it is, so that no other's is taken for it."""

    agent: str
    session: str
    values: Values


_KINDS = "a value is made of None, bool, int (64 bits), float, str, bytes, list and dict"
CONTAINERS = (list, dict, tuple, set, frozenset)
SCALARS = (NoneType, bool, int, float, str, bytes, bytearray, memoryview)

_decoder = msgspec.msgpack.Decoder(Document)
_encoder = msgspec.msgpack.Encoder()


def key_of(namespace: str, agent: str, session: str) -> bytes:
    """Return the key of a session. Hashes of the names stand in it, so no name can be another's."""
    return f"memory:{namespace}:{_hash('agent', agent)}-{_hash('session', session)}".encode()


def check_name(what: str, name: object) -> str:
    """Return a name. Raises TypeError or ValueError saying which names are accepted."""
    if not isinstance(name, str):
        raise TypeError(f"{what} is a str, not {type(name).__name__}")
    try:
        nbytes = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} {name!r} is no text that can be written as UTF-8") from error
    if not 1 <= nbytes <= NAME_BYTES_MAX:
        raise ValueError(f"{what} has 1 to {NAME_BYTES_MAX} bytes, not {nbytes}")
    return name


def decode(raw: Any, agent: str, session: str) -> Values:
    """Read a session's value. Raises PageCorrupt when it is none, or another's."""
    data = memoryview(raw)
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise PageCorrupt(f"the value of session {session!r} is no session")
    try:
        found = _decoder.decode(data[len(MAGIC) :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PageCorrupt(f"the value of session {session!r} cannot be read: {error}") from error
    if (found.agent, found.session) != (agent, session):
        raise PageCorrupt(f"the value of session {session!r} is another session's")
    return found.values


def encode(values: Values, agent: str, session: str) -> bytes:
    """Return a session's value. Raises TypeError or ValueError for what cannot be kept."""
    return MAGIC + _packed(Document(agent, session, values))


def put(values: Values, name: str, value: Any) -> None:
    """Set a name. Raises TypeError or ValueError for a value that cannot be kept."""
    check_value(value)
    _packed(value)
    _set(values, name, value)


def _set(values: Values, name: str, value: Any) -> None:
    if name not in values and len(values) >= NAMES_MAX:
        raise ValueError(f"a session has at most {NAMES_MAX} names; delete some")
    values[name] = value


def check_value(value: object) -> None:
    """Raise TypeError or ValueError for a value that would not come back as it is.

    The encoder would write others, too: a time as text, a dataclass as a dict.
    """
    found = _containers([value])
    for _ in range(DEPTH_MAX):
        if not found:
            return
        parts: list[object] = []
        for each in found:
            if isinstance(each, dict):
                _check_keys(each)
                parts += each.values()
            else:
                parts += each
        found = _containers(parts)
    if found:
        raise ValueError(f"a value has at most {DEPTH_MAX} lists and dicts in each other")


def _containers(values: Iterable[object]) -> list[Any]:
    """Return what has values in it, each once. Raises TypeError for what is no value."""
    found: dict[int, object] = {}
    for each in values:
        if isinstance(each, CONTAINERS):
            found[id(each)] = each
        elif not isinstance(each, SCALARS) or isinstance(each, Enum):
            raise TypeError(f"{_KINDS}, not {type(each).__name__}")
    return [*found.values()]


def _check_keys(found: dict[object, object]) -> None:
    for key in found:
        if not isinstance(key, SCALARS) or isinstance(key, Enum):
            raise TypeError(f"{_KINDS}; a key of a dict is none of the last two, not {key!r}")


def append(values: Values, name: str, items: Items, max_items: int) -> Items:
    """Append to a list, which begins when it is not there; the oldest items leave beyond max_items.

    Raises TypeError when what is there is no list, or an item cannot be kept.
    """
    for item in items:
        check_value(item)
    found = items_of(values, name)
    kept = [*found, *items][-max_items:]
    _set(values, name, kept)
    return kept


def items_of(values: Values, name: str) -> Items:
    """Return a list, empty when there is none. Raises TypeError when it is something else."""
    found = values.get(name, [])
    if not isinstance(found, list):
        raise TypeError(f"{name!r} is a {type(found).__name__}, not a list")
    return found


def fit(
    values: Values, name: str, least: int, most: int, nbytes_of: Callable[[Values], int]
) -> None:
    """Let the oldest items of a list leave until the session has at most ``most`` bytes.

    least: items that stay, whatever happens. Raises ValueError when that is not enough.
    """
    excess = nbytes_of(values) - most
    items = values[name]
    gone = 0
    while excess > 0 and len(items) - gone > least:
        excess -= len(_packed(items[gone]))
        gone += 1
    values[name] = items[gone:]
    check_fits(nbytes_of(values), most)


def check_fits(nbytes: int, most: int) -> None:
    """Raise ValueError when a session has more bytes than it may."""
    if nbytes > most:
        raise ValueError(
            f"the session would have {nbytes} bytes; max_bytes is {most}: delete names, or keep"
            " what is large under keys of its own"
        )


def _packed(value: Any) -> bytes:
    try:
        return _encoder.encode(value)
    except (TypeError, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise TypeError(f"{_KINDS}: {error}") from error


def _hash(what: str, name: str) -> str:
    return blake2b(
        check_name(what, name).encode(), digest_size=16, person=what.encode()
    ).hexdigest()
