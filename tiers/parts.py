"""The parts of a file tier, put together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from respkv.tiers.checkpointer import Checkpointer
from respkv.tiers.device import Device
from respkv.tiers.estimate import Estimate
from respkv.tiers.health import Health
from respkv.tiers.log import Hooks, Log
from respkv.tiers.order import Order
from respkv.tiers.reader import Reader
from respkv.tiers.reclaim import Reclaimer
from respkv.tiers.segments import SegmentTable
from respkv.tiers.space import ASKED, RELOCATED, Space
from respkv.tiers.staging import Staging
from respkv.tiers.superblock import read_boot_id
from respkv.tiers.syncer import Syncer
from respkv.tiers.tier_stats import TierStats
from respkv.tiers.writer import Codec, Writer

SEGMENTS_MIN = 4  # one open for each stream, one to be emptied, one free
SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX = 1 << 20, 256 << 20
_SEGMENTS = 16  # of the capacity, when nobody chose
_COPY_DEPTH = 4


@dataclass(frozen=True, slots=True)
class TierConfig:
    """How a tier is to be.

    letter:        of the tier, in KV.MATCH.
    alignment:     of the log: 4096 where O_DIRECT may be used, else 64.
    segment_bytes: of a new directory; 0 chooses. An old one keeps its own.
    depth:         batches in flight.
    boot_id:       of this run of the machine.
    path:          of the directory, for messages.
    latency_us, bytes_per_s: what reads are taken to cost until some were seen.
    """

    name: str
    letter: str
    alignment: Literal[64, 4096]
    capacity_bytes: int
    segment_bytes: int = 0
    depth: int = 32
    checkpoint_interval_s: float = 30.0
    latency_us: float = 100.0
    bytes_per_s: float = 2e9
    staging_bytes: int = 32 << 20
    boot_id: str = field(default_factory=read_boot_id)
    path: str = ""

    def new_segment_bytes(self) -> int:
        """Return the size of the segments of a new directory."""
        if self.segment_bytes:
            return self.segment_bytes
        share = self.capacity_bytes // _SEGMENTS // 4096 * 4096
        return min(max(share, SEGMENT_BYTES_MIN), SEGMENT_BYTES_MAX)


@dataclass(slots=True)
class Parts:
    """What a running tier is made of.

    writer: of what is asked; copier: of what reclaim copies.
    """

    log: Log
    staging: Staging
    syncer: Syncer
    order: Order
    space: Space
    writer: Writer
    copier: Writer
    reclaimer: Reclaimer
    checkpointer: Checkpointer
    reader: Reader

    def reopen(self) -> None:
        """After a crash: take again what is asked; it waits until there is somebody to do it."""
        for part in (self.writer, self.copier, self.syncer):
            part.is_stopped = False


def assemble(
    config: TierConfig,
    device: Device,
    table: SegmentTable,
    *,
    health: Health,
    stats: TierStats,
    hooks: Hooks,
    codec: Codec | None,
    estimate: Estimate,
    generation: Callable[[], int],
    clock: Callable[[], float] = monotonic,
) -> Parts:
    """Make the parts of a tier whose segments are known."""
    log = Log(config.name, device, config.alignment, table, health, stats, hooks, clock)
    staging = Staging(config.staging_bytes)
    device.register(staging.memory)
    syncer = Syncer(log, failed=log.lose)
    order = Order(log, syncer)
    space = Space(log, syncer)
    writer = Writer(log, order, space, staging, codec, stream=ASKED, depth=config.depth)
    copier = Writer(log, order, space, staging, None, stream=RELOCATED, depth=_COPY_DEPTH)
    checkpointer = Checkpointer(
        log, space, syncer, staging, generation, interval_s=config.checkpoint_interval_s
    )
    return Parts(
        log=log,
        staging=staging,
        syncer=syncer,
        order=order,
        space=space,
        writer=writer,
        copier=copier,
        reclaimer=Reclaimer(log, space, syncer, copier, checkpointer),
        checkpointer=checkpointer,
        reader=Reader(log, staging, codec, estimate),
    )
