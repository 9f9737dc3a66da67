"""Who may connect: loopback by default, other machines only with a password or when told so."""

import socket

import pytest

from tests.conftest import StartServer
from tests.server.raw import Raw
from tests.server_process import ServerProcess


def own_address() -> str:
    """Return an address of this machine that is not loopback. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address: str = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return address


def from_outside(server: ServerProcess) -> Raw:
    return Raw(socket.create_connection((own_address(), server.port), timeout=60))


def test_the_default_listens_on_loopback_only(server: ServerProcess) -> None:
    with pytest.raises(ConnectionRefusedError):
        from_outside(server)


def test_without_a_password_other_machines_are_told_why_not(start_server: StartServer) -> None:
    server = start_server(host="0.0.0.0")
    with from_outside(server) as raw:
        reply = raw.wait_closed()
    assert reply.startswith(b"-DENIED respkv is running in protected mode")
    assert reply.endswith(b"\r\n")
    assert reply.count(b"\n") == 1
    with from_outside(server) as raw:
        raw.socket.sendall(b"SET k v\r\n")
        assert raw.wait_closed() in (reply, b"")
    with Raw(server.connect()) as raw:
        assert raw.ask("EXISTS", "k") == 0
        assert raw.ask("CONFIG", "SET", "protected-mode", "no") == b"OK"
        with from_outside(server) as other:
            assert other.ask("PING") == b"PONG"
        assert raw.ask("CONFIG", "SET", "protected-mode", "yes") == b"OK"
        with from_outside(server) as other:
            assert other.wait_closed().startswith(b"-DENIED")
    assert int(server.info()["rejected_connections"]) == 3


def test_with_a_password_other_machines_may_authenticate(start_server: StartServer) -> None:
    server = start_server(host="0.0.0.0", requirepass="pw")
    with from_outside(server) as raw:
        assert raw.raw("PING") == b"-NOAUTH Authentication required.\r\n"
        assert raw.ask("AUTH", "pw") == b"OK"
        assert raw.ask("PING") == b"PONG"


def test_loopback_and_the_unix_socket_need_no_password(start_server: StartServer) -> None:
    server = start_server(host="0.0.0.0")
    with Raw(server.connect()) as raw:
        assert raw.ask("PING") == b"PONG"
    with socket.socket(socket.AF_UNIX) as unix:
        unix.connect(server.unixsocket)
        with Raw(unix) as raw:
            assert raw.ask("PING") == b"PONG"
