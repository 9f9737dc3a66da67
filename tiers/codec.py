"""Pages to and from the form in which a tier stores them.

What a namespace asks for is a ``PageSpec``: a codec for K and for V of each layer. A plane that its
codec cannot hold, or that would not become smaller, is stored as it is, and so is a whole page that
would save less than 1/64; the head of an encoded page (kernels/container.py) says what became of
each plane. Lossless codecs take numpy alone. The others take torch, which is imported when the
first page needs it, and never by a server whose namespaces are lossless.

All of this takes the time of touching every byte several times: it belongs into a thread.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from respkv.errors import CommandError, PageCorrupt
from respkv.kernels.container import (
    LOSSY_DTYPES,
    PACKED,
    PLAIN,
    RAW_ID,
    PageHead,
    Part,
    lay_page,
    raw_plane_bytes,
    read_head,
)
from respkv.kernels.layout import CODEC_NAMES, Codec
from respkv.page import DTYPE_BYTES, Geometry
from respkv.tiers import lossy
from respkv.tiers.format import Buffer
from respkv.tiers.lossy import NEEDS_TORCH, PlaneGroup

GAIN_SHARE_MIN = 64  # a page that saves less than one in so many bytes is stored raw
ENCODED_ID_MIN = 15  # ids below are of payloads that are raw or compressed as a whole
_ALIASES = {"rhz": Codec.RHZ3}


@dataclass(frozen=True, slots=True)
class PageSpec:
    """How pages of one geometry are to be stored. Make it with ``of`` when all layers are alike.

    codecs:      of K and V, for each layer.
    exact_first: tokens at the start of a page without a parent that lossy codecs leave alone.
    exact_last:  the same at the end of every page.
    Raises ValueError when the codecs are not as many as the layers, or do not take the dtype.
    """

    geometry: Geometry
    codecs: tuple[tuple[Codec, Codec], ...]
    exact_first: int = 0
    exact_last: int = 0

    def __post_init__(self) -> None:
        if len(self.codecs) != self.geometry.layers:
            raise ValueError(f"{len(self.codecs)} layers of codecs for {self.geometry.layers}")
        for codec in {codec for pair in self.codecs for codec in pair}:
            if not takes_dtype(codec, self.geometry.dtype):
                raise ValueError(_why_not(codec, self.geometry.dtype))

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        key: Codec,
        value: Codec,
        *,
        exact_first: int = 0,
        exact_last: int = 0,
    ) -> "PageSpec":
        """Return a spec that has the same codecs for all layers."""
        return cls(geometry, ((key, value),) * geometry.layers, exact_first, exact_last)

    @property
    def is_lossless(self) -> bool:
        """Whether pages come back with every bit."""
        return all(codec.is_lossless for pair in self.codecs for codec in pair)

    def without_loss(self) -> "PageSpec":
        """Return a spec that has the lossless codec where this one has a lossy one."""
        codecs = tuple(
            (key if key.is_lossless else Codec.XS, value if value.is_lossless else Codec.XS)
            for key, value in self.codecs
        )
        return PageSpec(self.geometry, codecs)


def parse_codec(text: str) -> tuple[Codec, Codec]:
    """Read the codecs of keys and of values: ``rh4`` for both, or ``rh4/rh2``.

    Raises ValueError naming what is accepted.
    """
    names = CODEC_NAMES | _ALIASES
    key, slash, value = text.lower().partition("/")
    if key not in names or (slash and value not in names):
        raise ValueError(
            f"codec {text!r} is not one of {', '.join(names)}, or two of them: keys/values"
        )
    return names[key], names[value if slash else key]


def takes_dtype(codec: Codec, dtype: str) -> bool:
    """Whether a codec has a form for numbers of this dtype."""
    return codec.is_lossless or dtype in LOSSY_DTYPES


def check_available(codec: Codec, dtype: str) -> None:
    """Raise CommandError unless pages of this dtype can be stored with a codec here."""
    if not takes_dtype(codec, dtype):
        raise CommandError(_why_not(codec, dtype))
    if not codec.is_lossless and not has_torch():
        raise CommandError(f"codec {codec.name.lower()} {NEEDS_TORCH}")


def has_torch() -> bool:
    """Whether torch could be imported; it is not imported to find out."""
    try:
        there = sys.modules.get("torch") or importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return False
    return there is not None


def load_lossless() -> None:
    """Import what the lossless codecs take: numpy, which takes a fifth of a second."""
    for name in ("lossless", "xs_numpy"):
        importlib.import_module(f"respkv.kernels.{name}")


def encode_page(
    payload: memoryview, spec: PageSpec, *, has_parent: bool
) -> tuple[int, bytearray | memoryview]:
    """Encode a page as a namespace asks for, or leave it as it is where that gains nothing.

    payload:    ``[L, 2, T, H, D]`` of the spec's geometry, contiguous; it is not changed.
    has_parent: whether it continues another page. A page that does not starts with the tokens that
                every later one attends to, of which ``exact_first`` are kept as they are.
    Returns:    the id that a page's header has for it, and the stored bytes: for id 0 the payload
                itself, else an encoded page.
    Raises TierError when torch is needed and not there.
    """
    head, pieces = _encode(payload.cast("B"), spec, has_parent=has_parent)
    limit = payload.nbytes - payload.nbytes // GAIN_SHARE_MIN
    if head.codec_id == RAW_ID or head.total_bytes > limit:
        return RAW_ID, payload
    return head.codec_id, _assemble(head, pieces)


def encoded_page(payload: memoryview, spec: PageSpec, *, has_parent: bool) -> bytearray:
    """Do as ``encode_page`` does, but make an encoded page in any case."""
    return _assemble(*_encode(payload.cast("B"), spec, has_parent=has_parent))


def decode_stored(codec: int, stored: memoryview, into: memoryview) -> bool:
    """Decode stored bytes of any codec id into memory of exactly the payload's size.

    Returns: whether the payload is what was encoded, bit for bit.
    Raises PageCorrupt when ``stored`` is not such a payload, TierError when torch is needed and not
    there; ``into`` holds anything then.
    """
    if codec >= ENCODED_ID_MIN:
        return decode_page(stored, into)
    if codec == RAW_ID and stored.nbytes == into.nbytes:
        into.cast("B")[:] = stored.cast("B")
        return True
    from respkv.kernels import lossless

    lossless.decode(codec, stored, into)
    return True


def decode_page(stored: memoryview, into: memoryview) -> bool:
    """Decode an encoded page; else as ``decode_stored``.

    It takes memory for a few planes beside ``into``, whatever ``stored`` claims.
    """
    stored, into = stored.cast("B"), into.cast("B")
    head = read_head(stored)
    if head.geometry.page_bytes != into.nbytes:
        raise PageCorrupt(
            f"an encoded page of {head.geometry.page_bytes} bytes is stored, not of {into.nbytes}"
        )
    plane_bytes = raw_plane_bytes(head.geometry)
    for index, plane in enumerate(head.planes):
        there = stored[plane.offset : plane.offset + plane.nbytes]
        target = into[index * plane_bytes : (index + 1) * plane_bytes]
        if plane.codec == Codec.RAW:
            target[:] = there
        elif plane.codec == Codec.XS:
            _decode_lossless(there, target, plane.form)
    exact = (head.exact_first, head.exact_last)
    for (codec, side), layers in _groups(plane.codec for plane in head.planes).items():
        if not codec.is_lossless:
            group = PlaneGroup(head.geometry, codec, side, layers, *exact)
            lossy.decode(head, group, stored, into)
    return head.is_lossless


# -- inside ---------------------------------------------------------------------------------------

_Pieces = Sequence[Buffer]  # what a plane's bytes are put together of


def _why_not(codec: Codec, dtype: str) -> str:
    return f"codec {codec.name.lower()} takes pages of {', '.join(LOSSY_DTYPES)}, not {dtype}"


def _encode(
    payload: memoryview, spec: PageSpec, *, has_parent: bool
) -> tuple[PageHead, list[_Pieces]]:
    shape = spec.geometry
    assert payload.nbytes == shape.page_bytes, "a page is not of its spec's geometry"
    first, last = 0 if has_parent else spec.exact_first, spec.exact_last
    codecs = [codec for pair in spec.codecs for codec in pair]
    if first + last >= shape.tokens:
        codecs = [codec if codec.is_lossless else Codec.XS for codec in codecs]
        first = last = 0
    plane_bytes = raw_plane_bytes(shape)
    planes = [payload[at : at + plane_bytes] for at in range(0, payload.nbytes, plane_bytes)]
    parts = [Part(Codec.RAW, PLAIN, plane_bytes)] * len(planes)
    pieces: list[_Pieces] = [[plane] for plane in planes]

    def put(index: int, codec: Codec, form: int, made: _Pieces) -> None:
        nbytes = sum(map(len, made))
        if nbytes < plane_bytes:
            parts[index], pieces[index] = Part(codec, form, nbytes), made

    for index, codec in enumerate(codecs):
        if codec == Codec.XS and (made := _encode_lossless(planes[index], shape.dtype)):
            put(index, codec, *made)
    for (codec, side), layers in _groups(codecs).items():
        if not codec.is_lossless:
            group = PlaneGroup(shape, codec, side, layers, first, last)
            for layer, made in zip(layers, lossy.encode(payload, group), strict=True):
                if made is not None:
                    put(2 * layer + side, codec, *made)
    return lay_page(shape, parts, exact_first=first, exact_last=last), pieces


def _groups(codecs: Iterable[Codec]) -> dict[tuple[Codec, int], list[int]]:
    """Return the layers that have a codec, for each codec and side, from those of all planes."""
    groups: dict[tuple[Codec, int], list[int]] = {}
    for index, codec in enumerate(codecs):
        groups.setdefault((codec, index % 2), []).append(index // 2)
    return groups


def _assemble(head: PageHead, pieces: Sequence[_Pieces]) -> bytearray:
    stored = bytearray(head.total_bytes)
    stored[: head.head_bytes] = head.pack()
    for plane, piece in zip(head.planes, pieces, strict=True):
        at = plane.offset
        for part in piece:
            stored[at : at + len(part)] = part
            at += len(part)
    return stored


def _encode_lossless(plane: memoryview, dtype: str) -> tuple[int, _Pieces] | None:
    if dtype == "bfloat16":
        import numpy as np

        from respkv.kernels import xs_numpy

        words = xs_numpy.encode(np.frombuffer(plane, np.uint16))
        return None if words is None else (PLAIN, [words])
    from respkv.kernels import lossless

    form, stored = lossless.encode(plane, element_bytes=DTYPE_BYTES[dtype], codec="zstd")
    return (PACKED, [stored]) if form == lossless.ZSTD else None


def _decode_lossless(stored: memoryview, into: memoryview, form: int) -> None:
    if form == PACKED:
        from respkv.kernels import lossless

        lossless.decode(lossless.ZSTD, stored, into)
        return
    import numpy as np

    from respkv.kernels import xs_numpy

    xs_numpy.decode(stored, np.frombuffer(into, np.uint16))
