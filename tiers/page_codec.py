"""How a file tier stores payloads: pages as their namespace asks for, the rest as the tier does.

Coding works in threads, few at a time: beside them the event loop has to have a processor. Reading
has threads of its own, because somebody waits for it, and nobody for a page that is moved down.

A page comes back from a lossy codec with other bytes than were put. Its tier says so, and every copy
that is made of what was read is described by the checksum of those bytes (engine/loads.py).
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TypeVar

import anyio

from respkv.errors import TierError
from respkv.kernels.container import RAW_ID
from respkv.page import part_of
from respkv.tiers.codec import ENCODED_ID_MIN, PageSpec, decode_stored, encode_page
from respkv.tiers.record import Meta
from respkv.tiers.tier_stats import TierStats

T = TypeVar("T")

LOOP_BYTES_MAX = 16 << 10  # more is encoded or decoded in a thread
_Stored = bytes | bytearray | memoryview
SpecOf = Callable[[Meta], PageSpec | None]

logger = logging.getLogger(__name__)


def no_spec(meta: Meta) -> PageSpec | None:
    """Ask for nothing."""
    return None


class PageCodec:
    """The codec of a tier; a ``Codec`` of its writer and reader.

    name:    of lossless.CODECS: for what no namespace asks for.
    spec_of: how a page is to be stored; None: as the tier does by itself. A spec of another size
             than the page has is not asked.
    stats:   of the tier.
    """

    def __init__(self, name: str, spec_of: SpecOf, stats: TierStats) -> None:
        self._name = name
        self._spec_of = spec_of
        self._stats = stats
        self._encoders, self._decoders = _limiter(), _limiter()
        self._lacks_torch = False
        self._complaints: set[str] = set()

    async def encode(self, meta: Meta, payload: memoryview) -> tuple[int, memoryview]:
        spec = self._spec_of(meta) if meta.kind == "kvpage" else None
        if spec is not None and spec.geometry.page_bytes == payload.nbytes:
            # What hangs on a page may be of a chain's first one: its first tokens stay exact too.
            has_parent = bool(meta.parent) and part_of(meta.key) is None
            work = partial(self._encode_page, payload, spec, has_parent)
            codec, stored = await self._encode(work, payload.nbytes, is_long=True)
        elif self._name == "raw":
            return RAW_ID, payload
        else:
            work = partial(_encode_whole, payload, element_bytes(meta), self._name)
            is_long = payload.nbytes > LOOP_BYTES_MAX
            codec, stored = await self._encode(work, payload.nbytes, is_long=is_long)
        return codec, memoryview(stored)

    async def decode(self, codec: int, stored: memoryview, into: memoryview) -> bool:
        work = partial(_timed, partial(decode_stored, codec, stored, into))
        try:
            if into.nbytes <= LOOP_BYTES_MAX and codec < ENCODED_ID_MIN:
                is_lossless, seconds = work()
            else:
                is_lossless, seconds = await anyio.to_thread.run_sync(work, limiter=self._decoders)
        except TierError as error:
            self._complain("pages in files cannot be read", error)
            raise
        self._stats.decoded_bytes += into.nbytes
        self._stats.decode_us += int(seconds * 1e6)
        return is_lossless

    async def _encode(
        self, work: Callable[[], tuple[int, _Stored]], nbytes: int, *, is_long: bool
    ) -> tuple[int, _Stored]:
        timed = partial(_timed, work)
        if is_long:
            made, seconds = await anyio.to_thread.run_sync(timed, limiter=self._encoders)
        else:
            made, seconds = timed()
        self._stats.encoded_bytes += nbytes
        self._stats.encode_us += int(seconds * 1e6)
        return made

    def _encode_page(
        self, payload: memoryview, spec: PageSpec, has_parent: bool
    ) -> tuple[int, _Stored]:
        if not self._lacks_torch:
            try:
                return encode_page(payload, spec, has_parent=has_parent)
            except TierError as error:
                self._lacks_torch = True
                self._complain("pages are stored without loss, larger than asked for", error)
        return encode_page(payload, spec.without_loss(), has_parent=has_parent)

    def _complain(self, what: str, error: TierError) -> None:
        """Log what is so for every page, once."""
        if what not in self._complaints:
            self._complaints.add(what)
            logger.warning("%s: %s", what, error)


def element_bytes(meta: Meta) -> int:
    """Return the bytes of the numbers in a value, as far as is known without its schema."""
    return 2 if meta.kind == "kvpage" else 1


def _limiter() -> anyio.CapacityLimiter:
    return anyio.CapacityLimiter(max(1, (os.cpu_count() or 1) // 2))


def _encode_whole(payload: memoryview, element_bytes: int, name: str) -> tuple[int, _Stored]:
    from respkv.kernels import lossless  # needs numpy, which a tier that stores raw is spared

    return lossless.encode(payload, element_bytes=element_bytes, codec=name)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = perf_counter()
    made = work()
    return made, perf_counter() - started
