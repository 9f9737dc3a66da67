"""Pages over RESP: put, get, match, describe, pin, explain."""

import time

import pytest

from tests.server.raw import Raw, error_of
from tests.server.test_kv_schemas import as_map
from tests.server.watching import number_of
from tests.server_process import ServerProcess

MIB = 1 << 20
ID = "ab" * 32


@pytest.mark.parametrize("nbytes", [1, 448, 449, 65_535, 65_536, MIB, 8 * MIB + 3])
def test_a_page_of_any_size_comes_back(nbytes: int, raw: Raw) -> None:
    page = bytes(range(251)) * (nbytes // 251 + 1)
    page = page[:nbytes]
    assert raw.ask("KV.PUT", "ns:p", page) == b"OK"
    assert raw.ask("KV.GET", "ns:p") == page
    assert raw.ask("GET", "ns:p") == page, "Redis's commands see it"
    assert raw.ask("STRLEN", "ns:p") == nbytes
    assert raw.ask("TYPE", "ns:p") == b"kvpage"
    assert raw.ask("KV.MGET", 3, "ns:p", "absent", "ns:p") == [page, None, page]
    assert raw.ask("DEL", "ns:p") == 1
    assert raw.ask("KV.GET", "ns:p") is None


def test_plain_values_can_be_read_as_pages_are(raw: Raw) -> None:
    raw.ask("SET", "small", "v")
    raw.ask("SET", "large", b"w" * 100_000)
    assert raw.ask("KV.GET", "small") == b"v"
    assert raw.ask("KV.GET", "large") == b"w" * 100_000
    assert raw.ask("KV.MGET", 2, "small", "large") == [b"v", b"w" * 100_000]
    assert raw.ask("KV.MATCH", 2, "small", "large")[0] == 2
    assert as_map(raw.ask("KV.INFO", "small"))[b"type"] == b"string"


def test_options_of_a_put_are_shown_by_info(raw: Raw) -> None:
    raw.ask("KV.PUT", "parent", b"x" * 1000)
    reply = raw.ask(
        "KV.PUT", "p", b"x" * 2000, "parent", "parent", "TOKENS", 64, "px", 50_000, "PRIORITY", -3
    )
    assert reply == b"OK"
    info = as_map(raw.ask("KV.INFO", "p"))
    assert info[b"key"] == b"p"
    assert info[b"type"] == b"kvpage"
    assert info[b"bytes"] == 2000
    assert info[b"tokens"] == 64
    assert info[b"parent"] == b"parent"
    assert info[b"priority"] == -3
    assert 20_000 < info[b"ttl_ms"] <= 50_000
    assert info[b"tier"] == b"cpu"
    assert info[b"children"] == 0
    assert as_map(raw.ask("KV.INFO", "parent"))[b"children"] == 1
    assert raw.ask("KV.INFO", "absent") is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["BOGUS"], "syntax error, unexpected option 'BOGUS'"),
        (["PARENT"], "syntax error, a value is missing"),
        (["TOKENS"], "syntax error, a value is missing"),
        (["TOKENS", "0"], "TOKENS must be at least 1"),
        (["TOKENS", "x"], "value is not an integer"),
        (["PX", "0"], "PX must be at least 1"),
        (["PX", "-5"], "PX must be at least 1"),
        (["PRIORITY", "high"], "value is not an integer"),
        (["PARENT", "p"], "stand behind itself"),
        (["DURABLE"], "DURABLE needs a tier"),
        (["NX", "BOGUS"], "unexpected option 'BOGUS'"),
    ],
)
@pytest.mark.parametrize("nbytes", [10, 200_000], ids=["small", "landed"])
def test_a_wrong_option_is_named_and_nothing_is_stored(
    options: list[str], said: str, nbytes: int, raw: Raw, server: ServerProcess
) -> None:
    used = number_of(server, "kv_arena_used_bytes")  # slots of writers that others had cut off
    assert said in error_of(raw.ask("KV.PUT", "p", b"x" * nbytes, *options))
    assert raw.ask("EXISTS", "p") == 0
    assert number_of(server, "kv_landings") == 0
    assert number_of(server, "kv_arena_used_bytes") <= used


def test_a_key_of_a_page_has_at_most_512_bytes(raw: Raw) -> None:
    assert raw.ask("KV.PUT", "k" * 512, b"x") == b"OK"
    assert "at most 512 bytes" in error_of(raw.ask("KV.PUT", "k" * 513, b"x"))
    assert "at most 512 bytes" in error_of(raw.ask("KV.PUT", "k", b"x", "PARENT", "k" * 513))
    assert raw.ask("SET", "k" * 100_000, b"x") == b"OK", "a plain key may be longer"
    assert raw.ask("GET", "k" * 100_000) == b"x"


def test_nx_puts_only_what_is_not_there(raw: Raw) -> None:
    assert raw.ask("KV.PUT", "p", b"first" * 100, "NX") == b"OK"
    assert raw.ask("KV.PUT", "p", b"other" * 100, "NX") is None
    assert raw.ask("KV.PUT", "p", b"other" * 50_000, "NX") is None
    assert raw.ask("KV.GET", "p") == b"first" * 100
    assert raw.ask("KV.PUT", "p", b"other" * 100) == b"OK"
    assert raw.ask("KV.GET", "p") == b"other" * 100


@pytest.mark.parametrize("nbytes", [1000, 300_000])
def test_a_page_that_is_there_is_not_written_again(
    nbytes: int, raw: Raw, server: ServerProcess
) -> None:
    """A page id names its content; only the options take effect."""
    key = f"ns:{ID}"
    page = b"x" * nbytes
    assert raw.ask("KV.PUT", key, page) == b"OK"
    before = server.info()
    assert raw.ask("KV.PUT", key, page, "PX", 70_000, "TOKENS", 5) == b"OK"
    after = server.info()
    assert int(after["kv_pages_skipped"]) == int(before["kv_pages_skipped"]) + 1
    assert after["kv_bytes_in"] == before["kv_bytes_in"]
    assert after["kv_bytes_landed"] == before["kv_bytes_landed"]
    assert 40_000 < raw.ask("PTTL", key) <= 70_000
    assert as_map(raw.ask("KV.INFO", key))[b"tokens"] == 5
    assert raw.ask("KV.PUT", key, b"y" * (nbytes + 1)) == b"OK", "another size is another page"
    assert raw.ask("STRLEN", key) == nbytes + 1
    raw.ask("SET", key, b"z" * nbytes)
    assert raw.ask("KV.PUT", key, page) == b"OK"
    assert raw.ask("KV.GET", key) == page, "a plain value under such a key is not the page"


def test_a_set_over_a_page_makes_it_a_string_and_a_put_a_page(raw: Raw) -> None:
    raw.ask("KV.PUT", "k", b"page" * 500)
    raw.ask("SET", "k", b"v")
    assert raw.ask("TYPE", "k") == b"string"
    raw.ask("KV.PUT", "k", b"page" * 500)
    assert raw.ask("TYPE", "k") == b"kvpage"


def test_match_stops_at_the_first_hole(raw: Raw) -> None:
    keys = [f"ns:{each}" for each in range(10)]
    assert raw.ask("KV.MATCH", 10, *keys) == [0, b"", 0]
    for each in (0, 1, 2, 4, 5, 9):
        raw.ask("KV.PUT", keys[each], b"x" * 100_000)
    pages, tiers, load_us = raw.ask("KV.MATCH", 10, *keys)
    assert (pages, tiers) == (3, b"ccc")
    assert load_us > 0
    assert raw.ask("KV.MATCH", 7, *keys[3:])[:2] == [0, b""]
    assert raw.ask("KV.MATCH", 2, *keys[4:6])[:2] == [2, b"cc"]
    raw.ask("KV.PUT", keys[3], b"x", "PX", 1)
    time.sleep(0.01)
    assert raw.ask("KV.MATCH", 10, *keys)[0] == 3, "what has expired is a hole"


@pytest.mark.parametrize("name", ["KV.MATCH", "KV.MGET", "KV.TOUCH", "KV.LEASE"])
@pytest.mark.parametrize(
    "counted", [["0", "k"], ["-1", "k"], ["x", "k"], ["2", "k"], ["99999999999", "k"]]
)
def test_a_wrong_count_of_keys_is_an_error(name: str, counted: list[str], raw: Raw) -> None:
    error_of(raw.ask(name, *counted))


@pytest.mark.parametrize("name", ["KV.MATCH", "KV.MGET", "KV.TOUCH", "KV.LEASE"])
def test_words_behind_the_keys_are_options_or_errors(name: str, raw: Raw) -> None:
    assert "syntax error" in error_of(raw.ask(name, 1, "k", "BOGUS"))


def test_touch_counts_pages_and_uses(raw: Raw) -> None:
    raw.ask("KV.PUT", "a", b"x")
    raw.ask("SET", "b", b"x")
    assert raw.ask("KV.TOUCH", 3, "a", "absent", "b") == 2
    assert raw.ask("KV.TOUCH", 1, "a") == 1
    assert raw.ask("OBJECT", "FREQ", "a") == 2
    assert as_map(raw.ask("KV.INFO", "a"))[b"hits"] == 2


def test_pins_are_set_and_taken_away(raw: Raw) -> None:
    raw.ask("KV.PUT", "p", b"x")
    assert raw.ask("KV.PIN", "absent", 1000) == 0
    assert raw.ask("KV.UNPIN", "p") == 0
    assert raw.ask("KV.PIN", "p", 60_000) == 1
    assert 30_000 < as_map(raw.ask("KV.INFO", "p"))[b"pinned_ms"] <= 60_000
    assert raw.ask("KV.UNPIN", "p") == 1
    assert raw.ask("KV.UNPIN", "p") == 0
    assert as_map(raw.ask("KV.INFO", "p"))[b"pinned_ms"] == 0
    for ms in ("0", "-1", "x", ""):
        error_of(raw.ask("KV.PIN", "p", ms))


def test_explain_tells_where_a_key_went(raw: Raw) -> None:
    raw.ask("KV.PUT", "here", b"x")
    raw.ask("KV.PUT", "gone", b"x")
    raw.ask("DEL", "gone")
    raw.ask("KV.PUT", "late", b"x", "PX", 1)
    time.sleep(0.01)
    assert raw.ask("EXISTS", "late") == 0
    reasons = {key: raw.ask("KV.EXPLAIN", key) for key in ("here", "gone", "late", "nowhere")}
    assert [reasons[key][0] for key in reasons] == [b"present", b"deleted", b"expired", b"never"]
    assert all(len(reply) == 2 and reply[1] for reply in reasons.values())
    raw.ask("FLUSHALL")
    assert raw.ask("KV.EXPLAIN", "here")[0] == b"flushed"


def test_a_circle_of_parents_is_never_closed(raw: Raw) -> None:
    """A page of one that is there already is refused; one that would close it comes without parent."""
    page = b"x" * 1000
    assert raw.ask("KV.PUT", "a", page, "PARENT", "b") == b"OK"
    assert raw.ask("KV.PUT", "b", page, "PARENT", "c") == b"OK"
    assert raw.ask("KV.PUT", "c", page, "PARENT", "a") == b"OK"
    assert as_map(raw.ask("KV.INFO", "c"))[b"parent"] is None
    assert "stand behind itself" in error_of(raw.ask("KV.PUT", "c", page, "PARENT", "a"))
    lease, *_ = raw.ask("KV.RESERVE", "d", 1000)
    assert raw.ask("KV.PUT", "e", page, "PARENT", "d") == b"OK"
    assert raw.ask("KV.COMMIT", lease, "PARENT", "e") == b"OK"
    assert as_map(raw.ask("KV.INFO", "d"))[b"parent"] is None
    assert raw.ask("DEL", "a", "b", "c", "d", "e") == 5


def test_tiers_and_stats_add_up(raw: Raw, server: ServerProcess) -> None:
    raw.ask("CONFIG", "RESETSTAT")
    for each in range(10):
        raw.ask("KV.PUT", f"p{each}", b"x" * 10_000)
    for each in range(15):
        raw.ask("KV.GET", f"p{each}")
    (tier,) = [as_map(each) for each in raw.ask("KV.TIERS")]
    assert tier[b"name"] == b"cpu"
    assert tier[b"letter"] == b"c"
    assert tier[b"pages"] == 10
    assert tier[b"payload_bytes"] == 100_000
    assert tier[b"payload_bytes"] < tier[b"used_bytes"] < tier[b"capacity_bytes"]
    stats = as_map(raw.ask("KV.STATS"))
    assert stats[b"pages_put"] == 10
    assert stats[b"page_hits"] == 10
    assert stats[b"page_misses"] == 5
    assert stats[b"bytes_in"] == 100_000
    assert stats[b"bytes_out"] == 100_000
    assert number_of(server, "kv_pages_put") == 10


def test_a_page_is_copied_once_on_its_way_in_and_once_out(raw: Raw, server: ServerProcess) -> None:
    """The counters show it: all but the first few KiB land in the slot and leave from it."""
    raw.ask("CONFIG", "RESETSTAT")
    page = b"x" * (32 * MIB)
    assert raw.ask("KV.PUT", "p", page) == b"OK"
    assert raw.ask("KV.GET", "p") == page
    info = server.info()
    assert int(info["kv_bytes_in"]) == 32 * MIB
    assert int(info["kv_bytes_landed"]) + int(info["kv_bytes_staged"]) == 32 * MIB
    assert int(info["kv_bytes_staged"]) <= 64 * 1024
    assert int(info["kv_bytes_out"]) == int(info["kv_bytes_sent_in_place"]) == 32 * MIB
