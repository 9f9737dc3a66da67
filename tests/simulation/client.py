"""A client that does anything: random commands, late reads, leases it forgets, writes it should not.

It knows what the protocol promises and nothing else: every answer is checked against its command
and, through the record, against what every client did.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hiredis

from respkv.engine.eviction import POLICIES
from tests.simulation.keys import Key, Keys
from tests.simulation.record import Kind, Operation, Record, State, WrongAnswer
from tests.simulation.socket import SimulatedSocket
from tests.simulation.values import Value, value_of_page, value_of_write

OPEN_MAX = 40  # commands without an answer
INBOX_MAX = 1 << 21
_UNFINISHED = object()

Word = bytes | int | str
Check = Callable[[Any], None]


@dataclass(eq=False, slots=True)
class Call:
    """A command that was sent. Its operations end when it is answered."""

    words: str
    check: Check
    operations: list[Operation]
    errors: tuple[str, ...] = ()
    is_silent: bool = False


@dataclass(eq=False, slots=True)
class Reading:
    """A lease to read: until ``deadline`` these bytes must not change."""

    number: int
    deadline: float
    places: list[tuple[int, bytes]]


@dataclass(eq=False, slots=True)
class Writing:
    """A lease to write ``value`` at ``offset``, of which ``filled`` bytes are there."""

    number: int
    deadline: float
    offset: int
    key: Key
    value: Value
    is_rogue: bool  # goes on writing after its deadline
    filled: int = 0


@dataclass(slots=True)
class Moment:
    """Where the history is: its step and its clock."""

    step: int = 0
    now: float = 0.0


@dataclass(eq=False, slots=True)
class Client:
    """One connection's other end."""

    number: int
    socket: SimulatedSocket
    rng: random.Random
    keys: Keys
    record: Record
    moment: Moment
    memory: memoryview
    counter: list[int]  # of writes, shared by all clients
    calls: deque[Call] = field(default_factory=deque)
    readings: list[Reading] = field(default_factory=list)
    writings: list[Writing] = field(default_factory=list)
    is_over: bool = False  # sent garbage or QUIT: the server will close
    answers: int = 0
    _place: int = 0
    _reader: hiredis.Reader = field(
        default_factory=lambda: hiredis.Reader(notEnoughData=_UNFINISHED)
    )

    # -- composing --------------------------------------------------------------------------------

    def compose(self) -> None:
        """Send a command, or a few of them."""
        if self.is_over or len(self.calls) > OPEN_MAX or len(self.socket.inbox) > INBOX_MAX:
            return
        for _ in range(self.rng.choice((1, 1, 2, 3, 6))):
            compose = self.rng.choices(_COMPOSE, _WEIGHTS)[0]
            compose(self)
            if self.is_over:
                return

    def _send(
        self,
        words: Iterable[Word],
        check: Check,
        operations: Iterable[Operation] = (),
        errors: tuple[str, ...] = (),
    ) -> None:
        parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        self.socket.inbox += b"*%d\r\n" % len(parts)
        for part in parts:
            self.socket.inbox += b"$%d\r\n%b\r\n" % (len(part), part)
        shown = b" ".join(part[:80] for part in parts).decode(errors="replace")
        call = Call(shown, check, list(operations), errors)
        self.calls.append(call)

    def _operation(
        self,
        kind: Kind,
        key: Key,
        value: Value | None = None,
        *,
        ttl_s: float | None = None,
    ) -> Operation:
        self._place += 1
        return self.record.add(
            Operation(
                kind,
                key.name,
                self.number,
                self._place,
                self.moment.step,
                self.moment.now,
                value,
                ttl_s,
            )
        )

    def _new_value(self, key: Key, nbytes: int | None = None) -> Value:
        self.counter[0] += 1
        size = self.keys.size(self.rng, key) if nbytes is None else nbytes
        return value_of_write(key.name, self.counter[0], size)

    def _set(self) -> None:
        key = self.keys.any(self.rng)
        write = self._operation(Kind.WRITE, key, self._new_value(key))
        assert write.value is not None
        words: list[Word] = ["SET", key.name, write.value.bytes()]
        option = self.rng.choice(("", "", "", "NX", "XX", "PX", "KEEPTTL", "GET"))
        if option == "PX":
            ms = self.rng.choice((50, 400, 3000))
            write.ttl_s = ms / 1000
            words += ["PX", ms]
        elif option:
            words.append(option)
        if option == "GET":
            # In the order in which they happen: the read sees what was there before.
            read = self._operation(Kind.READ, key)
            read.place, write.place = write.place, read.place
            self._send(words, partial(self._saw, [read]), [read, write], ("OOM",))
        elif option in ("NX", "XX"):
            self._send(words, partial(self._ok_or_nil, write), [write], ("OOM",))
        else:
            self._send(words, _ok, [write], ("OOM",))

    def _mset(self) -> None:
        words: list[Word] = ["MSET"]
        writes = []
        for _ in range(self.rng.randint(1, 4)):
            key = self.keys.any(self.rng)
            write = self._operation(Kind.WRITE, key, self._new_value(key))
            assert write.value is not None
            words += [key.name, write.value.bytes()]
            writes.append(write)
        self._send(words, _ok, writes, ("~OOM",))

    def _get(self) -> None:
        key = self.keys.any(self.rng)
        read = self._operation(Kind.READ, key)
        name = self.rng.choice(("GET", "GET", "KV.GET"))
        self._send([name, key.name], partial(self._saw, [read]), [read])

    def _burst(self) -> None:
        """Ask for more than a session answers at once."""
        for _ in range(self.rng.randint(5, 15)):
            key = self.rng.choice(self.keys.pages)
            read = self._operation(Kind.READ, key)
            self._send(["GET", key.name], partial(self._saw, [read]), [read])

    def _getdel(self) -> None:
        key = self.keys.any(self.rng)
        read = self._operation(Kind.READ, key)
        delete = self._operation(Kind.WRITE, key)
        self._send(["GETDEL", key.name], partial(self._saw, [read]), [read, delete])

    def _get_layers(self) -> None:
        key = self.rng.choice(self.keys.pages)
        first = self.rng.randrange(self.keys.layers)
        count = self.rng.randint(1, self.keys.layers - first)
        read = self._operation(Kind.READ, key)
        span = first * self.keys.layer_bytes, (first + count) * self.keys.layer_bytes
        self._send(
            ["KV.GET", key.name, "LAYERS", first, count],
            partial(self._saw, [read], span=span),
            [read],
            ("ERR LAYERS",),
        )

    def _mget(self) -> None:
        keys = [self.keys.any(self.rng) for _ in range(self.rng.randint(1, 12))]
        if self.rng.random() < 0.3:
            keys = self.rng.choices(self.keys.pages, k=30)
        reads = [self._operation(Kind.READ, key) for key in keys]
        names = [key.name for key in keys]
        head: list[Word] = ["KV.MGET", len(keys)] if self.rng.random() < 0.5 else ["MGET"]
        self._send([*head, *names], partial(self._saw_all, reads), reads)

    def _del(self) -> None:
        keys = [self.keys.any(self.rng) for _ in range(self.rng.randint(1, 3))]
        deletes = [self._operation(Kind.WRITE, key) for key in keys]
        self._send(["DEL", *(key.name for key in keys)], _integer, deletes)

    def _flush(self) -> None:
        deletes = [self._operation(Kind.WRITE, key) for key in self.keys.all]
        self._send(["FLUSHALL"], _ok, deletes)

    def _put(self) -> None:
        key = self.rng.choice(self.keys.kv)
        value = self._page(key)
        write = self._operation(Kind.WRITE, key, value)
        words: list[Word] = ["KV.PUT", key.name, value.bytes(), *self._put_options(key, write)]
        errors = ("OOM", "BUSY", "ERR PARENT", "KVSCHEMA")
        self._send(words, partial(self._ok_or_nil, write), [write], errors)

    def _page(self, key: Key) -> Value:
        if key.page_bytes:
            return value_of_page(key.name, key.page_bytes)
        return self._new_value(key, self.rng.randint(1, 200_000))

    def _put_options(self, key: Key, write: Operation) -> list[Word]:
        words: list[Word] = []
        if key.parent and self.rng.random() < 0.8:
            words += ["PARENT", key.parent]
        elif self.rng.random() < 0.1:
            words += ["PARENT", self.rng.choice(self.keys.kv).name]  # perhaps a circle
        if self.rng.random() < 0.1:
            ms = self.rng.choice((100, 2000))
            write.ttl_s = ms / 1000
            words += ["PX", ms]
        if self.rng.random() < 0.1:
            words += ["PRIORITY", self.rng.randint(-2, 2)]
        if self.rng.random() < 0.1:
            words.append("NX")
        return words

    def _match(self) -> None:
        keys = self.keys.pages[: self.rng.randint(1, len(self.keys.pages))]
        self._send(["KV.MATCH", len(keys), *(key.name for key in keys)], _match)

    def _exists(self) -> None:
        keys = [self.keys.any(self.rng).name for _ in range(self.rng.randint(1, 3))]
        name = self.rng.choice(("EXISTS", "TOUCH"))
        self._send([name, *keys], _integer)

    def _expire(self) -> None:
        key = self.keys.any(self.rng)
        if self.rng.random() < 0.3:
            change = self._operation(Kind.TTL, key)
            self._send(["PERSIST", key.name], _integer, [change])
            return
        ms = self.rng.choice((1, 300, 5000))
        change = self._operation(Kind.TTL, key, ttl_s=ms / 1000)
        self._send(["PEXPIRE", key.name, ms], partial(self._changed, change), [change])

    def _pin(self) -> None:
        key = self.keys.any(self.rng)
        words: list[Word] = ["KV.PIN", key.name, self.rng.choice((10, 1000, 20_000))]
        self._send(words if self.rng.random() < 0.6 else ["KV.UNPIN", key.name], _integer)

    def _look(self) -> None:
        key = self.keys.any(self.rng)
        commands: list[list[Word]] = [
            ["PING"],
            ["DBSIZE"],
            ["KEYS", "*"],
            ["SCAN", "0", "COUNT", "7"],
            ["KV.INFO", key.name],
            ["KV.EXPLAIN", key.name],
            ["RANDOMKEY"],
            ["TTL", key.name],
            ["KV.STATS"],
            ["CLIENT", "LIST"],
        ]
        self._send(self.rng.choice(commands), _anything)

    def _configure(self) -> None:
        if self.rng.random() < 0.5 or self.keys.maxmemory < 1 << 20:
            policy = self.rng.choice(POLICIES)
            self._send(["CONFIG", "SET", "maxmemory-policy", policy], _ok)
        else:
            nbytes = max(1 << 20, int(self.keys.maxmemory * self.rng.choice((0.6, 0.8, 1, 1))))
            self._send(["CONFIG", "SET", "maxmemory", nbytes], _ok)

    def _skip(self) -> None:
        """Have one command carried out in silence."""
        self._send(["CLIENT", "REPLY", "SKIP"], _anything)
        self.calls[-1].is_silent = True
        compose = self.rng.choice((Client._set, Client._get, Client._mget, Client._put))
        before = len(self.calls)
        compose(self)
        assert len(self.calls) == before + 1
        self.calls[-1].is_silent = True
        self._send(["PING"], _anything)

    def _lease(self) -> None:
        keys = [self.rng.choice(self.keys.kv) for _ in range(self.rng.randint(1, 6))]
        reads = [self._operation(Kind.READ, key) for key in keys]
        ms = self.rng.choice((20, 1000, 10_000))
        deadline = self.moment.now + ms / 1000
        words: list[Word] = ["KV.LEASE", len(keys), *(key.name for key in keys), "MS", ms]
        self._send(words, partial(self._leased, reads, deadline), reads)

    def _release(self) -> None:
        if self.readings and self.rng.random() < 0.9:
            reading = self.readings.pop(self.rng.randrange(len(self.readings)))
            self._send(["KV.RELEASE", reading.number], _integer)
        else:
            self._send(["KV.RELEASE", 1_000_000], _integer)

    def _reserve(self) -> None:
        key = self.rng.choice(self.keys.kv)
        value = self._page(key)
        ms = self.rng.choice((30, 2000, 10_000))
        writing = Writing(
            0, self.moment.now + ms / 1000, 0, key, value, is_rogue=self.rng.random() < 0.3
        )
        words: list[Word] = ["KV.RESERVE", key.name, value.nbytes, "MS", ms]
        self._send(words, partial(self._reserved, writing), (), ("OOM", "KVSCHEMA"))

    def _commit(self) -> None:
        full = [each for each in self.writings if each.filled == each.value.nbytes]
        if not full:
            return
        writing = self.rng.choice(full)
        self.writings.remove(writing)
        if self.rng.random() < 0.2:
            self._send(["KV.ABORT", writing.number], _integer)
            return
        write = self._operation(Kind.WRITE, writing.key, writing.value)
        words: list[Word] = ["KV.COMMIT", writing.number, *self._put_options(writing.key, write)]
        errors = ("KVLEASE", "ERR PARENT", "KVSCHEMA")
        self._send(words, partial(self._ok_or_nil, write), [write], errors)

    def _garbage(self) -> None:
        if self.rng.random() < 0.5:
            self._send(["QUIT"], _ok)
        else:
            self.socket.inbox += b"*1\r\n$x\r\n"
            self.calls.append(Call("garbage", _never, [], ("ERR Protocol error",)))
        self.is_over = True

    # -- what a step does besides -----------------------------------------------------------------

    def write_in_place(self) -> None:
        """Fill a part of a reserved slot; a rogue goes on after its time."""
        for writing in self.writings:
            if self.moment.now < writing.deadline or writing.is_rogue:
                stop = min(writing.value.nbytes, writing.filled + self.rng.randint(1, 100_000))
                start = writing.offset + writing.filled
                part = writing.value.bytes()[writing.filled : stop]
                self.memory[start : start + len(part)] = part
                writing.filled = stop

    def check_leases(self) -> None:
        """Assert that leased bytes are still what they were."""
        self.readings = [each for each in self.readings if self.moment.now < each.deadline]
        for reading in self.readings:
            for offset, data in reading.places:
                if self.memory[offset : offset + len(data)] != data:
                    raise WrongAnswer(f"bytes under lease {reading.number} changed: {data[:60]!r}")

    def end_all(self) -> None:
        """Note that what was not answered will never be."""
        for call in self.calls:
            for operation in call.operations:
                operation.end(State.LOST, self.moment.step, self.moment.now)
        self.calls.clear()

    # -- reading ----------------------------------------------------------------------------------

    def read_answers(self) -> None:
        """Check every answer that has arrived whole."""
        if not self.socket.arrived:
            return
        self._reader.feed(bytes(self.socket.arrived))
        self.socket.arrived.clear()
        while True:
            answer = self._reader.gets()
            if answer is _UNFINISHED:
                return
            self.answers += 1
            while self.calls and self.calls[0].is_silent:
                self._end(self.calls.popleft(), State.LOST)
            if not self.calls:
                raise WrongAnswer(f"client {self.number}: an answer to nothing: {answer!r}")
            self._take(self.calls.popleft(), answer)

    def _take(self, call: Call, answer: Any) -> None:
        try:
            if not isinstance(answer, hiredis.ReplyError):
                self._end(call, State.DONE)
                call.check(answer)
                return
            for word in call.errors:
                if str(answer).startswith(word.removeprefix("~")):
                    # ~: an error after which a part of it may have happened all the same.
                    self._end(call, State.LOST if word[0] == "~" else State.FAILED)
                    return
            raise WrongAnswer(f"the error is not one of {call.errors}: {answer}")
        except WrongAnswer as error:
            raise WrongAnswer(f"client {self.number}: {call.words}: {error}") from None

    def _end(self, call: Call, state: State) -> None:
        for operation in call.operations:
            operation.end(state, self.moment.step, self.moment.now)

    def _saw(
        self, reads: list[Operation], answer: Any, span: tuple[int, int] | None = None
    ) -> None:
        _expect(answer is None or isinstance(answer, bytes), answer)
        self.record.see(reads[0], answer, span)

    def _saw_all(self, reads: list[Operation], answer: Any) -> None:
        _expect(isinstance(answer, list) and len(answer) == len(reads), answer)
        for read, data in zip(reads, answer, strict=True):
            self._saw([read], data)

    def _ok_or_nil(self, write: Operation, answer: Any) -> None:
        _expect(answer in (b"OK", None), answer)
        if answer is None:
            write.state = State.FAILED

    def _changed(self, change: Operation, answer: Any) -> None:
        _expect(answer in (0, 1), answer)
        if not answer:
            change.state = State.FAILED

    def _leased(self, reads: list[Operation], deadline: float, answer: Any) -> None:
        _expect(isinstance(answer, list) and len(answer) == len(reads) + 1, answer)
        number, *places = answer
        if self.moment.now >= deadline:
            for read in reads:  # what is there now may be anything
                read.state = State.FAILED
            return
        reading = Reading(number, deadline, [])
        for read, place in zip(reads, places, strict=True):
            if place is None:
                # Small values have no place, so this says nothing about the key.
                read.state = State.FAILED
                continue
            offset, nbytes = place
            data = bytes(self.memory[offset : offset + nbytes])
            self.record.see(read, data)
            reading.places.append((offset, data))
        self.readings.append(reading)

    def _reserved(self, writing: Writing, answer: Any) -> None:
        _expect(isinstance(answer, list) and len(answer) == 2, answer)
        writing.number, writing.offset = answer
        if writing.is_rogue or self.moment.now < writing.deadline:
            self.writings.append(writing)


def _expect(is_met: bool, answer: Any) -> None:
    if not is_met:
        raise WrongAnswer(f"answered with {answer!r}"[:300])


def _ok(answer: Any) -> None:
    _expect(answer == b"OK", answer)


def _integer(answer: Any) -> None:
    _expect(isinstance(answer, int) and answer >= 0, answer)


def _match(answer: Any) -> None:
    _expect(isinstance(answer, list) and answer[1] == b"c" * answer[0], answer)


def _anything(answer: Any) -> None:
    pass


def _never(answer: Any) -> None:
    _expect(False, answer)


_TABLE: list[tuple[float, Callable[[Client], None]]] = [
    (10, Client._set),
    (2, Client._mset),
    (10, Client._get),
    (0.7, Client._burst),
    (1, Client._getdel),
    (2, Client._get_layers),
    (4, Client._mget),
    (2, Client._del),
    (0.15, Client._flush),
    (10, Client._put),
    (2, Client._match),
    (1, Client._exists),
    (2, Client._expire),
    (1.5, Client._pin),
    (3, Client._look),
    (0.5, Client._configure),
    (0.7, Client._skip),
    (4, Client._lease),
    (3, Client._release),
    (4, Client._reserve),
    (4, Client._commit),
    (0.1, Client._garbage),
]
_WEIGHTS = [weight for weight, _ in _TABLE]
_COMPOSE = [compose for _, compose in _TABLE]
