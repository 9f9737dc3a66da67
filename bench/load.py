"""The load: a raw connection and values, the same code for both servers and as little as possible.

A client library would measure itself. So a request is a few buffers prepared beforehand and sent by
one gathered call, and a reply, whose length is known, is received by one scattered call that returns
when all of it has come: a value in memory that is already there, its frame beside it. What was
received is compared byte by byte outside the measured time.
"""

import os
import socket
import struct
from collections.abc import Sequence
from time import perf_counter
from types import TracebackType
from typing import Self, TypeAlias

Address: TypeAlias = str | tuple[str, int]  # the path of a Unix socket, or host and port
Buffers: TypeAlias = Sequence[bytes | memoryview]

TIMEOUT_S = 30
_NULL = b"$-1\r\n"
STEP_BYTES = 64  # by how much the values of one set are shifted against each other


class WrongReplyError(Exception):
    """A server answered with something else than it should have."""


class Load:
    """One connection with blocking calls."""

    def __init__(self, address: Address) -> None:
        self._sock = socket.socket(
            socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM
        )
        try:
            # The kernel's timeout, not Python's, which would put a poll before each call.
            timeout = struct.pack("ll", TIMEOUT_S, 0)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            self._sock.connect(address)
            if isinstance(address, tuple):
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._sock.close()

    def send(self, request: Buffers, nbytes: int) -> None:
        """Send all of a request. Raises ConnectionError when the server stops reading."""
        if self._sock.sendmsg(request) != nbytes:
            raise ConnectionError("the server stopped reading")

    def receive(self, reply: Sequence[bytearray], nbytes: int) -> None:
        """Fill the buffers. Raises ConnectionError when the server hangs up."""
        if self._sock.recvmsg_into(reply, 0, socket.MSG_WAITALL)[0] != nbytes:
            raise ConnectionError("the server answered with less than it should have")

    def receive_page(self, into: bytearray) -> bool:
        """Receive a bulk that fills ``into``, or null. Returns: whether there was one.

        Raises WrongReplyError when it is anything else.
        """
        head = bytearray(len(_NULL))
        self.receive([head], len(head))
        if head == _NULL:
            return False
        frame = b"$%d\r\n" % len(into)
        rest, tail = bytearray(max(len(frame) - len(head), 0)), bytearray(2)
        self.receive([rest, into, tail], len(rest) + len(into) + 2)
        framed = bytes(head + rest), bytes(tail)
        if framed != (frame, b"\r\n"):
            raise WrongReplyError(f"a value framed {framed}, not {frame!r}")
        return True

    def receive_past(self, reply: bytearray, least: int) -> memoryview:
        """Receive a reply of more than ``least`` bytes, of which CRLF are the last."""
        with memoryview(reply) as view:
            got = 0
            while got <= least or reply[got - 2 : got] != b"\r\n":
                received = self._sock.recv_into(view[got:])
                if not received:
                    raise ConnectionError("the server hung up")
                got += received
        return memoryview(reply)[:got]

    def ask(self, *args: str | bytes) -> bytes:
        """Send a command; return its reply, which is one line."""
        request = command(*args)
        self.send([request], len(request))
        line = bytearray()
        while not line.endswith(b"\r\n"):
            line += self._receive_some()
        return bytes(line[:-2])

    def ask_bulk(self, *args: str | bytes) -> bytes:
        """Send a command; return its reply, which is a bulk."""
        request = command(*args)
        self.send([request], len(request))
        reply = bytearray()
        while b"\r\n" not in reply:
            reply += self._receive_some()
        head, _, body = bytes(reply).partition(b"\r\n")
        if not head.startswith(b"$"):
            raise WrongReplyError(f"to {args}: {head!r}")
        while len(body) < int(head[1:]) + 2:
            body += self._receive_some()
        return body[:-2]

    def _receive_some(self) -> bytes:
        received = self._sock.recv(65536)
        if not received:
            raise ConnectionError("the server hung up")
        return received


class Values:
    """A set of different values of ``nbytes``, and their keys."""

    def __init__(self, nbytes: int, count: int, prefix: str = "bench:") -> None:
        noise = memoryview(os.urandom(nbytes + STEP_BYTES * count))
        self.nbytes = nbytes
        self.keys = [f"{prefix}{index:064x}".encode() for index in range(count)]
        self.payloads = [noise[STEP_BYTES * index :][:nbytes] for index in range(count)]


class Transfer:
    """SET and GET, or another pair of commands, of a set of values over one connection."""

    def __init__(self, load: Load, values: Values, *, put: str = "SET", get: str = "GET") -> None:
        self._load = load
        self._values = values
        self._puts: list[list[bytes | memoryview]] = [
            command_with(payload, put, key)
            for key, payload in zip(values.keys, values.payloads, strict=True)
        ]
        self._gets = [command(get, key) for key in values.keys]
        self._frame = b"$%d\r\n" % values.nbytes
        self._head = bytearray(len(self._frame))
        self._payload = bytearray(values.nbytes)
        self._tail = bytearray(2)
        self._ok = bytearray(5)

    def put(self, count: int) -> float:
        """Store values, round and round; return the seconds that one took."""
        load, ok = self._load, [self._ok]
        requests = [(each, sum(map(len, each))) for each in self._puts]
        start = perf_counter()
        for index in range(count):
            request, nbytes = requests[index % len(requests)]
            load.send(request, nbytes)
            load.receive(ok, 5)
        took = perf_counter() - start
        if self._ok != b"+OK\r\n":
            raise WrongReplyError(f"to a value: {bytes(self._ok)!r}")
        return took / count

    def get(self, count: int) -> float:
        """Fetch values, round and round; return the seconds that one took."""
        load, reply = self._load, [self._head, self._payload, self._tail]
        nbytes = sum(map(len, reply))
        requests = [([each], len(each)) for each in self._gets]
        start = perf_counter()
        for index in range(count):
            load.send(*requests[index % len(requests)])
            load.receive(reply, nbytes)
        took = perf_counter() - start
        self._check((count - 1) % len(requests))
        return took / count

    def put_all(self) -> None:
        """Store every value once."""
        self.put(len(self._puts))

    def check_all(self) -> None:
        """Fetch every value once. Raises WrongReplyError unless each is, byte for byte, as stored."""
        for index, request in enumerate(self._gets):
            self._load.send([request], len(request))
            reply = [self._head, self._payload, self._tail]
            self._load.receive(reply, sum(map(len, reply)))
            self._check(index)

    def _check(self, index: int) -> None:
        frame = bytes(self._head), bytes(self._tail)
        # bytearray compares with a memoryview by memcmp; two memoryviews go element by element.
        if frame != (self._frame, b"\r\n") or self._payload != self._values.payloads[index]:
            raise WrongReplyError(f"value {index} came back different, framed {frame}")


def command(*args: str | bytes) -> bytes:
    """Return a command as RESP."""
    return b"*%d\r\n" % len(args) + b"".join(map(_bulk, args))


def command_with(payload: memoryview, *args: str | bytes) -> list[bytes | memoryview]:
    """Return a command as RESP, its last argument to be sent from where it lies."""
    head = b"*%d\r\n" % (len(args) + 1) + b"".join(map(_bulk, args))
    return [head + b"$%d\r\n" % len(payload), payload, b"\r\n"]


def _bulk(arg: str | bytes) -> bytes:
    data = arg.encode() if isinstance(arg, str) else arg
    return b"$%d\r\n%b\r\n" % (len(data), data)
