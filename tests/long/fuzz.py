"""The parser fuzz: `make fuzz`, or python -m tests.long.fuzz [--inputs N] [--sent N] [--seed N].

First in process: streams of commands, damaged in the ways a broken or hostile client damages them,
parsed whole, cut at random and by the exact parser alone. All three must agree, any error must be a
protocol error, and no parser may hold more than its limits. Then the same streams against a server
over TCP, whose one good key must survive. Neither may grow.
"""

import argparse
import gc
import itertools
import random
import subprocess
import sys
import time
from pathlib import Path

from respkv.client import Client
from respkv.wire.parser import Limits, RequestParser
from respkv.wire.tokenizer import Tokenizer
from tests.damage import answers_to, wound
from tests.server.raw import pipeline, reply_end
from tests.server_process import ServerProcess
from tests.wire.reference_parser import Reference

PROCESSES = 2
READ_BYTES = 64 * 1024  # the most that the server reads, and feeds, at once
GROWTH_BYTES_MAX = 32 * 1024 * 1024
WARM_UP = 0.2  # of the inputs, before memory is first read
LIMITS = Limits()
SENTINEL = (b"sentinel", b"untouched \r\n*1\r\n")
WORDS = [b"PING", b"GET", b"sentinel", b"ECHO", b"", b"\r\n", b"$3\r\n", b"x" * 40, b"y" * 3000]


def damaged_stream(rng: random.Random) -> bytes:
    """Return a few commands with zero to four wounds."""
    words = [rng.choices(WORDS, k=rng.randint(1, 4)) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.01:
        words.append([b"SET", b"big", bytes(rng.choice([65535, 65536, 70000]))])
    stream = pipeline(words)
    for _ in range(rng.randint(0, 4)):
        stream = wound(rng, stream)
    return stream


def events_of(
    tokenizer: Tokenizer, stream: bytes, edges: list[int], *, exact: bool
) -> list[object]:
    """Parse a stream that arrives in pieces; return its commands and how it ended."""
    parser = RequestParser(tokenizer, LIMITS)
    if exact:
        parser._is_quick = False
    events: list[object] = []
    body = bytearray()
    for start, stop in itertools.pairwise(edges):
        data = stream[start:stop]
        while data:
            if parser.body is None:
                events += parser.feed(data, len(data))
                data = b""
            else:
                missing = parser.body.nbytes - len(body)
                body += data[:missing]
                data = data[missing:]
                if len(body) < parser.body.nbytes:
                    break
                events += parser.end_body(bytes(body))
            body[:] = parser.body.early if parser.body else b""
        assert parser.held_bytes <= LIMITS.held_max + READ_BYTES, "more is held than the limit"
    return [*events, str(parser.error), parser.body is not None and len(body)]


def edges_of(rng: random.Random, length: int, cuts: int) -> list[int]:
    """Return where a stream is cut: reads of 64 KiB at most, and ``cuts`` more places."""
    places = {rng.randrange(length + 1) for _ in range(cuts)}
    return sorted({*range(0, length, READ_BYTES), length, *places})


def resident_bytes(pid: int | str = "self") -> int:
    """Return a process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def parse_share(inputs: int, share: str) -> int:
    """Parse ``inputs`` streams that follow from the seed ``share``.

    Returns: by how many bytes this process grew.
    """
    tokenizer, exact_tokenizer = Tokenizer(), Tokenizer()
    before = 0
    for index in range(inputs):
        if index == int(inputs * WARM_UP):
            gc.collect()
            before = resident_bytes()
        seed = f"{share}/{index}"
        rng = random.Random(seed)
        stream = damaged_stream(rng)
        whole = events_of(tokenizer, stream, edges_of(rng, len(stream), 0), exact=False)
        cut = events_of(tokenizer, stream, edges_of(rng, len(stream), 3), exact=False)
        plain = events_of(exact_tokenizer, stream, edges_of(rng, len(stream), 0), exact=True)
        # What follows a bulk that does not end in CR LF is undefined, as in Redis.
        if not whole == cut == plain and not Reference(stream, LIMITS).has_loose_end:
            raise AssertionError(f"input {seed}: {stream!r}\n{whole}\n{cut}\n{plain}")
    gc.collect()
    return resident_bytes() - before


def fuzz_parser(inputs: int, seed: str) -> None:
    """Parse ``inputs`` streams, on all cores."""
    command = [sys.executable, "-m", "tests.long.fuzz", "--inputs", str(inputs // PROCESSES)]
    shares = [
        subprocess.Popen([*command, "--share", f"{seed}/{index}"], stdout=subprocess.PIPE)
        for index in range(PROCESSES)
    ]
    printed = [share.communicate()[0] for share in shares]
    assert not any(share.returncode for share in shares), "the parser failed"
    growth = max(map(int, printed))
    print(f"parser: {inputs:,} inputs agree; a process grew by {growth >> 10:,} KiB", flush=True)
    assert growth <= GROWTH_BYTES_MAX, f"the parser leaks: {growth} bytes"


def check_whole(answers: bytes) -> None:
    """Assert that these are whole replies."""
    start = 0
    while start < len(answers):
        start = reply_end(answers, start)
        assert start > 0, f"half a reply: {answers!r}"


def fuzz_server(inputs: int, seed: str) -> None:
    """Send ``inputs`` streams to a server; it must live, keep its key and not grow."""
    server = ServerProcess()
    files = Path(f"/proc/{server.process.pid}/fd")
    before = files_before = 0
    try:
        with Client(server.url) as client:
            client.set(*SENTINEL)
            for index in range(inputs):
                if index == int(inputs * WARM_UP):
                    before = resident_bytes(server.process.pid)
                    files_before = len(list(files.iterdir()))
                check_whole(answers_to(server, damaged_stream(random.Random(f"{seed}/{index}"))))
                if index % 1000 == 0:
                    assert bytes(client.get(SENTINEL[0]) or b"") == SENTINEL[1], (
                        f"sentinel lost at {index}"
                    )
            assert bytes(client.get(SENTINEL[0]) or b"") == SENTINEL[1]
            assert client.info("clients")["connected_clients"] == "1"
        growth = resident_bytes(server.process.pid) - before
        assert len(list(files.iterdir())) <= files_before, "the server leaks descriptors"
    finally:
        status = server.stop()
    assert status == 0, f"the server ended with {status}"
    print(f"server: {inputs:,} inputs; it grew by {growth >> 10:,} KiB", flush=True)
    assert growth <= GROWTH_BYTES_MAX, f"the server leaks: {growth} bytes"


def main() -> None:
    """Run both and print what they took."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--inputs", type=int, default=1_000_000, help="for the parser")
    options.add_argument("--sent", type=int, default=100_000, help="over TCP")
    options.add_argument("--seed", default=str(int(time.time())))
    options.add_argument("--share", metavar="SEED", help="be one process of the first part")
    chosen = options.parse_args()
    if chosen.share:
        print(parse_share(chosen.inputs, chosen.share))
        return
    print(f"seed {chosen.seed}", flush=True)
    start = time.monotonic()
    fuzz_parser(chosen.inputs, chosen.seed)
    fuzz_server(chosen.sent, chosen.seed)
    print(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
