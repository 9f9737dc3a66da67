"""A server that writes only what is used, and says so."""

from pathlib import Path

from tests.server.raw import Raw
from tests.server.watching import number_of, wait_for
from tests.server_process import ServerProcess

VALUE = bytes(20_000)


def test_what_is_never_used_is_not_written_until_the_server_stops(tmp_path: Path) -> None:
    settings: dict[str, object] = {
        "maxmemory": "16mb",
        "nvme_path": tmp_path / "a",
        "nvme_bytes": "64mb",
    }
    server = ServerProcess(admission="second", **settings)
    with Raw(server.connect()) as raw:
        for number in range(40):
            assert raw.ask("SET", f"k{number}", VALUE) == b"OK"
        for number in range(10):
            assert raw.ask("GET", f"k{number}") == VALUE
        wait_for(server, "kv_admission_refused", 30)
        wait_for(server, "kv_admission_admitted", 10)
        wait_for(server, "kv_nvme_pages", 10)
        assert number_of(server, "kv_admission_left_out") == 30
        assert server.info()["kv_admission_mode"] == "second"
        assert raw.ask("GET", "k39") == VALUE
        assert raw.ask("CONFIG", "SET", "admission", "all") == b"OK"
    assert server.stop() == 0
    server = ServerProcess(**settings)
    try:
        with Raw(server.connect()) as raw:
            assert raw.ask("DBSIZE") == 40
    finally:
        assert server.stop() == 0
