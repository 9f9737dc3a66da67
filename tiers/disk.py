"""The disk tier: large, slow disks and network file systems, through the page cache.

What such a disk lacks is bandwidth, so payloads are stored through a lossless codec. It works in
threads, few at a time: beside them the event loop has to have a processor.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import anyio

from respkv.tiers import lossless
from respkv.tiers.file_tier import FileTier
from respkv.tiers.parts import TierConfig
from respkv.tiers.probe import open_device
from respkv.tiers.record import Meta

LOOP_BYTES_MAX = 16 << 10  # more is encoded or decoded in a thread


class Lossless:
    """The codec of the disk tier. name: of lossless.CODECS, for what is written.

    element_bytes: of the numbers in a payload.
    """

    def __init__(self, name: str, element_bytes: Callable[[Meta], int]) -> None:
        assert name in lossless.CODECS
        self._name = name
        self._element_bytes = element_bytes
        self._threads = anyio.CapacityLimiter(max(1, (os.cpu_count() or 1) // 2))

    async def encode(self, meta: Meta, payload: memoryview) -> tuple[int, memoryview]:
        encode = partial(lossless.encode, element_bytes=self._element_bytes(meta), codec=self._name)
        if payload.nbytes <= LOOP_BYTES_MAX:
            codec, stored = encode(payload)
        else:
            codec, stored = await anyio.to_thread.run_sync(encode, payload, limiter=self._threads)
        return codec, memoryview(stored)

    async def decode(self, codec: int, stored: memoryview, into: memoryview) -> None:
        if into.nbytes <= LOOP_BYTES_MAX:
            lossless.decode(codec, stored, into)
            return
        await anyio.to_thread.run_sync(lossless.decode, codec, stored, into, limiter=self._threads)


def open_disk(
    path: Path | str,
    *,
    capacity_bytes: int,
    segment_bytes: int = 0,
    depth: int = 32,
    codec: Literal["zstd", "lz4", "raw"] = "zstd",
    checkpoint_interval_s: float = 30.0,
) -> FileTier:
    """Return the tier for a directory; nothing is touched before its ``start``.

    segment_bytes: of a new directory; 0 chooses. depth: reads and writes at a time.
    """
    config = TierConfig(
        "disk",
        "d",
        64,
        capacity_bytes,
        segment_bytes,
        depth,
        checkpoint_interval_s,
        latency_us=5000.0,
        bytes_per_s=2e8,
        path=str(path),
    )
    tier = FileTier(config, partial(open_device, path, "aiofiles", depth))
    tier.codec = Lossless(codec, lambda meta: tier.element_bytes(meta))
    return tier
