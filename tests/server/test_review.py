"""What a review found, from outside."""

import pytest

from tests.conftest import StartServer
from tests.server.raw import Raw, error_of

LATEST = (1 << 63) - 1


def test_a_client_that_waits_behind_a_password_is_let_in_when_it_is_taken_away(
    start_server: StartServer,
) -> None:
    server = start_server()
    with Raw(server.connect()) as owner, Raw(server.connect()) as early:
        assert owner.ask("CONFIG", "SET", "requirepass", "secret") == b"OK"
        with Raw(server.connect()) as late:
            assert "NOAUTH" in error_of(late.ask("PING"))
            assert owner.ask("CONFIG", "SET", "requirepass", "") == b"OK"
            assert late.ask("PING") == b"PONG"
        assert early.ask("PING") == b"PONG"


@pytest.mark.parametrize(
    "words",
    [
        ("KV.PUT", "page", b"bytes", "PX", LATEST),
        ("KV.PIN", "page", LATEST),
        (
            "KV.SCHEMA",
            "SET",
            "n",
            *["LAYERS", "1", "HEADS", "1", "DIM", "1", "TOKENS", "1", "DTYPE", "int8", "TTL"],
            LATEST,
        ),
    ],
)
def test_no_time_is_so_late_that_it_leaves_64_bits(raw: Raw, words: tuple[str, ...]) -> None:
    assert raw.ask("KV.PUT", "page", b"bytes") == b"OK"
    assert "must be at most" in error_of(raw.ask(*words))


@pytest.mark.parametrize(
    "words",
    [
        ("HELLO", "3", b"\xff" * 100_000),
        (
            "KV.SCHEMA",
            "SET",
            "n",
            *["LAYERS", "1", "HEADS", "1", "DIM", "1", "TOKENS", "1", "DTYPE"],
            b"x" * 100_000,
        ),
    ],
)
def test_an_error_does_not_send_back_what_was_long(raw: Raw, words: tuple[str, ...]) -> None:
    assert len(raw.raw(*words)) < 500


def test_one_connection_has_only_so_many_leases(start_server: StartServer) -> None:
    # None of them lapses meanwhile.
    server = start_server(shm="ro", shm_path="", lease_default=280_000, lease_max=280_000)
    with Raw(server.connect()) as raw:
        for _ in range(8):
            raw.ask_all([("KV.LEASE", 1, "absent")] * 8192)
        assert error_of(raw.ask("KV.LEASE", 1, "absent")).startswith("BUSY")
        assert raw.ask("KV.RELEASE", 1) == 1
        assert raw.ask("KV.LEASE", 1, "absent") == [65537, None]
