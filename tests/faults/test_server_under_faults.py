"""The whole server while the disk below its file tiers fails: it serves on, rightly, and recovers.

Clients of tests/long work all the time, and check every answer. The faults come through the preload
library, with threads, and through FUSE, with io_uring.
"""

import errno
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.fuse import can_mount, mounted
from tests.faults.preload import COMPILER, faults
from tests.faults.table import Call, Faults, Kind, Rule
from tests.long.ledger import MEMORY, Ledger, Values, make_keys
from tests.long.load import Load, check_all
from tests.server.raw import Raw, error_of
from tests.server_process import ServerProcess

CLIENTS = 2
KEYS_PER_CLIENT = 120
# Of any machine: how long a tier itself may take is asked in virtual time, by tests/tiers.
BACK_S_MAX = 30.0
FAIR_ERRORS = ("KVTIER",)  # of a put that asked for more than memory
HOT = {b"hot:%d" % index: bytes([index]) * 1000 for index in range(20)}

_no_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
_no_mount = pytest.mark.skipif(not can_mount(), reason="may not mount")
WAYS = [
    pytest.param(("nvme", "preload"), marks=_no_compiler, id="nvme-threads"),
    pytest.param(("disk", "preload"), marks=[_no_compiler, pytest.mark.long], id="disk"),
    pytest.param(("nvme", "fuse"), marks=[_no_mount, pytest.mark.long], id="nvme-auto"),
]


class Trial:
    """A server with one file tier on a disk that can fail, and clients.

    folder: where the files lie in truth.
    """

    def __init__(self, tier: str, disk: Faults, directory: Path, folder: Path) -> None:
        self.tier = tier
        self.disk = disk
        self.folder = folder
        self._loads: list[Load] = []
        self._shares = make_keys(CLIENTS, KEYS_PER_CLIENT)
        keys = [key for share in self._shares for key in share]
        self._ledger = Ledger(Values("faults"), keys, level_kept=MEMORY, may_evict=True)
        self._settings: dict[str, object] = {
            "maxmemory": "16mb",
            "checkpoint_interval": 1,
            "environment": disk.environment,
            f"{tier}_path": directory / "tier",
            f"{tier}_bytes": "32mb",
        }
        if disk.environment and tier == "nvme":
            self._settings["nvme_engine"] = "threads"
        self.server = ServerProcess(**self._settings)

    def info(self, field: str) -> str:
        """Return what INFO says of the tier."""
        return self.server.info()[f"kv_{self.tier}_{field}"]

    @contextmanager
    def load(self, seed: str) -> Iterator[Load]:
        """Let clients work. Raises what they found."""
        load = Load(
            *(self._ledger, self._shares, self.server.connect, seed),
            fair_errors=FAIR_ERRORS,
            flush_chance=0,
        )
        self._loads.append(load)
        try:
            yield load
        finally:
            self._loads.remove(load)
            load.end()
            self.disk.heal()  # or what hangs keeps them
            load.wait()
        assert "Traceback" not in self.server.log, self.server.log[-5000:]

    def wait_for(self, is_there: Callable[[], bool], what: str, seconds: float = 60.0) -> float:
        """Wait, but no longer when a client has found a fault; return how long it took."""
        start = time.monotonic()
        while not is_there() and not any(load.failures for load in self._loads):
            assert time.monotonic() - start < seconds, f"{what}: {self.server.log[-3000:]}"
            time.sleep(0.02)
        return time.monotonic() - start

    def wait_for_hits(self, rule: Rule, count: int = 1) -> None:
        """Wait until a fault has been met so often."""
        self.wait_for(lambda: self.disk.hits(rule) >= count, "the fault was not met")

    def wait_for_more(self, load: Load, what: str, count: int) -> None:
        """Wait until clients have done something so many times more."""
        enough = load.counts[what] + count
        self.wait_for(lambda: load.counts[what] >= enough, f"no {what}")

    def wait_until_ok(self) -> None:
        """Wait until the tier says that it is well, as it must soon."""
        self.wait_for(lambda: self.info("state") == "ok", "not ok again", BACK_S_MAX)

    def check_durable_put(self) -> None:
        """Put a value durably, which needs a tier that is well."""
        with Raw(self.server.connect()) as raw:
            assert raw.ask("KV.PUT", "durable", b"value" * 1000, "DURABLE") == b"OK"
            assert raw.ask("GET", "durable") == b"value" * 1000

    def restart(self, number: int) -> None:
        """Stop or kill the server, start another one on a healthy disk, and check all it has."""
        self.server.stop(number)
        self.disk.heal()
        self.server = ServerProcess(**self._settings)
        with Raw(self.server.connect()) as raw:
            check_all(raw, self._ledger, clean=number == signal.SIGTERM)

    def start_afresh(self) -> None:
        """Give up a server that is beyond help, and its files."""
        self.server.stop(signal.SIGKILL)
        shutil.rmtree(self.folder)
        self.server = ServerProcess(**self._settings)


@contextmanager
def trial_on(way: tuple[str, str], folder: Path) -> Iterator[Trial]:
    tier, through = way
    source, target = folder / "source", folder / "target"
    source.mkdir()
    target.mkdir()
    with mounted(source, target) if through == "fuse" else faults(source) as disk:
        directory = target if through == "fuse" else source
        trial = Trial(tier, disk, directory, source / "tier")
        try:
            yield trial
        finally:
            disk.heal()
            assert trial.server.stop() == 0, trial.server.log[-3000:]


@pytest.fixture(scope="module", params=WAYS)
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trial]:
    """One server goes through many faults, one after another."""
    with trial_on(request.param, tmp_path_factory.mktemp("faults")) as trial:
        yield trial


@pytest.fixture
def trial(shared: Trial) -> Iterator[Trial]:
    yield shared
    shared.disk.heal()
    try:
        shared.wait_until_ok()
    except BaseException:
        shared.start_afresh()  # the next test is not to suffer from it
        raise


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("calls", [("write",), ("write", "allocate", "open", "rename", "remove")])
def test_a_disk_that_takes_no_writes_makes_the_tier_read_only_until_it_does(
    trial: Trial, calls: tuple[Call, ...], code: int
) -> None:
    with trial.load(f"no writes {code}") as load:
        trial.wait_for(lambda: load.counts["puts, durable"] > 20, "no puts")
        trial.disk.set("error", *calls, code=code)
        trial.wait_for(lambda: trial.info("state") == "read-only", "never read-only")
        before = load.counts.copy()
        trial.wait_for(
            lambda: all(load.counts[each] > before[each] + 20 for each in ("hits", "puts, memory")),
            "it does not serve",
        )
        assert load.counts["refused"]
        trial.disk.heal()
        trial.wait_until_ok()
        trial.check_durable_put()
    assert f"tier {trial.tier} is read-only" in trial.server.log


def test_a_disk_that_takes_no_reads_turns_the_tier_off_until_it_does(trial: Trial) -> None:
    with trial.load("no reads") as load:
        trial.wait_for(lambda: load.counts["puts, durable"] > 100, "no puts")
        trial.disk.set("error", "read", name="tier/segment")
        trial.wait_for(lambda: trial.info("state") == "off", "never off")
        before = load.counts.copy()
        trial.wait_for(lambda: load.counts["hits"] > before["hits"] + 20, "it does not serve")
        trial.disk.heal()
        trial.wait_until_ok()
        trial.check_durable_put()
    assert f"tier {trial.tier} is off" in trial.server.log


@pytest.mark.parametrize(
    ("kind", "calls", "every"),
    [
        ("error", ("write",), 5),
        ("error", ("read",), 5),
        ("error", ("sync",), 1),
        ("error", ("sync",), 4),
        ("error", ("open", "allocate", "truncate"), 1),
        ("error", ("remove",), 1),
        ("short", ("write",), 1),
        ("short", ("read",), 1),
        ("torn", ("write",), 6),
        ("dropped", ("write",), 6),
        ("misdirected", ("write",), 6),
        ("flip", ("write",), 6),
        ("torn", ("read",), 6),
        ("dropped", ("read",), 6),
        ("misdirected", ("read",), 6),
        ("flip", ("read",), 6),
        ("dropped", ("sync",), 1),
        ("slow", ("write", "sync"), 3),
    ],
)
def test_no_byte_is_wrong_and_nothing_stops(
    trial: Trial, kind: Kind, calls: tuple[Call, ...], every: int
) -> None:
    corrupt = int(trial.info("corrupt"))
    with trial.load(f"{kind} {calls} {every}") as load:
        trial.wait_for(lambda: load.counts["puts, memory"] > 20, "no puts")
        rule = trial.disk.set(kind, *calls, every=every, delay_s=0.02)
        if calls != ("remove",):  # which comes seldom
            trial.wait_for_hits(rule)
        before = load.counts.copy()
        trial.wait_for(
            lambda: all(load.counts[each] > before[each] + 40 for each in ("hits", "puts, memory")),
            "it does not serve",
        )
        # Linux makes EIO of a short write that io_uring sends to FUSE.
        if kind == "short" and (trial.disk.environment or calls == ("read",)):
            assert trial.info("state") == "ok"
            assert int(trial.info("corrupt")) == corrupt
        trial.disk.heal()
        trial.wait_until_ok()
        trial.check_durable_put()


def test_flushall_says_when_the_disk_will_not_remember_it(trial: Trial) -> None:
    with Raw(trial.server.connect()) as raw:
        assert raw.ask("KV.PUT", "key", b"value" * 1000, "DURABLE") == b"OK"
        rule = trial.disk.set("error", "rename")
        assert error_of(raw.ask("FLUSHALL")).startswith("KVTIER")
        assert trial.disk.hits(rule) == 1
        assert raw.ask("GET", "key") is None
        trial.disk.heal()
        assert raw.ask("FLUSHALL") == b"OK"
        assert raw.ask("DBSIZE") == 0


@pytest.mark.alone
def test_values_in_memory_are_served_while_reads_and_writes_hang(trial: Trial) -> None:
    with Raw(trial.server.connect()) as raw:
        for key, value in HOT.items():
            assert raw.ask("KV.PUT", key, value, "PRIORITY", 100) == b"OK"
            assert raw.ask("KV.PIN", key, 10**9) == 1
        with trial.load("hang") as load:
            trial.wait_for(lambda: load.counts["hits"] > 50, "no hits")
            rule = trial.disk.set("hang", "read", "write", "sync", name="tier/segment")
            trial.wait_for_hits(rule)
            deadline = time.monotonic() + 1.0
            slowest_s = 0.0
            while time.monotonic() < deadline:
                for key, value in HOT.items():
                    before = time.monotonic()
                    assert raw.ask("GET", key) == value
                    slowest_s = max(slowest_s, time.monotonic() - before)
            assert slowest_s < 5, "what hangs does so until it is healed"
            trial.disk.heal()
            before_counts = load.counts.copy()
            trial.wait_for(lambda: load.counts["hits"] > before_counts["hits"] + 20, "still hangs")


def test_a_reply_waits_for_a_disk_that_hangs_and_is_right(trial: Trial) -> None:
    with Raw(trial.server.connect()) as raw, Raw(trial.server.connect()) as other:
        rule = trial.disk.set("hang", "write", "sync", name="tier/segment")
        raw.send("KV.PUT", "slow", b"value", "DURABLE")
        trial.wait_for_hits(rule)
        assert other.ask("PING") == b"PONG"
        raw.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            raw.next()
        raw.socket.settimeout(20)
        trial.disk.heal()
        assert raw.next() == b"OK"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["torn", "dropped", "misdirected", "flip", "error"])
@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_starts_after_it_has_nothing_wrong(
    tmp_path: Path, way: tuple[str, str], kind: Kind, number: int
) -> None:
    rng = random.Random(f"{kind} {number}")
    with trial_on(way, tmp_path) as trial:
        for index in range(2):
            with trial.load(f"{kind} {number} {index}") as load:
                trial.wait_for(lambda: load.counts["hits"] > 30, "no hits")
                rule = trial.disk.set(kind, "write", every=rng.randint(2, 9))
                trial.wait_for_hits(rule, 3)
                # That the very last batch is missing nobody can know; that one in between is, can.
                trial.disk.heal()
                trial.wait_until_ok()
                trial.wait_for_more(load, "puts, durable", 10)
                if number == signal.SIGKILL:
                    load.end()
                    trial.server.process.kill()
            trial.restart(number)


@pytest.mark.parametrize("way", WAYS)
def test_a_directory_that_is_removed_is_made_anew(tmp_path: Path, way: tuple[str, str]) -> None:
    with trial_on(way, tmp_path) as trial:
        with trial.load("removed") as load:
            trial.wait_for(lambda: load.counts["hits"] > 50, "no hits")
            shutil.rmtree(trial.folder)
            trial.wait_for(lambda: trial.info("state") != "ok", "it did not notice")
            before = load.counts.copy()
            trial.wait_for(lambda: load.counts["hits"] > before["hits"] + 20, "it does not serve")
            trial.folder.mkdir(exist_ok=True)
            trial.wait_until_ok()
            trial.check_durable_put()
        trial.restart(signal.SIGTERM)


@pytest.mark.parametrize("way", WAYS[:1])
@pytest.mark.parametrize("call", ["open", "read", "write", "sync", "rename", "allocate"])
def test_a_server_that_cannot_use_its_directory_says_so_and_ends(
    tmp_path: Path, way: tuple[str, str], call: Call
) -> None:
    """Or it starts and serves without it, when the trouble is found later."""
    tier, _ = way
    directory = tmp_path / "tier"
    with faults(tmp_path) as disk:
        disk.set("error", call)
        server = ServerProcess(
            is_awaited=False,
            environment=disk.environment,
            nvme_engine="threads",
            **{f"{tier}_path": directory, f"{tier}_bytes": "32mb"},
        )
        try:
            server.wait_until_ready()
        except AssertionError as error:
            assert server.process.wait(timeout=60) == 2
            said = str(error).partition(": ")[2]
            assert "Input/output error" in said
            assert len(said.splitlines()) == 1
            return
        with Raw(server.connect()) as raw:
            assert raw.ask("SET", "key", b"value" * 100) == b"OK"
            assert raw.ask("GET", "key") == b"value" * 100
        assert server.stop() == 0
