"""The KV commands of both faces, against a respkv server."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest

from respkv.client import Match
from respkv.errors import ServerError
from tests.client.pages import GEOMETRY, NBYTES, chain, declare, payload
from tests.server_process import ServerProcess

Connect = Callable[..., Any]


def test_a_schema_comes_back_as_it_was_set(client: Any, namespace: str) -> None:
    assert client.schema_get(namespace) is None
    client.schema_set(
        namespace,
        layers=2,
        heads=3,
        dim=4,
        tokens=5,
        dtype="bfloat16",
        fingerprint=b"\x00\xff",
        ttl_ms=60_000,
    )
    got = client.schema_get(namespace)
    expected = {"layers": 2, "heads": 3, "dim": 4, "tokens": 5, "dtype": "bfloat16"}
    assert {name: got[name] for name in expected} == expected
    assert (got["fingerprint"], got["ttl_ms"]) == (b"\x00\xff", 60_000)
    assert namespace in client.schema_list()
    with pytest.raises(ServerError) as caught:
        client.schema_set(namespace, layers=9, heads=3, dim=4, tokens=5, dtype="bfloat16")
    assert caught.value.word == "KVSCHEMA"


def test_a_schema_reads_the_same_over_resp2(
    connect: Connect, server: ServerProcess, namespace: str
) -> None:
    new, old = connect(server.url), connect(server.url, protocol=2)
    declare(new, namespace)
    assert old.schema_get(namespace) == new.schema_get(namespace)
    assert old.match(["none"]) == new.match(["none"])


def test_a_page_comes_back_whole_in_part_and_in_place(client: Any, namespace: str) -> None:
    declare(client, namespace)
    (key,) = chain(namespace, 1)
    assert client.get(key) is None
    assert client.put(key, payload(1), tokens=4, priority=2) is True
    assert client.put(key, payload(1), nx=True) is False
    assert client.get(key) == payload(1)
    layer = GEOMETRY.layer_bytes
    assert client.get(key, layers=(1, 2)) == payload(1)[layer : 3 * layer]
    memory = bytearray(NBYTES)
    got = client.get(key, into=memory)
    assert got is not None
    assert got.obj is memory
    assert memory == payload(1)
    with pytest.raises(ValueError, match="into has 10 bytes"):
        client.get(key, into=bytearray(10))


def test_a_page_of_the_wrong_size_is_refused(client: Any, namespace: str) -> None:
    declare(client, namespace)
    with pytest.raises(ServerError) as caught:
        client.put(chain(namespace, 1)[0], bytes(NBYTES - 1))
    assert caught.value.word == "KVSCHEMA"
    client.ping()


def test_many_pages_come_in_order_with_nulls(client: Any, namespace: str) -> None:
    keys = chain(namespace, 4)
    for index in (0, 1, 3):
        client.put(keys[index], payload(index))
    pages = client.mget(keys)
    assert [None if page is None else bytes(page) for page in pages] == [
        payload(0),
        payload(1),
        None,
        payload(3),
    ]
    memory = numpy.zeros((4, NBYTES), numpy.uint8)
    pages = client.mget(keys, into=[*memory])
    assert memory[3].tobytes() == payload(3)
    assert not memory[2].any()
    assert pages[2] is None
    with pytest.raises(ValueError, match="1 buffers for 4 keys"):
        client.mget(keys, into=[bytearray(1)])


def test_a_match_is_the_longest_prefix(client: Any, namespace: str) -> None:
    keys = chain(namespace, 5)
    assert client.match(keys)[:2] == (0, "")
    parent = None
    for key in keys[:3]:
        client.put(key, payload(0), parent=parent)
        parent = key
    client.put(keys[4], payload(4))
    found = client.match(keys)
    assert isinstance(found, Match)
    assert (found.pages, found.tiers) == (3, "ccc")
    assert found.load_us > 0


def test_pages_are_ordinary_keys_too(client: Any, namespace: str) -> None:
    first, second = chain(namespace, 2)
    client.put(first, payload(0), px_ms=60_000)
    assert client.exists(first, second) == 1
    assert client.touch([first, second]) == 1
    assert client.pin(first, 1000) is True
    assert client.unpin(first) is True
    assert client.pin(second, 1000) is False
    assert 0 < client.command("PTTL", first) <= 60_000
    assert client.delete(first, second) == 1


def test_plain_values_work_as_with_redis(client: Any, namespace: str) -> None:
    key, value = f"{namespace}-plain", payload(7, 3 << 20)
    assert client.set(key, value, px_ms=60_000) is True
    assert client.set(key, "other", nx=True) is False
    assert client.get(key) == value
    assert client.command("GET", key) == value
    assert client.info("server")


def test_a_list_of_keys_must_be_one(client: Any) -> None:
    with pytest.raises(TypeError, match="list of keys"):
        client.match("key")
    with pytest.raises(ValueError, match="at least one key"):
        client.mget([])


def test_pages_in_a_pipeline(client: Any, namespace: str) -> None:
    keys = chain(namespace, 24)
    pipeline = client.pipeline()
    for index, key in enumerate(keys):
        pipeline.command("KV.PUT", key, payload(index, 1 << 20)).command("KV.GET", key)
    replies = pipeline.execute()
    assert replies[0::2] == [b"OK"] * len(keys)
    assert all(page == payload(index, 1 << 20) for index, page in enumerate(replies[1::2]))
