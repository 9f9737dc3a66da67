"""What all connections of a server share."""

import os
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import anyio
from anyio.abc import TaskGroup

from respkv.config import Config
from respkv.engine.assembly import Assemblies
from respkv.engine.cache import Cache
from respkv.engine.clock import Clock
from respkv.engine.events import Events
from respkv.engine.groups import Groups
from respkv.engine.landing import Landing
from respkv.engine.placement import GpuPromote, MoveSettings
from respkv.engine.prefetch import Limits as PrefetchLimits
from respkv.engine.sequences import Sequences
from respkv.engine.sessions import Hints
from respkv.errors import OutOfMemory
from respkv.server.answers import Wire
from respkv.server.body import LAND_MIN
from respkv.server.budget import Budget
from respkv.server.event_channels import EventChannels
from respkv.server.intake import READ_BYTES
from respkv.server.pubsub import PubSub
from respkv.server.schema_files import SchemaFiles
from respkv.server.session import Session
from respkv.tiers.arena import Arena
from respkv.tiers.record import Level
from respkv.wire.parser import Limits
from respkv.wire.tokenizer import Tokenizer

if TYPE_CHECKING:
    from respkv.engine.gpu_actor import GpuActor
    from respkv.engine.mover import Mover
    from respkv.engine.prefetcher import Prefetcher
    from respkv.server.zmq_events import Publisher
    from respkv.tiers.file_tier import FileTier
    from respkv.tiers.gpu import GpuTier

ROOM_PAUSE_S, ROOM_PAUSE_S_MAX = 0.05, 0.4
PATIENCE_S_MAX = 1.0


class Server:
    """The cache, the settings, the connections and the counters that are not the cache's.

    One read buffer serves every connection, because lending it, the read and taking the bytes run
    back to back: an idle connection costs a few KiB.

    is_embedded: it is a part of a process that does other work: its collector, its limits and its
                 end are not the server's affair, and all that it serves may see the arena.
    """

    def __init__(
        self,
        config: Config,
        cache: Cache,
        arena: Arena,
        clock: Clock,
        *,
        is_embedded: bool = False,
    ) -> None:
        self.is_embedded = is_embedded
        self.config = config
        self.cache = cache
        self.mover: Mover | None = None  # without file tiers, as the next three
        self.prefetcher: Prefetcher | None = None
        self.schema_files: SchemaFiles | None = None
        self.file_tiers: Sequence[FileTier] = ()
        self.gpu: GpuActor | None = None  # without a gpu tier, as the next one
        self.gpu_tier: GpuTier | None = None
        self.sequences = Sequences(cache)
        self.groups = Groups(cache, self.sequences.branches)
        self.sequences.serve = self.groups.serve
        self.sequences.is_whole = self.groups.is_whole
        self.assemblies = Assemblies(cache)
        self.hints = Hints(cache)
        self.budget = Budget(config.move_bytes_max, arena.nbytes)
        # Beside them the event loop has to have a processor.
        self.form_threads = anyio.CapacityLimiter(max(1, (os.cpu_count() or 1) // 2))
        self.measuring = (
            anyio.Lock()
        )  # apart from them: who waits for a page waits for milliseconds
        self.arena = arena
        self.clock = clock
        self.run_id = secrets.token_hex(20)
        self.started_s = clock.now
        self.pid = os.getpid()
        self.port = 0
        self.base_bytes = 0  # resident before the arena was touched
        self.maxmemory_at_start = config.maxmemory
        self.read_buffer = bytearray(READ_BYTES)
        self.scratch = memoryview(self.read_buffer)
        self.tokenizer = Tokenizer()
        self.limits = limits_of(config)
        self.sessions: dict[int, Session] = {}
        self.parting: set[Wire] = set()  # connections that wait for their client to close
        self.pubsub = PubSub(self)
        self.events = Events(cache)
        cache.watchers.add(self.events)
        self.event_channels = EventChannels(self)
        self.publisher: Publisher | None = None  # without events-endpoint
        self.next_number = 1
        self.stopping = anyio.Event()
        self._limit_assemblies()
        self.reset_counters()
        self._tasks: TaskGroup | None = None
        self._room = anyio.Event()
        cache.on_room = self.announce_room

    def reset_counters(self) -> None:
        """Set the counters of CONFIG RESETSTAT to zero."""
        self.num_connections = 0
        self.num_rejected = 0
        self.num_commands = 0
        self.num_errors = 0
        self.num_protocol_errors = 0
        self.num_slow_readers = 0
        self.num_slow_subscribers = 0
        self.num_idle_closed = 0
        self.num_overdue_writers = 0
        self.input_bytes = 0
        self.output_bytes = 0
        self.cache.stats.reset()
        self.cache.accounts.reset_counters()
        self.hints.reset_counters()

    def configure(self, config: Config) -> None:
        """Put changed settings in force."""
        self.config = config
        self.limits = limits_of(config)
        self._limit_assemblies()
        cache = self.cache
        if self.mover is not None:
            self.mover.settings = moves_of(config)
            if self.prefetcher is not None:
                self.prefetcher.limits = prefetch_of(config)
            cache.copies.admission.mode = admission_of(config)
            cache.default_level = Level[config.durability.upper()]
        cache.gpu.promote = cast(GpuPromote, config.gpu_promote)
        for session in self.sessions.values():
            session.use_limits(self.limits)
            if not config.requirepass and not session.is_authenticated:
                session.demand_password(False)  # or AUTH, its only way on, would be refused
        if config.maxmemory_policy != cache.room.policy:
            cache.room.use_policy(config.maxmemory_policy, iter(cache.entries.values()))
        budget = config.maxmemory - config.small_value_bytes()
        if budget != cache.slabs.budget_bytes:
            cache.slabs.budget_bytes = min(budget, cache.slabs.capacity_bytes)
            self.budget.set_limits(config.move_bytes_max, cache.slabs.budget_bytes)
            cache.room.small_max = config.small_value_bytes()
            cache.room.shrink()

    def _limit_assemblies(self) -> None:
        config = self.config
        self.assemblies.timeout_s = config.assembly_timeout / 1000
        self.assemblies.bytes_max = config.assembly_bytes(config.maxmemory)

    def run_in(self, tasks: TaskGroup) -> None:
        """Let ``spawn`` start tasks in this group."""
        self._tasks = tasks

    def spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Start a task that ends with the server."""
        assert self._tasks is not None
        self._tasks.start_soon(work, *args)

    def announce_room(self) -> None:
        """Wake those who wait for a slot."""
        if not self._room.is_set():
            self._room.set()

    def find_room(self, nbytes: int) -> Landing | None:
        """Reserve a slot if there is one at once; None when ``wait_for_room`` may find one.

        Raises OutOfMemory when it would not.
        """
        cache = self.cache
        if cache.copies.is_behind and nbytes >= LAND_MIN:
            return None
        try:
            return cache.reserve(nbytes, may_lose=False, is_last=False)
        except OutOfMemory:
            is_written_soon = cache.has_files and nbytes <= cache.slabs.payload_bytes_max
            if is_written_soon or cache.is_waiting_useful(nbytes):
                return None
            raise

    async def wait_for_writes(self) -> None:
        """Wait, but not for long, while too much in memory has no copy in a file."""
        with anyio.move_on_after(PATIENCE_S_MAX):
            while self.cache.copies.is_behind:
                await self.wait_for_news(ROOM_PAUSE_S)

    async def wait_for_news(self, seconds: float) -> None:
        """Wait until room is announced, but no longer than this."""
        if self._room.is_set():  # it is shared: all who wait look again
            self._room = anyio.Event()
        # Promises lapse without anybody saying so, hence the look now and then.
        with anyio.move_on_after(seconds):
            await self._room.wait()

    async def wait_for_room(self, nbytes: int, has_gone: Callable[[], bool]) -> Landing | None:
        """Wait up to reserve-timeout for a slot; None when there is none, or the asker has gone.

        With file tiers it is patient at first: values that are still to be written are not evicted,
        and while there are too many of them none is added.
        Cancelled: nothing is held.
        """
        cache = self.cache
        pause_s, timeout_s = ROOM_PAUSE_S, self.config.reserve_timeout / 1000
        patient_until = anyio.current_time() + min(PATIENCE_S_MAX, timeout_s / 2)
        with anyio.move_on_after(timeout_s):
            while not has_gone():
                self.clock.refresh()
                is_patient = cache.has_files and anyio.current_time() < patient_until
                try:
                    if not (is_patient and cache.copies.is_behind):
                        return cache.reserve(nbytes, may_lose=not is_patient, is_last=False)
                except OutOfMemory:
                    if cache.has_files and not is_patient and not cache.is_waiting_useful(nbytes):
                        return None
                await self.wait_for_news(pause_s)
                pause_s = min(2 * pause_s, ROOM_PAUSE_S_MAX)  # a look in vain is long
        return None


def limits_of(config: Config) -> Limits:
    """Return what an authenticated connection may send."""
    return Limits(
        args_max=config.max_args,
        bulk_max=config.proto_max_bulk_len,
        inline_max=config.inline_max,
        held_max=config.query_buffer_limit,
    )


def admission_of(config: Config) -> Literal["all", "second", "tinylfu"]:
    """Return which values files take."""
    return cast(Literal["all", "second", "tinylfu"], config.admission)


def prefetch_of(config: Config) -> PrefetchLimits:
    """Return how much is raised from files ahead."""
    mode = cast(Literal["auto", "on", "off"], config.prefetch)
    return PrefetchLimits(mode, config.prefetch_budget(config.maxmemory))


def moves_of(config: Config) -> MoveSettings:
    """Return how values move between memory and files."""
    return MoveSettings(
        promote=cast(Literal["second", "first", "never"], config.promote),
        dirty_high=config.dirty_high,
        dirty_low=config.dirty_low,
        move_bytes_max=config.move_bytes_max,
        reserve_timeout_s=config.reserve_timeout / 1000,
        shutdown_timeout_s=float(config.shutdown_timeout),
    )
