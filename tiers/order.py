"""Batches on their way, acknowledged in the order of their sequences.

Writes end in any order, but nobody is told of a batch before all earlier ones have ended: so what
a crash tears off the log is a tail of it that nobody was promised.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from respkv.tiers.batch import Place
from respkv.tiers.health import why
from respkv.tiers.log import Log
from respkv.tiers.pending import Pending
from respkv.tiers.record import Level, Record
from respkv.tiers.segments import Segment
from respkv.tiers.syncer import Syncer


@dataclass(eq=False, slots=True)
class Flight:
    """One batch in flight. stop: where it ends in its segment. places: of its values, in order."""

    segment: Segment
    sequence: int
    stop: int
    members: list[Pending]
    places: list[Place]
    is_done: bool = False
    error: OSError | None = None


class Order:
    """The batches in flight, oldest first, and what happens when they are acknowledged."""

    def __init__(self, log: Log, syncer: Syncer) -> None:
        self._log = log
        self._syncer = syncer
        self._flights: deque[Flight] = deque()

    def begin(self, flight: Flight) -> None:
        """A batch is about to be written. Sequences come in order."""
        assert not self._flights or self._flights[-1].sequence < flight.sequence
        self._flights.append(flight)

    def end(self, flight: Flight, error: OSError | None) -> None:
        """A write has ended; acknowledge all that now can be.

        The members of a batch that failed are left to whoever wrote it.
        """
        flight.is_done, flight.error = True, error
        while self._flights and self._flights[0].is_done:
            first = self._flights.popleft()
            try:
                self._acknowledge(first)
            except BaseException:
                self._tell(each for each in [first, *self._flights] if each.is_done)
                raise

    def abandon(self) -> None:
        """Whoever wrote has crashed: nothing in flight will be acknowledged."""
        while self._flights:
            flight = self._flights.popleft()
            self._log.table.end_write(flight.segment, flight.stop)
            self._tell([flight])

    def _tell(self, flights: Iterable[Flight]) -> None:
        for flight in flights:
            for member in flight.members:
                member.fail("the tier crashed")

    def _acknowledge(self, flight: Flight) -> None:
        log = self._log
        log.table.end_write(flight.segment, flight.stop)
        log.acked = flight.sequence
        if flight.error is not None:
            return
        if flight.segment.id in log.doomed:
            for member in flight.members:
                member.fail(f"tier {log.name}: a sync of the file failed")
            return
        self._syncer.wrote(flight.segment.id, flight.sequence)
        places = iter(flight.places)
        for member in flight.members:
            if member.logged is None:
                self._apply(member, flight, next(places))
            else:
                log.note(member.logged, flight.segment.id, flight.sequence)
                self._answer(member, flight, None)

    def _apply(self, member: Pending, flight: Flight, place: Place) -> None:
        log = self._log
        if member.epoch != log.epoch or member.done.status.name != "PENDING":
            member.answer(None)
        elif member.source is not None:
            if log.is_live(member.source):
                log.move(member.source, flight.segment.id, place.offset, flight.sequence)
            self._answer(member, flight, member.source)
        else:
            self._answer(member, flight, self._record(member, flight, place))

    def _record(self, member: Pending, flight: Flight, place: Place) -> Record:
        assert member.value is not None
        meta = member.value.meta
        record = Record(
            segment=flight.segment.id,
            offset=place.offset,
            stored_bytes=place.stored_bytes,
            payload_bytes=meta.payload_bytes,
            codec=place.codec,
            generation=meta.generation,
            checksum=meta.checksum,
            sequence=flight.sequence,
            level=meta.level,
            owner=member.value.owner,
        )
        self._log.add(record, meta)
        self._log.young[record] = meta
        self._log.stats.stored_bytes += meta.payload_bytes
        return record

    def _answer(self, member: Pending, flight: Flight, record: Record | None) -> None:
        if member.level < Level.DURABLE:
            member.answer(record)
            return

        log = self._log

        def when_safe(error: OSError | None) -> None:
            if error is None:
                member.answer(record)
                return
            if record is not None and log.young.pop(record, None) is not None:
                log.discard(record)
            member.fail(f"tier {log.name}: a sync failed: {why(error)}")

        self._syncer.call_when_safe(flight.segment.id, when_safe)
