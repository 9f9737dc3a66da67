"""One look at a server, and what changed between two."""

from respkv.cli.sample import Sample, Tier, rates, take_sample
from respkv.client import Client


def sample(at_s: float, info: dict[str, str] | None = None, **stats: int) -> Sample:
    return Sample(at_s=at_s, info=info or {}, stats=stats, tiers=[])


def test_a_redis_is_shown_by_what_info_says(redis_url: str) -> None:
    for protocol in (2, 3):
        with Client(redis_url, protocol=protocol) as client:
            look = take_sample(client)
        assert look.info["redis_mode"] == "standalone"
        assert look.stats == {}
        (tier,) = look.tiers
        assert (tier.name, tier.capacity_bytes, tier.num_pages) == ("memory", 0, None)
        assert tier.used_bytes == look.count("used_memory") > 0


def test_rates_are_changes_per_second() -> None:
    before = sample(10.0, {"total_commands_processed": "100"}, hits=10, misses=10, bytes_in=1000)
    after = sample(12.0, {"total_commands_processed": "150"}, hits=16, misses=12, bytes_in=5000)
    now = rates(before, after)
    assert (now.commands, now.in_bytes, now.out_bytes, now.evicted) == (25.0, 2000.0, 0.0, 0.0)
    assert now.hit_rate == 0.75


def test_kv_counters_come_before_those_of_info() -> None:
    info = {"total_net_input_bytes": "999"}
    assert sample(0.0, info, bytes_in=5).counter("bytes_in", "total_net_input_bytes") == 5
    assert sample(0.0, info).counter("bytes_in", "total_net_input_bytes") == 999


def test_a_server_that_was_started_again_has_no_negative_rates() -> None:
    before, after = sample(0.0, hits=100, misses=5, bytes_out=10**9), sample(1.0, hits=1, misses=6)
    now = rates(before, after)
    assert (now.out_bytes, now.hit_rate) == (0.0, 0.0)


def test_nothing_asked_is_no_hit_rate() -> None:
    assert rates(sample(0.0, hits=3), sample(1.0, hits=3)).hit_rate is None


def test_a_field_that_is_no_number_counts_zero() -> None:
    assert sample(0.0, {"maxmemory_policy": "lru"}).count("maxmemory_policy") == 0
    assert sample(0.0).count("uptime_in_seconds") == 0


def test_a_server_of_ours_shows_its_tiers(server_url: str) -> None:
    for protocol in (2, 3):
        with Client(server_url, protocol=protocol) as client:
            client.put(b"sample:page", b"x" * 100_000)
            assert client.get(b"sample:page") is not None
            look = take_sample(client)
            client.delete(b"sample:page")
        cpu = look.tiers[0]
        assert isinstance(cpu, Tier)
        assert cpu.name == "cpu"
        assert 100_000 <= cpu.used_bytes <= cpu.capacity_bytes
        assert cpu.num_pages == 1
        assert look.stats["hits"] >= 1
        assert look.stats["bytes_in"] >= 100_000
        assert look.stats["bytes_out"] >= 100_000
