"""Quotas, pins, TTLs and hints over a connection: each answer says what is in force, and why."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartServer
from tests.server.raw import Raw, error_of
from tests.server.test_kv_schemas import GEOMETRY, PAGE_BYTES, as_map, set_schema
from tests.server_process import ServerProcess

PAGE = b"x" * 1000


@pytest.fixture
def ns(raw: Raw, request: pytest.FixtureRequest) -> str:
    """Return a namespace of the test's own: quotas outlive a flush."""
    return f"r{abs(hash(request.node.nodeid))}"


def info_of(raw: Raw, *sections: str) -> dict[str, str]:
    text = raw.ask("INFO", *sections).decode()
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def described(raw: Raw, key: str) -> dict[bytes, Any]:
    return as_map(raw.ask("KV.INFO", key))


# -- quotas -----------------------------------------------------------------------------------


def test_a_quota_is_set_and_read_and_evicts_the_oldest_page(raw: Raw, ns: str) -> None:
    assert as_map(raw.ask("KV.QUOTA", ns))[b"max_bytes"] == 0
    assert as_map(raw.ask("KV.QUOTA", ns, "MAXBYTES", 3000))[b"max_bytes"] == 3000
    for name in "abcd":
        assert raw.ask("KV.PUT", f"{ns}:{name}", PAGE) == b"OK"
    assert raw.ask("EXISTS", f"{ns}:a") == 0
    reason, text = raw.ask("KV.EXPLAIN", f"{ns}:a")
    assert reason == b"quota"
    assert b"KV.QUOTA" in text
    quota = as_map(raw.ask("KV.QUOTA", ns))
    assert (quota[b"bytes"], quota[b"pages"]) == (3000, 3)


def test_a_tenant_has_a_quota_of_its_own_or_that_of_each(raw: Raw, ns: str) -> None:
    raw.ask("KV.QUOTA", ns, "TENANTBYTES", 2000)
    raw.ask("KV.QUOTA", ns, "TENANT", "big", "MAXBYTES", 0)
    for tenant in ("small", "big"):
        for name in "abc":
            assert raw.ask("KV.PUT", f"{ns}:{tenant}{name}", PAGE, "TENANT", tenant) == b"OK"
    small = as_map(raw.ask("KV.QUOTA", ns, "TENANT", "small"))
    assert (small[b"max_bytes"], small[b"bytes"], small[b"pages"]) == (2000, 2000, 2)
    big = as_map(raw.ask("KV.QUOTA", ns, "TENANT", "big"))
    assert (big[b"max_bytes"], big[b"bytes"]) == (0, 3000)
    big = as_map(raw.ask("KV.QUOTA", ns, "TENANT", "big", "MAXBYTES", "DEFAULT"))
    assert (big[b"max_bytes"], big[b"bytes"]) == (2000, 2000)
    assert as_map(raw.ask("KV.QUOTA", ns))[b"tenants"] == 2
    found = described(raw, f"{ns}:smallc")
    assert found[b"tenant"] == b"small"
    assert (found[b"tenant_bytes"], found[b"tenant_max_bytes"]) == (2000, 2000)
    assert found[b"namespace_bytes"] == 4000


def test_a_put_that_cannot_fit_is_told_the_quota_and_loses_nothing(raw: Raw, ns: str) -> None:
    raw.ask("KV.QUOTA", ns, "MAXBYTES", 1500)
    assert raw.ask("KV.PUT", f"{ns}:a", PAGE, "PIN", 60_000) == b"OK"
    refused = error_of(raw.ask("KV.PUT", f"{ns}:b", PAGE))
    assert refused.startswith("KVQUOTA ")
    assert "may keep 1500 bytes and has 1000, 1000 more do not fit" in refused
    assert "never fits" in error_of(raw.ask("KV.PUT", f"{ns}:b", b"x" * 100_000))
    assert raw.ask("KV.GET", f"{ns}:a") == PAGE
    lower = error_of(raw.ask("KV.QUOTA", ns, "MAXBYTES", 500))
    assert lower.startswith("KVQUOTA ")
    assert as_map(raw.ask("KV.QUOTA", ns))[b"max_bytes"] == 1500
    raw.ask("KV.UNPIN", f"{ns}:a")
    assert raw.ask("KV.PUT", f"{ns}:b", PAGE) == b"OK"
    assert raw.ask("KV.GET", f"{ns}:a") is None


@pytest.mark.parametrize("num_tokens", [12, 2048], ids=["small", "large"])
@pytest.mark.parametrize("how", ["KV.PUT", "KV.SEQ.PUT"])
def test_a_put_refused_for_its_quota_evicts_nobody_elses_pages(
    how: str, num_tokens: int, start_server: StartServer
) -> None:
    server = start_server(maxmemory="4mb", small_value_memory="1mb")
    tokens, payload = b"\1\0\0\0" * num_tokens, b"x" * (num_tokens * PAGE_BYTES // 16)
    words = ("q:more", payload) if how == "KV.PUT" else ("q", tokens, 1, payload)
    with Raw(server.connect()) as raw:
        set_schema(raw, "q", GEOMETRY.replace("TOKENS 16", f"TOKENS {num_tokens}"))
        assert raw.ask("KV.PUT", "q:own", payload, "TENANT", "t", "PIN", 60_000) == b"OK"
        raw.ask("KV.QUOTA", "q", "TENANT", "t", "MAXBYTES", len(payload))
        for number in range(2 * (4 << 20) // len(payload)):
            raw.ask("KV.PUT", f"q:{number}", payload, "TENANT", "u")
        before = int(info_of(raw)["evicted_keys"])
        assert before > 0
        for _ in range(3):
            assert error_of(raw.ask(how, *words, "TENANT", "t")).startswith("KVQUOTA ")
        assert int(info_of(raw)["evicted_keys"]) == before
        assert raw.ask(how, *words, "TENANT", "u") == (b"OK" if how == "KV.PUT" else [1, 0])
        assert int(info_of(raw)["evicted_keys"]) > before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["MAXBYTES", "-1"], "MAXBYTES must be at least 0"),
        (["MAXBYTES", "x"], "not an integer"),
        (["MAXBYTES", "1", "MAXBYTES", "2"], "MAXBYTES"),
        (["TENANT", "t", "TENANTBYTES", "2"], "TENANTBYTES"),
        (["MAXBYTES", "1", "TENANT", "t"], "TENANT"),
        (["TENANT", ""], "a tenant has 1 to"),
        (["BOGUS"], "BOGUS"),
        (["MAXBYTES"], "missing"),
    ],
)
def test_a_wrong_quota_is_refused(words: list[str], said: str, raw: Raw, ns: str) -> None:
    assert said in error_of(raw.ask("KV.QUOTA", ns, *words))
    assert as_map(raw.ask("KV.QUOTA", ns))[b"max_bytes"] == 0


def test_a_schema_sets_quotas_and_leaves_them_when_it_says_nothing(raw: Raw, ns: str) -> None:
    most = str(2 * PAGE_BYTES)
    assert set_schema(raw, ns, GEOMETRY, "MAXBYTES", most, "TENANTBYTES", str(PAGE_BYTES)) == b"OK"
    assert set_schema(raw, ns) == b"OK"
    schema = as_map(raw.ask("KV.SCHEMA", "GET", ns))
    assert (schema[b"max_bytes"], schema[b"tenant_bytes"]) == (2 * PAGE_BYTES, PAGE_BYTES)
    for name in "abc":
        raw.ask("KV.PUT", f"{ns}:{name}", b"x" * PAGE_BYTES)
    assert as_map(raw.ask("KV.QUOTA", ns))[b"bytes"] == 2 * PAGE_BYTES
    assert set_schema(raw, ns, GEOMETRY, "MAXBYTES", "0", "TENANTBYTES", "0") == b"OK"
    assert as_map(raw.ask("KV.QUOTA", ns))[b"max_bytes"] == 0


def test_the_quotas_of_a_namespace_go_with_its_schema(raw: Raw, ns: str) -> None:
    set_schema(raw, ns, GEOMETRY, "MAXBYTES", str(PAGE_BYTES))
    raw.ask("KV.QUOTA", ns, "TENANT", "t", "MAXBYTES", 1)
    assert raw.ask("KV.SCHEMA", "DEL", ns) == 1
    quota = as_map(raw.ask("KV.QUOTA", ns))
    assert (quota[b"max_bytes"], quota[b"tenants"]) == (0, 0)


@pytest.mark.parametrize("is_orderly", [True, False])
def test_quotas_and_what_tenants_keep_survive_a_restart(
    is_orderly: bool, start_server: StartServer, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"nvme_path": str(tmp_path), "nvme_bytes": 64 << 20}
    first = ServerProcess(**settings)
    raw = Raw(first.connect())
    raw.ask("KV.QUOTA", "n", "MAXBYTES", 5000, "TENANTBYTES", 2000)
    raw.ask("KV.QUOTA", "n", "TENANT", "t", "MAXBYTES", 3000)
    for name in "abcd":
        assert raw.ask("KV.PUT", f"n:{name}", PAGE, "DURABLE", "TENANT", "t") == b"OK"
    raw.close()
    if is_orderly:
        first.stop()
    else:
        first.stop(signal.SIGKILL)
    raw = Raw(start_server(**settings).connect())
    whole = as_map(raw.ask("KV.QUOTA", "n"))
    assert (whole[b"max_bytes"], whole[b"tenant_bytes"]) == (5000, 2000)
    assert as_map(raw.ask("KV.QUOTA", "n", "TENANT", "u"))[b"max_bytes"] == 2000
    tenant = as_map(raw.ask("KV.QUOTA", "n", "TENANT", "t"))
    assert (tenant[b"max_bytes"], tenant[b"bytes"], tenant[b"pages"]) == (3000, 3000, 3)
    assert raw.ask("KV.PUT", "n:e", PAGE, "TENANT", "t") == b"OK"
    assert as_map(raw.ask("KV.QUOTA", "n", "TENANT", "t"))[b"bytes"] == 3000
    raw.close()


# -- pins and TTLs ----------------------------------------------------------------------------


def test_a_pin_is_cut_to_pin_max_and_info_shows_it(start_server: StartServer) -> None:
    raw = Raw(start_server(pin_max=5000, ttl_max=9000).connect())
    assert raw.ask("KV.PUT", "n:a", PAGE, "PIN", 60_000, "PX", 60_000) == b"OK"
    info = described(raw, "n:a")
    assert 0 < info[b"pinned_ms"] <= 5000
    assert 0 < info[b"ttl_ms"] <= 9000
    assert raw.ask("KV.RETAIN", "n:a", "PIN", 60_000, "PX", 70_000, "PRIORITY", 3) == [
        [b"PIN", b"clipped", 5000, b"pin-max is 5000 ms"],
        [b"PX", b"clipped", 9000, b"ttl-max is 9000 ms"],
        [b"PRIORITY", b"accepted", 3, b""],
    ]
    assert raw.ask("KV.RETAIN", "n:a", "PIN", 0, "PX", 0)[0][1:3] == [b"accepted", 0]
    info = described(raw, "n:a")
    assert (info[b"pinned_ms"], info[b"ttl_ms"], info[b"priority"]) == (0, -1, 3)
    assert raw.ask("KV.PIN", "n:a", 60_000) == 1
    assert 0 < described(raw, "n:a")[b"pinned_ms"] <= 5000
    fields = info_of(raw, "kv")
    assert (fields["kv_pinned"], fields["kv_pinned_bytes"]) == ("1", "1000")
    assert fields["kv_wishes_clipped"] == "2"
    raw.close()


def test_pins_beyond_their_share_are_refused(start_server: StartServer) -> None:
    server = start_server(maxmemory="16mb", pinned_share_max=25)
    raw = Raw(server.connect())
    page = b"x" * (1 << 20)
    for number in range(3):
        assert raw.ask("KV.PUT", f"n:{number}", page, "PIN", 60_000) == b"OK"
    refused = error_of(raw.ask("KV.PUT", "n:3", page, "PIN", 60_000))
    assert refused.startswith("KVPIN 3145728 bytes are pinned and 1048576 more")
    assert raw.ask("EXISTS", "n:3") == 0
    assert raw.ask("KV.PUT", "n:3", page) == b"OK"
    assert error_of(raw.ask("KV.PIN", "n:3", 60_000)).startswith("KVPIN ")
    [word, status, value, reason] = raw.ask("KV.RETAIN", "n:3", "PIN", 60_000)[0]
    assert (word, status, value) == (b"PIN", b"rejected", 0)
    assert b"pinned-share-max" in reason
    assert raw.ask("KV.PIN", "n:0", 50_000) == 1, "one that is pinned already counts once"
    raw.ask("KV.UNPIN", "n:0")
    assert raw.ask("KV.PIN", "n:3", 60_000) == 1
    raw.close()


def test_retain_answers_null_for_no_page_and_refuses_what_it_does_not_know(
    raw: Raw, ns: str
) -> None:
    assert raw.ask("KV.RETAIN", f"{ns}:a", "PIN", 1) is None
    raw.ask("KV.PUT", f"{ns}:a", PAGE)
    assert "NX" in error_of(raw.ask("KV.RETAIN", f"{ns}:a", "NX", "1"))
    assert "PIN" in error_of(raw.ask("KV.RETAIN", f"{ns}:a", "PIN", 1, "PIN", 2))
    [answer] = raw.ask("KV.RETAIN", f"{ns}:a", "DURABLE", "SESSION", "s")[:1]
    assert answer[:3] == [b"DURABLE", b"rejected", 0]
    assert described(raw, f"{ns}:a")[b"session"] == b"s"


# -- hints ------------------------------------------------------------------------------------


def test_a_hint_on_a_session_nobody_knows_is_rejected(raw: Raw, ns: str) -> None:
    for words in (["END"], ["EXPECT", 100], ["DEMOTE"]):
        status, value, reason = raw.ask("KV.HINT", ns, "nobody", *words)
        assert (status, value) == (b"rejected", 0)
        assert b"SESSION 'nobody'" in reason
    assert "accepted are END" in error_of(raw.ask("KV.HINT", ns, "s", "BOGUS"))
    assert "MORE" in error_of(raw.ask("KV.HINT", ns, "s", "END", "MORE"))
    assert "EXPECT" in error_of(raw.ask("KV.HINT", ns, "s", "EXPECT", 0))


def test_a_session_is_known_by_the_names_of_its_pages_without_a_schema_too(
    raw: Raw, ns: str
) -> None:
    raw.ask("KV.PUT", f"{ns}:a", PAGE, "SESSION", "s")
    raw.ask("KV.PUT", f"{ns}-other:a", PAGE, "SESSION", "s")
    assert raw.ask("KV.HINT", ns, "s", "END")[:2] == [b"accepted", 1]
    assert described(raw, f"{ns}:a")[b"is_ended"] == 1
    assert described(raw, f"{ns}-other:a")[b"is_ended"] == 0, "another conversation"
    assert raw.ask("KV.HINT", "", "s", "END")[0] == b"rejected"


def test_a_session_that_ended_is_the_first_to_go(raw: Raw, ns: str) -> None:
    raw.ask("KV.QUOTA", ns, "MAXBYTES", 4000)
    set_schema(raw, ns, "LAYERS 1 HEADS 1 DIM 125 TOKENS 2 DTYPE float16")
    keys = {name: f"{ns}:{name * 64}" for name in "abcdef"}
    raw.ask("KV.PUT", keys["a"], PAGE, "SESSION", "old")
    raw.ask("KV.PUT", keys["b"], PAGE, "SESSION", "new", "TOKENS", 2)
    raw.ask("KV.PUT", keys["c"], PAGE, "SESSION", "new", "PARENT", keys["b"])
    raw.ask("KV.PUT", keys["d"], PAGE, "SESSION", "old2")
    status, value, _ = raw.ask("KV.HINT", ns, "new", "END")
    assert (status, value) == (b"accepted", 2)
    assert described(raw, keys["c"])[b"is_ended"] == 1
    assert described(raw, keys["c"])[b"session"] == b"new"
    raw.ask("KV.PUT", keys["e"], PAGE)
    raw.ask("KV.PUT", keys["f"], PAGE)
    there = [name for name, key in keys.items() if raw.ask("EXISTS", key)]
    assert there == ["a", "d", "e", "f"]


def test_an_expected_return_is_cut_to_expect_max_and_shown(start_server: StartServer) -> None:
    raw = Raw(start_server(expect_max=5000).connect())
    set_schema(raw, "n", "LAYERS 1 HEADS 1 DIM 125 TOKENS 2 DTYPE float16")
    key = "n:" + "a" * 64
    raw.ask("KV.PUT", key, PAGE, "SESSION", "s")
    assert described(raw, key)[b"expected_ms"] == -1
    assert raw.ask("KV.HINT", "n", "s", "EXPECT", 60_000) == [
        b"clipped",
        5000,
        b"expect-max is 5000 ms",
    ]
    assert 0 < described(raw, key)[b"expected_ms"] <= 5000
    assert raw.ask("KV.HINT", "n", "s", "EXPECT", 1000)[:2] == [b"accepted", 1000]
    fields = info_of(raw, "kv")
    assert (fields["kv_sessions"], fields["kv_sessions_expected"]) == ("1", "1")
    assert (fields["kv_wishes_accepted"], fields["kv_wishes_clipped"]) == ("1", "1")
    assert raw.ask("KV.MATCH", 1, key, "SESSION", "s")[0] == 1
    assert described(raw, key)[b"expected_ms"] == -1, "it is back"
    assert raw.ask("KV.HINT", "n", "s", "DEMOTE")[0] == b"rejected", "there are no files"
    raw.close()


def test_a_demoted_session_leaves_memory_and_is_read_back(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(nvme_path=str(tmp_path), nvme_bytes=64 << 20)
    raw = Raw(server.connect())
    set_schema(raw, "n", "LAYERS 1 HEADS 1 DIM 125 TOKENS 2 DTYPE float16")
    keys = ["n:" + f"{number:x}" * 64 for number in range(8)]
    parent: list[str] = []
    for number, key in enumerate(keys):
        page = bytes([number]) * 1000
        assert raw.ask("KV.PUT", key, page, "SESSION", "s", *parent) == b"OK"
        parent = ["PARENT", key]
    other = "n:" + "f" * 64
    raw.ask("KV.PUT", other, PAGE)
    assert raw.ask("KV.HINT", "n", "s", "DEMOTE")[:2] == [b"accepted", 8]
    deadline = time.monotonic() + 60
    while any(described(raw, key)[b"tier"] != b"nvme" for key in keys):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert described(raw, other)[b"tier"] == b"cpu"
    for number, key in enumerate(keys):
        assert raw.ask("KV.GET", key) == bytes([number]) * 1000
    raw.close()


def test_a_demoted_session_is_back_in_memory_when_it_is_expected(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(nvme_path=str(tmp_path), nvme_bytes=64 << 20)
    raw = Raw(server.connect())
    set_schema(raw, "n", "LAYERS 1 HEADS 1 DIM 125 TOKENS 2 DTYPE float16")
    key = "n:" + "a" * 64
    raw.ask("KV.PUT", key, PAGE, "SESSION", "s")
    assert raw.ask("KV.HINT", "n", "s", "EXPECT", 1500)[0] == b"accepted"
    assert raw.ask("KV.HINT", "n", "s", "DEMOTE")[0] == b"accepted"
    deadline = time.monotonic() + 60
    while info_of(raw, "kv")["kv_prefetch_hint_raised"] != "1":  # what is in files alone
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while described(raw, key)[b"tier"] != b"cpu":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    raw.close()


# -- INFO -------------------------------------------------------------------------------------


def test_info_has_a_line_for_each_namespace_and_tenant_whatever_their_names(raw: Raw) -> None:
    raw.ask("KV.PUT", b"a b\r\nx:1", PAGE, "TENANT", b"t:\n/")
    raw.ask("KV.QUOTA", b"a b\r\nx", "MAXBYTES", 9000)
    fields = info_of(raw, "kv")
    line = fields["kv_namespace_a%20b%0D%0Ax"]
    assert line.startswith("pages=1,bytes=1000,max_bytes=9000,tenant_bytes=0,tenants=1")
    assert fields["kv_tenant_a%20b%0D%0Ax/t%3A%0A%2F"] == "pages=1,bytes=1000,max_bytes=0"
    raw.ask("KV.QUOTA", b"a b\r\nx", "MAXBYTES", 0)
    raw.ask("FLUSHALL")
    assert "kv_namespace_a%20b%0D%0Ax" not in info_of(raw, "kv")


def test_info_names_so_many_namespaces_and_no_more(raw: Raw) -> None:
    for number in range(150):
        raw.ask("KV.PUT", f"many{number}:a", b"x" * (1000 + number))
    fields = info_of(raw, "kv")
    named = [name for name in fields if name.startswith("kv_namespace_")]
    assert len(named) == 100
    assert "kv_namespace_many149" in named
    assert int(fields["kv_spaces"]) >= 150


def test_counters_begin_again_with_resetstat(raw: Raw, ns: str) -> None:
    raw.ask("KV.QUOTA", ns, "MAXBYTES", 1500)
    raw.ask("KV.PUT", f"{ns}:a", PAGE)
    raw.ask("KV.PUT", f"{ns}:b", PAGE)
    raw.ask("KV.PUT", f"{ns}:c", b"x" * 2000)
    raw.ask("KV.HINT", ns, "nobody", "END")
    fields = info_of(raw, "kv")
    assert int(fields["kv_quota_evictions"]) >= 1
    assert int(fields["kv_quota_refusals"]) >= 1
    assert int(fields["kv_wishes_rejected"]) >= 1
    raw.ask("CONFIG", "RESETSTAT")
    fields = info_of(raw, "kv")
    names = ("kv_quota_evictions", "kv_quota_refusals", "kv_wishes_rejected")
    assert [fields[name] for name in names] == ["0", "0", "0"]


def test_a_large_page_that_is_refused_leaves_no_slot_behind(start_server: StartServer) -> None:
    with Raw(start_server(maxmemory="16mb", check_interval=1).connect()) as raw:
        page = b"x" * (1 << 20)
        raw.ask("KV.QUOTA", "n", "MAXBYTES", 2_500_000)
        for number in range(40):
            reply = raw.ask("KV.PUT", f"n:{number}", page, "PIN", 60_000)
            assert reply == b"OK" if number < 2 else error_of(reply).startswith("KVQUOTA")
        fields = info_of(raw, "kv")
        assert fields["kv_landings"] == "0"
        assert int(fields["kv_arena_used_bytes"]) < 3 << 20
        assert raw.ask("KV.GET", "n:1") == page


def test_a_page_in_shared_memory_is_refused_at_its_commit(start_server: StartServer) -> None:
    with Raw(start_server(maxmemory="16mb", shm="rw").connect()) as raw:
        raw.ask("KV.QUOTA", "n", "TENANTBYTES", 1500)
        lease, _ = raw.ask("KV.RESERVE", "n:a", 1000)
        assert raw.ask("KV.COMMIT", lease, "TENANT", "t", "PIN", 60_000) == b"OK"
        lease, _ = raw.ask("KV.RESERVE", "n:b", 1000)
        refused = error_of(raw.ask("KV.COMMIT", lease, "TENANT", "t"))
        assert refused.startswith("KVQUOTA tenant 't'")
        assert raw.ask("EXISTS", "n:b") == 0
        assert info_of(raw, "kv")["kv_landings"] == "0"


def test_commits_at_the_same_time_pin_no_more_together_than_one_may(
    start_server: StartServer,
) -> None:
    server = start_server(maxmemory="64mb", shm="rw", pinned_share_max=25)
    raws = [Raw(server.connect()) for _ in range(8)]
    leases = [
        raw.ask("KV.RESERVE", f"n:{number}", 4 << 20)[0] for number, raw in enumerate(raws)
    ]  # so large that they are hashed beside the loop, all at once
    for raw, lease in zip(raws, leases, strict=True):
        raw.send("KV.COMMIT", lease, "PIN", 60_000)
    answers = [raw.next() for raw in raws]
    refused = [answer for answer in answers if answer != b"OK"]
    assert refused
    assert all(error_of(answer).startswith("KVPIN ") for answer in refused)
    fields = info_of(raws[0], "kv")
    assert int(fields["kv_pinned_bytes"]) <= 16 << 20
    assert fields["kv_landings"] == "0"
    for raw in raws:
        raw.close()
