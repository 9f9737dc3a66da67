"""A device of io_uring: O_DIRECT, registered memory and files, little processor."""

from collections.abc import Sequence

from respkv.tiers.claim import Opened
from respkv.tiers.device import Write
from respkv.tiers.directory import Directory, Engine, File
from respkv.tiers.transfers import Transfer, Transfers
from respkv.tiers.uring import FSYNC, READ, WRITE, Ring

_ALIGNMENT = 4096


class RingDevice(Directory):
    """Files read and written by a ring; ``Device`` says what each method does.

    Belongs to the event loop in which it was made. Raises OSError where io_uring is refused.
    """

    engine: Engine = "io_uring"
    alignment = _ALIGNMENT

    def __init__(self, opened: Opened, depth: int) -> None:
        super().__init__(opened)
        self._ring = Ring(depth, blocks=not self.is_direct)
        self._transfers = Transfers(self._ring, _ALIGNMENT if self.is_direct else 1)

    def register(self, memory: memoryview) -> None:
        self._ring.register(memory)

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        with self._using(name) as file:
            await self._transfers.carry_out([Transfer(READ, file.fd, file.slot, offset, into)])

    async def write(self, name: str, pieces: Sequence[Write]) -> None:
        with self._using(name) as file:
            await self._transfers.carry_out(
                [Transfer(WRITE, file.fd, file.slot, offset, data) for offset, data in pieces]
            )

    async def sync(self, name: str) -> None:
        with self._using(name) as file:
            await self._transfers.carry_out([Transfer(FSYNC, file.fd, file.slot)])

    def _attach(self, file: File) -> None:
        super()._attach(file)
        file.slot = self._ring.add_file(file.fd)

    def _detach(self, file: File) -> None:
        super()._detach(file)
        self._ring.drop_file(file.slot)

    def _end(self) -> None:
        self._ring.close()

    def _abandon(self) -> None:
        super()._abandon()
        self._transfers.abandon()
