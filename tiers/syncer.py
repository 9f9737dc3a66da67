"""Group commit: one sync answers all who wait for it.

Syncs take as long as hundreds of small writes, so they run one at a time, and all that was written
while one ran is covered by the next. A waiter is answered by a sync that started after its write
had ended, and by no earlier one.

A sync that failed is final. The system may have marked the lost pages as clean, so that a second
sync of the file would succeed and prove nothing: the file is given up with all that is in it.
"""

from collections.abc import Callable

import anyio
from anyio import Future

from respkv.errors import TierError
from respkv.tiers.health import why
from respkv.tiers.log import Log
from respkv.tiers.segment_head import segment_name
from respkv.tiers.segments import Segment

_STOPPED = "the tier has stopped"
Waiter = Callable[[OSError | None], None]


class Syncer:
    """Make segments durable.

    failed: called with a segment whose sync failed, before its waiters are told.
    """

    def __init__(self, log: Log, failed: Callable[[Segment], None]) -> None:
        self._log = log
        self._failed = failed
        self._written: dict[int, int] = {}  # by segment: its last acknowledged batch not yet synced
        self._waiting: dict[int, list[Waiter]] = {}
        self._wanted = anyio.Event()
        self._turn = anyio.Lock()
        self.is_stopped = False

    def wrote(self, segment_id: int, sequence: int) -> None:
        """A batch has been acknowledged; no sync covers it yet."""
        self._written[segment_id] = sequence

    def forget(self, segment_id: int) -> None:
        """A segment is free or gone: nothing that was in it needs a sync."""
        self._written.pop(segment_id, None)

    def call_when_safe(self, segment_id: int, waiter: Waiter) -> None:
        """Call ``waiter`` after a sync of all that was acknowledged in a segment until now.

        It gets None, or the error when the sync failed or there is nobody to carry it out.
        """
        if self.is_stopped:
            waiter(OSError(_STOPPED))
            return
        self._waiting.setdefault(segment_id, []).append(waiter)
        self._wanted.set()

    def is_awaited(self, segment_id: int) -> bool:
        """Say whether somebody waits for a sync of a segment."""
        return segment_id in self._waiting

    async def cover(self, segment_id: int, sequence: int) -> None:
        """Wait until a batch is durable. Raises TierError when it never will be."""
        if self._written.get(segment_id, 0) < sequence:
            return
        done = Future[OSError | None]()
        self.call_when_safe(segment_id, lambda error: _set(done, error))
        error = await done
        if error is not None:
            raise TierError(f"tier {self._log.name}: a sync failed: {why(error)}")

    async def run(self) -> None:
        """Serve those who wait, until cancelled; who waits then, or later, gets an error."""
        self.is_stopped = False
        try:
            while True:
                await self._wanted.wait()
                self._wanted = anyio.Event()
                for segment_id in list(self._waiting):
                    await self.sync(segment_id)
        finally:
            self.is_stopped = True
            waiting, self._waiting = self._waiting, {}
            for waiters in waiting.values():
                for waiter in waiters:
                    waiter(OSError(_STOPPED))

    async def cover_all(self) -> None:
        """Wait until all that is acknowledged now is durable. Raises TierError."""
        for segment_id, sequence in list(self._written.items()):
            if segment_id not in self._log.doomed:  # what was there is lost, and known to be
                await self.cover(segment_id, sequence)

    async def sync_all(self) -> None:
        """Make all that is acknowledged now durable, as far as that goes."""
        for segment_id in list(self._written):
            await self.sync(segment_id)

    async def sync(self, segment_id: int) -> None:
        """Sync one segment if it needs that, and answer those who wait for it."""
        async with self._turn:
            waiters = self._waiting.pop(segment_id, [])
            sequence = self._written.get(segment_id, 0)
            error = None
            try:
                if sequence:
                    error = await self._sync(self._log.table.segments[segment_id])
            except BaseException:  # whoever waits must not wait for ever
                for waiter in waiters:
                    waiter(OSError(_STOPPED))
                raise
            if error is None and self._written.get(segment_id) == sequence:
                del self._written[segment_id]
            for waiter in waiters:
                waiter(error)

    async def _sync(self, segment: Segment) -> OSError | None:
        log = self._log
        if segment.id in log.doomed:
            return OSError("an earlier sync of the file failed")
        segment.writers += 1  # it must not be emptied meanwhile
        try:
            with anyio.CancelScope(shield=True):
                await log.device.sync(segment_name(segment.id))
            log.stats.syncs += 1
            return None
        except OSError as error:
            log.stats.sync_errors += 1
            log.health.write_failed(error)
            self._failed(segment)
            return error
        finally:
            segment.writers -= 1


def _set(done: "Future[OSError | None]", error: OSError | None) -> None:
    if done.status is Future.Status.PENDING:
        done.return_value = error
