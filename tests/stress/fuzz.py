"""Every command with every kind of argument, whole and damaged, against a server:
python -m tests.stress.fuzz [--inputs N] [--seed S].

tests/long/fuzz.py is about the parser; this is about what stands behind it. Connections carry a few
inputs each and are half closed, so that the server answers all and closes. What comes back must be
whole RESP replies, as many as there were commands when none was damaged. Now and then, and at the
end: a pinned key is untouched, nobody holds anything, the server has not grown, its log shows no
exception, and its own integrity check passes.
"""

import argparse
import random
import time
from dataclasses import dataclass

from respkv.wire.commands import COMMANDS
from tests.damage import answers_to, wound
from tests.server.raw import Raw, reply_end, request
from tests.server.watching import number_of, wait_for, wait_until
from tests.server_process import ServerProcess

# They end the server, the connection or the key that must survive, or silence what is counted, or
# answer more than once.
APART = {
    *("shutdown", "quit", "flushall", "flushdb", "config|set", "client|kill", "client|reply"),
    *("subscribe", "unsubscribe", "psubscribe", "punsubscribe"),
}
NAMES = [
    row.name.encode().split(b"|")
    for command in COMMANDS.values()
    for row in (command, *command.subcommands.values())
    if row.name not in APART
]
KEYS = [b"k%d" % each for each in range(20)] + [b"ns:" + b"%02x" % each * 32 for each in range(10)]
NUMBERS = [b"0", b"1", b"2", b"3", b"-1", b"10", b"1000", b"9223372036854775807", b"1" * 25, b"1.5"]
WORDS = (
    b"EX PX EXAT PXAT NX XX GT LT GET KEEPTTL PERSIST MATCH COUNT TYPE string LAYERS MS PARENT TOKENS "
    b"PRIORITY DURABLE HEADS DIM DTYPE float16 int8 FINGERPRINT HASH SEED CODEC cpu raw MAXBYTES TTL "
    b"SAMPLES ID ADDR USER SKIPME yes ON OFF LIB-NAME FILTERBY MODULE AUTH SETNAME ASYNC SYNC HELP "
    b"FROM LOGITS HIDDEN GROUP SALT TENANT LORA MM SESSION PIN FULL SLIDING STATE END EXPECT DEMOTE"
).split()
NASTY = [
    b"",
    b"\r\n",
    b"\r\n+OK\r\n",
    b"\0",
    b"\xff" * 9,
    b"*" * 50,
    b"[a-",
    b"$5\r\nhello\r\n",
    b"%s",
]
LARGE = [449, 5000, 20_000, 65_535, 65_536, 70_000, 300_000]
SENTINEL = b"sentinel of tests.stress.fuzz"
INPUTS_PER_CONNECTION = 8
LOOK_EVERY = 2000
GROWTH_BYTES_MAX = 64 << 20
WARM_UP = 0.2


@dataclass
class Seen:
    """What came back."""

    inputs: int = 0
    replies: int = 0
    errors: int = 0
    protocol_errors: int = 0


def argument(rng: random.Random) -> bytes:
    """Return a key, a number, an option word, something nasty or a value."""
    match rng.randrange(10):
        case 0 | 1 | 2 | 3:
            return rng.choice(KEYS)
        case 4 | 5:
            return rng.choice(NUMBERS)
        case 6 | 7:
            return rng.choice(WORDS)
        case 8:
            return rng.choice(NASTY)
        case _:
            nbytes = rng.choice(LARGE) if rng.random() < 0.1 else rng.randrange(40)
            return rng.randbytes(1) * nbytes


def call(rng: random.Random) -> bytes:
    """Return a command of the table with random arguments; counts are right half of the time."""
    words = list(rng.choice(NAMES))
    if rng.random() < 0.3:
        words[0] = words[0].upper()
    arguments = [argument(rng) for _ in range(rng.randrange(7))]
    if (
        words[0].lower() in (b"kv.match", b"kv.mget", b"kv.lease", b"kv.touch")
        and rng.random() < 0.5
    ):
        words.append(b"%d" % len(arguments))
    return request(*words, *arguments)


def check_answers(answers: bytes, seen: Seen) -> int:
    """Assert that these are whole replies; return how many."""
    count = start = 0
    while start < len(answers):
        end = reply_end(answers, start)
        assert end > 0, f"half a reply: {answers[start : start + 80]!r}"
        seen.errors += answers[start : start + 1] == b"-"
        seen.protocol_errors += answers.startswith(b"-ERR Protocol error", start)
        start = end
        count += 1
    seen.replies += count
    return count


def one_connection(server: ServerProcess, rng: random.Random, seen: Seen) -> None:
    """Send a few inputs and check what they get."""
    calls = [call(rng) for _ in range(INPUTS_PER_CONNECTION)]
    seen.inputs += len(calls)
    if rng.random() < 0.5:
        count = check_answers(answers_to(server, b"".join(calls)), seen)
        assert count == len(calls), f"{count} answers to {len(calls)} commands: {calls}"
    else:
        damaged = [wound(rng, each) for each in calls]
        check_answers(answers_to(server, b"".join(damaged)), seen)


def look(server: ServerProcess, healthy: Raw) -> int:
    """Assert that all is well; return the server's resident memory."""
    assert healthy.ask("PING") == b"PONG"
    assert healthy.ask("KV.GET", SENTINEL) == SENTINEL * 100
    for field in ("kv_leases", "kv_landings", "kv_sending"):
        wait_for(server, field, 0)
    log = server.log
    assert "Traceback" not in log, log[-3000:]
    return server.resident_bytes


def run(server: ServerProcess, inputs: int, seed: str) -> Seen:
    """Send ``inputs`` inputs that follow from the seed."""
    seen = Seen()
    before = 0
    with Raw(server.connect()) as healthy:
        assert healthy.ask("KV.PUT", SENTINEL, SENTINEL * 100) == b"OK"
        assert healthy.ask("KV.PIN", SENTINEL, 1 << 40) == 1
        looked = 0
        while seen.inputs < inputs:
            rng = random.Random(f"{seed}/{seen.inputs}")
            try:
                one_connection(server, rng, seen)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, input {seen.inputs}: {error}") from error
            if seen.inputs - looked >= LOOK_EVERY:
                looked = seen.inputs
                resident = look(server, healthy)
                if not before and seen.inputs >= inputs * WARM_UP:
                    before = resident
        growth = look(server, healthy) - (before or server.resident_bytes)
    print(f"RSS grew by {growth / (1 << 20):.1f} MiB after the warm-up")
    assert growth <= GROWTH_BYTES_MAX, f"the server leaks: {growth} bytes"
    checks = number_of(server, "kv_checks")
    deadline = time.monotonic() + 60
    while number_of(server, "kv_checks") == checks:
        assert time.monotonic() < deadline, "no integrity check"
        time.sleep(1.2)
    wait_until(server, "connected_clients", lambda number: number == 1)
    return seen


def main() -> None:
    """Fuzz a server and print what was seen; fails with an assertion that names the input."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", default=str(int(time.time())))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    server = ServerProcess(maxmemory="64mb", shm="rw", check_interval=1, lease_max=60_000)
    start = time.monotonic()
    try:
        seen = run(server, options.inputs, options.seed)
    finally:
        log = server.log
        status = server.stop()
    seconds = time.monotonic() - start
    assert status == 0, f"the server ended with {status}: {log[-3000:]}"
    print(
        f"{seen.inputs:,} inputs in {seconds:.0f} s, {seen.inputs / seconds:,.0f} a second: "
        f"{seen.replies:,} replies, {seen.errors:,} errors, {seen.protocol_errors:,} of them of the "
        "protocol; no crash, no exception, nothing held"
    )


if __name__ == "__main__":
    main()
