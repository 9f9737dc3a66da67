"""Which function carries out which command, and what a wrong call is told.

``@command(name)`` ties a handler to its row in the command table, which gives its arity. Names are
found in one dict lookup: upper and lower case are both in it, anything else is folded once.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from respkv.errors import CommandError
from respkv.wire.commands import COMMANDS, Command, find_command, look_up
from respkv.wire.parser import Args

if TYPE_CHECKING:
    from respkv.server.loads import Delay
    from respkv.server.session import Session
    from respkv.wire.calls import Calls

logger = logging.getLogger(__name__)

# What a handler returns when it has not answered yet: an iterator that appends to the output step
# by step, or an awaitable that ends with the answer appended. Instead of a handler's answer there
# may be what has to be waited for before it can run.
Later: TypeAlias = "Iterator[None] | Awaitable[None] | Delay"
Handle: TypeAlias = "Callable[[Session, Args], Later | None]"
Reads: TypeAlias = Callable[[Args], Sequence[bytes]]
Streams: TypeAlias = Literal["never", "large", "always"]
Together: TypeAlias = "Callable[[Session, Calls], int] | None"
Within: TypeAlias = Callable[[Args], float | None]


NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Handler:
    """A command's function and the numbers of arguments, its name included, that it accepts.

    reads:   the keys whose bytes it needs; None: it needs none. When it runs they are in memory, or
             cannot be had: a cold entry is then to be treated as an absent one.
    streams: whether it brings them itself, one after the other: always, or when they are many bytes.
    within:  for how many seconds it waits for them at most; None, or the answer None: for long.
    is_strict: it fails when one of them cannot be had, instead of taking it for absent.
    together: answers several calls at once, from the first one on, as long as they need no more than
             is quick: nothing that waits, fails, or that file tiers have to be told. Returns how
             many; the others are carried out one by one, as all are elsewhere.
    """

    handle: Handle
    least: int
    most: int
    command: Command
    reads: Reads | None = None
    streams: Streams = "never"
    within: Within | None = None
    reads_from: int = NEVER  # the number of arguments from which on it reads
    payload_at: int = 0  # the first argument that may be large; 0: none
    is_strict: bool = False
    together: Together = None

    def takes(self, num_args: int) -> bool:
        """Whether ``reads`` may be asked about so many arguments."""
        return self.reads_from <= num_args and self.least <= num_args <= self.most


BY_NAME: dict[str, Handler] = {}
HANDLERS: dict[bytes, Handler] = {}
UNAUTHENTICATED_HANDLERS: dict[bytes, Handler] = {}
# Of a client that listens to channels and speaks RESP2, where a message looks like a reply.
SUBSCRIBER_HANDLERS: dict[bytes, Handler] = {}
_UNAUTHENTICATED = frozenset({"auth", "hello", "quit", "reset"})
_SUBSCRIBER = frozenset(
    {"subscribe", "unsubscribe", "psubscribe", "punsubscribe", "ping", "quit", "reset"}
)

_TABLES = (
    (HANDLERS, None),
    (UNAUTHENTICATED_HANDLERS, _UNAUTHENTICATED),
    (SUBSCRIBER_HANDLERS, _SUBSCRIBER),
)


def one_key(args: Args) -> Sequence[bytes]:
    """Return the key of a command that has one."""
    return args[1:2]


def command(
    name: str,
    reads: Reads | None = None,
    *,
    streams: Streams = "never",
    within: Within | None = None,
    reads_from: int = 0,
    is_strict: bool = False,
    together: Together = None,
) -> Callable[[Handle], Handle]:
    """Make a function the handler of a command, or of a subcommand as ``client|id``.

    reads, streams, within, reads_from, together: see ``Handler``. is_strict: so is every command that writes.
    """
    outer, _, sub = name.partition("|")
    row = COMMANDS[outer].subcommands[sub] if sub else COMMANDS[outer]
    least = abs(row.arity)
    most = row.arity if row.arity > 0 else 1 << 62

    def register(handle: Handle) -> Handle:
        assert name not in BY_NAME, f"{name} has two handlers"
        payload_at = row.payload[0] if row.payload is not None else 0
        from_ = NEVER if reads is None else reads_from
        strict = is_strict or "write" in row.flags
        handler = Handler(
            handle, least, most, row, reads, streams, within, from_, payload_at, strict, together
        )
        BY_NAME[name] = handler
        if not row.subcommands and not sub:
            for table, names in _TABLES:
                if names is None or name in names:
                    table[name.encode()] = table[name.upper().encode()] = handler
        return handle

    return register


def _refuse_browser(session: "Session", args: Args) -> None:
    """Close at once: a web page made its reader's browser send what follows as commands."""
    logger.warning("possible cross-protocol attack from %s; closing", session.address)
    session.is_closing = True


_HTTP = frozenset({b"post", b"host:"})
_INTRUDER = Handler(_refuse_browser, 0, 1 << 62, COMMANDS["quit"])


def handlers_for(is_authenticated: bool, is_listening: bool) -> dict[bytes, Handler]:
    """Return the commands that a connection may call.

    is_listening: to channels, in RESP2.
    """
    if not is_authenticated:
        return UNAUTHENTICATED_HANDLERS
    return SUBSCRIBER_HANDLERS if is_listening else HANDLERS


def resolve(handlers: Mapping[bytes, Handler], args: Args) -> Handler:
    """Find the handler that the quick look-up or its arity check did not settle.

    Raises CommandError in Redis's words: unknown command or subcommand, wrong number of arguments,
    before authentication NOAUTH for all that is not needed to authenticate, and what may not be
    called while messages come as if they were replies.
    """
    if args[0].lower() in _HTTP:
        return _INTRUDER
    row = look_up(args[0])
    if handlers is UNAUTHENTICATED_HANDLERS and (row is None or row.name not in _UNAUTHENTICATED):
        raise CommandError("Authentication required.", "NOAUTH")
    name = find_command(args).name
    if handlers is SUBSCRIBER_HANDLERS and name not in _SUBSCRIBER:
        raise CommandError(
            f"Can't execute '{name}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET"
            " are allowed in this context"
        )
    return BY_NAME[name]
