"""Transfers between memory and files on a ring: who waits, in which order, and for how long.

- Slots: at most ``depth`` transfers are with the kernel, each in a slot whose number comes back with
  its completion. What finds no slot waits in line.
- Turns: askers queue, let one turn of the event loop pass, and the first to go on hands all that was
  queued to the kernel in one call.
- Leading: there is no task of our own, which somebody would have to own and to end. One of those who
  wait waits for the kernel on behalf of all, and passes that on when its own transfers have ended.
- Memory: a slot holds what is read or written until the kernel is done with it, whoever has gone.
"""

import errno
import os
from collections import deque
from collections.abc import Sequence

import anyio
from anyio.lowlevel import checkpoint

from respkv.tiers.uring import FSYNC, READ, Ring, address_of

_TRIES_MAX = 1000
_RETRY_S = 0.001
_TRANSFER_BYTES_MAX = 1 << 30
# What the kernel never finished: its memory must stay mapped.
_abandoned: list["Transfer"] = []


class Transfer:
    """One read, write or sync of a file.

    fd, file: its descriptor, and its place in the ring's table or -1.
    memory:   None for a sync.
    done:     bytes that the kernel has moved. batch: whom to tell of the end.
    """

    __slots__ = ("address", "batch", "done", "fd", "file", "memory", "offset", "operation", "tries")
    batch: "Batch"

    def __init__(
        self, operation: int, fd: int, file: int, offset: int = 0, memory: memoryview | None = None
    ) -> None:
        assert (memory is None) == (operation == FSYNC)
        assert operation != READ or not (memory and memory.readonly)
        self.operation = operation
        self.fd = fd
        self.file = file
        self.offset = offset
        # A view of our own: the memory stays mapped as long as the transfer lives.
        self.memory = None if memory is None else memory[:]
        self.address = 0 if memory is None else address_of(memory)
        self.done = 0
        self.tries = 0


class Batch:
    """What one asker waits for. num_left: transfers that have not ended. error: of the first."""

    __slots__ = ("error", "num_left")

    def __init__(self, num_left: int) -> None:
        self.num_left = num_left
        self.error: OSError | None = None


class Transfers:
    """The transfers of one ring, within one event loop.

    alignment: a transfer that was done in part goes on at a multiple of it.
    """

    def __init__(self, ring: Ring, alignment: int) -> None:
        self._ring = ring
        self._alignment = alignment
        self._waiting: deque[Transfer] = deque()
        self._slots: list[Transfer | None] = [None] * ring.depth
        self._free = list(range(ring.depth))
        self._leader: Batch | None = None
        self._followers: dict[Batch, anyio.Event] = {}

    async def carry_out(self, transfers: Sequence[Transfer]) -> None:
        """Carry out all; they go to the kernel together as far as there are slots.

        Raises the OSError of the first that failed, when all have ended.
        Cancelled: those that the kernel does not have yet are left out; the others end first.
        """
        batch = Batch(len(transfers))
        for transfer in transfers:
            transfer.batch = batch
        self._waiting.extend(transfers)
        try:
            await self._wait(batch)
        except anyio.get_cancelled_exc_class():
            self._withdraw(batch)
            with anyio.CancelScope(shield=True):
                await self._wait(batch)
            raise
        if batch.error is not None:
            try:
                raise batch.error
            finally:
                batch.error = None  # its traceback holds the batch, which would be a cycle

    def abandon(self) -> None:
        """Let go of everyone who waits, with ETIMEDOUT, though the kernel is not done.

        It may still write to the memory of a read: nobody may use that again.
        """
        held = [transfer for transfer in self._slots if transfer is not None]
        _abandoned.extend(held)
        for transfer in [*held, *self._waiting]:
            transfer.batch.error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            self._leave(transfer.batch)
        self._waiting.clear()
        os.eventfd_write(self._ring.eventfd, 1)  # for the leader

    # Waiting

    async def _wait(self, batch: Batch) -> None:
        try:
            await checkpoint()  # what others queue in this turn goes along
            self._flush()
            while batch.num_left > 0:
                if self._leader is None:
                    await self._lead(batch)
                else:
                    self._followers[batch] = event = anyio.Event()
                    await event.wait()
        finally:
            self._followers.pop(batch, None)
            if self._leader is None and self._followers:
                self._followers.popitem()[1].set()  # the youngest: it is likely to stay longest

    async def _lead(self, batch: Batch) -> None:
        self._leader = batch
        try:
            while batch.num_left > 0:
                await anyio.wait_readable(self._ring.eventfd)
                self._reap()
                if self._ring.num_queued:  # the kernel was short of memory
                    await anyio.sleep(_RETRY_S)
                self._flush()
        finally:
            self._leader = None

    # To the kernel and back

    def _flush(self) -> None:
        while self._waiting and self._free:
            self._push(self._waiting.popleft())
        if self._ring.num_queued:
            self._ring.enter()
            if self._ring.num_queued:
                os.eventfd_write(self._ring.eventfd, 1)  # the leader tries again

    def _push(self, transfer: Transfer) -> None:
        slot = self._free.pop()
        assert self._slots[slot] is None
        self._slots[slot] = transfer
        self._ring.push(
            slot,
            transfer.operation,
            transfer.fd,
            transfer.file,
            transfer.offset + transfer.done,
            transfer.address + transfer.done,
            min(_left(transfer), _TRANSFER_BYTES_MAX),
        )

    def _reap(self) -> None:
        for slot, result in self._ring.completions():
            transfer, self._slots[slot] = self._slots[slot], None
            assert transfer is not None
            self._free.append(slot)
            self._complete(transfer, result)

    def _complete(self, transfer: Transfer, result: int) -> None:
        if result in (-errno.EINTR, -errno.EAGAIN) and transfer.tries < _TRIES_MAX:
            transfer.tries += 1
            self._waiting.append(transfer)
            return
        if result < 0:
            self._fail(transfer, OSError(-result, os.strerror(-result)))
        elif transfer.memory is not None:
            before = transfer.done
            transfer.done = advance(before, result, transfer.memory.nbytes, self._alignment)
            if _left(transfer) and transfer.done > before:
                self._waiting.append(transfer)
                return
            if _left(transfer):
                self._fail(transfer, unfinished())
        self._leave(transfer.batch)

    def _fail(self, transfer: Transfer, error: OSError) -> None:
        transfer.batch.error = transfer.batch.error or error

    def _leave(self, batch: Batch) -> None:
        batch.num_left -= 1
        if not batch.num_left and (event := self._followers.pop(batch, None)) is not None:
            event.set()

    def _withdraw(self, batch: Batch) -> None:
        kept = [transfer for transfer in self._waiting if transfer.batch is not batch]
        batch.num_left -= len(self._waiting) - len(kept)
        self._waiting = deque(kept)


def _left(transfer: Transfer) -> int:
    return transfer.memory.nbytes - transfer.done if transfer.memory is not None else 0


def advance(done: int, moved: int, nbytes: int, alignment: int) -> int:
    """Return how much of ``nbytes`` counts as done when ``moved`` more bytes were moved.

    In the middle it is a multiple of ``alignment``: direct transfers can only go on there.
    """
    done += moved
    return done if done >= nbytes else done - done % alignment


def unfinished() -> OSError:
    """Return the error of a file that ends inside a transfer, or of a device that takes no more."""
    return OSError(errno.EIO, os.strerror(errno.EIO))
