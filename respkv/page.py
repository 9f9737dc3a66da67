"""Pages, their geometry, their ids and their keys: the vocabulary every other module shares.

A page is the K and V of ``T`` consecutive tokens over all layers of one shard, ``[L, 2, T, H, D]``
contiguous and layer-major, so that a range of layers is a range of bytes. Its id is a chained hash:
it names the whole prefix that ends with the page, so equal ids mean equal prefixes and the longest
cached prefix is the longest run of present ids from the start.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

KEY_BYTES_MAX = 512
PAGE_ID_BYTES = 32

DTYPE_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of every page of a namespace.

    layers, heads, dim, tokens: L, H, D and T of ``[L, 2, T, H, D]``; dtype: a key of DTYPE_BYTES.
    """

    layers: int
    heads: int
    dim: int
    tokens: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "dim", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(sorted(DTYPE_BYTES))
            raise ValueError(f"dtype must be one of {known}, not {self.dtype!r}")

    @property
    def planes(self) -> int:
        """Planes of a layer, each ``[T, H, D]``: one of K and one of V."""
        return 2

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer: all planes of every token and head."""
        return self.planes * self.tokens * self.heads * self.dim * DTYPE_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of a whole page."""
        return self.layers * self.layer_bytes

    def layer_range(self, first: int, count: int) -> tuple[int, int]:
        """Return the byte range [start, stop) of ``count`` layers from ``first``.

        Raises ValueError naming the range when it leaves the page.
        """
        if first < 0 or count < 1 or first + count > self.layers:
            raise ValueError(
                f"layers {first} to {first + count - 1} are not within 0 to {self.layers - 1}"
            )
        return first * self.layer_bytes, (first + count) * self.layer_bytes


def page_key(namespace: str | bytes, page_id: bytes) -> bytes:
    """Return ``<namespace>:<page id in hex>``. Raises ValueError when it is too long for a key."""
    name = namespace.encode() if isinstance(namespace, str) else namespace
    key = name + b":" + page_id.hex().encode()
    if len(key) > KEY_BYTES_MAX:
        raise ValueError(f"a page key has at most {KEY_BYTES_MAX} bytes, not {len(key)}")
    return key


def page_keys(namespace: str | bytes, ids: Iterable[bytes]) -> list[bytes]:
    """Return the key of every id, in order."""
    return [page_key(namespace, page_id) for page_id in ids]


def namespace_of(key: bytes) -> bytes:
    """Return the namespace of a page key: all before the last colon; empty when there is none."""
    return key.rpartition(b":")[0]


@dataclass(frozen=True, slots=True)
class Latents(Geometry):
    """The shape of pages of latents, ``[L, T, D]``: keys and values of all heads are made of them.

    Source: DeepSeek-AI, DeepSeek-V2, 2024, arXiv:2405.04434 (multi-head latent attention).
    """

    def __post_init__(self) -> None:
        Geometry.__post_init__(self)
        if self.heads != 1:
            raise ValueError(f"latents are of all heads together: heads is 1, not {self.heads}")

    @property
    def planes(self) -> int:
        """One plane: there is no K and V."""
        return 1

    @property
    def halves(self) -> Geometry | None:
        """The same bytes as planes of K and V of half the dim, for lossless codecs; or None."""
        if self.dim % 2:
            return None
        return Geometry(self.layers, 1, self.dim // 2, self.tokens, self.dtype)


class Part(Enum):
    """What hangs on a page under a key of its own, ``<key of a page>.<suffix>``.

    BOUND: the page of another group of layers; without it the page is of no use.
    FREE:  logits, hidden states, the state of recurrent layers: they may go alone.
    """

    BOUND = "bound"
    FREE = "free"


_DIGITS = 2 * PAGE_ID_BYTES
_HEX = frozenset(b"0123456789abcdef")
_SUFFIXES = {b"g": Part.BOUND, b"s": Part.FREE, b"logits": Part.FREE, b"hidden": Part.FREE}


def part_of(key: bytes) -> Part | None:
    """Say what kind of part a key names; None: it names a page, or anything else."""
    if key[-_DIGITS - 1 : -_DIGITS] == b":" or b"." not in key:
        return None
    name = key[key.rfind(b":") + 1 :]
    page_id, suffix = name[:_DIGITS], name[_DIGITS:].split(b".", 2)
    if len(suffix) < 2 or suffix[0] or not _HEX.issuperset(page_id):
        return None
    is_group = suffix[1] in (b"g", b"s")
    return _SUFFIXES.get(suffix[1]) if is_group == (len(suffix) == 3) else None


def group_of(key: bytes) -> bytes:
    """Return the group whose page or state a key names; empty when it names none."""
    suffix = key[key.rfind(b":") :].split(b".", 2)
    return suffix[2] if len(suffix) == 3 and suffix[1] in (b"g", b"s") else b""


def part_key(key: bytes, suffix: bytes) -> bytes:
    """Return the key of a part of a page. suffix: ``logits``, ``hidden``, ``g.<group>``, ..."""
    return b"%b.%b" % (key, suffix)
