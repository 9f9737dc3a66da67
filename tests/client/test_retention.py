"""Quotas, hints and how pages are kept, through both faces, against a respkv server."""

from typing import Any

import anyio
import numpy
import pytest

from respkv.client import Answer, AsyncClient, Client
from respkv.errors import ServerError
from tests.client.pages import NBYTES, chain, declare, payload
from tests.server_process import ServerProcess


def test_a_quota_is_set_read_and_kept_to(client: Any, namespace: str) -> None:
    declare(client, namespace)
    assert client.quota(namespace)["max_bytes"] == 0
    assert client.quota(namespace, max_bytes=2 * NBYTES, tenant_bytes=NBYTES)["max_bytes"]
    keys = chain(namespace, 3)
    assert client.put(keys[0], payload(0), tenant="t")
    found = client.quota(namespace, tenant="t")
    assert (found["tenant"], found["max_bytes"], found["bytes"]) == ("t", NBYTES, NBYTES)
    assert client.put(keys[1], payload(1), tenant="t")
    assert client.explain(keys[0]).reason == "quota"
    assert client.quota(namespace, tenant="t", max_bytes=0)["max_bytes"] == 0
    assert client.quota(namespace, tenant="t", max_bytes="default")["max_bytes"] == NBYTES
    with pytest.raises(ServerError) as caught:
        client.put(keys[2], payload(2), parent=keys[1], tenant="t")
    assert caught.value.word == "KVQUOTA"


def test_a_quota_of_a_schema_is_that_of_its_namespace(client: Any, namespace: str) -> None:
    declare(client, namespace, max_bytes=5 * NBYTES)
    assert client.schema_get(namespace)["max_bytes"] == 5 * NBYTES
    assert client.quota(namespace)["max_bytes"] == 5 * NBYTES


def test_hints_on_a_session_are_answered(client: Any, namespace: str) -> None:
    declare(client, namespace)
    (key,) = chain(namespace, 1)
    assert client.end_session(namespace, "s").status == "rejected"
    client.put(key, payload(0), session="s")
    assert client.page_info(key)["session"] == "s"
    assert client.expect_session(namespace, "s", 60_000)[:2] == ("accepted", 60_000)
    assert client.expect_session(namespace, "s", 1 << 40).status == "clipped"
    assert client.page_info(key)["expected_ms"] > 0
    assert client.match([key], session="s").pages == 1
    assert client.page_info(key)["expected_ms"] == -1
    assert client.demote_session(namespace, "s").status == "rejected"
    assert client.end_session(namespace, "s")[:2] == ("accepted", 1)
    assert client.page_info(key)["is_ended"] == 1


def test_a_page_is_kept_as_is_asked(client: Any, namespace: str) -> None:
    declare(client, namespace)
    (key,) = chain(namespace, 1)
    assert client.retain(key, priority=1) is None
    client.put(key, payload(0), pin_ms=60_000)
    assert client.page_info(key)["pinned_ms"] > 0
    answers = client.retain(key, px_ms=9000, pin_ms=0, priority=4, durability="durable")
    assert list(answers) == ["px_ms", "pin_ms", "priority", "durability"]
    assert answers["priority"] == Answer("accepted", 4, "")
    assert answers["durability"].status == "rejected"
    info = client.page_info(key)
    assert (info["priority"], info["pinned_ms"]) == (4, 0)
    with pytest.raises(TypeError, match="nothing to change"):
        client.retain(key)


def test_a_prompt_is_explained_and_kept(server: ServerProcess, namespace: str) -> None:
    with Client(server.url) as client:
        declare(client, namespace)
        tokens = list(range(256 + 10))
        assert client.seq.explain(namespace, tokens)[::2] == ("never", 0)
        client.seq.put(namespace, tokens, numpy.zeros((4, 2, 266, 2, 16), numpy.float16), salt="a")
        found = client.seq.explain(namespace, [*tokens, 1], salt="a")
        assert (found.reason, found.tokens) == ("never", 266)
        assert "266 of 267 tokens" in found.text
        matched, answers = client.seq.retain(
            namespace, tokens, salt="a", session="s", pin_ms=1000, px_ms=0
        )
        assert matched == 266
        assert {name: answer[:2] for name, answer in answers.items()} == {
            "session": ("accepted", 2),
            "px_ms": ("accepted", 0),
            "pin_ms": ("accepted", 1000),
        }


def test_the_asynchronous_face_explains_and_keeps_too(
    server: ServerProcess, namespace: str
) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            await client.schema_set(namespace, layers=1, heads=1, dim=2, tokens=4, dtype="float16")
            assert (await client.seq.explain(namespace, [1, 2])).reason == "never"
            assert await client.seq.retain(namespace, [1, 2], priority=1) == (
                0,
                {"priority": Answer("accepted", 1, "")},
            )

    anyio.run(run)
