"""Many clients at once, of all kinds: patient ones, streaming ones, wrong ones, ones that hang up.

`make gateway-test` runs 100 of them for 60 s against a real process as it is by default, which refuses
none of them, and for a while against one with fewer places than clients, where 503 may come back; the
gate a short form. Nothing else may come but what was asked for; afterwards all sockets and the memory
are given back.
"""

import argparse
import contextlib
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.checkpoint import make_model, make_tokenizer
from tests.gateway.process import GatewayProcess
from tests.gateway.running import Client, Reply

MIB = 1 << 20
SETTLE_S = 60.0
FEW_PLACES = ("--max-waiting", "32")
TOPICS = ("a page of tokens", "the prefix of a prompt", "what a tier keeps", "who is evicted")


@dataclass
class Tally:
    """What all clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, status: int, seconds: float, tokens: int, problem: str) -> None:
        with self.lock:
            self.kinds[kind] += 1
            self.statuses[status] += 1
            self.num_tokens += tokens
            if status == 200 and kind != "leaves":
                self.seconds.append(seconds)
            if problem:
                self.problems.append(f"{kind}: {problem}")

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1e3


class Member:
    """One client, which asks until it is told to stop."""

    def __init__(self, port: int, seed: int, tally: Tally) -> None:
        self._client = Client(port)
        self._random = random.Random(seed)
        self._tally = tally

    def run(self, until: float) -> None:
        kinds = {
            "generate": self._generate,
            "streams": self._streams,
            "completes": self._completes,
            "chats": self._chats,
            "leaves": self._leaves,
            "errs": self._errs,
        }
        while time.monotonic() < until:
            kind = self._random.choices(list(kinds), (4, 4, 2, 2, 1, 1))[0]
            start = time.monotonic()
            try:
                status, tokens, problem = kinds[kind]()
            except (OSError, ValueError, KeyError) as error:
                status, tokens, problem = 0, 0, repr(error)
            self._tally.note(kind, status, time.monotonic() - start, tokens, problem)
            if status == 503:
                time.sleep(self._random.uniform(0.05, 0.2))

    def _prompt(self) -> str:
        topic = self._random.choice(TOPICS)
        return f"{topic}: " * 8 + f"question {self._random.randrange(50)}"

    def _count(self) -> int:
        return self._random.randrange(1, 17)

    def _generate(self) -> tuple[int, int, str]:
        count = self._count()
        body = {"prompt": self._prompt(), "max_new_tokens": count, "temperature": 0.8}
        reply = self._client.post("/generate", body)
        return _judged(reply, reply.status == 200 and reply.json["new_tokens"], count)

    def _streams(self) -> tuple[int, int, str]:
        count = self._count()
        body = {"prompt": self._prompt(), "max_new_tokens": count, "stream": True}
        reply = self._client.post("/generate", body)
        if reply.status != 200:
            return _judged(reply, 0, count)
        *pieces, (name, whole) = reply.events
        if name != "done" or "".join(data["text"] for _, data in pieces) != whole["text"]:
            return 200, 0, f"a stream that is not its text: {reply.body!r}"
        return _judged(reply, whole["new_tokens"], count)

    def _completes(self) -> tuple[int, int, str]:
        count = self._count()
        body = {"prompt": self._prompt(), "max_tokens": count, "n": 2, "temperature": 1}
        reply = self._client.post("/v1/completions", body)
        found = reply.status == 200 and reply.json["usage"]["completion_tokens"]
        return _judged(reply, found, 2 * count)

    def _chats(self) -> tuple[int, int, str]:
        count = self._count()
        message = {"role": "user", "content": self._prompt()}
        body = {"messages": [message], "max_tokens": count, "temperature": 0}
        reply = self._client.post("/v1/chat/completions", body)
        found = reply.status == 200 and reply.json["usage"]["completion_tokens"]
        return _judged(reply, found, count)

    def _leaves(self) -> tuple[int, int, str]:
        """Hang up in the middle of an answer, or before it."""
        stream = self._random.random() < 0.5
        body = {"prompt": self._prompt(), "max_new_tokens": 64, "stream": stream}
        with self._client.open("POST", "/generate", body) as raw:
            raw.settimeout(self._random.uniform(0.01, 0.3))
            with contextlib.suppress(TimeoutError):
                raw.recv(self._random.randrange(1, 500))
            if self._random.random() < 0.5:  # with a reset
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return 200, 0, ""

    def _errs(self) -> tuple[int, int, str]:
        wrong: Any = self._random.choice(
            ({"prompt": ""}, {"prompt": "x", "temperature": 9}, {"prompt": "x " * 3000}, [], None)
        )
        reply = self._client.post("/generate", wrong)
        is_right = reply.status in (400, 422, 503) and bool(reply.error)
        return reply.status, 0, "" if is_right else f"{reply.status} for {wrong!r}"


def _judged(reply: Reply, found: int, wanted: int) -> tuple[int, int, str]:
    """Return status, tokens and problem of an answer that should have so many tokens."""
    if reply.status == 503 and "retry-after" in reply.headers and reply.error["code"] == "busy":
        return 503, 0, ""
    if reply.status == 200 and 0 < found <= wanted:  # fewer where the model says that it is over
        return 200, found, ""
    return reply.status, 0, f"{reply.status}, {found} of {wanted} tokens: {reply.body[:300]!r}"


def gather(port: int, *, num_clients: int, seconds: float, seed: int) -> Tally:
    """Let clients ask for so long; return what they saw."""
    tally, until = Tally(), time.monotonic() + seconds
    members = [Member(port, seed + index, tally) for index in range(num_clients)]
    threads = [threading.Thread(target=each.run, args=[until]) for each in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def settled(gateway: GatewayProcess, num_descriptors: int) -> str:
    """Wait until the process is idle with as many files as before; return what is left, if any."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        reply = gateway.get("/cache/stats")
        if reply.status != 200:
            return f"no statistics: {reply.body!r}"
        left = {name: reply.json[name] for name in ("running", "waiting") if reply.json[name]}
        more = gateway.num_descriptors - num_descriptors
        if not left and more <= 0:
            return ""
        if time.monotonic() > deadline:
            return f"after {SETTLE_S:g} s: {left or 'nothing runs'}, {more} more open files"
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=6)
    options = parser.parse_args()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "model")
        # As it is by default, when nobody is refused; then with fewer places than clients.
        for waiting, seconds in ((), options.seconds), (FEW_PLACES, options.seconds / 4):
            gateway = GatewayProcess(
                checkpoint,
                *("--max-prompt-tokens", "512", "--loglevel", "warning", *waiting),
                *("--set", "prefault=yes"),  # all of the engine's memory is there from the start
            )
            try:
                tally, left = _measure(gateway, options.clients, seconds, options.seed)
                problems += [*tally.problems, *left]
                if bool(tally.statuses[503]) != bool(waiting):
                    problems.append(f"{tally.statuses[503]} were refused with {waiting}")
            finally:
                gateway.close()
    for problem in problems[:20]:
        print("PROBLEM", problem)
    return 1 if problems else 0


def _measure(
    gateway: GatewayProcess, clients: int, seconds: float, seed: int
) -> tuple[Tally, list[str]]:
    """Send a crowd; return what it saw, and what was wrong with the gateway itself."""
    # The first crowd fills pools and caches, which stay.
    problems = gather(gateway.port, num_clients=clients, seconds=seconds / 4, seed=seed).problems
    gateway.post("/cache/clear")
    files = gateway.num_descriptors
    before = gateway.resident_bytes
    tally = gather(gateway.port, num_clients=clients, seconds=seconds, seed=seed + clients)
    if left := settled(gateway, files):
        problems.append(left)
    gateway.post("/cache/clear")  # as before: what is cached is no leak
    grown = gateway.resident_bytes - before
    if grown > 64 * MIB:
        problems.append(f"{grown / MIB:.0f} MiB more memory than before")
    status, log = gateway.stop(), gateway.log
    if status or not all(line.startswith("respkv gateway: ") for line in log.splitlines()):
        problems.append(f"it ended with {status} and has logged: {log[-4000:]}")
    print(f"{clients} clients, {seconds:g} s: {sum(tally.kinds.values())} requests", end=", ")
    print(f"{tally.num_tokens} tokens; statuses {dict(tally.statuses)}; {dict(tally.kinds)}")
    shares = {f"p{share:g}": tally.percentile_ms(share / 100) for share in (50, 95, 99)}
    print("latency:", ", ".join(f"{name} {value:.0f} ms" for name, value in shares.items()))
    print(f"memory: {before / MIB:.0f} MiB before, {grown / MIB:+.0f} after")
    return tally, problems


def make_checkpoint(folder: Path) -> Path:
    """Save a Llama of two layers with random weights, and a tokenizer that has read this file."""
    tokenizer = make_tokenizer(Path(__file__).read_text())
    model = make_model(vocabulary=tokenizer.get_vocab_size(), layers=2, hidden=64)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


if __name__ == "__main__":
    sys.exit(main())
