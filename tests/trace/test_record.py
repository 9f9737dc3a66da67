"""The proxy between real clients and real servers, and what it writes down."""

import hashlib
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st

from respkv.client import AsyncClient
from respkv.client.url import Settings, settings
from respkv.errors import CacheError, ConnectionLost
from respkv.trace.notes import Notes
from respkv.trace.pipe import Pipe, connect, listen
from respkv.trace.read import read_trace
from respkv.trace.record import Ear, Recorder, Recording, record
from respkv.wire.commands.table import COMMANDS
from respkv.wire.tokenizer import Tokenizer
from tests.redis_server import RedisServer, free_port, why_not
from tests.server_process import ServerProcess

pytestmark = pytest.mark.anyio
GIVE_UP_S = 60.0


class Proxy:
    """A recording in progress: where its clients connect, and its lines so far."""

    def __init__(self, url: str, file: StringIO, recorder: Recorder) -> None:
        self.url = url
        self.file = file
        self.recorder = recorder

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.getvalue().splitlines()[1:]]

    def of(self, cmd: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["cmd"] == cmd]


def bytes_of(page: memoryview | None) -> bytes:
    assert page is not None
    return bytes(page)


@asynccontextmanager
async def recording(target: Settings, at: Settings | None = None) -> AsyncGenerator[Proxy]:
    file = StringIO()
    notes, written = Notes(16), Recording(file)
    recorder = Recorder(target, notes, written)
    async with listen(at or Settings(host="127.0.0.1", port=0)) as (listener, where):
        with anyio.fail_after(GIVE_UP_S):
            async with anyio.create_task_group() as group:
                group.start_soon(record, recorder, listener, written)
                yield Proxy(where, file, recorder)
                group.cancel_scope.cancel()


async def test_what_clients_ask_is_answered_as_ever_and_written_down(
    server: ServerProcess,
) -> None:
    payload = b"page" * 1000
    keys = [f"rec:{number:064x}" for number in range(3)]
    async with recording(settings(server.url, {})) as proxy, AsyncClient(proxy.url) as client:
        assert (await client.match(keys)).pages == 0
        for place, key in enumerate(keys):
            parent = keys[place - 1] if place else None
            assert await client.put(key, payload, parent=parent, tokens=16)
        assert (await client.match(keys)).pages == 3
        assert list(map(bytes_of, await client.mget(keys))) == [payload] * 3
        assert await client.delete(*keys) == 3
    first, last = proxy.of("kv.match")
    assert (first["reply"], first["matched"]) == ("miss", 0)
    assert (last["reply"], last["matched"], last["num_keys"]) == ("hit", 3, 3)
    assert last["chain"] == first["chain"]
    puts = proxy.of("kv.put")
    assert [put["chain"][0] for put in puts] == first["chain"]
    assert [put.get("parent") for put in puts] == [None, *first["chain"][:2]]
    assert all(put["in_bytes"] == len(payload) for put in puts)
    (got,) = proxy.of("kv.mget")
    assert (got["reply"], got["out_bytes"], got["keys"]) == ("hit", 12_000, first["chain"])
    assert all(line["latency_us"] > 0 and line["t"] >= 0 for line in proxy.lines)
    assert "rec:" not in proxy.file.getvalue()


async def test_pages_of_megabytes_go_through_unchanged(server: ServerProcess) -> None:
    pages = [hashlib.shake_128(b"%d" % number).digest(3 << 20) for number in range(4)]
    async with recording(settings(server.url, {})) as proxy, AsyncClient(proxy.url) as client:
        for number, page in enumerate(pages):
            assert await client.put(f"large:{number}", page)
        found = await client.mget([f"large:{number}" for number in range(4)])
        assert list(map(bytes_of, found)) == pages
        await client.delete(*(f"large:{number}" for number in range(4)))
    assert [put["in_bytes"] for put in proxy.of("kv.put")] == [3 << 20] * 4
    assert proxy.of("kv.mget")[0]["out_bytes"] == 4 * (3 << 20)


async def test_unix_sockets_serve_both_sides_and_many_clients(
    server: ServerProcess, tmp_path: Path
) -> None:
    at = Settings(path=str(tmp_path / "proxy"))
    async with recording(Settings(path=server.unixsocket), at) as proxy:

        async def talk(number: int) -> None:
            async with AsyncClient(proxy.url) as client:
                for turn in range(20):
                    await client.set(f"many:{number}:{turn}", b"%d" % turn)
                    assert await client.command("GET", f"many:{number}:{turn}") == b"%d" % turn

        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(talk, number)
    assert len(proxy.of("set")) == len(proxy.of("get")) == 100
    assert len({line["conn"] for line in proxy.of("get")}) == 5
    assert all(line["reply"] == "hit" for line in proxy.of("get"))


async def test_a_plain_redis_can_be_recorded(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with RedisServer(tmp_path) as redis:
        async with recording(settings(redis.tcp_url, {})) as proxy:
            async with AsyncClient(proxy.url) as client:
                await client.set("k", b"v")
                assert await client.command("GET", "k") == b"v"
                assert await client.command("GET", "absent") is None
    assert [line["reply"] for line in proxy.of("get")] == ["hit", "miss"]


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[Pipe]:
    pipe = await connect(settings(url, {}))
    try:
        yield pipe
    finally:
        pipe.close()


async def everything(pipe: Pipe) -> bytes:
    said = b""
    while data := await pipe.receive(1000):
        said += data
    return said


async def test_what_cannot_be_understood_goes_through_and_is_not_written(
    server: ServerProcess,
) -> None:
    async with recording(settings(server.url, {})) as proxy, connected(proxy.url) as pipe:
        await pipe.send(b"PING\r\n*1\r\n:5\r\n")
        said = await everything(pipe)
    assert said.startswith(b"+PONG\r\n-ERR Protocol error")
    assert [line["cmd"] for line in proxy.lines] in (["ping"], [])


async def test_a_client_that_ends_its_side_still_gets_its_replies(server: ServerProcess) -> None:
    async with recording(settings(server.url, {})) as proxy, connected(proxy.url) as pipe:
        await pipe.send(b"PING\r\nPING\r\n")
        pipe.end()
        assert await everything(pipe) == b"+PONG\r\n+PONG\r\n"


async def test_a_server_that_does_not_read_stops_the_client() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # connections wait for an accept
        target = Settings(host="127.0.0.1", port=server.getsockname()[1])
        async with recording(target) as proxy, connected(proxy.url) as pipe:
            await pipe.send(b"*2\r\n$4\r\nECHO\r\n$%d\r\n" % (256 << 20))
            sent = 0
            while sent < 256 << 20:
                with anyio.move_on_after(1.0) as scope:
                    await pipe.send(bytes(1 << 20))
                if scope.cancelled_caught:
                    break
                sent += 1 << 20
    assert sent < 128 << 20  # what the sockets on the way hold, and no more


async def test_a_server_that_is_away_is_counted_and_ends_the_clients_connection() -> None:
    async with recording(Settings(host="127.0.0.1", port=free_port())) as proxy:
        async with AsyncClient(proxy.url, reconnect_max=0) as client:
            with pytest.raises(ConnectionLost):
                await client.ping()
    assert proxy.recorder.num_refused == 1
    assert proxy.lines == []


async def test_a_recording_is_a_trace(server: ServerProcess, tmp_path: Path) -> None:
    keys = [f"trace:{number}" for number in range(3)]
    async with recording(settings(server.url, {})) as proxy, AsyncClient(proxy.url) as client:
        for count in (2, 3):
            found = await client.match(keys[:count])
            for place in range(found.pages, count):
                parent = keys[place - 1] if place else None
                await client.put(keys[place], b"x", parent=parent, tokens=16)
        await client.delete(*keys)
    path = tmp_path / "recording"
    path.write_text(proxy.file.getvalue())
    trace = read_trace(path)
    assert [request.blocks for request in trace.requests] == [(0, 1), (0, 1, 2)]
    assert trace.block_tokens == 16


async def test_prompts_are_recorded_as_chains_of_pages_and_read_back_as_requests(
    server: ServerProcess, tmp_path: Path
) -> None:
    prompt = list(range(20_100))  # more tokens than one read of the proxy takes
    async with recording(settings(server.url, {})) as proxy, AsyncClient(proxy.url) as client:
        await client.schema_set("seqrec", layers=1, heads=1, dim=8, tokens=512, dtype="float16")
        assert (await client.seq.match("seqrec", prompt)).tokens == 0
        kv = bytes(2 * len(prompt) * 8 * 2)
        pages = [kv[at : at + 512 * 32] for at in range(0, len(kv), 512 * 32)]
        await client.seq.put("seqrec", prompt, pages)
        assert (await client.seq.match("seqrec", prompt + [7] * 1000, session="s")).tokens == 20_100
        await client.command("KV.SCHEMA", "DEL", "seqrec")
    first, last = proxy.of("kv.seq.match")[0], proxy.of("kv.seq.match")[-1]
    assert (first["reply"], last["reply"], last["matched"]) == ("miss", "hit", 20_100)
    assert (first["tokens"], first["page_tokens"], len(first["chain"])) == (20_100, 512, 40)
    assert last["chain"][:39] == first["chain"][:39]
    assert proxy.of("kv.seq.put")[0]["in_bytes"] == len(kv)
    assert "seqrec" not in proxy.file.getvalue()
    path = tmp_path / "recording"
    path.write_text(proxy.file.getvalue())
    trace = read_trace(path)
    assert [request.num_tokens for request in trace.requests][-1] == 21_100
    assert trace.block_tokens == 512


def follow(*pieces: bytes) -> tuple[Ear, StringIO]:
    file = StringIO()
    ear = Ear(1, Notes(), Recording(file), Tokenizer())
    for piece in pieces:
        ear.sent(piece)
    return ear, file


@pytest.mark.parametrize("step", [1, 7, 1000, 65_536, 1 << 20])
def test_large_arguments_are_stepped_over_however_they_come(step: int) -> None:
    value = bytes(200_000)
    stream = b"*3\r\n$6\r\nKV.PUT\r\n$1\r\nk\r\n$200000\r\n" + value + b"\r\n"
    stream = stream * 2 + b"PING\r\n"
    ear, file = follow(*(stream[at : at + step] for at in range(0, len(stream), step)))
    ear.answered(b"+OK\r\n+OK\r\n+PONG\r\n")
    lines = [json.loads(line) for line in file.getvalue().splitlines()[1:]]
    assert [(line["cmd"], line["in_bytes"]) for line in lines] == [
        ("kv.put", 200_000),
        ("kv.put", 200_000),
        ("ping", 0),
    ]
    assert not ear.is_lost


def test_replies_that_nobody_asked_for_end_the_record_of_a_connection() -> None:
    ear, file = follow(b"PING\r\n")
    ear.answered(b"+PONG\r\n+PONG\r\n")
    assert ear.is_lost
    ear.sent(b"PING\r\n")
    ear.answered(b"+PONG\r\n")
    assert len(file.getvalue().splitlines()) == 2


def test_after_client_reply_nothing_is_matched_to_its_command_any_more() -> None:
    ear, file = follow(b"PING\r\nCLIENT REPLY OFF\r\nPING\r\n")
    assert ear.is_lost
    assert [json.loads(line)["cmd"] for line in file.getvalue().splitlines()[1:]] == [
        "client|reply"
    ]


SECRET = b"zq7"  # in all that the clients below send
words = st.one_of(
    st.integers(0, 99).map(lambda number: b"%b%d" % (SECRET, number)),
    st.sampled_from(
        [b"", b"0", b"1", b"2", b"-1", b"PARENT", b"TOKENS", b"SESSION", b"SALT", b"MM"]
    ),
    st.sampled_from([SECRET * 30_000, b"END", b"SET"]),  # the first is a body
)
commands = st.lists(words, max_size=7).flatmap(
    lambda args: st.sampled_from([name.upper().encode() for name in COMMANDS] + [SECRET]).map(
        lambda name: [name, *args]
    )
)


def encoded(args: list[bytes]) -> bytes:
    return b"*%d\r\n" % len(args) + b"".join(b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args)


@settings_(max_examples=300, deadline=None)
@given(
    sent=st.lists(commands, max_size=5), page_tokens=st.integers(0, 2), step=st.integers(1, 70_000)
)
def test_whatever_is_sent_is_followed_and_none_of_it_is_written(
    sent: list[list[bytes]], page_tokens: int, step: int
) -> None:
    file = StringIO()
    ear = Ear(1, Notes(page_tokens), Recording(file), Tokenizer())
    stream = b"".join(map(encoded, sent))
    step = max(step, len(stream) // 50)
    for at in range(0, len(stream), step):
        ear.sent(stream[at : at + step])
    if not ear.is_lost:
        ear.answered(b"+OK\r\n" * len(sent))
        assert len(file.getvalue().splitlines()) == 1 + len(sent)
    assert SECRET.decode() not in file.getvalue()


@settings_(max_examples=300, deadline=None)
@given(sent=st.binary(max_size=200), answered=st.binary(max_size=200))
def test_garbage_from_either_side_is_survived(sent: bytes, answered: bytes) -> None:
    ear, _ = follow(b"PING\r\n", *([sent] if sent else []))
    ear.answered(answered)


class FullDisk(StringIO):
    """A file that takes its first line and no more."""

    def write(self, text: str) -> int:
        if self.tell():
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_full_disk_is_an_error_that_says_so() -> None:
    ear = Ear(1, Notes(), Recording(FullDisk()), Tokenizer())
    ear.sent(b"PING\r\n")
    with pytest.raises(CacheError, match=r"the recording cannot be written: .*No space left"):
        ear.answered(b"+PONG\r\n")
