"""redis-benchmark of Redis 7.0 runs its whole course and meets no error."""

import csv
import shutil
import subprocess

import pytest

from tests.server_process import ServerProcess

pytestmark = pytest.mark.skipif(
    shutil.which("redis-benchmark") is None,
    reason="redis-benchmark is not installed (apt-get install redis-tools)",
)


def bench(server: ServerProcess, *words: str) -> str:
    line = ["redis-benchmark", "-p", str(server.port), *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done
    assert not done.stderr, done.stderr
    assert "rror" not in done.stdout, done.stdout
    return done.stdout


@pytest.mark.parametrize("protocol", [[], ["-3"]], ids=["RESP2", "RESP3"])
def test_pipelined_set_get_mset(protocol: list[str], server: ServerProcess) -> None:
    out = bench(server, "-t", "set,get,mset", "-P", "16", "-n", "20000", "-q", *protocol)
    for name in ("SET: ", "GET: ", "MSET (10 keys): "):
        assert name in out


def test_the_csv_table(server: ServerProcess) -> None:
    """It asks CONFIG GET save and appendonly first, and would print a warning."""
    out = bench(server, "-t", "set,get", "-n", "5000", "-r", "1000", "--csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["test"] for row in rows] == ["SET", "GET"]
    assert all(float(row["rps"]) > 0 for row in rows)


def test_values_that_land_in_slots(server: ServerProcess) -> None:
    bench(server, "-t", "set,get", "-n", "400", "-d", "300000", "-P", "4", "-c", "8", "-q")


def test_the_inline_and_bulk_pings(server: ServerProcess) -> None:
    out = bench(server, "-t", "ping_inline,ping_mbulk", "-n", "5000", "-P", "8", "-q")
    assert "PING_INLINE: " in out
    assert "PING_MBULK: " in out
