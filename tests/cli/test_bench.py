"""``respkv bench``."""

import json
import math
from typing import Any

import pytest

from respkv.cli.bench import percentile
from respkv.client import Client
from tests.cli.conftest import Cli

QUICK = ("--seconds", "0.2", "--clients", "2", "--pages", "3")


def num_keys(url: str) -> int:
    with Client(url) as client:
        count = client.command("DBSIZE")
    assert isinstance(count, int)
    return count


def check_phases(found: dict[str, Any], page_bytes: int) -> None:
    for phase in (found["phases"]["put"], found["phases"]["get"]):
        assert phase["pages"] >= 6
        assert phase["misses"] == 0
        assert phase["seconds"] >= 0.2
        expected = phase["pages"] * page_bytes / phase["seconds"] / 1e9
        assert phase["gb_per_s"] == pytest.approx(expected)
        assert 0 < phase["p50_ms"] <= phase["p90_ms"] <= phase["p99_ms"] <= phase["max_ms"]


@pytest.mark.parametrize("size", ["32", "64k", "1mb"])
def test_any_redis_can_be_measured_with_plain(size: str, cli: Cli, redis_url: str) -> None:
    before = num_keys(redis_url)
    done = cli("bench", "--plain", "--json", "--size", size, *QUICK, url=redis_url)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["how"], found["clients"], found["pages"]) == ("plain", 2, 3)
    check_phases(found, {"32": 32, "64k": 64_000, "1mb": 1 << 20}[size])
    assert num_keys(redis_url) == before


@pytest.mark.parametrize("way", [(), ("--shm",), ("--plain",)], ids=["kv", "shm", "plain"])
def test_a_server_of_ours_can_be_measured_each_way(
    way: tuple[str, ...], cli: Cli, server_url: str
) -> None:
    before = num_keys(server_url)
    done = cli("bench", "--json", "--size", "1mb", *way, *QUICK, url=server_url)
    assert (done.returncode, done.stderr) == (0, "")
    check_phases(json.loads(done.stdout), 1 << 20)
    assert num_keys(server_url) == before


def test_every_put_is_stored_and_none_skipped(cli: Cli, server_url: str) -> None:
    with Client(server_url) as client:
        before = client.info("kv")
        found = json.loads(cli("bench", "--json", *QUICK, url=server_url).stdout)
        after = client.info("kv")
    assert after["kv_pages_skipped"] == before["kv_pages_skipped"]
    stored = int(after["kv_pages_put"]) - int(before["kv_pages_put"])
    assert stored == found["phases"]["put"]["pages"]


def test_the_table_has_a_line_for_each_way(cli: Cli, redis_url: str) -> None:
    lines = cli("bench", "--plain", *QUICK, url=redis_url).stdout.splitlines()
    assert lines[0].endswith(": SET, GET, 2 clients, 3 pages each of 1mb")
    assert lines[2].split()[:2] == ["GB/s", "pages/s"]
    assert [line.split()[0] for line in lines[3:]] == ["put", "get"]
    assert len({len(line) for line in lines[2:]}) == 1


def test_pages_that_were_evicted_are_misses(cli: Cli, redis_port: int, redis_url: str) -> None:
    with Client(redis_url) as client:
        client.command("CONFIG", "SET", "maxmemory", "8mb", "maxmemory-policy", "allkeys-lru")
        try:
            args = ("--plain", "--json", "--clients", "1", "--pages", "16", "--seconds", "0.2")
            found = json.loads(cli("bench", *args, url=redis_url).stdout)
        finally:
            client.command("CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")
    assert found["phases"]["put"]["misses"] == 0
    assert found["phases"]["get"]["misses"] > 0


def test_a_server_without_kv_commands_is_told_about_plain(cli: Cli, redis_url: str) -> None:
    done = cli("bench", *QUICK, url=redis_url)
    assert done.returncode == 1
    address = redis_url.removeprefix("redis://")
    assert done.stderr == f"respkv: {address} knows no KV.PUT and KV.GET; try --plain\n"


def test_a_server_that_refuses_ends_the_measuring(cli: Cli, redis_url: str) -> None:
    with Client(redis_url) as client:
        client.command("CONFIG", "SET", "maxmemory", "1mb")
        try:
            done = cli("bench", "--plain", *QUICK, url=redis_url)
        finally:
            client.command("CONFIG", "SET", "maxmemory", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("respkv: OOM ")
    assert done.stderr.count("\n") == 1


def test_a_server_that_is_away_is_one_line_and_exit_code_1(cli: Cli, nowhere: str) -> None:
    done = cli("bench", *QUICK, url=nowhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("respkv: cannot connect to ")


@pytest.mark.parametrize("size", ["31", "x", "1 mb", "-1"])
def test_a_size_that_is_none_is_refused(size: str, cli: Cli, nowhere: str) -> None:
    done = cli("bench", f"--size={size}", url=nowhere)
    assert done.returncode == 2
    assert f"{size!r}: accepted are 32 and up" in done.stderr


def test_a_percentile_is_the_value_that_so_many_do_not_exceed() -> None:
    ordered = [float(number) for number in range(1, 101)]
    assert [percentile(ordered, share) for share in (1, 50, 99, 99.9, 100)] == [1, 50, 99, 100, 100]
    assert percentile([7.0], 50) == percentile([7.0], 99.9) == 7.0
    assert math.isnan(percentile([], 50))
