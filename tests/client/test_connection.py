"""Connections: handshake, login, TLS, what breaks and what is tried again, forks."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from respkv.client import Client
from respkv.errors import ConfigError, ConnectionLost, ProtocolError, ServerError, TimedOut
from tests.client.peer import Peer
from tests.redis_server import RedisServer, free_port

Connect = Callable[..., Any]

MIB = 1 << 20


@pytest.mark.parametrize("hello", ["", "--rename-command HELLO NONE"], ids=["hello", "no hello"])
def test_a_connection_logs_in_and_says_who_it_is(
    connect: Connect, own_redis: RedisServer, hello: str
) -> None:
    own_redis.options = tuple(hello.split())
    own_redis.stop()
    own_redis.start()
    own_redis.cli("ACL", "SETUSER", "ann", "on", ">pass word", "~*", "+@all")
    client = connect(own_redis.url, username="ann", password="pass word", name="worker-1")
    assert client.command("ACL", "WHOAMI") == b"ann"
    (line,) = [
        line for line in own_redis.cli("CLIENT", "LIST").splitlines() if "name=worker-1" in line
    ]
    assert f"resp={2 if hello else 3}" in line


def test_a_wrong_password_is_the_servers_error(connect: Connect, own_redis: RedisServer) -> None:
    own_redis.cli("CONFIG", "SET", "requirepass", "right")
    with pytest.raises(ServerError) as caught:
        connect(own_redis.url, password="wrong").ping()
    assert caught.value.word == "WRONGPASS"
    with pytest.raises(ServerError) as caught:
        connect(own_redis.url).ping()
    assert caught.value.word == "NOAUTH"
    connect(f"unix://:right@{own_redis.path}").ping()
    with pytest.raises(ServerError):
        connect(own_redis.url, password="wrong", protocol=2).ping()


def test_a_url_selects_a_database(connect: Connect, redis: RedisServer) -> None:
    first, second = connect(f"{redis.tcp_url}/1"), connect(f"{redis.url}?db=2")
    first.set("key", "one")
    assert second.command("GET", "key") is None
    assert redis.cli("-n", "1", "GET", "key") == "one"


def test_a_name_is_resolved(connect: Connect, redis: RedisServer) -> None:
    connect(f"redis://localhost:{redis.port}").ping()
    with pytest.raises(ConnectionLost, match="cannot find"):
        connect("redis://nowhere.invalid:1", reconnect_max=0).ping()


def test_ipv6_works(connect: Connect, own_redis: RedisServer) -> None:
    own_redis.cli("CONFIG", "SET", "bind", "127.0.0.1 ::1")
    try:
        connect(f"redis://[::1]:{own_redis.port}").ping()
    except ConnectionLost as error:
        if "Cannot assign" in str(error) or "not supported" in str(error):
            pytest.skip("this machine has no IPv6")
        raise


def test_a_server_that_is_not_there_is_named(connect: Connect, tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(ConnectionLost, match=f"127.0.0.1:{port}.*refused"):
        connect(f"redis://127.0.0.1:{port}", reconnect_max=1).ping()
    with pytest.raises(ConnectionLost, match="No such file"):
        connect(f"unix://{tmp_path}/none", reconnect_max=0).ping()


def test_a_server_that_never_greets_is_given_up(connect: Connect, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "mute"))
        mute.listen()
        client = connect(f"unix://{tmp_path}/mute", connect_timeout_s=0.2)
        begun = time.monotonic()
        with pytest.raises(TimedOut):
            client.ping()
        assert time.monotonic() - begun < 4.5, "it would wait 5 s if it were not told otherwise"


def test_a_host_that_swallows_packets_is_given_up(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        place = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:  # the queue of the listener fills up, and from then on it is silent
            sock.setblocking(False)
            sock.connect_ex(place)
        client = connect(f"redis://127.0.0.1:{place[1]}", connect_timeout_s=0.2)
        with pytest.raises(TimedOut, match="did not accept"):
            client.ping()
        for sock in waiting:
            sock.close()


def test_a_client_outlives_its_server(connect: Connect, own_redis: RedisServer) -> None:
    client = connect(own_redis.url, reconnect_max=1, pool_max=1)
    client.set("key", "before")
    own_redis.stop()
    with pytest.raises(ConnectionLost):
        client.command("GET", "key")
    own_redis.start()
    assert client.set("key", "after")
    assert client.command("GET", "key") == b"after"


def test_a_call_waits_for_a_server_that_comes_back(
    connect: Connect, own_redis: RedisServer
) -> None:
    client = connect(own_redis.url, reconnect_max=100)
    client.ping()
    own_redis.stop()
    timer = threading.Timer(0.3, own_redis.start)
    timer.start()
    assert client.set("key", "value"), "it was never sent to the server that died"
    timer.join()


def test_an_idle_connection_that_died_is_replaced_before_anything_is_sent(
    connect: Connect, redis: RedisServer
) -> None:
    client = connect(redis.url, reconnect_max=0)
    for value in ("one", "two"):
        assert client.set("key", value)
        redis.cli("CLIENT", "KILL", "TYPE", "normal")
    assert client.command("GET", "key") == b"two"


class HangsUpOnce:
    """Reads one command, hangs up, and answers every later one."""

    def __init__(self) -> None:
        self.commands = 0

    def __call__(self, args: list[bytes]) -> bytes | None:
        self.commands += 1
        return None if self.commands == 1 else b":7\r\n"


def test_a_read_whose_connection_breaks_is_sent_again(connect: Connect, tmp_path: Path) -> None:
    with Peer(tmp_path / "s", HangsUpOnce()) as peer:
        client = connect(peer.url)
        assert client.command("GET", "key") == 7
        client.close()
    assert peer.seen == [b"GET", b"GET"]


def test_a_write_whose_connection_breaks_is_not_sent_again(
    connect: Connect, tmp_path: Path
) -> None:
    with Peer(tmp_path / "s", HangsUpOnce()) as peer:
        client = connect(peer.url)
        with pytest.raises(ConnectionLost, match="may have been carried out"):
            client.command("INCR", "key")
        assert client.command("INCR", "key") == 7
        client.close()
    assert peer.seen == [b"INCR", b"INCR"]


def test_a_pipeline_is_sent_again_only_if_all_of_it_reads(connect: Connect, tmp_path: Path) -> None:
    with Peer(tmp_path / "s", HangsUpOnce()) as peer:
        client = connect(peer.url)
        with pytest.raises(ConnectionLost):
            client.pipeline().command("GET", "key").command("INCR", "key").execute()
        client.close()
    assert peer.seen == [b"GET"]


def test_a_reply_that_nobody_asked_for_closes_the_connection(
    connect: Connect, tmp_path: Path
) -> None:
    with Peer(tmp_path / "s", lambda args: b"+one\r\n+two\r\n") as peer:
        client = connect(peer.url)
        with pytest.raises(ProtocolError, match="nobody asked for"):
            client.command("GET", "key")
        client.close()


@pytest.mark.parametrize("reply", [b"what\r\n", b"$x\r\n", b"$3\r\nabcd\r\n"])
def test_what_is_not_resp_is_a_protocol_error(
    connect: Connect, tmp_path: Path, reply: bytes
) -> None:
    with Peer(tmp_path / "s", lambda args: reply) as peer:
        client = connect(peer.url)
        with pytest.raises(ProtocolError):
            client.command("GET", "key")
        client.close()


def test_why_a_server_hangs_up_is_not_lost(connect: Connect, own_redis: RedisServer) -> None:
    own_redis.cli("CONFIG", "SET", "proto-max-bulk-len", "1mb")
    client = connect(own_redis.url)
    client.ping()
    with pytest.raises(ServerError, match="invalid bulk length"):
        client.set("key", bytes(16 * MIB))
    assert client.set("key", bytes(MIB))


def test_a_pipeline_reads_while_a_server_that_writes_does_not(
    connect: Connect, tmp_path: Path
) -> None:
    payload = bytes(range(256)) * 4096

    def echo(args: list[bytes]) -> bytes:
        return b"$%d\r\n%b\r\n" % (len(args[1]), args[1])

    with Peer(tmp_path / "s", echo) as peer:
        client = connect(peer.url)
        pipeline = client.pipeline()
        for _ in range(16):
            pipeline.command("ECHO", payload)
        replies = pipeline.execute()
        client.close()
    assert all(reply == payload for reply in replies)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the key and the self-signed certificate of localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    line = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    line += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    line += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    line += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(line, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def tls_redis(
    certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RedisServer, int]]:
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", str(certificate / "cert.pem")]
    options += ["--tls-key-file", str(certificate / "key.pem")]
    with RedisServer(tmp_path_factory.mktemp("tls-redis"), *options) as server:
        yield server, port


def test_tls_carries_large_values_both_ways(
    connect: Connect, certificate: Path, tls_redis: tuple[RedisServer, int]
) -> None:
    trust = ssl.create_default_context(cafile=certificate / "cert.pem")
    client = connect(f"rediss://localhost:{tls_redis[1]}", tls=trust)
    payload = os.urandom(3 * MIB)
    client.set("key", payload)
    assert client.command("GET", "key") == payload
    memory = bytearray(len(payload))
    client.command("GET", "key", into=memory)
    assert memory == payload
    pipeline = client.pipeline()
    for _ in range(8):
        pipeline.command("ECHO", payload)
    assert all(reply == payload for reply in pipeline.execute())


def test_a_server_that_is_not_trusted_is_refused_at_once(
    connect: Connect, tls_redis: tuple[RedisServer, int]
) -> None:
    with pytest.raises(ConfigError, match="not trusted"):
        connect(f"rediss://localhost:{tls_redis[1]}").ping()
    without_tls = connect(f"rediss://localhost:{tls_redis[0].port}", connect_timeout_s=0.2)
    with pytest.raises(TimedOut, match="no TLS"):
        without_tls.ping()


def test_a_forked_child_opens_its_own_connections(redis: RedisServer) -> None:
    script = """
import os, sys
from respkv.client import Client
client = Client(sys.argv[1], pool_max=1, name="forked")
client.set("key", "value")
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        for index in range(200):
            assert client.command("ECHO", f"{os.getpid()}:{index}") == f"{os.getpid()}:{index}".encode()
        os._exit(0)
    children.append(pid)
for index in range(200):
    assert client.command("ECHO", f"parent:{index}") == f"parent:{index}".encode()
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
client.close()
sys.exit(max(codes))
"""
    before = int(redis.cli("INFO", "stats").partition("connections_received:")[2].split()[0])
    subprocess.run([sys.executable, "-c", script, redis.url], check=True, timeout=120)
    after = int(redis.cli("INFO", "stats").partition("connections_received:")[2].split()[0])
    assert after - before == 5, "one of the parent, one of each child, one of redis-cli"


def test_an_interrupted_call_leaves_no_answer_to_the_next(redis: RedisServer) -> None:
    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Client(redis.url, pool_max=1) as client:
            client.ping()

            def wait_for_the_interrupt() -> None:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                client.command("BLPOP", "queue", 0)

            with pytest.raises(KeyboardInterrupt):
                wait_for_the_interrupt()
            redis.cli("LPUSH", "queue", "late")
            assert client.command("ECHO", "mine") == b"mine"
    finally:
        signal.signal(signal.SIGALRM, before)
