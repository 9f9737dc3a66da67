"""Commands as values: what is sent, and what a reply that does not fit means."""

from typing import Any

import pytest

from respkv.client import commands, schemas
from respkv.errors import ProtocolError


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (commands.put("k", b"p"), ["KV.PUT", "k", b"p"]),
        (
            commands.put("k", b"p", parent=b"q", tokens=3, px_ms=4, priority=0, nx=True),
            ["KV.PUT", "k", b"p", "PARENT", b"q", "TOKENS", 3, "PX", 4, "PRIORITY", 0, "NX"],
        ),
        (
            commands.put("k", b"p", durability="durable", nx=False),
            ["KV.PUT", "k", b"p", "DURABLE"],
        ),
        (commands.put("k", b"p", durability="written"), ["KV.PUT", "k", b"p", "WRITTEN"]),
        (commands.put("k", b"p", durability=None), ["KV.PUT", "k", b"p"]),
        (commands.put("k", b"p", parent=None), ["KV.PUT", "k", b"p"]),
        (commands.get("k", layers=(0, 2)), ["KV.GET", "k", "LAYERS", 0, 2]),
        (commands.mget(iter("ab"), layers=(1, 1)), ["KV.MGET", 2, "a", "b", "LAYERS", 1, 1]),
        (commands.get("k", deadline_ms=0), ["KV.GET", "k", "DEADLINE", 0]),
        (commands.mget(["a"], deadline_ms=9), ["KV.MGET", 1, "a", "DEADLINE", 9]),
        (commands.prefetch(["a", b"b"]), ["KV.PREFETCH", 2, "a", b"b"]),
        (commands.match(["a", b"b"]), ["KV.MATCH", 2, "a", b"b"]),
        (commands.touch(("a",)), ["KV.TOUCH", 1, "a"]),
        (commands.set_("k", "v", px_ms=5, nx=True), ["SET", "k", "v", "PX", 5, "NX"]),
        (commands.info(), ["INFO"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_arguments_follow_the_wire_contract(command: Any, args: list[Any]) -> None:
    assert list(command.args) == args


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="no such option: ttl"):
        commands.put("k", b"p", ttl=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        (commands.put("k", b"p"), b"QUEUED"),
        (commands.get("k"), 1),
        (commands.mget(["k"]), b"page"),
        (commands.mget(["k"], into=[bytearray(1)]), None),
        (commands.match(["k"]), [b"1", b"c", 2]),
        (commands.match(["k"]), None),
        (commands.exists("k"), b"1"),
        (commands.pin("k", 1), None),
        (commands.info(), None),
        (schemas.schema_get("n"), 5),
        (schemas.schema_list(), b"n"),
        (schemas.schema_list(), [3]),
    ],
)
def test_a_reply_of_another_kind_is_a_protocol_error(command: Any, reply: Any) -> None:
    with pytest.raises(ProtocolError, match="expected"):
        command.decode(reply)


def test_a_schema_reads_the_same_as_a_map_and_as_a_flat_array() -> None:
    decode = schemas.schema_get("n").decode
    expected = {"layers": 2, "dtype": "int8", "fingerprint": b"\xff", "codecs": [["cpu", "raw"]]}
    as_map: Any = {
        b"layers": 2,
        b"dtype": b"int8",
        b"fingerprint": b"\xff",
        b"codecs": [[b"cpu", b"raw"]],
    }
    assert decode(as_map) == decode([each for pair in as_map.items() for each in pair]) == expected
    assert decode(None) is None


def test_groups_of_a_schema_are_said_behind_its_own_shape() -> None:
    shape: Any = {"layers": 2, "heads": 1, "dim": 8, "tokens": 4, "dtype": "int8"}
    groups = {
        "local": schemas.LayerGroup("sliding", layers=3, heads=1, dim=4, window=12),
        "mamba": schemas.LayerGroup("state", nbytes=77),
        "mla": schemas.LayerGroup("mla", layers=3, dim=4, dtype="uint8"),
    }
    args = schemas.schema_set("ns", **shape, mla=True, groups=groups, ttl_ms=5).args
    with pytest.raises(TypeError, match="heads is missing"):
        schemas.schema_set("ns", layers=2, dim=8, tokens=4, dtype="int8")
    front = "KV.SCHEMA SET ns MLA LAYERS 2 HEADS 1 DIM 8 TOKENS 4 DTYPE int8"
    behind = (
        "GROUP local SLIDING 12 LAYERS 3 HEADS 1 DIM 4 GROUP mamba STATE BYTES 77 "
        "GROUP mla MLA LAYERS 3 DIM 4 DTYPE uint8 TTL 5"
    )
    assert " ".join(map(str, args)) == f"{front} {behind}"
    assert "MLA" not in schemas.schema_set("ns", **shape).args


def test_how_ids_are_made_is_said_if_it_is_given() -> None:
    shape: Any = {"layers": 2, "heads": 1, "dim": 8, "tokens": 4, "dtype": "int8"}
    args = schemas.schema_set("ns", **shape, algorithm="sha256_cbor", seed="0").args
    assert args[-4:] == ["HASH", "sha256_cbor", "SEED", "0"]
    assert "HASH" not in schemas.schema_set("ns", **shape).args
