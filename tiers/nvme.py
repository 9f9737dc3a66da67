"""The nvme tier: O_DIRECT where there is one, payloads as they are unless their namespace asks.

Heads and large values are written and read at multiples of 4096 bytes, so a page goes from the
device straight into its slot of the arena.
"""

from functools import partial
from pathlib import Path
from typing import Literal

from respkv.tiers.file_tier import FileTier
from respkv.tiers.page_codec import PageCodec, SpecOf, no_spec
from respkv.tiers.parts import TierConfig
from respkv.tiers.probe import open_device


def open_nvme(
    path: Path | str,
    *,
    capacity_bytes: int,
    segment_bytes: int = 0,
    depth: int = 32,
    engine: Literal["auto", "io_uring", "threads"] = "auto",
    checkpoint_interval_s: float = 30.0,
    spec_of: SpecOf = no_spec,
) -> FileTier:
    """Return the tier for a directory; nothing is touched before its ``start``.

    segment_bytes: of a new directory; 0 chooses. depth: reads and writes at a time.
    spec_of: how pages are stored; see PageCodec.
    """
    config = TierConfig(
        "nvme",
        "n",
        4096,
        capacity_bytes,
        segment_bytes,
        depth,
        checkpoint_interval_s,
        latency_us=150.0,
        bytes_per_s=1.5e9,
        path=str(path),
    )
    tier = FileTier(config, partial(open_device, path, engine, depth))
    tier.codec = PageCodec("raw", spec_of, tier.stats)
    return tier
