"""Read one large reply slowly, across the server's shutdown: `make image-test` uses it.

python slow_reader.py /run/respkv/respkv.sock

Prints "reading" once the reply has begun, waits, and takes the rest. The server is told to end in
between, so getting every byte shows that it drains.
"""

import hashlib
import socket
import sys
import time

VALUE_BYTES = 64 << 20
PAUSE_S = 3


def request(*args: bytes) -> bytes:
    """Encode a command."""
    return b"*%d\r\n" % len(args) + b"".join(b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args)


def main(path: str) -> str | None:
    """Store a value and read it back in two halves of time.

    Returns: what went wrong, if something did.
    """
    value = hashlib.shake_256(b"slow reader").digest(VALUE_BYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        connection.settimeout(30)
        replies = connection.makefile("rb")
        connection.sendall(request(b"SET", b"slow", value) + request(b"GET", b"slow"))
        if (answer := replies.readline()) != b"+OK\r\n":
            return f"SET was answered {answer!r}"
        if (head := replies.readline()) != b"$%d\r\n" % VALUE_BYTES:
            return f"GET was answered {head!r}"
        print("reading", flush=True)
        time.sleep(PAUSE_S)
        if replies.read(VALUE_BYTES) != value or replies.read(2) != b"\r\n":
            return "the reply was cut or changed"
        if replies.read(1):
            return "there is more than the reply"
    print(f"{VALUE_BYTES >> 20} MiB arrived whole, then the connection was closed")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
