"""A peer whose answers a test decides: for what a healthy server cannot be made to do on time."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import hiredis

SILENCE_S = 60.0  # a connection that a failed test left open does not keep the peer for ever

Answer = Callable[[list[bytes]], bytes | None]


class Peer:
    """Answers one command after the other, and reads nothing while it writes an answer.

    answer: from a command to the bytes of its reply; None hangs up. HELLO is answered here.
    seen:   the names of all commands that came, without the handshake's.
    """

    def __init__(self, path: Path, answer: Answer) -> None:
        self.url = f"unix://{path}"
        self.seen: list[bytes] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            conn, _ = self._listener.accept()
            conn.settimeout(SILENCE_S)
            with conn:
                if not self._converse(conn):
                    return

    def _converse(self, conn: socket.socket) -> bool:
        reader = hiredis.Reader()
        while data := _receive(conn):
            reader.feed(data)
            while (args := reader.gets()) is not False:
                if args[0] == b"STOP":
                    return False
                if (reply := self._reply(args)) is None:
                    return True
                conn.sendall(reply)
        return True

    def _reply(self, args: list[bytes]) -> bytes | None:
        if args[0] == b"HELLO":
            return b"%0\r\n"
        if args[:2] == [b"CLIENT", b"SETINFO"]:
            return b"+OK\r\n"
        self.seen.append(args[0])
        return self._answer(args)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.url.removeprefix("unix://"))
            sock.sendall(b"*1\r\n$4\r\nSTOP\r\n")
            self._thread.join()
        self._listener.close()


def _receive(conn: socket.socket) -> bytes:
    try:
        return conn.recv(4096)
    except TimeoutError:
        return b""
