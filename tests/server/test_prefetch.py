"""Pages are raised from a real tier before their get, and INFO says so."""

from pathlib import Path

from tests.server.raw import Raw, Word
from tests.server.watching import wait_for
from tests.server_process import ServerProcess

PAGE_BYTES = 2048
SCHEMA = ("LAYERS", 2, "HEADS", 2, "DIM", 16, "TOKENS", 4, "DTYPE", "float32")
KEYS = [b"ns:%064x" % number for number in range(12)]


def start(folder: Path, **settings: object) -> ServerProcess:
    return ServerProcess(maxmemory="16mb", nvme_path=folder / "a", nvme_bytes="64mb", **settings)


def put_chain(raw: Raw) -> None:
    parent: tuple[Word, ...] = ()
    assert raw.ask("KV.SCHEMA", "SET", "ns", *SCHEMA) == b"OK"
    for key in KEYS:
        assert raw.ask("KV.PUT", key, key.ljust(PAGE_BYTES), *parent) == b"OK"
        parent = ("PARENT", key)


def test_a_match_raises_what_it_found_and_the_get_counts_as_won(tmp_path: Path) -> None:
    server = start(tmp_path)
    with Raw(server.connect()) as raw:
        put_chain(raw)
    assert server.stop() == 0
    server = start(tmp_path)
    try:
        with Raw(server.connect()) as raw:
            assert server.info()["kv_prefetch_mode"] == "auto"
            raw.ask("KV.MATCH", len(KEYS), *KEYS)
            wait_for(server, "kv_promoted", len(KEYS))
            info = server.info()
            assert info["kv_prefetch_match_raised"] == str(len(KEYS))
            assert int(info["kv_prefetch_pending_bytes"]) == len(KEYS) * PAGE_BYTES
            assert all(raw.ask("GET", key) for key in KEYS)
            wait_for(server, "kv_prefetch_match_used", len(KEYS))
            assert server.info()["kv_prefetch_match_wasted"] == "0"
            assert server.info()["kv_nvme_hits"] == str(len(KEYS))
    finally:
        assert server.stop() == 0


def test_a_session_that_is_expected_is_in_memory_before_it_comes(tmp_path: Path) -> None:
    server = start(tmp_path)
    try:
        with Raw(server.connect()) as raw:
            put_chain(raw)
            raw.ask("KV.MATCH", len(KEYS), *KEYS, "SESSION", "chat")
            assert raw.ask("KV.HINT", "ns", "chat", "DEMOTE")[0] == b"accepted"
            wait_for(server, "kv_arena_used_bytes", 0)
            assert raw.ask("KV.HINT", "ns", "chat", "EXPECT", 300)[0] == b"accepted"
            wait_for(server, "kv_prefetch_hint_raised", len(KEYS))
            wait_for(server, "kv_arena_payload_bytes", len(KEYS) * PAGE_BYTES)
    finally:
        assert server.stop() == 0


def test_off_means_off_at_once(tmp_path: Path) -> None:
    server = start(tmp_path)
    with Raw(server.connect()) as raw:
        put_chain(raw)
    assert server.stop() == 0
    server = start(tmp_path)
    try:
        with Raw(server.connect()) as raw:
            assert raw.ask("CONFIG", "SET", "prefetch", "off") == b"OK"
            raw.ask("KV.MATCH", len(KEYS), *KEYS)
            assert raw.ask("GET", KEYS[0])
            info = server.info()
            assert info["kv_prefetch_mode"] == "off"
            assert info["kv_prefetch_match_raised"] == "0"
            assert info["kv_nvme_hits"] == "1"
    finally:
        assert server.stop() == 0
