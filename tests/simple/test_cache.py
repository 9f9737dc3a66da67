"""Tensors under names: SimpleKVCache in this process and over a server."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from respkv.embedded import EmbeddedCache
from respkv.errors import ConfigError, ConnectionLost, PageCorrupt
from respkv.simple import SimpleKVCache
from respkv.simple.names import key_of, name_of
from tests.server_process import ServerProcess
from tests.simple.conftest import MakeCache

MIB = 1 << 20


def pair(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return random keys and values."""
    made = torch.Generator().manual_seed(seed)
    shape = shape or (1, 2, 5, 8)
    return torch.randn(shape, generator=made).to(dtype), torch.randn(shape, generator=made).to(
        dtype
    )


def are_equal(found: Any, stored: Any) -> bool:
    return found is not None and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, stored, strict=True)
    )


def mib(value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((MIB - 1024,), value, dtype=torch.uint8), torch.zeros(0)


def test_keys_and_values_come_back_as_they_were(make_cache: MakeCache) -> None:
    cache = make_cache()
    stored = pair(1)
    assert cache.get_cached_kv("prompt", 0) is None
    assert cache.cache_kv("prompt", 0, *stored) is True
    found = cache.get_cached_kv("prompt", 0)
    assert are_equal(found, stored)
    assert found is not None
    found[0].zero_()
    assert are_equal(cache.get_cached_kv("prompt", 0), stored), "they are the caller's own"
    assert cache.get_cached_kv("prompt", 1) is None
    assert cache.get_cached_kv("prompt ", 0) is None


def test_what_was_there_is_replaced(make_cache: MakeCache) -> None:
    cache = make_cache()
    for seed in range(3):
        cache.cache_kv("prompt", 0, *pair(seed, 100, 100))
        assert are_equal(cache.get_cached_kv("prompt", 0), pair(seed, 100, 100))
    assert cache.get_stats()["entries"] == 1


def test_all_layers_come_back_together_or_not_at_all(make_cache: MakeCache) -> None:
    cache = make_cache()
    layers = [pair(number) for number in range(11)]
    assert cache.get_all_layers("prompt") is None
    assert cache.cache_all_layers("prompt", layers) is True
    found = cache.get_all_layers("prompt")
    assert found is not None
    assert len(found) == 11
    assert all(map(are_equal, found, layers))
    assert are_equal(cache.get_cached_kv("prompt", 7), layers[7])
    cache._cache.delete(key_of(cache.namespace, name_of("prompt"), 7))
    assert cache.get_all_layers("prompt") is None


def test_a_layer_that_was_replaced_by_itself_comes_with_the_others(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.cache_all_layers("prompt", [pair(number) for number in range(4)])
    for replaced in (2, 0):
        cache.cache_kv("prompt", replaced, *pair(10 + replaced))
        found = cache.get_all_layers("prompt")
        assert found is not None
        assert len(found) == 4
        assert are_equal(found[replaced], pair(10 + replaced))
        assert are_equal(found[3], pair(3))
    cache._cache.delete(key_of(cache.namespace, name_of("prompt"), 3))
    assert cache.get_all_layers("prompt") is None


def test_layers_of_two_who_stored_the_same_prefix_are_not_mixed(make_cache: MakeCache) -> None:
    cache = make_cache()
    last = key_of(cache.namespace, name_of("prompt"), 1)
    cache.cache_all_layers("prompt", [pair(1), pair(2)])
    before = bytes(cache._cache.command("KV.GET", last))  # type: ignore[arg-type]
    cache.cache_all_layers("prompt", [pair(3), pair(4)])
    cache._cache.command("KV.PUT", last, before)  # as it is when both store at once
    assert cache.get_all_layers("prompt") is None
    assert are_equal(cache.get_cached_kv("prompt", 1), pair(2))


@pytest.mark.parametrize("count", [1, 8, 9, 10])
def test_layers_that_were_stored_one_by_one_come_up_to_the_first_gap(
    make_cache: MakeCache, count: int
) -> None:
    cache = make_cache()
    for number in [*range(count), count + 1]:
        cache.cache_kv("prompt", number, *pair(number))
    found = cache.get_all_layers("prompt")
    assert found is not None
    assert len(found) == count


def test_a_prefix_is_evicted_with_all_its_layers(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.cache_all_layers("one", [pair(1)] * 3)
    cache.cache_kv("two", 5, *pair(2))
    assert cache.evict("three") == 0
    assert cache.evict("one") == 3
    assert cache.get_all_layers("one") is None
    assert are_equal(cache.get_cached_kv("two", 5), pair(2))


def test_the_least_recently_used_prefixes_are_evicted_by_number(make_cache: MakeCache) -> None:
    cache = make_cache()
    for name in "abcd":
        cache.cache_all_layers(name, [pair(1)] * 2)
    cache.get_cached_kv("a", 1)
    cache.get_all_layers("b")
    assert cache.evict(0) == 0
    assert cache.evict(2) == 4
    assert [cache.get_all_layers(name) is None for name in "abcd"] == [False, False, True, True]
    assert cache.evict(10) == 4


def test_what_others_stored_goes_first(make_cache: MakeCache) -> None:
    one = make_cache()
    other = make_cache(namespace=one.namespace)
    one.cache_kv("mine", 0, *pair(1))
    other.cache_kv("theirs", 0, *pair(2))
    assert one.evict(1) == 1
    assert one.get_cached_kv("mine", 0) is not None
    assert one.get_cached_kv("theirs", 0) is None


def test_clear_leaves_other_namespaces_alone(make_cache: MakeCache) -> None:
    one, other = make_cache(), make_cache()
    one.cache_kv("prompt", 0, *pair(1))
    other.cache_kv("prompt", 0, *pair(2))
    assert one.clear() == 1
    assert one.clear() == 0
    assert are_equal(other.get_cached_kv("prompt", 0), pair(2))


def test_a_namespace_whose_name_begins_like_another_is_left_alone(make_cache: MakeCache) -> None:
    one = make_cache()
    other = make_cache(namespace=one.namespace + ":inner")
    one.cache_kv("prompt", 0, *pair(1))
    other.cache_kv("prompt", 0, *pair(2))
    assert one.evict("prompt") == 1
    assert one.evict(5) == 0
    one.cache_kv("prompt", 0, *pair(1))
    assert one.clear() == 1
    assert are_equal(other.get_cached_kv("prompt", 0), pair(2))


def test_a_quota_that_the_server_has_forgotten_is_set_again(make_cache: MakeCache) -> None:
    cache = make_cache(8 / 1024)
    cache.cache_kv("prompt", 0, *pair(1))
    cache._cache.quota(cache.namespace, max_bytes=0)  # as after a restart without files
    for number in range(10):
        cache.cache_kv(f"prompt{number}", 0, *mib(number))
    stats = cache.get_stats()
    assert stats["bytes"] <= 8 * MIB == stats["max_bytes"]


def test_what_it_remembers_of_uses_is_bounded(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("respkv.simple.cache.USED_MAX", 3)
    cache = make_cache()
    for name in "abcdefgh":
        cache.cache_kv(name, 0, *pair(1))
    assert len(cache._used) == 3
    assert cache.evict(5) == 5
    assert [cache.get_cached_kv(name, 0) is None for name in "efgh"] == [True, False, False, False]


def test_it_never_has_more_than_its_size_and_the_least_recently_used_go(
    make_cache: MakeCache,
) -> None:
    cache = make_cache(8 / 1024)
    for number in range(8):
        cache.cache_kv(f"prompt{number}", 0, *mib(number))
    assert cache.get_cached_kv("prompt0", 0) is not None
    for number in range(8, 11):
        assert cache.cache_kv(f"prompt{number}", 0, *mib(number)) is True
    stats = cache.get_stats()
    assert stats["bytes"] <= 8 * MIB == stats["max_bytes"]
    assert stats["entries"] == 8
    assert stats["evictions_lru"] >= 3
    assert cache.get_cached_kv("prompt10", 0) is not None


def test_what_is_larger_than_the_cache_is_refused_and_costs_nobody_anything(
    make_cache: MakeCache,
) -> None:
    cache = make_cache(2 / 1024)
    cache.cache_kv("small", 0, *pair(1))
    assert cache.cache_kv("large", 0, torch.zeros(2 * MIB), torch.zeros(1)) is False
    assert cache.cache_all_layers("many", [mib()] * 3) is False
    assert are_equal(cache.get_cached_kv("small", 0), pair(1))
    assert (cache.get_stats()["rejected"], cache.get_stats()["entries"]) == (4, 1)


def test_what_was_to_be_replaced_is_not_answered_when_the_new_has_no_room(
    make_cache: MakeCache,
) -> None:
    cache = make_cache(2 / 1024)
    cache.cache_kv("prompt", 0, *pair(1))
    assert cache.cache_kv("prompt", 0, torch.zeros(2 * MIB), torch.zeros(1)) is False
    assert cache.get_cached_kv("prompt", 0) is None


def test_what_has_expired_is_a_miss(make_cache: MakeCache) -> None:
    cache = make_cache(ttl_s=0.05)
    cache.cache_kv("short", 0, *pair(1))
    cache.cache_kv("long", 0, *pair(2), ttl_s=60)
    cache.cache_all_layers("layers", [pair(3)])
    time.sleep(0.1)
    assert cache.get_cached_kv("short", 0) is None
    assert cache.get_all_layers("layers") is None
    assert are_equal(cache.get_cached_kv("long", 0), pair(2))
    assert cache.get_stats()["evictions_ttl"] >= 2


def test_statistics_count_calls(make_cache: MakeCache, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make_cache()
    assert cache.get_stats()["hit_rate"] == 0.0
    cache.cache_all_layers("prompt", [pair(1)] * 3)
    cache.get_all_layers("prompt")
    cache.get_cached_kv("prompt", 2)
    cache.get_cached_kv("prompt", 3)
    cache.get_all_layers("other")
    stats = cache.get_stats()
    assert (stats["hits"], stats["misses"], stats["total_requests"]) == (2, 2, 4)
    assert stats["hit_rate"] == 0.5
    assert stats["bytes"] >= 6 * pair(1)[0].nbytes
    cache.print_stats()
    printed = capsys.readouterr().out
    assert "hit_rate        50.0%" in printed
    assert cache.namespace in printed


def test_tensors_come_where_they_are_wanted(make_cache: MakeCache) -> None:
    cache = make_cache(device="meta")
    cache.cache_kv("prompt", 0, *pair(1))
    found = cache.get_cached_kv("prompt", 0)
    assert found is not None
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert are_equal(cache.get_cached_kv("prompt", 0, device="cpu"), pair(1))


def test_threads_may_share_it(make_cache: MakeCache) -> None:
    cache = make_cache()

    def work(number: int) -> bool:
        cache.cache_all_layers(f"prompt{number}", [pair(number)] * 4)
        found = cache.get_all_layers(f"prompt{number}")
        return found is not None and are_equal(found[3], pair(number))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(16)))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda cache: cache.cache_kv("p", -1, *pair(1)), "layer is -1"),
        (lambda cache: cache.cache_kv("p", True, *pair(1)), "layer is True"),
        (lambda cache: cache.get_cached_kv("p", "0"), "layer is '0'"),
        (lambda cache: cache.cache_kv(7, 0, *pair(1)), "prefix is a int"),
        (lambda cache: cache.cache_kv("p", 0, [1.0], torch.zeros(1)), "keys is a list"),
        (lambda cache: cache.cache_kv("p", 0, torch.zeros(1), torch.eye(2).to_sparse()), "dense"),
        (lambda cache: cache.cache_kv("p", 0, *pair(1), ttl_s=0), "ttl_s is 0"),
        (lambda cache: cache.cache_kv("p", 0, *pair(1), ttl_s="1h"), "ttl_s is '1h'"),
        (lambda cache: cache.cache_kv("p", 0, *pair(1), ttl_s=1e20), r"ttl_s is 1e\+20"),
        (lambda cache: cache.cache_all_layers("p", []), "layers is empty"),
        (lambda cache: cache.evict(-1), r"evict\(-1\)"),
        (lambda cache: cache.evict(True), r"evict\(True\)"),
        (lambda cache: cache.evict(1.5), r"evict\(1.5\)"),
    ],
)
def test_a_bad_argument_is_named(engine: EmbeddedCache, call: Any, told: str) -> None:
    cache = SimpleKVCache(0.01, cache=engine, namespace="bad")
    with pytest.raises((ValueError, TypeError, ConfigError), match=told):
        call(cache)
    assert cache.get_stats()["entries"] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"max_size_gb": 0}, "max_size_gb is 0"),
        ({"max_size_gb": float("nan")}, "max_size_gb is nan"),
        ({"ttl_s": -1}, "ttl_s is -1"),
        ({"namespace": ""}, "namespace is empty"),
        ({"namespace": 5}, "namespace is 5; it must be printable text"),
        ({"namespace": "a\n"}, "it must be printable text of 1 to 256 bytes"),
        ({"namespace": "x" * 257}, "it must be printable text of 1 to 256 bytes"),
        ({"max_size_gb": "1"}, "max_size_gb is '1'"),
        ({"ttl_s": "1h"}, "ttl_s is '1h'"),
        ({"url": 5}, "url is a int"),
        ({"device": "nowhere"}, "device is 'nowhere', which cannot be used"),
        ({"device": 3.5}, "device is 3.5, which cannot be used"),
        ({"cache": "respkv://localhost"}, "cache is 'respkv://localhost'"),
        ({"url": "respkv://localhost", "maxmemory": "1gb"}, "maxmemory = '1gb'"),
        ({"url": "http://localhost"}, "the scheme must be one of"),
        ({"max_size_gb": None}, "without a server"),
        ({"maxmemry": "1gb"}, "did you mean maxmemory"),
    ],
)
def test_what_it_is_made_with_is_checked(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SimpleKVCache(**arguments)


def test_it_opens_an_engine_of_its_own_with_files_if_they_are_wanted(tmp_path: Any) -> None:
    tier = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "32mb"}
    with SimpleKVCache(0.01, **tier) as cache:
        cache.cache_all_layers("prompt", [pair(number) for number in range(3)])
    with pytest.raises(ConnectionLost):
        cache.get_all_layers("prompt")
    with SimpleKVCache(0.01, **tier) as cache:
        found = cache.get_all_layers("prompt")
        assert found is not None
        assert all(map(are_equal, found, map(pair, range(3))))
        assert cache.evict(1) == 3


def test_a_value_of_somebody_else_is_told(engine: EmbeddedCache) -> None:
    cache = SimpleKVCache(0.01, cache=engine, namespace="strange")
    cache.cache_kv("prompt", 0, *pair(1))
    key = key_of("strange", name_of("prompt"), 0)
    engine.delete(key)
    engine.put(key, b"RSKV\xff\xff\xff\xffnonsense" * 10)
    with pytest.raises(PageCorrupt, match="pair of tensors"):
        cache.get_cached_kv("prompt", 0)


def test_a_server_keeps_its_quota_when_no_size_is_given(server: ServerProcess) -> None:
    with SimpleKVCache(None, url=server.url, namespace="unlimited") as cache:
        cache._cache.quota("unlimited", max_bytes=5 * MIB)
        cache.cache_kv("prompt", 0, *pair(1))
        assert cache.get_stats()["max_bytes"] == 5 * MIB
        cache._cache.quota("unlimited", max_bytes=0)
        cache.clear()
