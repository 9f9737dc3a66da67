"""One history: a server without sockets, some clients, and a seed that decides everything.

Real are the sessions, the transport above its socket, the cache, the arena's memory, the keeper, the
janitor and its supervisor. Simulated are time, sockets and clients. After every fourth step the
cache checks itself, and every resident page is held against the checksum in its header.
"""

import gc
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import anyio
import anyio.lowlevel

import respkv.server.commands  # noqa: F401  (registers the handlers)
from respkv.config import Config
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry
from respkv.engine.eviction import POLICIES
from respkv.engine.janitor import make_janitor
from respkv.engine.leases import Mode
from respkv.engine.supervisor import supervise
from respkv.server.keeper import keep
from respkv.server.state import Server
from respkv.tiers.format import HEADER_BYTES, check_page
from tests.fakes import ManualClock, make_server
from tests.simulation.client import Client, Moment
from tests.simulation.keys import Keys, make_keys, schema_words
from tests.simulation.record import Record
from tests.simulation.socket import SimulatedSocket
from tests.simulation.virtual import Jump, run

QUARANTINE_S = 2.0
LEASE_MAX_S = 10  # the longest that clients ask for
FINISH_S = 60.0  # every answer has come by then, in virtual time
STEPS = 300


@dataclass(frozen=True, slots=True)
class Result:
    """What a history did. ``digest`` tells two runs apart."""

    answers: int
    evicted: int
    oom: int
    lapsed: int
    digest: str


class WatchedCache(Cache):
    """A cache that may never evict what somebody was promised.

    loose: where writers whose connection was closed on them may still be writing, and until when.
    """

    loose: list[tuple[float, memoryview]]

    def drop_owner(self, owner: int, *, may_write: bool = False) -> None:
        for lease in self.leases._leases.values():
            is_writer = lease.mode is Mode.WRITE and lease.owner == owner
            if is_writer and (may_write or lease.is_overdue):
                # The client learns of it late, but not as late as the end of the quarantine.
                until = max(self.clock.now, lease.deadline) + 0.9 * QUARANTINE_S
                self.loose.append((until, self.payload(lease.slots[0])))
        super().drop_owner(owner, may_write=may_write)

    def _lose(self, entry: Entry) -> None:
        now = self.clock.now
        assert entry.held_until <= now, f"{entry.key!r} was promised"
        assert entry.pinned_until <= now, f"{entry.key!r} was pinned"
        assert not entry.children, f"{entry.key!r} has pages behind it"
        if entry.slot is not None:
            assert entry.slot not in self._borrowed, f"{entry.key!r} is being sent"
            assert entry.slot not in self.leases.holders(), f"{entry.key!r} is leased"
        super()._lose(entry)


class World:
    """A server and its clients."""

    def __init__(self, server: Server, rng: random.Random, keys: Keys, jump: Jump) -> None:
        assert isinstance(server.cache, WatchedCache)
        self.server = server
        self.cache = server.cache
        self.cache.loose = []
        self.rng = rng
        self.keys = keys
        self.record = Record()
        self.moment = Moment(0, server.clock.now)
        self.clients: list[Client] = []
        self.answers = 0
        self._jump = jump
        self._writes = [0]
        self._number = 0
        self._deferred: list[Callable[[], None]] = []
        self._digest = hashlib.sha256()

    def connect(self) -> Client:
        """Open a connection."""
        self._number += 1
        socket = SimulatedSocket(self.server, self._number, self._deferred.append)
        client = Client(
            self._number,
            socket,
            self.rng,
            self.keys,
            self.record,
            self.moment,
            self.server.arena.view,
            self._writes,
        )
        self.clients.append(client)
        return client

    async def play(self, steps: int) -> None:
        """Take random steps."""
        client = self.connect()
        client._send(schema_words(self.keys), lambda answer: None)
        for _ in range(self.rng.randint(1, 5)):
            self.connect()
        for _ in range(steps):
            await self.step()
            if self.rng.random() < 0.25:
                self.check()

    async def step(self) -> None:
        """Let one thing happen."""
        self._tick()
        rng = self.rng
        client = rng.choice(self.clients)
        what = rng.random()
        if what < 0.30:
            client.compose()
        elif what < 0.65:
            self._deliver(client)
        elif what < 0.83:
            client.socket.drain(rng.choice((1, 60_000, 1 << 20, 1 << 22)))
        elif what < 0.88:
            client.write_in_place()
            self._overwrite()
        elif what < 0.89:
            client.socket.lose()
        elif what < 0.95:
            await anyio.sleep(rng.choice((0, 0.001, 0.02, 0.02, 0.3, 3)))
        else:
            await anyio.lowlevel.checkpoint()
        self._run_deferred()
        self.moment.now = anyio.current_time()
        client.read_answers()
        if not client.socket.is_lost:
            client.check_leases()
        self._replace_lost()

    def _deliver(self, client: Client) -> None:
        rng = self.rng
        for _ in range(rng.choice((1, 1, 10, 30))):
            if client.socket.can_read:
                client.socket.deliver(rng.choice((1, 7, 300, 20_000, 1 << 20, 1 << 20)))

    def _overwrite(self) -> None:
        """Let writers that have lost their connection, and do not know yet, go on writing."""
        self.cache.loose = [each for each in self.cache.loose if each[0] > self.moment.now]
        for _, memory in self.cache.loose:
            memory[:1000] = b"!" * len(memory[:1000])

    def _tick(self) -> None:
        self._jump(self.rng.uniform(1e-6, 2e-6))
        self.moment.step += 1
        self.moment.now = anyio.current_time()

    def _run_deferred(self) -> None:
        deferred = self._deferred[:]
        self._deferred.clear()
        for each in deferred:
            each()

    def _replace_lost(self) -> None:
        for client in [each for each in self.clients if each.socket.is_lost]:
            client.read_answers()
            client.end_all()
            self.clients.remove(client)
            self.answers += client.answers
            self._note(client)
            self.connect()

    def _note(self, client: Client) -> None:
        text = f"{client.number} {client.answers} {self.moment} {self.cache.stats.snapshot()}"
        self._digest.update(text.encode())

    async def answer_all(self) -> None:
        """Let everything arrive, and require that every command is answered."""
        give_up = anyio.current_time() + FINISH_S
        while any(client.calls or client.socket.inbox for client in self.clients):
            self._tick()
            for client in self.clients:
                if client.socket.can_read:
                    client.socket.deliver(1 << 20)
                client.socket.drain(1 << 30)
                client.read_answers()
            self._run_deferred()
            for client in [each for each in self.clients if each.socket.is_lost]:
                client.end_all()
                self.clients.remove(client)
                self.answers += client.answers
            await anyio.sleep(0.01)
            if anyio.current_time() > give_up:
                stuck = [(each.number, each.calls[0].words) for each in self.clients if each.calls]
                raise AssertionError(f"no answer for {FINISH_S} s: {stuck}")
        self.check()

    async def leave(self) -> None:
        """Break every connection; require that nothing is left behind."""
        for client in self.clients:
            self._note(client)
            self.answers += client.answers
            client.end_all()
            client.socket.lose()
        self._run_deferred()
        await anyio.sleep(LEASE_MAX_S + QUARANTINE_S + 1)
        self.check()
        cache = self.cache
        assert not self.server.sessions
        assert not len(cache.leases), "leases are left"
        assert not cache.leases.quarantined, "slots are left in quarantine"
        assert cache.in_flight() == (0, 0), "slots are left in flight"
        resident = [entry.slot for entry in cache.entries.values() if entry.slot is not None]
        assert cache.slabs.used_bytes == sum(slot.slab.slot_bytes for slot in resident)
        assert cache.slabs.payload_bytes == sum(slot.payload_bytes for slot in resident)
        assert all(slot.holders == 1 for slot in resident)

    def check(self) -> None:
        """Assert that the engine is whole and every resident page is what was written."""
        cache = self.cache
        cache.check()
        for key, entry in cache.entries.items():
            slot = entry.slot
            if slot is not None:
                header = cache.arena[slot.offset : slot.offset + HEADER_BYTES]
                check_page(header, cache.payload(slot), key=key, generation=entry.generation)
        for lease in cache.leases._leases.values():
            assert lease.owner in self.server.sessions, "a lease without a connection"
            assert lease.mode is Mode.READ or len(lease.slots) == 1

    def result(self) -> Result:
        """Return what came of it."""
        stats = self.cache.stats
        text = self._digest.hexdigest()[:16]
        return Result(self.answers, stats.evicted, stats.oom, stats.lapsed, text)


def play_history(seed: int, *, backend: str = "asyncio", steps: int = STEPS) -> Result:
    """Play one history. Raises AssertionError, with the seed in it, when something is wrong."""

    async def play(jump: Jump) -> Result:
        return await _play(random.Random(seed), steps, jump)

    gc.freeze()  # the keeper collects all the time, and only what a history makes is worth a look
    try:
        result = run(play, backend=backend, seed=seed)
    except BaseException as error:
        error.add_note(
            f"again with: python -m tests.simulation --seed {seed} --histories 1 "
            f"--backend {backend} --steps {steps}"
        )
        raise
    finally:
        gc.collect()
        gc.unfreeze()
    assert isinstance(result, Result)
    return result


async def _play(rng: random.Random, steps: int, jump: Jump) -> Result:
    maxmemory = rng.choice((700, 1024, 1536, 2560)) << 10
    config = Config(
        maxmemory=maxmemory,
        small_value_memory=rng.choice((4, 16, 100)) << 10,
        maxmemory_policy=rng.choice(POLICIES),
        shm="rw",
        answer_lease=rng.choice((0, 50, 5000)),
        reserve_timeout=rng.choice((0, 100, 5000)),
        lease_default=1000,
        lease_max=LEASE_MAX_S * 1000,
        output_timeout=rng.choice((1, 10)),
        client_output_buffer_limit=rng.choice((100_000, 1 << 28)),
        check_interval=1,
    )
    clock = ManualClock(anyio.current_time)
    with make_server(config, clock, WatchedCache) as server:
        server.cache.leases.quarantine_s = QUARANTINE_S
        world = World(server, rng, make_keys(rng, maxmemory), jump)
        async with anyio.create_task_group() as tasks:
            server.run_in(tasks)
            janitor = make_janitor(server.cache)
            tasks.start_soon(supervise, janitor, _no_recovery)
            tasks.start_soon(keep, server, janitor)
            await world.play(steps)
            if rng.random() < 0.5:
                await world.answer_all()
            await world.leave()
            tasks.cancel_scope.cancel()
        return world.result()


async def _no_recovery() -> None:
    raise AssertionError("the janitor crashed")
