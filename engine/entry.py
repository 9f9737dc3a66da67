"""One value: what the index holds for a key, and how a put asks for it to be kept."""

from dataclasses import dataclass
from typing import Any, Literal

from respkv.page import Part
from respkv.tiers.record import Level, Record
from respkv.tiers.slab import Slot

SMALL_BYTES_MAX = (
    448  # values up to this stay on the heap; with its header it fills a 480-byte block
)
ENTRY_BYTES = 504  # what an entry costs beyond key and value: measured with tracemalloc

Kind = Literal["string", "kvpage"]


class Entry:
    """A key and where its bytes are.

    In memory it has either ``value`` (a small one, on the heap) or ``slot`` (a place in the arena);
    with neither it is cold. ``records`` are its copies in file tiers, fastest first. It is dirty
    while it has none, clean while it is in memory as well, and never without any copy.
    The hot path writes ``touched`` and ``hits`` and nothing else, so eviction policies read those
    two lazily. Times named ``_ms`` are wall-clock milliseconds (TTLs follow the wall clock); other
    times are seconds of the monotonic clock.
    """

    __slots__ = (
        "account",
        "born",
        "branch",
        "children",
        "depth",
        "expires_ms",
        "generation",
        "held_until",
        "hits",
        "key",
        "kind",
        "level",
        "mark",
        "namespace",
        "nbytes",
        "parent",
        "parent_key",
        "part",
        "parts",
        "pinned_until",
        "position",
        "priority",
        "queue",
        "records",
        "request",
        "slot",
        "tenant",
        "token_ids",
        "tokens",
        "touched",
        "value",
    )

    def __init__(self, key: bytes, kind: Kind, nbytes: int, now: float) -> None:
        self.key = key
        self.kind: Kind = kind
        self.nbytes = nbytes
        self.value: bytes | None = None
        self.slot: Slot | None = None
        self.records: tuple[Record, ...] = ()
        self.generation = 0  # of its value; a small one gets its own when it is written to a file
        self.level = Level.MEMORY  # what its value must survive
        self.expires_ms = 0  # 0: never
        self.touched = now
        self.born = now
        self.hits = 0
        self.held_until = 0.0  # an answer promised it until then
        self.pinned_until = 0.0
        self.priority = 0
        self.namespace = b""
        self.tokens = 0
        self.parent_key = b""
        self.parent: Entry | None = None
        self.children: set[Entry] | None = None  # present pages right behind it in its chain
        self.part: Part | None = None  # it is none: a page, a tail, or a string
        self.parts: set[Entry] | None = None  # present parts that hang on it
        self.position = -1  # its place in the index's table, for SCAN
        self.mark: float = 0.0  # for the eviction policy
        self.queue: Any = None  # for the eviction policy
        self.depth = 0  # tokens in front of it in its chain, as far as it is known
        self.branch = b""  # of a page that came with its tokens: what it shares with its siblings
        self.token_ids = b""  # and the tokens it holds, int32 little-endian
        self.request: Any = None  # the last request that touched it (requests.py)
        self.tenant = b""  # who put it first, and pays for it
        self.account: Any = None  # whose bytes it is (accounts.py)

    @property
    def is_cold(self) -> bool:
        """Whether its bytes are in file tiers alone."""
        return self.slot is None and self.value is None


@dataclass(frozen=True, slots=True)
class Put:
    """How a value is to be kept.

    expires_ms: wall-clock end of its TTL, 0 for none, None to keep the one the key has.
    parent:     key of the page it stands behind; None leaves the link as it is.
    branch, token_ids: of a page that comes with its tokens, see ``Entry``; empty: they stay.
    depth:      tokens in front of the page; None: as many as its parent says.
    tenant:     whose quota it counts against, beside that of its namespace.
    session:    the conversation that it belongs to; empty: none that is known.
    pinned_until: on the monotonic clock; 0.0 leaves the pin as it is.
    level:      what it must survive once the put is answered; None: what its namespace says, or
                the cache.
    """

    kind: Kind = "string"
    expires_ms: int | None = 0
    priority: int = 0
    tokens: int = 0
    parent: bytes | None = None
    level: Level | None = None
    branch: bytes = b""
    token_ids: bytes = b""
    depth: int | None = None
    tenant: bytes = b""
    session: bytes = b""
    pinned_until: float = 0.0


PLAIN = Put()
