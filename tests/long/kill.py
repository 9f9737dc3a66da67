"""Clients killed with SIGKILL in the middle of their work: `make kill-test`, or
python -m tests.long.kill [--rounds N] [--seed N].

Each round a client starts to put, lease, reserve or read pages and is killed at a random moment.
At the end the server must hold no lease, no reservation, no half-landed page and no half-sent reply,
and its arena must take as many pages as before the first round.
"""

import argparse
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from respkv.client import Client
from tests.server_process import ServerProcess

PAGE_BYTES = 1 << 20
PAGE = bytes(range(256)) * (PAGE_BYTES // 256)
SHARED = [b"kill:%064x" % index for index in range(4)]
LIFE_S_MAX = 0.01  # a client's life once it has begun
QUIET_S_MAX = 10.0
HELD = ("leases", "landings", "sending", "quarantined")

Work = Callable[[ServerProcess], None]


def put(server: ServerProcess) -> None:
    """Put pages, each in pieces: a kill falls between two of them or inside one."""
    with server.connect() as raw:
        for index in range(1000):
            key = b"kill:%064x" % (os.getpid() * 1000 + index)
            head = b"*3\r\n$6\r\nKV.PUT\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, PAGE_BYTES)
            raw.sendall(head)
            for start in range(0, PAGE_BYTES, PAGE_BYTES // 8):
                raw.sendall(PAGE[start : start + PAGE_BYTES // 8])
                time.sleep(0.0005)
            raw.sendall(b"\r\n")
            assert raw.recv(64) == b"+OK\r\n"


def lease(server: ServerProcess) -> None:
    """Lease pages and read them in place."""
    with Client(server.url) as client:
        while True:
            with client.lease(SHARED) as held:
                for page in held.pages:
                    assert page is not None
                    assert bytes(page[-256:]) == PAGE[-256:]


def reserve(server: ServerProcess) -> None:
    """Reserve memory, write half of it, then the rest, and commit."""
    with Client(server.url) as client:
        for index in range(1000):
            key = b"kill:%064x" % (os.getpid() * 1000 + index)
            with client.reserve(key, PAGE_BYTES) as reservation:
                reservation.view[: PAGE_BYTES // 2] = PAGE[: PAGE_BYTES // 2]
                time.sleep(0.0005)
                reservation.view[PAGE_BYTES // 2 :] = PAGE[PAGE_BYTES // 2 :]
                reservation.commit()


def read(server: ServerProcess) -> None:
    """Ask for many pages and read little of what comes."""
    with server.connect() as raw:
        for key in SHARED * 8:
            raw.sendall(b"*2\r\n$6\r\nKV.GET\r\n$%d\r\n%b\r\n" % (len(key), key))
        while raw.recv(4096):
            time.sleep(0.001)


WORKS: list[Work] = [put, lease, reserve, read]


def client_process(work: Work, server: ServerProcess, begun: socket.socket) -> NoReturn:
    """Be the client: say that it begins, and work until killed."""
    begun.send(b"x")
    try:
        work(server)
    finally:
        os._exit(1)  # it was to be killed; ending by itself is the failure


def kill_one(rng: random.Random, server: ServerProcess) -> str:
    """Start a client, kill it, and return what it was doing."""
    work = rng.choice(WORKS)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            client_process(work, server, theirs)
        assert ours.recv(1) == b"x"
        time.sleep(rng.random() * LIFE_S_MAX)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"a client ended by itself while it was to {work.__name__}"
    return work.__name__


def stats(client: Client) -> dict[str, int]:
    """Return the numbers of KV.STATS."""
    reply = client.command("KV.STATS")
    assert isinstance(reply, dict)
    return {k.decode(): v for k, v in reply.items() if isinstance(k, bytes) and isinstance(v, int)}


def capacity(client: Client) -> int:
    """Return how many pages the empty server takes before it evicts."""
    client.command("FLUSHALL")
    evicted = stats(client)["evicted"]
    count = 0
    while stats(client)["evicted"] == evicted:
        client.put(b"fill:%064x" % count, PAGE)
        count += 1
    client.command("FLUSHALL")
    return count - 1


def wait_until_quiet(client: Client) -> None:
    """Wait until nothing is held and nobody else is connected."""
    deadline = time.monotonic() + QUIET_S_MAX
    while True:
        now = stats(client)
        held = {name: now[name] for name in HELD if now[name]}
        others = int(client.info("clients")["connected_clients"]) - 1
        if not held and not others:
            return
        assert time.monotonic() < deadline, f"still held: {held}, {others} connections"
        time.sleep(0.05)


def run(rounds: int, seed: int) -> None:
    """Kill ``rounds`` clients and check what they left behind."""
    rng = random.Random(seed)
    server = ServerProcess(shm="rw", maxmemory="64mb")
    killed: Counter[str] = Counter()
    try:
        with Client(server.url) as client:
            before = capacity(client)
            for key in SHARED:
                client.put(key, PAGE)
                client.pin(key, 60_000)
            for index in range(rounds):
                killed[kill_one(rng, server)] += 1
                if index % 100 == 99:
                    for key in SHARED:
                        client.pin(key, 60_000)
            wait_until_quiet(client)
            for key in SHARED:
                client.unpin(key)
            after = capacity(client)
            left = stats(client)
            assert after == before, f"{before - after} of {before} slots were lost"
            assert left["entries"] == left["arena_used_bytes"] == 0, f"left behind: {left}"
    finally:
        status = server.stop()
    assert status == 0, f"the server ended with {status}"
    print(f"{rounds} clients killed ({dict(killed)}): no lease, no slot of {before} lost")


def main() -> None:
    """Run it as the command line says."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--rounds", type=int, default=1000)
    options.add_argument("--seed", type=int, default=int(time.time()))
    chosen = options.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    run(chosen.rounds, chosen.seed)


if __name__ == "__main__":
    main()
