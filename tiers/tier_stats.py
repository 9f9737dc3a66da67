"""What a file tier counts, for INFO."""

from dataclasses import dataclass


@dataclass(slots=True)
class TierStats:
    """Counters since the start, but for the first three, which are of now.

    written_bytes: what went to the device, heads, padding, relocations and checkpoints included.
    stored_bytes:  payload that was asked to be written, and was; their ratio is the write
                   amplification.
    read_bytes:    payload read for askers.
    relocated_bytes: read and written again by reclaim.
    dropped:       records that the tier gave up by itself: evicted, corrupt or lost.
    """

    records: int = 0
    live_bytes: int = 0
    file_bytes: int = 0
    reads: int = 0
    read_bytes: int = 0
    read_errors: int = 0
    writes: int = 0
    written_bytes: int = 0
    stored_bytes: int = 0
    write_errors: int = 0
    syncs: int = 0
    sync_errors: int = 0
    reclaimed: int = 0
    relocated_bytes: int = 0
    evicted: int = 0
    corrupt: int = 0
    lost: int = 0
    checkpoints: int = 0
    checkpoint_errors: int = 0
    recovered: int = 0
    skipped_damaged: int = 0

    @property
    def dropped(self) -> int:
        return self.evicted + self.corrupt + self.lost
