"""Pushes in a session without sockets: their place among replies, and what keeps them back."""

from typing import Any

import hiredis
import pytest

from respkv.server.answers import OUTPUT_BYTES_SOFT
from respkv.server.state import Server
from tests.fakes import FakeWire
from tests.server.cold import make_cold_server
from tests.server.raw import request
from tests.server.test_session import running, settle

pytestmark = pytest.mark.anyio
LARGE = 3 * OUTPUT_BYTES_SOFT


def replies(data: bytes) -> list[Any]:
    reader = hiredis.Reader()
    reader.feed(data)
    found: list[Any] = []
    while (reply := reader.gets()) is not False:
        found.append(reply)
    return found


def listener(server: Server, *channels: str, room: int = 1 << 60) -> FakeWire:
    """Return a connection in RESP3 that listens and was told so."""
    wire = FakeWire(server)
    wire.feed(request("HELLO", 3) + request("SUBSCRIBE", *channels))
    wire.drain()
    wire.room = room
    return wire
