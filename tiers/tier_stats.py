"""What a file tier counts, for INFO."""

from dataclasses import dataclass, field

from respkv.tiers.record import Record


@dataclass(slots=True)
class Contents:
    """What the live records of a tier are, together.

    payload_bytes: as clients sent them.
    by_codec:      how many have which codec.
    """

    payload_bytes: int = 0
    by_codec: dict[int, int] = field(default_factory=dict[int, int])

    def add(self, record: Record) -> None:
        self._count(record, 1)

    def discard(self, record: Record) -> None:
        self._count(record, -1)

    def clear(self) -> None:
        self.payload_bytes = 0
        self.by_codec.clear()

    def _count(self, record: Record, sign: int) -> None:
        self.payload_bytes += sign * record.payload_bytes
        count = self.by_codec.get(record.codec, 0) + sign
        if count:
            self.by_codec[record.codec] = count
        else:
            del self.by_codec[record.codec]


@dataclass(slots=True)
class TierStats:
    """Counters since the start, but for the first four, which are of now.

    live_bytes:    of the records, as they are stored.
    written_bytes: what went to the device, heads, padding, relocations and checkpoints included.
    stored_bytes:  payload that was asked to be written, and was; their ratio is the write
                   amplification.
    read_bytes:    payload read for askers.
    relocated_bytes: read and written again by reclaim.
    encoded_bytes, decoded_bytes: payload that went through a codec, and encode_us, decode_us: the
                   time that took; the time to wait for a thread is not in it.
    too_large:     values larger than a segment takes, which are never written here.
    stale:         values that were found at the start, and dropped because the tier was left out of
                   the last run.
    dropped:       records that the tier gave up by itself: evicted, corrupt or lost.
    """

    records: int = 0
    live_bytes: int = 0
    file_bytes: int = 0
    contents: Contents = field(default_factory=Contents)
    reads: int = 0
    read_bytes: int = 0
    read_errors: int = 0
    writes: int = 0
    written_bytes: int = 0
    stored_bytes: int = 0
    encoded_bytes: int = 0
    encode_us: int = 0
    decoded_bytes: int = 0
    decode_us: int = 0
    write_errors: int = 0
    too_large: int = 0
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
    stale: int = 0

    @property
    def dropped(self) -> int:
        return self.evicted + self.corrupt + self.lost
