"""Streams of commands, damaged in the ways a broken or hostile client damages them.

What the fuzzers share: tests/long/fuzz.py is about the parser, tests/stress/fuzz.py about what
stands behind it.
"""

import random
import socket

from tests.server.raw import Raw
from tests.server_process import ServerProcess

# What means something to a parser, and what nearly does.
PIECES = [
    *(
        b"*",
        b"$",
        b"\r\n",
        b"\r",
        b"\n",
        b"\x00",
        b" ",
        b'"',
        b"'",
        b"\\x41",
        b"+OK\r\n",
        b":1\r\n",
    ),
    *(b"*-1\r\n", b"*0\r\n", b"*1\r\n", b"$-1\r\n", b"$0\r\n\r\n", b"%1\r\n", b"%2\r\n", b"~1\r\n"),
    *(b"=4\r\ntxt:", b"+x\r\n", b"*3\r\n$3\r\nSET\r\n", b"$ 3\r\n", b"*+1\r\n", b"$03\r\n"),
    *(b"*4000000000\r\n", b"$536870912\r\n", b"*99999999999999999999\r\n", b"*1048577\r\n"),
    *(b"$9223372036854775807\r\n", b"*99999999\r\n", b"$99999999\r\n"),
    *(b"PING\r\n", b"GET sentinel\r\n", b"QUIT\r\n"),
]


def wound(rng: random.Random, stream: bytes) -> bytes:
    """Damage a stream in one place."""
    data = bytearray(stream)
    at = rng.randrange(len(data) + 1)
    match rng.randrange(6):
        case 0:
            data[at : at + 1] = rng.randbytes(1)
        case 1:
            data[at:at] = rng.choice(PIECES)
        case 2:
            del data[at : at + rng.randint(1, 9)]
        case 3:
            data[at:at] = data[at : at + rng.randint(1, 99)]
        case 4:
            del data[at:]
        case _:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
    return bytes(data)


def answers_to(server: ServerProcess, stream: bytes) -> bytes:
    """Send a stream on a connection of its own, half closed then; return all that comes back."""
    with Raw(server.connect()) as raw:
        try:
            raw.socket.sendall(stream)
            raw.socket.shutdown(socket.SHUT_WR)
        except TimeoutError:
            raise
        except OSError:
            pass  # it had answered an error and closed
        return raw.wait_closed()
