"""The disk tier: large, slow disks and network file systems, through the page cache.

What such a disk lacks is bandwidth, so payloads are stored through a lossless codec, or as their
namespace asks for.
"""

from functools import partial
from pathlib import Path
from typing import Literal

from respkv.kernels import lossless
from respkv.tiers.file_tier import FileTier
from respkv.tiers.page_codec import PageCodec, SpecOf, no_spec
from respkv.tiers.parts import TierConfig
from respkv.tiers.probe import open_device


def open_disk(
    path: Path | str,
    *,
    capacity_bytes: int,
    segment_bytes: int = 0,
    depth: int = 32,
    codec: Literal["zstd", "lz4", "raw"] = "zstd",
    checkpoint_interval_s: float = 30.0,
    spec_of: SpecOf = no_spec,
) -> FileTier:
    """Return the tier for a directory; nothing is touched before its ``start``.

    segment_bytes: of a new directory; 0 chooses. depth: reads and writes at a time.
    codec, spec_of: how payloads are stored; see PageCodec.
    """
    assert codec in lossless.CODECS
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
    tier.codec = PageCodec(codec, spec_of, tier.stats)
    return tier
