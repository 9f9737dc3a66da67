"""The actor of a file tier: what is asked of the tier, and the work it does in the background.

The tier has its own queue for the device. What the actor adds is the border: an error that is an
answer goes to the one who asked, anything else crashes the actor, whose tier is then emptied while
the others go on.
"""

from typing import Any, assert_never

import anyio

from respkv.engine.actor import Actor
from respkv.engine.messages import (
    ClearTier,
    ReadRecord,
    ReadStored,
    SettleNotes,
    WriteValues,
)
from respkv.engine.tier import Tier
from respkv.errors import TierError
from respkv.tiers.record import Level, Record

MAILBOX_MAX = 1024
JOBS_MAX = 512  # a write waits for its sync, so this is more than the depth of the device


class TierActor(Actor):
    """Serve the mailbox of a tier, and beside it let the tier reclaim, write and probe."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(
            f"tier {tier.name}", self._serve, mailbox_max=MAILBOX_MAX, jobs_max=JOBS_MAX
        )
        self.tier = tier

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.tier.run)
            await super().run()
            tasks.cancel_scope.cancel()

    async def _serve(self, message: Any) -> Any:
        match message:
            case ReadRecord(record, key, into, image):
                return await self.tier.read(record, key, into, image)
            case ReadStored(record, key):
                return await self.tier.read_stored(record, key)
            case WriteValues():
                await self._write(message)
            case SettleNotes(tickets, level):
                return [await self._settle(ticket, level) for ticket in tickets]
            case ClearTier():
                await self.tier.clear()
            case _:
                assert_never(message)
        return None

    async def _write(self, message: WriteValues) -> None:
        numbers = [i for i in range(len(message.values)) if message.is_wanted(i)]
        records: list[Record | None] = [None] * len(message.values)
        try:
            values = [message.values[i] for i in numbers]
            written = await self.tier.write(values, message.level)
            for number, record in zip(numbers, written, strict=True):
                records[number] = record
        finally:
            message.attach(records)

    async def _settle(self, ticket: int, level: Level) -> str:
        try:
            await self.tier.settle(ticket, level)
        except TierError as error:
            return str(error)
        return ""
