"""A raw connection: requests as bytes, replies as bytes, every reply held against RESP's grammar."""

import re
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import hiredis

Word = str | bytes | int

REPLY_S = 60.0
_LINE = re.compile(rb"[^\r\n]*\r\n")
_INTEGER = re.compile(rb"-?(0|[1-9][0-9]*)")
_CHILDREN = {b"*": 1, b"~": 1, b">": 1, b"%": 2}


class Malformed(AssertionError):
    """The other side sent what is not RESP."""


class Closed(AssertionError):
    """The other side closed the connection instead of answering."""


def request(*words: Word) -> bytes:
    """Write a command as clients do."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)


def pipeline(requests: Iterable[Sequence[Word]]) -> bytes:
    """Write many commands back to back."""
    return b"".join(request(*words) for words in requests)


def reply_end(data: bytes | bytearray, start: int) -> int:
    """Return where the reply that begins at ``start`` ends, or -1 if its end is yet to come.

    Raises Malformed when it is no reply.
    """
    line = _LINE.match(data, start)
    if line is None:
        if len(data) - start > 1 << 16:
            raise Malformed(bytes(data[start : start + 100]))
        return -1
    kind, rest, end = bytes(data[start : start + 1]), line[0][1:-2], line.end()
    if kind in b"+-,(" and kind:
        return end
    if kind == b"_" and not rest:
        return end
    if kind == b"#" and rest in (b"t", b"f"):
        return end
    if not _INTEGER.fullmatch(rest):
        raise Malformed(bytes(data[start : start + 100]))
    number = int(rest)
    if kind == b":":
        return end
    if kind in b"$=!" and number >= -1:
        return end if number < 0 else _bulk_end(data, end + number)
    if kind in _CHILDREN and number >= -1:
        for _ in range(number * _CHILDREN[kind]):
            end = reply_end(data, end)
            if end < 0:
                return -1
        return end
    raise Malformed(bytes(data[start : start + 100]))


def _bulk_end(data: bytes | bytearray, stop: int) -> int:
    if len(data) < stop + 2:
        return -1
    if data[stop : stop + 2] != b"\r\n":
        raise Malformed(f"a bulk string ends with {bytes(data[stop : stop + 2])!r}")
    return stop + 2


class Raw:
    """One connection. ``ask`` answers with what hiredis makes of the reply, ``raw`` with its bytes."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.settimeout(REPLY_S)
        self._data = bytearray()

    def send(self, *words: Word) -> None:
        """Send one command."""
        self.socket.sendall(request(*words))

    def raw(self, *words: Word) -> bytes:
        """Send one command; return the bytes of its reply."""
        self.send(*words)
        return self.next_raw()

    def ask(self, *words: Word) -> Any:
        """Send one command; return its reply. Errors are returned, not raised."""
        return parsed(self.raw(*words))

    def ask_all(self, requests: Sequence[Sequence[Word]]) -> list[Any]:
        """Send many commands at once; return their replies."""
        return [parsed(each) for each in self.raw_all(requests)]

    def raw_all(self, requests: Sequence[Sequence[Word]]) -> list[bytes]:
        """Send many commands and a PING; return the bytes of each reply but the PING's.

        So a reply too many, or too few, is noticed. Sends and receives at the same time, as a
        client must whose commands and replies are both larger than the socket's buffers.
        """
        sending = threading.Thread(
            target=self.socket.sendall, args=(pipeline([*requests, ("PING",)]),)
        )
        sending.start()
        replies = [self.next_raw() for _ in range(len(requests) + 1)]
        sending.join()
        assert replies.pop() == b"+PONG\r\n", replies
        self.check_silent()
        return replies

    def next(self) -> Any:
        """Return the next reply."""
        return parsed(self.next_raw())

    def next_raw(self) -> bytes:
        """Return the bytes of the next reply. Raises Closed."""
        while (end := self._whole_reply()) < 0:
            self._receive()
        reply = bytes(self._data[:end])
        del self._data[:end]
        return reply

    def check_silent(self) -> None:
        """Assert that nothing but what was read has arrived."""
        assert not self._data, bytes(self._data[:100])

    def wait_closed(self, timeout_s: float = REPLY_S) -> bytes:
        """Return everything up to the end of the connection. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                self._receive()
            except Closed:
                return bytes(self._data)

    def close(self) -> None:
        """Close this side."""
        self.socket.close()

    def _whole_reply(self) -> int:
        # A large bulk is not scanned again and again while it arrives.
        if bytes(self._data[:1]) in (b"$", b"="):
            line = _LINE.match(self._data)
            if line is not None and len(self._data) < int(line[0][1:-2]):
                return -1
        return reply_end(self._data, 0) if self._data else -1

    def _receive(self) -> None:
        try:
            data = self.socket.recv(1 << 20)
        except (ConnectionResetError, BrokenPipeError):
            data = b""
        if not data:
            raise Closed(bytes(self._data[:200]))
        self._data += data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()


def parsed(reply: bytes) -> Any:
    """Return a reply as hiredis reads it."""
    reader = hiredis.Reader()
    reader.feed(reply)
    return reader.gets()


def error_of(reply: Any) -> str:
    """Return the text of a reply that must be an error."""
    assert isinstance(reply, hiredis.ReplyError), reply
    return str(reply)
