"""Encoded pages: a head that says how each plane is stored, then the planes.

A page ``[L, 2, T, H, D]`` is 2 L planes, K and V of each layer, and each may have a codec of its
own. Whoever has the head knows where every plane is, so a range of layers is a range of bytes here
as it is of a page as it came, and a reader that decodes on its own device needs nothing else.

The head is 48 bytes: magic, version, dtype, flags (u16), then u32 each L, T, H, D, ``exact_first``,
``exact_last``, then u64 bytes in all, u32 crc32 of head and table without these 4 bytes, 4 zero
bytes. The table is 16 bytes a plane, the planes in the order of the page: codec (of layout.py),
form, u16 zero, u32 bytes, u64 offset from the start of the head. Then the planes, each at a multiple
of 16, in that order and without gaps beyond the padding, which is zero. All is little-endian.

Of a lossy plane the first ``exact_first`` and the last ``exact_last`` tokens are kept as they came,
together in front of what the codec made of the rest. Raw and lossless planes hold all tokens.

With the flag IS_PAYLOAD the planes are the payload of a raw page as it is, unpadded: so such a page
is sent with a head in front and is not copied.

Nothing here is believed before it was held against the sizes that the geometry asks for.
"""

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, NamedTuple

from respkv.errors import PageCorrupt
from respkv.kernels.layout import ALIGN_BYTES, Codec, Side, num_groups, plane_layout, xs_layout
from respkv.page import DTYPE_BYTES, Geometry

MAGIC: Final = b"RKVE"
VERSION: Final = 1
IS_PAYLOAD: Final = 1  # a flag
# How the codec's bytes are stored: as layout.py has them, or through zstd: of xs the byte planes of
# numbers that are not bfloat16, of rhz the codes.
PLAIN: Final = 0
PACKED: Final = 1
SIDES: Final[tuple[Side, Side]] = ("key", "value")
LOSSY_DTYPES: Final = ("bfloat16", "float16", "float32")

# What a page's header says of how it is stored; a number keeps its meaning for ever. From MIXED on
# the stored bytes are an encoded page, before that the payload itself, or all of it compressed.
RAW_ID: Final = 0
MIXED_ID: Final = 15
_FIRST_ID: Final = 16
_OTHER_NAMES: Final = {RAW_ID: "raw", 1: "zstd", 2: "lz4", MIXED_ID: "mixed"}

_DTYPES: Final = (
    "bfloat16",
    "float16",
    "float32",
    "float8_e4m3fn",
    "float8_e5m2",
    "int8",
    "uint8",
)
assert set(_DTYPES) == set(DTYPE_BYTES)
_HEAD: Final = struct.Struct("<4sBBHIIIIIIQI4x")
_CRC: Final = struct.Struct("<I")
_CRC_AT: Final = 40
_PLANE: Final = struct.Struct("<BBHIQ")
HEAD_BYTES: Final = _HEAD.size
PLANE_BYTES_MAX: Final = (1 << 32) - 1

Buffer = bytes | bytearray | memoryview


class Part(NamedTuple):
    """How a plane is stored, and in how many bytes."""

    codec: Codec
    form: int
    nbytes: int


class Plane(NamedTuple):
    """A plane of an encoded page: ``nbytes`` from ``offset`` on, counted from the head's start."""

    codec: Codec
    form: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PageHead:
    """What is known of an encoded page.

    planes:      K and V of the first layer, then of the next.
    total_bytes: of head, table and planes.
    is_payload:  the planes are the payload of a raw page as it is.
    """

    geometry: Geometry
    exact_first: int
    exact_last: int
    planes: tuple[Plane, ...]
    total_bytes: int
    is_payload: bool

    @property
    def head_bytes(self) -> int:
        """Bytes of head and table: where the planes start."""
        return HEAD_BYTES + _PLANE.size * len(self.planes)

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back every bit."""
        return all(plane.codec.is_lossless for plane in self.planes)

    @property
    def codec_id(self) -> int:
        """What a page's header says of a page that is stored so."""
        return codec_id(plane.codec for plane in self.planes)

    def plane(self, layer: int, side: Side | Literal[0, 1]) -> Plane:
        """Return K or V of a layer."""
        return self.planes[2 * layer + (side if isinstance(side, int) else SIDES.index(side))]

    def coded_tokens(self, plane: Plane) -> int:
        """Return how many tokens the codec of a plane saw."""
        return coded_tokens(self.geometry, plane.codec, self.exact_first, self.exact_last)

    def exact_bytes(self, plane: Plane) -> int:
        """Return where in a plane the codec's bytes start, behind the exact tokens."""
        return exact_bytes(self.geometry, plane.codec, self.exact_first, self.exact_last)

    def layer_range(self, first: int, count: int) -> tuple[int, int]:
        """Return the bytes [start, stop) of ``count`` layers from ``first``.

        Raises ValueError naming the range when it leaves the page.
        """
        self.geometry.layer_range(first, count)
        last = 2 * (first + count)
        stop = self.planes[last].offset if last < len(self.planes) else self.total_bytes
        return self.planes[2 * first].offset, stop

    def pack(self) -> bytes:
        """Return head and table as bytes."""
        shape = self.geometry
        numbers = (shape.layers, shape.tokens, shape.heads, shape.dim)
        exact = (self.exact_first, self.exact_last)
        dtype, flags = _DTYPES.index(shape.dtype), IS_PAYLOAD if self.is_payload else 0
        head = bytearray(
            _HEAD.pack(MAGIC, VERSION, dtype, flags, *numbers, *exact, self.total_bytes, 0)
        )
        for codec, form, offset, nbytes in self.planes:
            head += _PLANE.pack(codec, form, 0, nbytes, offset)
        _CRC.pack_into(head, _CRC_AT, _crc(head))
        return bytes(head)


def codec_id(codecs: Iterable[Codec]) -> int:
    """Return what a page's header says of a page whose planes have these codecs."""
    there = set(codecs)
    if there == {Codec.RAW}:
        return RAW_ID
    return _FIRST_ID + there.pop() if len(there) == 1 else MIXED_ID


def codec_name(codec_id: int) -> str:
    """Return the name of what a page's header or a record says."""
    if codec_id in _OTHER_NAMES:
        return _OTHER_NAMES[codec_id]
    known = codec_id - _FIRST_ID in Codec.__members__.values()
    return Codec(codec_id - _FIRST_ID).name.lower() if known else f"codec-{codec_id}"


def is_lossless(codec_id: int) -> bool:
    """Say whether a page that is stored so comes back with every bit; a mixed one may not."""
    return codec_id < MIXED_ID or codec_id - _FIRST_ID in (Codec.RAW, Codec.XS)


def raw_plane_bytes(geometry: Geometry) -> int:
    """Return the bytes of a plane as it came."""
    return geometry.layer_bytes // 2


def coded_tokens(geometry: Geometry, codec: Codec, exact_first: int, exact_last: int) -> int:
    """Return how many tokens of a plane a codec sees."""
    return geometry.tokens - (0 if codec.is_lossless else exact_first + exact_last)


def exact_bytes(geometry: Geometry, codec: Codec, exact_first: int, exact_last: int) -> int:
    """Return the bytes of the exact tokens of a plane, padding included."""
    if codec.is_lossless:
        return 0
    token_bytes = raw_plane_bytes(geometry) // geometry.tokens
    return _aligned((exact_first + exact_last) * token_bytes)


def lay_page(
    geometry: Geometry,
    parts: Sequence[Part],
    *,
    exact_first: int = 0,
    exact_last: int = 0,
    is_payload: bool = False,
) -> PageHead:
    """Return the head of an encoded page of these parts, in the order of its planes."""
    assert len(parts) == 2 * geometry.layers
    at = HEAD_BYTES + _PLANE.size * len(parts)
    planes: list[Plane] = []
    for codec, form, nbytes in parts:
        planes.append(Plane(codec, form, at, nbytes))
        at += nbytes if is_payload else _aligned(nbytes)
    return PageHead(geometry, exact_first, exact_last, tuple(planes), at, is_payload)


@lru_cache(maxsize=256)
def raw_head(geometry: Geometry) -> bytes:
    """Return the head that makes an encoded page of the payload that follows it."""
    part = Part(Codec.RAW, PLAIN, raw_plane_bytes(geometry))
    return lay_page(geometry, [part] * (2 * geometry.layers), is_payload=True).pack()


def select_layers(head: PageHead, first: int, count: int) -> tuple[bytes, int, int]:
    """Make an encoded page of some layers of one.

    Returns: its head, and the bytes [start, stop) of the whole page that follow it.
    Raises ValueError naming the range when it leaves the page.
    """
    start, stop = head.layer_range(first, count)
    shape = head.geometry
    part = lay_page(
        Geometry(count, shape.heads, shape.dim, shape.tokens, shape.dtype),
        [
            Part(plane.codec, plane.form, plane.nbytes)
            for plane in head.planes[2 * first : 2 * (first + count)]
        ],
        exact_first=head.exact_first,
        exact_last=head.exact_last,
        is_payload=head.is_payload,
    )
    assert part.total_bytes - part.head_bytes == stop - start
    return part.pack(), start, stop


def read_head(buffer: Buffer, nbytes: int | None = None) -> PageHead:
    """Read the head of an encoded page.

    nbytes: of the whole page, when ``buffer`` has only its beginning.
    Raises PageCorrupt naming what is wrong: with the head, or with the size of the page or of a
    plane. What the planes hold is not looked at.
    """
    view = memoryview(buffer).cast("B")
    if view.nbytes < HEAD_BYTES:
        raise PageCorrupt(f"an encoded page has a head of {HEAD_BYTES} bytes, not {view.nbytes}")
    magic, version, _, _, layers, *_ = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise PageCorrupt(f"an encoded page starts with {MAGIC!r}, not {magic!r}")
    head_bytes = HEAD_BYTES + 2 * _PLANE.size * layers
    if view.nbytes < head_bytes:
        raise PageCorrupt(f"the table of {layers} layers is cut short: {view.nbytes} bytes")
    if _CRC.unpack_from(view, _CRC_AT)[0] != _crc(view[:head_bytes]):
        raise PageCorrupt("the head of the encoded page was changed: its checksum does not match")
    if version != VERSION:
        raise PageCorrupt(f"the encoded page is of version {version}, known is {VERSION}")
    return _parse(bytes(view[:head_bytes]), view.nbytes if nbytes is None else nbytes)


# The pages of a namespace have the same head, unless their sizes depend on what is in them.
@lru_cache(maxsize=256)
def _parse(head: bytes, nbytes: int) -> PageHead:
    _, _, dtype, flags, layers, tokens, heads, dim, first, last, total, _ = _HEAD.unpack_from(head)
    try:
        geometry = Geometry(layers, heads, dim, tokens, _DTYPES[dtype])
    except (ValueError, IndexError) as error:
        raise PageCorrupt(f"the encoded page has no shape: {error}") from error
    if flags & ~IS_PAYLOAD or raw_plane_bytes(geometry) > PLANE_BYTES_MAX:
        raise PageCorrupt("the encoded page has flags or planes that cannot be")
    parts: list[Part] = []
    offsets: list[int] = []
    for codec, form, zero, plane_bytes, offset in _PLANE.iter_unpack(head[HEAD_BYTES:]):
        if codec not in Codec.__members__.values() or zero:
            raise PageCorrupt(f"this program knows no codec {codec} of a plane")
        parts.append(Part(Codec(codec), form, plane_bytes))
        offsets.append(offset)
    is_payload = bool(flags & IS_PAYLOAD)
    found = lay_page(geometry, parts, exact_first=first, exact_last=last, is_payload=is_payload)
    if (total, offsets) != (found.total_bytes, [plane.offset for plane in found.planes]):
        raise PageCorrupt("the planes of the encoded page are not where they have to be")
    if total != nbytes:
        raise PageCorrupt(f"the encoded page has {total} bytes, there are {nbytes}")
    if is_payload and any(part.codec != Codec.RAW for part in parts):
        raise PageCorrupt("a payload as it came has planes that are not raw")
    for index, part in enumerate(parts):
        _check_part(found, part, SIDES[index % 2])
    return found


def _check_part(head: PageHead, part: Part, side: Side) -> None:
    """Raise PageCorrupt unless a plane has a size that its codec makes."""
    least, most = _sizes(
        head.geometry, part.codec, part.form, side, head.exact_first, head.exact_last
    )
    if not least <= part.nbytes <= most:
        name = part.codec.name.lower()
        raise PageCorrupt(f"a plane of codec {name} has {part.nbytes} bytes, not {least} to {most}")


def _sizes(
    shape: Geometry, codec: Codec, form: int, side: Side, exact_first: int, exact_last: int
) -> tuple[int, int]:
    """Return the least and the most bytes of a plane. Raises PageCorrupt: there is no such plane."""
    raw_bytes, element_bytes = raw_plane_bytes(shape), DTYPE_BYTES[shape.dtype]
    may_pack = codec == Codec.XS or codec.is_entropy_coded
    if form not in (PLAIN, PACKED) or (form == PACKED and not may_pack):
        raise PageCorrupt(f"a plane of codec {codec.name.lower()} has no form {form}")
    if codec == Codec.RAW:
        return raw_bytes, raw_bytes
    if codec == Codec.XS and form == PACKED:
        return 1, raw_bytes
    if codec == Codec.XS and shape.dtype == "bfloat16":
        least = xs_layout(raw_bytes // element_bytes, width=3, num_escapes=0)
        return least.nbytes, raw_bytes
    tokens = coded_tokens(shape, codec, exact_first, exact_last)
    if shape.dtype not in LOSSY_DTYPES or codec == Codec.XS or tokens < 1:
        raise PageCorrupt(f"no {tokens} tokens of {shape.dtype} have codec {codec.name.lower()}")
    front = exact_bytes(shape, codec, exact_first, exact_last)
    whole = plane_layout(codec, side, tokens, shape.heads, shape.dim, element_bytes).nbytes
    return front + (1 if form == PACKED else whole), front + whole


def _aligned(nbytes: int) -> int:
    return num_groups(nbytes, ALIGN_BYTES) * ALIGN_BYTES


def _crc(head: Buffer) -> int:
    view = memoryview(head)
    return zlib.crc32(view[_CRC_AT + _CRC.size :], zlib.crc32(view[:_CRC_AT]))
