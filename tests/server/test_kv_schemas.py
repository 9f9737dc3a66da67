"""KV.SCHEMA: what a namespace's pages look like, and what does not fit is told with both sizes."""

from typing import Any

import pytest

from respkv.engine.entry import Put
from respkv.engine.journeys import Move
from respkv.engine.namespaces import Schema
from respkv.page import Geometry
from respkv.tiers.record import Level
from tests.conftest import StartServer
from tests.fakes import FakeWire
from tests.server.cold import cold_server, replies
from tests.server.raw import Raw, error_of, request

GEOMETRY = "LAYERS 4 HEADS 2 DIM 8 TOKENS 16 DTYPE float16"
PAGE_BYTES = 4 * 2 * 16 * 2 * 8 * 2
ITEM_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}


def set_schema(raw: Raw, namespace: str, text: str = GEOMETRY, *more: str | bytes) -> Any:
    return raw.ask("KV.SCHEMA", "SET", namespace, *text.split(), *more)


def as_map(reply: list[Any]) -> dict[bytes, Any]:
    return dict(zip(reply[::2], reply[1::2], strict=True))


@pytest.fixture
def namespace(raw: Raw, request: pytest.FixtureRequest) -> str:
    """Return a namespace of the test's own: schemas outlive a flush."""
    return f"ns-{abs(hash(request.node.nodeid))}"


def test_a_schema_is_set_read_listed_and_forgotten(raw: Raw, namespace: str) -> None:
    assert raw.ask("KV.SCHEMA", "GET", namespace) is None
    more: list[str | bytes] = [
        "FINGERPRINT",
        b"\x00\xff",
        "HASH",
        "sha256",
        "SEED",
        b"s",
        "CODEC",
        "cpu",
        "raw",
        "TTL",
        "60000",
    ]
    assert set_schema(raw, namespace, GEOMETRY, *more) == b"OK"
    found = as_map(raw.ask("KV.SCHEMA", "GET", namespace))
    assert found[b"namespace"] == namespace.encode()
    assert [found[name] for name in (b"layers", b"heads", b"dim", b"tokens")] == [4, 2, 8, 16]
    assert found[b"dtype"] == b"float16"
    assert found[b"page_bytes"] == PAGE_BYTES
    assert found[b"fingerprint"] == b"\x00\xff"
    assert found[b"ttl_ms"] == 60_000
    assert namespace.encode() in raw.ask("KV.SCHEMA", "LIST")
    assert raw.ask("KV.SCHEMA", "DEL", namespace) == 1
    assert raw.ask("KV.SCHEMA", "DEL", namespace) == 0
    assert raw.ask("KV.SCHEMA", "GET", namespace) is None
    assert namespace.encode() not in raw.ask("KV.SCHEMA", "LIST")


def test_resp3_gets_a_map_and_null(raw: Raw, namespace: str) -> None:
    set_schema(raw, namespace)
    raw.ask("HELLO", 3)
    assert raw.raw("KV.SCHEMA", "GET", namespace).startswith(b"%")
    assert raw.raw("KV.SCHEMA", "GET", "absent") == b"_\r\n"


def test_setting_the_same_again_is_fine_and_another_is_refused(raw: Raw, namespace: str) -> None:
    assert set_schema(raw, namespace) == b"OK"
    assert set_schema(raw, namespace) == b"OK"
    assert set_schema(raw, namespace, GEOMETRY, "TTL", "5") == b"OK", "a policy may change"
    for other in (
        GEOMETRY.replace("LAYERS 4", "LAYERS 5"),
        GEOMETRY.replace("HEADS 2", "HEADS 4"),
        GEOMETRY.replace("DIM 8", "DIM 16"),
        GEOMETRY.replace("TOKENS 16", "TOKENS 32"),
        GEOMETRY.replace("float16", "bfloat16"),
        GEOMETRY + " FINGERPRINT other",
        GEOMETRY + " SEED other",
    ):
        text = error_of(set_schema(raw, namespace, other))
        assert text.startswith(f"KVSCHEMA namespace '{namespace}' has layers 4")
    assert as_map(raw.ask("KV.SCHEMA", "GET", namespace))[b"layers"] == 4


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_has_its_page_size(dtype: str, raw: Raw, namespace: str) -> None:
    assert set_schema(raw, namespace, GEOMETRY.replace("float16", dtype)) == b"OK"
    nbytes = 4 * 2 * 16 * 2 * 8 * ITEM_BYTES[dtype]
    assert as_map(raw.ask("KV.SCHEMA", "GET", namespace))[b"page_bytes"] == nbytes
    assert raw.ask("KV.PUT", f"{namespace}:p", b"x" * nbytes) == b"OK"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GEOMETRY.replace("LAYERS 4", "LAYERS 0"), "LAYERS must be at least 1, not 0"),
        (GEOMETRY.replace("LAYERS 4", "LAYERS -1"), "LAYERS must be at least 1, not -1"),
        (GEOMETRY.replace("LAYERS 4", "LAYERS x"), "value is not an integer or out of range"),
        (GEOMETRY.replace("float16", "float17"), "dtype must be one of"),
        (GEOMETRY.replace("float16", "FLOAT16"), "dtype must be one of"),
        (GEOMETRY + " BOGUS 1", "syntax error, unexpected option 'BOGUS'"),
        (GEOMETRY + " TTL", "syntax error, a value is missing"),
        (GEOMETRY + " TTL 0", "TTL must be at least 1"),
        (GEOMETRY + " CODEC nvme int8", "CODEC nvme: this server has the tiers cpu"),
        (GEOMETRY + " CODEC cpu", "syntax error, a value is missing"),
        (GEOMETRY.replace("DTYPE float16", "TTL 1"), "a schema needs DTYPE"),
        (GEOMETRY.replace("HEADS 2", "TTL 1"), "a schema needs HEADS"),
        (GEOMETRY.replace("TOKENS 16 ", "MLA "), "a schema needs TOKENS"),
        (GEOMETRY + " LAYERS 4", "a schema has LAYERS twice"),
        (GEOMETRY + " DTYPE float16", "a schema has DTYPE twice"),
        (GEOMETRY + " BYTES 5", "a schema does not take BYTES"),
        (GEOMETRY + " MLA", "heads is 1, not 2"),
        (GEOMETRY + " GROUP", "syntax error, a value is missing"),
        (GEOMETRY + " GROUP a.b FULL", "GROUP a.b: a name has 1 to 32 letters"),
        (GEOMETRY + " GROUP a LOCAL", "accepted are FULL, SLIDING, STATE, MLA"),
        (GEOMETRY + " GROUP a SLIDING 0", "SLIDING must be at least 1"),
        (GEOMETRY + " GROUP a FULL LAYERS 1 HEADS 1", "GROUP a needs DIM"),
        (GEOMETRY + " GROUP a FULL LAYERS 1 LAYERS 1", "what is behind a GROUP is of that group"),
        (GEOMETRY + " GROUP a STATE", "GROUP a needs BYTES"),
        (GEOMETRY + " GROUP a STATE DIM 5", "GROUP a does not take DIM"),
        (GEOMETRY + " GROUP a STATE BYTES 999999999999", "never fits the arena"),
        (GEOMETRY + " GROUP a MLA LAYERS 1 DIM 8 HEADS 2", "GROUP a: latents are of all heads"),
        (GEOMETRY + " GROUP a STATE BYTES 5 GROUP a STATE BYTES 5", "GROUP a is given twice"),
        (GEOMETRY + " GROUP a STATE BYTES 5 MLA", "unexpected option 'MLA'"),
        (GEOMETRY.replace("LAYERS 4", "LAYERS 4000000"), "never fits the arena"),
        (GEOMETRY.replace("LAYERS 4", "LAYERS 9223372036854775807"), "never fits the arena"),
    ],
)
def test_a_wrong_schema_is_refused_and_says_what_is_wrong(
    text: str, said: str, raw: Raw, namespace: str
) -> None:
    assert said in error_of(set_schema(raw, namespace, text))
    assert raw.ask("KV.SCHEMA", "GET", namespace) is None


def test_a_namespace_has_a_name_of_a_sensible_length(raw: Raw) -> None:
    assert "a namespace has 1 to" in error_of(set_schema(raw, ""))
    assert "a namespace has 1 to" in error_of(set_schema(raw, "n" * 257))


def test_what_a_schema_keeps_is_bounded(raw: Raw, namespace: str) -> None:
    for word in ("FINGERPRINT", "HASH", "SEED"):
        assert "at most 1024 bytes" in error_of(
            set_schema(raw, namespace, GEOMETRY, word, "x" * 1025)
        )
        assert set_schema(raw, f"{namespace}-{word}", GEOMETRY, word, "x" * 1024) == b"OK"


def test_so_many_namespaces_and_no_more(start_server: StartServer) -> None:
    with Raw(start_server().connect()) as raw:
        words = ["KV.SCHEMA", "SET", "", *GEOMETRY.split()]
        calls = [[*words[:2], f"ns-{each}", *words[3:]] for each in range(4097)]
        replies = raw.ask_all(calls)
        assert replies[:4096] == [b"OK"] * 4096
        assert "there are 4096 namespaces" in error_of(replies[4096])
        assert raw.ask(*calls[7]) == b"OK", "one that is there may be set again"
        assert raw.ask("KV.SCHEMA", "DEL", "ns-7") == 1
        assert raw.ask(*calls[4096]) == b"OK"


def test_a_page_of_another_size_is_refused_with_both_sizes(raw: Raw, namespace: str) -> None:
    set_schema(raw, namespace)
    key = f"{namespace}:page"
    for nbytes in (PAGE_BYTES - 1, PAGE_BYTES + 1, 1, 100_000):
        text = error_of(raw.ask("KV.PUT", key, b"x" * nbytes))
        assert text.startswith("KVSCHEMA ")
        assert str(PAGE_BYTES) in text
        assert str(nbytes) in text
        text = error_of(raw.ask("KV.RESERVE", key, nbytes))
        assert text.startswith("KVSCHEMA ")
        assert str(PAGE_BYTES) in text
        assert str(nbytes) in text
    assert raw.ask("EXISTS", key) == 0
    assert raw.ask("KV.EXPLAIN", key)[0] == b"schema"
    assert raw.ask("KV.PUT", key, b"x" * PAGE_BYTES) == b"OK"
    assert raw.ask("KV.PUT", "elsewhere:page", b"x") == b"OK", "no schema, any size"


def test_an_empty_page_is_refused(raw: Raw) -> None:
    assert "at least 1 byte" in error_of(raw.ask("KV.PUT", "p", b""))


def test_the_ttl_of_the_schema_is_that_of_its_pages(raw: Raw, namespace: str) -> None:
    set_schema(raw, namespace, GEOMETRY, "TTL", "50000")
    page = b"x" * PAGE_BYTES
    raw.ask("KV.PUT", f"{namespace}:a", page)
    raw.ask("KV.PUT", f"{namespace}:b", page, "PX", 90_000)
    raw.ask("KV.PUT", "other:a", page)
    assert 20_000 < raw.ask("PTTL", f"{namespace}:a") <= 50_000
    assert 60_000 < raw.ask("PTTL", f"{namespace}:b") <= 90_000
    assert raw.ask("PTTL", "other:a") == -1


def test_layers_are_ranges_of_bytes(raw: Raw, namespace: str) -> None:
    set_schema(raw, namespace)
    page = bytes(range(256)) * (PAGE_BYTES // 256)
    layer = PAGE_BYTES // 4
    keys = [f"{namespace}:{each}" for each in range(3)]
    for key in keys:
        raw.ask("KV.PUT", key, page)
    for first in range(4):
        for count in range(1, 5 - first):
            part = page[first * layer : (first + count) * layer]
            assert raw.ask("KV.GET", keys[0], "LAYERS", first, count) == part
            found = raw.ask("KV.MGET", 3, keys[0], "absent", keys[2], "layers", first, count)
            assert found == [part, None, part]
    for first, count in ((0, 5), (4, 1), (3, 2), (1 << 40, 1)):
        assert "are not within 0 to 3" in error_of(
            raw.ask("KV.GET", keys[0], "LAYERS", first, count)
        )
        assert "are not within 0 to 3" in error_of(
            raw.ask("KV.MGET", 1, keys[0], "LAYERS", first, count)
        )
    for words in (
        ["LAYERS", 0, 0],
        ["LAYERS", -1, 1],
        ["LAYERS", 0],
        ["LAYERS"],
        ["LAYERS", "a", 1],
    ):
        error_of(raw.ask("KV.GET", keys[0], *words))
    raw.ask("KV.PUT", "no-schema", page)
    raw.ask("SET", "plain", "value")
    for key in ("no-schema", "plain"):
        assert "LAYERS needs a page" in error_of(raw.ask("KV.GET", key, "LAYERS", 0, 1))
    assert raw.ask("KV.GET", "absent", "LAYERS", 0, 1) is None


def test_the_pages_of_a_deleted_schema_are_not_served_under_the_next(raw: Raw) -> None:
    words: list[str | int] = ["LAYERS", 1, "HEADS", 1, "DIM", 8, "TOKENS", 4, "DTYPE", "uint8"]
    words.append("FINGERPRINT")
    assert raw.ask("KV.SCHEMA", "SET", "model", *words, "old") == b"OK"
    for number in range(5000):
        raw.send("KV.PUT", f"model:{number:064x}", b"o" * 64)
    assert {raw.next() for _ in range(5000)} == {b"OK"}
    assert raw.ask("KV.PUT", "other:1", b"x" * 99) == b"OK"
    assert raw.ask("KV.SCHEMA", "DEL", "model") == 1
    assert raw.ask("KV.SCHEMA", "SET", "model", *words, "new") == b"OK"
    assert raw.ask("KV.GET", f"model:{7:064x}") is None
    assert raw.ask("EXISTS", *(f"model:{number:064x}" for number in range(5000))) == 0
    assert raw.ask("KV.GET", "other:1") == b"x" * 99
    assert raw.ask("KV.SCHEMA", "DEL", "model") == 1
    assert raw.ask("KV.SCHEMA", "DEL", "model") == 0


@pytest.mark.anyio
async def test_a_file_that_a_page_is_on_its_way_to_is_told_that_its_schema_goes() -> None:
    async with cold_server() as cold:
        cold.cache.namespaces.put(Schema(b"ns", Geometry(1, 1, 64, 16, "bfloat16")))
        buried: list[tuple[bytes, int]] = []

        def bury(key: bytes, generation: int) -> int:
            buried.append((key, generation))
            return len(buried)

        cold.tier.bury = bury  # type: ignore[method-assign]
        entry = cold.cache.put(b"ns:1", bytes(4096), Put("kvpage"))
        moved = Move(0, entry.generation + 1, Level.MEMORY)
        cold.cache.copies.moving[entry] = [moved]
        wire = FakeWire(cold.server)
        wire.feed(request("KV.SCHEMA", "DEL", "ns"))
        assert await replies(wire, 1) == [1]
        assert buried == [(b"ns:1", moved.generation)]
