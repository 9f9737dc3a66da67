"""A semantic cache over a server and over an engine in this process: what one caller sees."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch

from respkv.client import Client
from respkv.errors import ConfigError, ConnectionLost, ServerError
from respkv.semantic import Hit, SemanticCache
from tests.conftest import StartServer
from tests.redis_server import free_port
from tests.semantic.conftest import OpenCache
from tests.server_process import ServerProcess

EAST, NORTH, UP = [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]
NEARLY_EAST = [1, 0.1, 0, 0]


def eventually(holds: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 60
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_an_answer_is_found_by_a_question_that_is_near_enough(open_cache: OpenCache) -> None:
    answers = open_cache(threshold=0.9)
    assert answers.get(EAST) is None
    key = answers.put(EAST, "east", metadata={"source": "map"})
    assert answers.get(EAST) == Hit("east", 1.0, key, {"source": "map"})
    near = answers.get(NEARLY_EAST)
    assert near is not None
    assert 0.99 < near.score < 1
    assert answers.get(NORTH) is None
    assert answers.get(NEARLY_EAST, threshold=0.999) is None
    assert answers.get(numpy.array(EAST, "float16")) is not None
    assert answers.get(torch.tensor(EAST, dtype=torch.bfloat16)) is not None
    stats = answers.stats()
    assert (stats.entries, stats.puts, stats.hits, stats.misses) == (1, 1, 4, 3)
    assert stats.hit_rate == 4 / 7


def test_search_answers_with_the_nearest_first(open_cache: OpenCache) -> None:
    answers = open_cache()
    for name, vector in {"east": EAST, "north": NORTH, "up": UP, "near": NEARLY_EAST}.items():
        answers.put(vector, name, key=name)
    found = answers.search([1, 0.2, 0.1, 0], 3)
    assert [hit.key for hit in found] == ["near", "east", "north"]
    assert [hit.payload for hit in found] == [hit.key for hit in found]
    assert found[0].score > found[1].score > found[2].score
    assert len(answers.search(EAST, 100)) == 4
    assert [hit.key for hit in answers.search(EAST, 100, threshold=0.9)] == ["east", "near"]
    with pytest.raises(ValueError, match="k = 0"):
        answers.search(EAST, 0)


def test_an_embedding_without_a_direction_is_left_to_other_metrics(open_cache: OpenCache) -> None:
    answers, distances = open_cache(), open_cache(metric="l2", threshold=-0.5)
    answers.put(EAST, "east")
    distances.put([0, 0, 0, 0], "nowhere")
    for number in range(10):
        answers.put([number, 1, 1, 1], f"{number}")
    found = answers.get(NEARLY_EAST)
    assert found is not None
    assert found.payload == "east"
    assert len(answers.search(EAST, 100)) == 11
    assert answers.stats().unreadable == 1
    assert distances.get([0, 0, 0, 0.1]) is not None


@pytest.mark.parametrize("size", [0, 1, 400, 100_000, 3_000_000], ids=str)
def test_payloads_are_opaque_bytes_of_any_size(open_cache: OpenCache, size: int) -> None:
    answers = open_cache()
    image = bytes(range(256)) * (size // 256 + 1)
    answers.put(EAST, image[:size])
    found = answers.get(EAST)
    assert found is not None
    assert found.payload == image[:size]


def test_the_same_embedding_or_the_same_key_replaces(open_cache: OpenCache) -> None:
    answers = open_cache()
    assert answers.put(EAST, "old") == answers.put(EAST, "new")
    assert [hit.payload for hit in answers.search(EAST, 9)] == ["new"]
    answers.put(EAST, "a", key="mine")
    answers.put(NORTH, "b", key="mine")
    assert [hit.payload for hit in answers.search(NORTH, 9)] == ["b", "new"]
    assert answers.stats().entries == 2


def test_what_is_deleted_or_expired_is_no_answer(open_cache: OpenCache) -> None:
    answers = open_cache(ttl_s=100)
    key = answers.put(EAST, "east")
    answers.put(NEARLY_EAST, "short", ttl_s=0.05)
    time.sleep(0.06)
    found = answers.get(NEARLY_EAST)
    assert found is not None
    assert found.payload == "east"
    assert answers.delete(key)
    assert not answers.delete(key)
    assert answers.get(EAST) is None
    assert answers.stats().entries == 0


def test_what_was_deleted_and_put_again_is_found_every_time(open_cache: OpenCache) -> None:
    answers, other = open_cache(), open_cache()
    for number in range(60):
        key = answers.put(EAST, "old")
        assert (other if number % 2 else answers).delete(key)
        answers.put(EAST, "new", ttl_s=100)
        answers.put(NORTH, "north")  # takes in what was told of the others
        found = answers.get(EAST)
        assert found is not None, f"round {number}"
        assert found.payload == "new"


def test_a_closed_cache_says_so_and_leaves_the_client_open(engine: Client, namespace: str) -> None:
    answers = SemanticCache(engine, namespace, dim=4)
    answers.put(EAST, "east")
    answers.close()
    answers.close()
    for call in (answers.get, answers.search):
        with pytest.raises(ConnectionLost, match="the semantic cache is closed"):
            call(EAST)
    with pytest.raises(ConnectionLost, match="the semantic cache is closed"):
        answers.put(EAST, "east")
    engine.ping()  # it is its owner's still


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", "b"), ("", "a"), ("a:b", "a"), ("a-b", "a"), ("*", "?"), ("\ud800", "\0")],
)
def test_tenants_see_their_own_entries_only(open_cache: OpenCache, one: str, other: str) -> None:
    answers = open_cache()
    key = answers.put(EAST, "secret", tenant=one, key="b")
    answers.put(EAST, "public", tenant=other, key="b:c")
    assert [hit.payload for hit in answers.search(EAST, 9, tenant=one)] == ["secret"]
    assert [hit.payload for hit in answers.search(EAST, 9, tenant=other)] == ["public"]
    assert not answers.delete(key, tenant=other)
    assert answers.clear(other) == 1
    assert answers.get(EAST, tenant=other) is None
    assert answers.get(EAST, tenant=one) is not None
    assert answers.clear(one) == 1
    assert answers.clear(one) == 0


def test_a_tenant_keeps_max_entries_those_that_were_used_last(open_cache: OpenCache) -> None:
    answers = open_cache(max_entries=3)
    for number in range(3):
        answers.put([1, number, 0, 0], str(number), key=str(number))
    assert answers.get([1, 0, 0, 0]) is not None
    answers.put(UP, "up", key="up")
    answers.put(UP, "up", key="up", tenant="another")
    assert sorted(hit.key for hit in answers.search(UP, 9)) == ["0", "2", "up"]
    assert open_cache().stats().entries == 0  # nothing was asked yet
    assert len(open_cache().search(UP, 9)) == 3
    assert answers.stats().evicted == 1


def test_tenants_beyond_the_limit_are_read_again_when_they_are_asked_for(
    open_cache: OpenCache,
) -> None:
    answers = open_cache(tenants_max=2)
    for name in "abcd":
        answers.put(EAST, name, tenant=name)
    for name in "abcdabcd":
        found = answers.get(EAST, tenant=name)
        assert found is not None
        assert found.payload == name
    assert answers.stats().tenants_open == 2
    assert answers.stats().tenants == 4


@pytest.mark.parametrize("index", ["exact", "hnsw"])
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_every_metric_and_index_answers_alike(
    open_cache: OpenCache, metric: str, index: str
) -> None:
    threshold = {"cosine": 0.95, "ip": 0.95, "l2": -0.3}[metric]
    answers = open_cache(metric=metric, index=index, threshold=threshold)
    answers.put(EAST, "east")
    answers.put(UP, "up")
    found = answers.get(NEARLY_EAST)
    assert found is not None
    assert found.payload == "east"
    assert found.score == pytest.approx({"cosine": 0.995037, "ip": 1, "l2": -0.1}[metric])
    assert answers.get([0, -1, 0, 0]) is None


def test_threads_may_share_a_cache(open_cache: OpenCache) -> None:
    answers = open_cache()

    def work(number: int) -> bool:
        vector = [1, number, number % 7, 0]
        answers.put(vector, str(number), key=str(number))
        found = answers.get(vector, threshold=1.0)
        return found is not None and found.payload == str(number)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(60)))
    assert answers.stats().entries == 60
    assert len(answers.search(EAST, 100)) == 60


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 0}, "dim = 0: accepted are whole numbers from 1 to 65536"),
        ({"threshold": 1.5}, "threshold = 1.5: the cosine score is at most 1"),
        ({"threshold": float("nan")}, "threshold = nan"),
        ({"metric": "dot"}, "metric = 'dot': accepted are 'cosine', 'ip', 'l2'"),
        ({"metric": "l2"}, "metric = 'l2' needs a threshold"),
        ({"metric": "l2", "threshold": 0.5}, "it is minus the distance"),
        ({"index": "faiss"}, "index = 'faiss': accepted are 'exact', 'hnsw'"),
        ({"ttl_s": 0}, "ttl_s = 0: accepted are more than 0"),
        ({"max_entries": 0}, "max_entries = 0: accepted are whole numbers from 1"),
        ({"max_payload_bytes": 1.5}, "max_payload_bytes = 1.5"),
        ({"durability": "always"}, "durability = 'always'"),
        ({"namespace": "a:b"}, "namespace = 'a:b'"),
        ({"namespace": 3}, "namespace = 3: accepted are"),
        ({"threshold": "high"}, "threshold = 'high': a number is needed"),
        ({"ttl_s": "1h"}, "ttl_s = '1h': a number is needed"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(options: dict[str, Any], said: str) -> None:
    settings: Any = {"dim": 4} | options
    with pytest.raises(ConfigError, match=said):
        SemanticCache("respkv://127.0.0.1:1", **settings)


def test_what_is_no_cache_or_no_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cache is a Client, an engine"):
        SemanticCache(5, dim=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no such option: ttl; accepted are durability, index"):
        SemanticCache("respkv://127.0.0.1:1", dim=4, ttl=5)  # type: ignore[call-arg]


def test_a_bad_call_is_an_error_and_loses_nothing(open_cache: OpenCache) -> None:
    answers = open_cache(max_payload_bytes=10)
    answers.put(EAST, "east")
    for payload, said in ((b"x" * 11, "11 bytes; max_payload_bytes is 10"), ("ä" * 6, "12 bytes")):
        with pytest.raises(ValueError, match=said):
            answers.put(EAST, payload)
    with pytest.raises(TypeError, match="a payload is bytes or str, not dict"):
        answers.put(EAST, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no text that can be written as UTF-8"):
        answers.put(EAST, "\ud800")
    with pytest.raises(TypeError, match="metadata is a dict, not list"):
        answers.put(EAST, b"", metadata=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k = 2\.5: how many are searched for"):
        answers.search(EAST, 2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="threshold = 'x': a number is needed"):
        answers.get(EAST, threshold="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ttl_s = -1"):
        answers.put(EAST, b"", ttl_s=-1)
    with pytest.raises(ValueError, match=r"has shape \(2,\)"):
        answers.get([1, 2])
    with pytest.raises(ValueError, match="threshold = 2"):
        answers.get(EAST, threshold=2)
    found = answers.get(EAST)
    assert found is not None
    assert found.payload == "east"


def test_embeddings_of_another_model_are_refused_at_once(open_cache: OpenCache) -> None:
    open_cache().put(EAST, "east")
    with pytest.raises(ConfigError, match="keeps embeddings of another model: dim=4, not dim=5"):
        open_cache(dim=5).put([1, 2, 3, 4, 5], "x")
    assert open_cache().get(EAST) is not None


def test_a_tenant_with_a_quota_keeps_no_more(server: ServerProcess, namespace: str) -> None:
    with Client(server.url) as client, SemanticCache(client, namespace, dim=4) as answers:
        client.command("KV.QUOTA", f"semantic:{namespace}", "TENANTBYTES", 4000)
        for number in range(20):
            answers.put([1, number, 0, 0], b"x" * 500)
        assert eventually(lambda: 1 <= len(answers.search(EAST, 99)) <= 7)
        with pytest.raises(ServerError, match="KVQUOTA"):
            answers.put(NORTH, b"x" * 5000)
        assert answers.get([1, 19, 0, 0]) is not None  # and nothing broke


def test_values_that_are_no_entries_are_left_alone(server: ServerProcess, namespace: str) -> None:
    with Client(server.url) as client, SemanticCache(client, namespace, dim=4) as answers:
        answers.put(EAST, "east")
        for name in ("x", f"{'0' * 32}-{'1' * 32}", "a" * 65):
            client.set(f"semantic:{namespace}:{name}", "what is this")
    with Client(server.url) as client, SemanticCache(client, namespace, dim=4) as answers:
        assert len(answers.search(EAST, 9)) == 1
        assert client.get(f"semantic:{namespace}:x") is not None


def test_a_server_that_goes_away_is_told_and_its_return_is_found(
    start_server: StartServer,
) -> None:
    server = start_server(port=free_port())  # given to nobody else in between
    with SemanticCache(server.url, dim=4) as answers:
        answers.put(EAST, "east")
        server.process.kill()
        server.process.wait()
        with pytest.raises(ConnectionLost):
            answers.get(EAST)
        again = start_server(port=server.port)
        assert again.port == server.port
        assert answers.get(EAST) is None
        answers.put(EAST, "again")
        found = answers.get(EAST)
        assert found is not None
        assert found.payload == "again"
