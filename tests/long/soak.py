"""Clients that put and get for a long time: `make soak`, or
python -m tests.long.soak [--seconds N] [--clients N] [--seed N].

Values of 64 bytes to 4 MiB over four times the memory, so that eviction never stops; some expire and
some are deleted. A value says which key and version it is, and everything else in it follows from
those, so a reader knows every byte it must get whoever wrote it last. The server's resident memory
must stay where it was when it had warmed up.
"""

import argparse
import json
import random
import statistics
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from respkv.client import Client
from respkv.errors import ServerError
from tests.server_process import ServerProcess

GROWTH_MAX = 0.01
WARM_UP = 0.2  # of the time, before memory is first read
SAMPLES_S = 0.5
MAXMEMORY = 256 << 20
SIZES = [64, 4096, 100_000, 1 << 20, 4 << 20]
KEYS = 4 * MAXMEMORY // (sum(SIZES) // len(SIZES))
HEAD = struct.Struct("<QQ")
NOISE = random.Random(0).randbytes(8 << 20)


def value_of(key: int, version: int) -> bytes:
    """Return the only right value of a key in a version; its size depends on the key alone."""
    body_bytes = SIZES[key % len(SIZES)] - HEAD.size
    start = (key * 7919 + version * 104729) % (len(NOISE) - body_bytes)
    return HEAD.pack(key, version) + NOISE[start : start + body_bytes]


@dataclass
class Counts:
    """What one client did."""

    puts: int = 0
    hits: int = 0
    misses: int = 0
    refused: int = 0
    moved_bytes: int = 0


def check(key: int, got: memoryview) -> None:
    """Raise AssertionError unless these are the bytes of some version of this key."""
    value = bytes(got)
    _, version = HEAD.unpack_from(value)
    assert value == value_of(key, version), f"wrong bytes for key {key}, version {version}"


def one_step(client: Client, rng: random.Random, counts: Counts) -> None:
    """Get, put or delete one key; a miss is put, as an inference worker would."""
    key = min(rng.randrange(KEYS), rng.randrange(KEYS))  # low ones are asked for more often
    name = b"soak:%064x" % key
    chance = rng.random()
    if chance < 0.02:
        client.delete(name)
        return
    if chance < 0.7:
        got = client.get(name)
        if got is not None:
            check(key, got)
            counts.hits += 1
            counts.moved_bytes += len(got)
            return
        counts.misses += 1
    value = value_of(key, rng.getrandbits(32))
    px_ms = rng.randint(1, 5000) if rng.random() < 0.1 else None
    if key % 2:
        client.set(name, value, px_ms=px_ms)
    else:
        try:
            client.put(name, value, px_ms=px_ms)
        except ServerError as error:
            # The one refusal that is right here: a page that was there already, so that its bytes
            # were not kept, and was evicted or deleted before they had all come.
            if error.word != "BUSY":
                raise
            counts.refused += 1
    counts.puts += 1
    counts.moved_bytes += len(value)


def work(url: str, seed: str, seconds: float) -> Counts:
    """Be one client for a time."""
    rng = random.Random(seed)
    counts = Counts()
    until = time.monotonic() + seconds
    with Client(url) as client:
        while time.monotonic() < until:
            one_step(client, rng, counts)
    return counts


def watch(server: ServerProcess, workers: list[subprocess.Popen[str]], seconds: float) -> list[int]:
    """Read the server's resident memory from the end of the warm-up on, while all are at work."""
    began = time.monotonic()
    samples: list[int] = []
    while time.monotonic() < began + seconds and not any(worker.poll() for worker in workers):
        if time.monotonic() > began + seconds * WARM_UP:
            samples.append(server.resident_bytes)
        time.sleep(SAMPLES_S)
    return samples


def start_client(url: str, seed: str, seconds: float) -> subprocess.Popen[str]:
    """Start ``work`` in a process of its own, which prints its counts."""
    command = [sys.executable, "-m", "tests.long.soak", "--work", url]
    command += ["--seed", seed, "--seconds", str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run(seconds: float, clients: int, seed: str) -> None:
    """Let clients work on one server and judge its bytes and its memory."""
    server = ServerProcess(maxmemory=MAXMEMORY, shm="ro")
    try:
        workers = [start_client(server.url, f"{seed}/{i}", seconds) for i in range(clients)]
        samples = watch(server, workers, seconds)
        printed = [worker.communicate(timeout=60)[0] for worker in workers]
        assert not any(worker.returncode for worker in workers), "a client failed"
        with Client(server.url) as client:
            info = client.info()
    finally:
        status = server.stop()
    assert status == 0, f"the server ended with {status}"
    report([Counts(**json.loads(text)) for text in printed], samples, info)


def report(totals: list[Counts], samples: list[int], info: dict[str, str]) -> None:
    """Print what happened; raise AssertionError if the memory grew or nothing was put to the test."""
    tenth = max(1, len(samples) // 10)
    first, last = statistics.median(samples[:tenth]), statistics.median(samples[-tenth:])
    growth = last / first - 1
    hits, misses = sum(c.hits for c in totals), sum(c.misses for c in totals)
    print(
        f"{sum(c.puts for c in totals):,} puts ({sum(c.refused for c in totals)} refused), {hits:,} hits, {misses:,} misses,"
        f" {sum(c.moved_bytes for c in totals) / 2**30:.1f} GiB, no wrong byte;"
        f" {int(info['evicted_keys']):,} evicted, {int(info['expired_keys']):,} expired"
    )
    print(
        f"resident after warm-up {first / 2**20:.1f} MiB, at the end {last / 2**20:.1f} MiB"
        f" ({growth:+.2%}), {min(samples) / 2**20:.1f} to {max(samples) / 2**20:.1f} MiB between"
    )
    assert hits
    assert int(info["evicted_keys"]), "nothing was evicted: this says little"
    assert info["kv_leases"] == info["kv_landings"] == info["kv_sending"] == "0"
    assert growth <= GROWTH_MAX, f"resident memory grew by {growth:.2%}"


def main() -> None:
    """Run it as the command line says."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--seconds", type=float, default=600)
    options.add_argument("--clients", type=int, default=4)
    options.add_argument("--seed", default=str(int(time.time())))
    options.add_argument("--work", metavar="URL", help="be one client of a run")
    chosen = options.parse_args()
    if chosen.work:
        print(json.dumps(asdict(work(chosen.work, chosen.seed, chosen.seconds))))
        return
    print(f"seed {chosen.seed}", flush=True)
    run(chosen.seconds, chosen.clients, chosen.seed)


if __name__ == "__main__":
    main()
