"""The actor of the gpu tier: it copies pages up, and back into memory.

Advice to copy a page is dropped while many wait; those who lease pages on the device ask, and wait.
An error of the device is an answer, after which the tier is off. Anything else crashes the actor:
the tier then starts empty, which costs nobody a page.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, assert_never

import anyio

from respkv.engine.actor import Actor, Ask
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry
from respkv.engine.gpu_copies import GpuCopy, Lift
from respkv.engine.gpu_tier import GpuTier
from respkv.engine.placement import GpuPromote
from respkv.engine.supervisor import supervise
from respkv.errors import CacheError, PageCorrupt, TierError
from respkv.kernels.page_form import PageForm
from respkv.tiers.format import read_header
from respkv.tiers.slab import Slot

logger = logging.getLogger(__name__)

MAILBOX_MAX = 256
JOBS_MAX = 8  # enough to keep both directions busy


@dataclass(frozen=True, slots=True)
class LiftPage(Ask[None]):
    """Copy a page that is in memory to the gpu tier, unless it is there.

    attached: called in the turn in which the copy is there; not at all if it does not come to it.
    """

    entry: Entry
    attached: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class ReadCopy(Ask[None]):
    """Fill memory with the page of a copy. The copy is dropped if it is not what was put."""

    copy: GpuCopy
    into: memoryview


class GpuActor(Actor):
    """Serves the mailbox of the gpu tier of a cache."""

    def __init__(self, cache: Cache) -> None:
        super().__init__("tier gpu", self._serve, mailbox_max=MAILBOX_MAX, jobs_max=JOBS_MAX)
        self.tier = cache.gpu.tier
        self._cache = cache
        self._gpu = cache.gpu
        self._lifted = anyio.Event()

    def advise_lift(self, entry: Entry) -> bool:
        """Have a page copied some time; False if that is dropped."""
        return self.advise(LiftPage(entry))

    async def bring(self, entry: Entry, attached: Callable[[], None]) -> None:
        """Copy a page that is in memory, and wait for it.

        Raises TierError or ActorDown. Cancelled: it may be copied all the same.
        """
        await self.ask(LiftPage(entry, attached))

    async def read(self, copy: GpuCopy, into: memoryview) -> bool:
        """Fill memory with a lossless copy's page; False when it cannot be had.

        Cancelled: after the read has ended, because the memory is lent.
        """
        if not copy.form.is_lossless:
            return False
        try:
            with anyio.CancelScope(shield=True):
                await self.ask(ReadCopy(copy, into))
        except CacheError as error:
            logger.warning("%s", error)
            return False
        return True

    async def forget(self) -> None:
        """Forget all copies, because the tier's state is suspect."""
        self._gpu.fail()

    # -- inside -------------------------------------------------------------------------------

    async def _serve(self, message: Any) -> None:
        match message:
            case LiftPage(entry, attached):
                await self._lift(entry, attached)
            case ReadCopy(copy, into):
                await self._read(copy, into)
            case _:
                assert_never(message)

    async def _lift(self, entry: Entry, attached: Callable[[], None] | None) -> None:
        gpu, cache = self._gpu, self._cache
        while entry in gpu.lifts:
            await self._lifted.wait()
        form, source = gpu.form_of(entry), entry.slot
        is_wanted = entry.position >= 0 and entry not in gpu.by_entry
        if is_wanted and source is not None and form is not None:
            lift = gpu.begin_lift(entry)
            cache.borrow(source)
            try:
                await self._copy_up(lift, source, form)
            finally:
                cache.restore(source)
                gpu.end_lift(lift)
                self._tell()
        if attached is not None and entry in gpu.by_entry:
            attached()

    async def _copy_up(self, lift: Lift, source: Slot, form: PageForm) -> None:
        """Copy a page, raw if its codec cannot hold it."""
        if not await self._copy(lift, source, form) and not form.is_lossless:
            await self._copy(lift, source, form.raw)

    async def _copy(self, lift: Lift, source: Slot, form: PageForm) -> bool:
        """Copy a page in one form; False when it does not fit that."""
        gpu, payload = self._gpu, self._cache.payload(source)
        place = gpu.take(form.nbytes)
        if place is None:
            return True
        is_attached = fits = False
        try:
            with anyio.CancelScope(shield=True):
                fits = await self._written(place, payload, form)
            if fits:
                checksum = read_header(self._cache.header(source)).checksum
                is_attached = gpu.attach(lift, place, form, checksum)
        finally:
            if not is_attached:
                gpu.give_back(place)
        return fits

    async def _written(self, place: Slot, payload: memoryview, form: PageForm) -> bool:
        try:
            return await self.tier.write(place, payload, form)
        except TierError:
            self._look_at_state()
            raise

    async def _read(self, copy: GpuCopy, into: memoryview) -> None:
        gpu = self._gpu
        if gpu.by_entry.get(copy.entry) is not copy:
            raise TierError("the copy in the gpu tier has gone")
        slots = self.tier.slots
        slots.hold(copy.slot)
        gpu.num_reading += 1
        checksum: int | None = None
        try:
            with anyio.CancelScope(shield=True):
                checksum = await self.tier.read(copy.slot, into, copy.form)
        except TierError:
            self._look_at_state()
            raise
        finally:
            gpu.num_reading -= 1
            slots.give_back(copy.slot)
        if checksum != copy.checksum:
            gpu.stats.corrupt += 1
            gpu.discard(copy)
            raise PageCorrupt("a copy in the gpu tier is not the page that was put")
        gpu.stats.raised += 1

    def _look_at_state(self) -> None:
        """Forget all copies when the device has failed."""
        if self.tier.state != "ok":
            self._gpu.fail()

    def _tell(self) -> None:
        self._lifted.set()
        self._lifted = anyio.Event()


@asynccontextmanager
async def open_gpu(cache: Cache, tier: GpuTier, promote: GpuPromote) -> AsyncIterator[GpuActor]:
    """Keep copies of pages in a tier while the block runs.

    A crash of the actor empties the tier and starts it again, a bounded number of times. When the
    block is left, copies on their way have ended.
    """
    gpu = cache.gpu
    gpu.use(tier, promote)
    actor = GpuActor(cache)
    gpu.advise = actor.advise_lift
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervise, actor, actor.forget)
        try:
            yield actor
        finally:
            gpu.is_on = False
            gpu.advise = lambda entry: False
            tasks.cancel_scope.cancel()
    gpu.clear()
