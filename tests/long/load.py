"""Clients that put, get, delete and expire until the server is gone or they are told to stop.

What they do goes into the ledger before it is sent and again when it was acknowledged; every answer
is checked. Each client has keys of its own, and never two commands for one key under way.
"""

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import hiredis

from tests.long.ledger import DURABLE, LEVEL_WORDS, MEMORY, SIZES, WRITTEN, Key, Ledger
from tests.server.raw import Closed, Raw, Word, pipeline

PIPELINE_MAX = 8
FLUSH_CHANCE = 0.0005
GONE = (Closed, ConnectionError, BrokenPipeError, TimeoutError)

Acknowledge = Callable[[Any], None]
Connect = Callable[[], socket.socket]


class Load:
    """Clients at work, each in a thread.

    fair_errors: how the error replies begin that are no fault.
    counts, failures: what they did, and what they found.
    """

    def __init__(
        self,
        ledger: Ledger,
        shares: list[list[Key]],
        connect: Connect,
        seed: str,
        *,
        fair_errors: tuple[str, ...] = (),
        flush_chance: float = FLUSH_CHANCE,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self._ledger = ledger
        self._is_over = self.works_on = False
        self.fair_errors = fair_errors
        self.flush_chance = flush_chance
        self._flushing = threading.Lock()
        self._clients = [
            _Client(self, share, connect, f"{seed}/{i}") for i, share in enumerate(shares)
        ]
        for client in self._clients:
            client.thread.start()

    @property
    def is_over(self) -> bool:
        """No acknowledgement counts any more."""
        return self._is_over

    @property
    def ledger(self) -> Ledger:
        """What is expected."""
        return self._ledger

    def end(self, *, work_on: bool = False) -> None:
        """Let no acknowledgement count from now on, and ask the clients to stop.

        work_on: rather ask them to go on with other keys, of which nothing is expected.
        """
        self.works_on = work_on
        self._is_over = True

    def wait(self) -> None:
        """Wait until all have stopped. Raises what one of them found."""
        for client in self._clients:
            client.thread.join(timeout=60)
            assert not client.thread.is_alive(), "a client hangs"
        if self.failures:
            raise self.failures[0]

    def flush(self, raw: Raw) -> None:
        """FLUSHALL while no other command is under way."""
        with self._flushing:
            for client in self._clients:
                client.busy.acquire()
            try:
                self._ledger.begin_flush()
                reply = raw.ask("FLUSHALL")
                if not self._is_over:
                    assert reply == b"OK", reply
                    self._ledger.end_flush()
                    self.counts["flushes"] += 1
            finally:
                for client in self._clients:
                    client.busy.release()


class _Client:
    """One of them."""

    def __init__(self, load: Load, keys: list[Key], connect: Connect, seed: str) -> None:
        self.busy = threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self._load = load
        self._ledger = load.ledger
        self._keys = keys
        self._connect = connect
        self._rng = random.Random(seed)
        self._sent = 0.0  # when the commands under way were sent, wall-clock seconds

    def _run(self) -> None:
        try:
            with Raw(self._connect()) as raw:
                while not self._load.is_over:
                    if self._rng.random() < self._load.flush_chance:
                        self._load.flush(raw)
                    with self.busy:
                        self._batch(raw)
                while self._load.works_on:
                    self._batch_of_others(raw)
        except GONE as error:
            if isinstance(error, TimeoutError):
                self._load.failures.append(error)
        except BaseException as error:  # for the thread that waits, which raises it
            self._load.failures.append(error)

    def _batch(self, raw: Raw) -> None:
        """Send a few commands for different keys at once, and read what comes."""
        keys = self._rng.sample(self._keys, self._rng.randint(1, PIPELINE_MAX))
        self._sent = time.time()
        calls = [self._call(key) for key in keys]
        raw.socket.sendall(pipeline(words for words, _ in calls))
        for key, (words, acknowledge) in zip(keys, calls, strict=True):
            reply = raw.next()
            if self._load.is_over:
                continue
            if isinstance(reply, hiredis.ReplyError):
                assert str(reply).startswith(self._load.fair_errors), (
                    f"{words[:2]} for {key}: {reply}"
                )
                self._load.counts["refused"] += 1
            else:
                acknowledge(reply)

    def _batch_of_others(self, raw: Raw) -> None:
        """Put and get keys of which nobody knows anything."""
        name = b"other:%d" % self._rng.randrange(50)
        level = self._rng.choice(LEVEL_WORDS)
        raw.ask("KV.PUT", name, bytes(self._rng.choice(SIZES)), *level)
        raw.ask("GET", name)
        raw.ask("GET", self._rng.choice(self._keys).name)

    def _call(self, key: Key) -> tuple[list[Word], Acknowledge]:
        """Choose a command for a key, note that it begins; return it and what takes its answer."""
        chance = self._rng.random()
        if chance < 0.5:
            return self._put(key)
        if chance < 0.75:
            return ["GET", key.name], lambda reply: self._got(key, reply)
        if chance < 0.85:
            self._ledger.begin_delete(key)
            return ["DEL", key.name], lambda _: self._deleted(key)
        px_ms = self._rng.choice(
            [None, self._rng.randint(50, 3000), self._rng.randint(60_000, 10**8)]
        )
        if key.is_content or not key.expiries:
            return ["GET", key.name], lambda reply: self._got(key, reply)
        window = self._ledger.begin_expire(key, px_ms)
        words: list[Word] = ["PERSIST", key.name] if px_ms is None else ["PEXPIRE", key.name, px_ms]

        def expired(reply: int) -> None:
            # PERSIST answers 0 for a value that has no TTL, too.
            if reply or px_ms is not None:
                self._ledger.end_expire(key, px_ms, window, bool(reply))
            self._count("expires")

        return words, expired

    def _put(self, key: Key) -> tuple[list[Word], Acknowledge]:
        level = self._rng.choices([MEMORY, WRITTEN, DURABLE], [30, 20, 50])[0]
        px_ms = None
        if not key.is_content and self._rng.random() < 0.1:
            px_ms = self._rng.choice([self._rng.randint(30, 2000), 10**7])
        version = self._ledger.begin_put(key, level, px_ms)
        value = self._ledger.values.of(key.number, version)
        words: list[Word] = ["KV.PUT", key.name, value, *LEVEL_WORDS[level]]
        if level == MEMORY and not key.is_content and self._rng.random() < 0.7:
            words = ["SET", key.name, value]
        if px_ms is not None:
            words += ["PX", px_ms]

        def stored(reply: bytes) -> None:
            assert reply == b"OK", reply
            self._ledger.end_put(key, version, level, px_ms)
            self._count(f"puts, {['memory', 'written', 'durable'][level]}")

        return words, stored

    def _got(self, key: Key, reply: bytes | None) -> None:
        self._ledger.check(key, reply, self._sent)
        self._count("misses" if reply is None else "hits")

    def _deleted(self, key: Key) -> None:
        self._ledger.end_delete(key)
        self._count("deletes")

    def _count(self, what: str) -> None:
        self._load.counts[what] += 1


def check_all(raw: Raw, ledger: Ledger, *, clean: bool, batch: int = 16) -> Counter[str]:
    """Ask a server that was started again for every key. Raises Wrong; returns what there is."""
    counts: Counter[str] = Counter()
    for at in range(0, len(ledger.keys), batch):
        keys = ledger.keys[at : at + batch]
        asked = [words for key in keys for words in (("GET", key.name), ("PTTL", key.name))]
        since = time.time()
        raw.socket.sendall(pipeline(asked))
        for key in keys:
            value, pttl_ms = raw.next(), raw.next()
            state = ledger.check_recovered(key, value, pttl_ms, clean=clean, since=since)
            counts["absent" if state is None else "there"] += 1
    return counts
