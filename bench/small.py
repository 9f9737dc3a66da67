"""Small values by many connections: redis-benchmark, the load generator that Redis comes with."""

import csv
import subprocess

from bench.load import Load, WrongReplyError
from bench.servers import Server

VALUE_BYTES = 64
NUM_KEYS = 10_000
TIMEOUT_S = 120


class SmallLoad:
    """One kind of request to one server, ``set`` or ``get``, with ``depth`` of them on the way."""

    def __init__(self, server: Server, word: str, depth: int, count: int, clients: int) -> None:
        self._server = server
        self._command = [
            *("redis-benchmark", "-h", "127.0.0.1", "-p", str(server.port), "--csv", "-e"),
            *("-t", word, "-n", str(count), "-P", str(depth), "-c", str(clients)),
            *("-d", str(VALUE_BYTES), "-r", str(NUM_KEYS)),
        ]

    def measure(self) -> float:
        """Return the seconds from one reply to the next."""
        done = subprocess.run(
            self._command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        rows = list(csv.DictReader(done.stdout.splitlines()))
        if len(rows) != 1 or "rps" not in rows[0]:
            raise WrongReplyError(f"redis-benchmark printed {done.stdout + done.stderr}")
        return 1 / float(rows[0]["rps"])

    def check(self) -> None:
        """Raise WrongReplyError unless the server holds what redis-benchmark stored."""
        with Load(self._server.unix) as load:
            num_keys = load.ask("DBSIZE")
            length = load.ask("STRLEN", _key(0))
        if num_keys != b":%d" % NUM_KEYS or length != b":%d" % VALUE_BYTES:
            raise WrongReplyError(f"DBSIZE {num_keys!r}, STRLEN {length!r}")


def fill(server: Server) -> None:
    """Store every key that redis-benchmark may ask for, so that a GET is a hit."""
    value = b"x" * VALUE_BYTES
    with Load(server.unix) as load:
        reply = load.ask(
            "MSET", *(word for index in range(NUM_KEYS) for word in (_key(index), value))
        )
    if reply != b"+OK":
        raise WrongReplyError(f"MSET of {NUM_KEYS} keys: {reply!r}")


def _key(index: int) -> str:
    return f"key:{index:012}"
