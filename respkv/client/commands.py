"""The commands as values: what to send, where it lands, what the reply means.

Each function here is one method of both faces. A face makes its methods from these with a wrapper
that is typed by ParamSpec, so names, arguments and results are written once and checkers see
``Client.get(...) -> memoryview | None`` and ``AsyncClient.get(...)`` as its awaitable.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, Unpack, get_args

from respkv.client.replies import Reply
from respkv.client.requests import Arg, Buffer, check_offered, writable_bytes
from respkv.errors import ProtocolError

T = TypeVar("T")

Key = str | bytes


@dataclass(slots=True)
class Command(Generic[T]):
    """One command and how to read its reply.

    targets: memory of the caller that the reply's bulks land in.
    """

    args: Sequence[Arg]
    decode: Callable[[Reply], T]
    targets: Sequence[memoryview] = ()


class Match(NamedTuple):
    """The longest cached prefix: its pages, the tier of each, and how long loading them takes.

    tiers: a letter a page: g gpu, c memory, n nvme, d disk.
    """

    pages: int
    tiers: str
    load_us: int


class PutOptions(TypedDict, total=False):
    """How a page is kept.

    parent: key of the page before it in the chain; tokens: how many it holds, when not full.
    px_ms: time to live; pin_ms: not evicted for so long; priority: higher stays longer;
    session: the conversation it belongs to; tenant: whose quota it counts against;
    nx: only if the key is not there;
    durability: answered once the page survives a crash of the server (``written``) or a power cut
    (``durable``); else as its namespace says.
    """

    parent: Key | None
    tokens: int | None
    px_ms: int | None
    pin_ms: int | None
    priority: int | None
    session: Key | None
    tenant: Key | None
    nx: bool
    durability: Literal["written", "durable"] | None


def command(*args: Arg, into: Buffer | None = None) -> Command[Reply]:
    """Send any command.

    into:    writable memory that a bulk reply lands in; the reply is then a view of it.
    Returns: bytes (memoryview from 64 KiB on), int, float, bool, None, list or dict.
    Raises:  ServerError; ValueError for commands that take over a connection (SUBSCRIBE, MONITOR)
             or an ``into`` that is too small, after the reply has been read.
    """
    check_offered(args)
    if into is None:
        return Command(args, _whatever)
    target = writable_bytes(into)
    return Command(args, lambda reply: _fitting(reply, target), [target])


def ping() -> Command[None]:
    """Ask for a sign of life."""
    return Command(["PING"], lambda reply: None)


def info(section: str | None = None) -> Command[dict[str, str]]:
    """Return what the server says about itself, all sections in one dict."""
    return Command(["INFO"] if section is None else ["INFO", section], _info)


def put(key: Key, payload: Buffer, **options: Unpack[PutOptions]) -> Command[bool]:
    """Store a page, sent from where it lies.

    payload: contiguous; must not change until the call has returned.
    options: see PutOptions.
    Returns: False when ``nx`` was given and the key is there.
    Raises:  ServerError KVSCHEMA when its size does not fit the namespace, OOM when there is no
             room, KVQUOTA when its owner may keep no more, KVPIN when too much is pinned, KVTIER
             when it does not survive what ``durability`` asks: it is in memory then.
    """
    args: list[Arg] = ["KV.PUT", key, payload]
    put_options(args, options)
    return Command(args, _is_ok)


def get(
    key: Key,
    *,
    layers: tuple[int, int] | None = None,
    into: Buffer | None = None,
    deadline_ms: int | None = None,
    as_: str | None = None,
) -> Command[memoryview | None]:
    """Return a page, or None.

    layers:  first and count of the layers wanted; all when None.
    deadline_ms: a page that the server has not brought into memory by then is None; the server goes
             on bringing it, so that a later get finds it.
    into:    writable memory that the page lands in, without a copy on the way (a tensor's by
             ``as_bytes``); the result is a view of it. Else the result has memory of its own.
    as_:     a dtype that the server converts the numbers to, or "raw": the page as it is stored,
             for ``views.decode_page``. Both need the schema of the namespace.
    Raises:  ValueError when ``into`` is too small, after the reply has been read.
    """
    args: list[Arg] = ["KV.GET", key]
    _layers(args, layers)
    option(args, "DEADLINE", deadline_ms)
    option(args, "AS", as_)
    if into is None:
        return Command(args, _page)
    target = writable_bytes(into)
    return Command(args, lambda reply: _page(_fitting(reply, target)), [target])


def mget(
    keys: Iterable[Key],
    *,
    layers: tuple[int, int] | None = None,
    into: Sequence[Buffer] | None = None,
    deadline_ms: int | None = None,
    as_: str | None = None,
) -> Command[list[memoryview | None]]:
    """Return a page or None for every key.

    layers, into, deadline_ms, as_: as for ``get``; into has one buffer for every key.
    """
    args: list[Arg] = ["KV.MGET", *_counted(keys)]
    count = len(args) - 2
    _layers(args, layers)
    option(args, "DEADLINE", deadline_ms)
    option(args, "AS", as_)
    if into is None:
        return Command(args, lambda reply: [_page(page) for page in list_of(reply)])
    if len(into) != count:
        raise ValueError(f"into has {len(into)} buffers for {count} keys")
    targets = [writable_bytes(buffer) for buffer in into]

    def decode(reply: Reply) -> list[memoryview | None]:
        pages = zip(list_of(reply), targets, strict=True)
        return [_page(_fitting(page, target)) for page, target in pages]

    return Command(args, decode, targets)


def match(keys: Iterable[Key], *, session: Key | None = None) -> Command[Match]:
    """Find the longest cached prefix of a chain; its pages then stay for a few seconds.

    session: the conversation that asks.
    """
    args: list[Arg] = ["KV.MATCH", *_counted(keys)]
    option(args, "SESSION", session)
    return Command(args, _match)


def prefetch(keys: Iterable[Key], *, to: Literal["cpu", "gpu"] = "cpu") -> Command[int]:
    """Have pages brought into memory ahead of use; return how many are on their way now.

    to: gpu: to the server's GPU as well.
    """
    args: list[Arg] = ["KV.PREFETCH", *_counted(keys)]
    if to != "cpu":
        args += ("TO", to)
    return Command(args, _int)


def set_(key: Key, value: Arg, *, px_ms: int | None = None, nx: bool = False) -> Command[bool]:
    """Store a plain value. Returns False when ``nx`` was given and the key is there."""
    args: list[Arg] = ["SET", key, value]
    option(args, "PX", px_ms)
    if nx:
        args.append("NX")
    return Command(args, _is_ok)


def delete(*keys: Key) -> Command[int]:
    """Delete keys; return how many were there."""
    return Command(["DEL", *keys], _int)


def exists(*keys: Key) -> Command[int]:
    """Return how many of the keys are there, which then stay for a few seconds."""
    return Command(["EXISTS", *keys], _int)


def touch(keys: Iterable[Key]) -> Command[int]:
    """Count as used now; return how many of the keys are there."""
    return Command(["KV.TOUCH", *_counted(keys)], _int)


def pin(key: Key, ms: int) -> Command[bool]:
    """Keep a page from being evicted for ``ms``. Returns False when it is not there."""
    return Command(["KV.PIN", key, ms], _flag)


def unpin(key: Key) -> Command[bool]:
    """End a pin. Returns False when there was none."""
    return Command(["KV.UNPIN", key], _flag)


def put_options(args: list[Arg], options: PutOptions) -> None:
    """Append the options of KV.PUT and KV.COMMIT."""
    check_options(options, PutOptions.__optional_keys__)
    option(args, "PARENT", options.get("parent"))
    option(args, "TOKENS", options.get("tokens"))
    option(args, "PX", options.get("px_ms"))
    option(args, "PIN", options.get("pin_ms"))
    option(args, "PRIORITY", options.get("priority"))
    option(args, "SESSION", options.get("session"))
    option(args, "TENANT", options.get("tenant"))
    if options.get("nx"):
        args.append("NX")
    durability = options.get("durability")
    if durability is not None:
        args.append(durability.upper())


def describe(method: Callable[..., Any], source: Callable[..., Any]) -> None:
    """Give a face's method the name, docstring and signature of the function it is made from."""
    method.__name__ = source.__name__.rstrip("_")
    method.__doc__ = source.__doc__
    signature = inspect.signature(source)
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    returned = get_args(signature.return_annotation)
    vars(method)["__signature__"] = signature.replace(
        parameters=[self, *signature.parameters.values()],
        return_annotation=returned[-1] if returned else signature.return_annotation,
    )


def _counted(keys: Iterable[Key]) -> list[Arg]:
    if isinstance(keys, str | bytes):
        raise TypeError("keys is a list of keys, not one key")
    listed = list(keys)
    if not listed:
        raise ValueError("at least one key is needed")
    return [len(listed), *listed]


def check_options(options: Mapping[str, object], accepted: frozenset[str]) -> None:
    """Raise TypeError for options that are none: a misspelled pin must not be taken for a pin."""
    if unknown := options.keys() - accepted:
        raise TypeError(
            f"no such option: {', '.join(sorted(unknown))}; accepted are {', '.join(sorted(accepted))}"
        )


def option(args: list[Arg], word: str, value: Arg | None) -> None:
    """Append an option and its value, unless that is None."""
    if value is not None:
        args += (word, value)


def _layers(args: list[Arg], layers: tuple[int, int] | None) -> None:
    if layers is not None:
        first, count = layers
        args += ("LAYERS", first, count)


def _whatever(reply: Reply) -> Reply:
    return reply


def _fitting(reply: Reply, target: memoryview) -> Reply:
    # A bulk that its target could not hold came in memory of its own.
    if isinstance(reply, bytes | memoryview) and len(reply) > len(target):
        raise ValueError(f"into has {len(target)} bytes, the reply {len(reply)}")
    return reply


def _page(reply: Reply) -> memoryview | None:
    match reply:
        case None:
            return None
        case bytes() | memoryview():
            return memoryview(reply)
        case _:
            raise unexpected("a page", reply)


def _is_ok(reply: Reply) -> bool:
    if reply is not None and reply != b"OK":
        raise unexpected("OK", reply)
    return reply is not None


def _int(reply: Reply) -> int:
    if not isinstance(reply, int):
        raise unexpected("a number", reply)
    return reply


def _flag(reply: Reply) -> bool:
    return bool(_int(reply))


def list_of(reply: Reply) -> list[Reply]:
    """Return an array. Raises ProtocolError."""
    if not isinstance(reply, list):
        raise unexpected("an array", reply)
    return reply


def text_of(reply: Reply) -> str:
    """Return a text. Raises ProtocolError."""
    if not isinstance(reply, bytes | memoryview):
        raise unexpected("text", reply)
    return bytes(reply).decode(errors="replace")


def _info(reply: Reply) -> dict[str, str]:
    lines = (
        line.partition(":") for line in text_of(reply).splitlines() if not line.startswith("#")
    )
    return {name: value for name, colon, value in lines if colon}


def _match(reply: Reply) -> Match:
    match reply:
        case [int(pages), bytes(tiers), int(load_us), *_]:
            return Match(pages, tiers.decode(), load_us)
        case _:
            raise unexpected("a match", reply)


def unexpected(wanted: str, reply: Reply) -> ProtocolError:
    """Return the error for a reply of another type than was wanted."""
    return ProtocolError(f"expected {wanted}, the server answered {type(reply).__name__}")
