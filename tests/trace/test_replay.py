"""Traces against a real server."""

from dataclasses import replace

import pytest

from respkv.client import AsyncClient, Client
from respkv.errors import ConfigError, ServerError
from respkv.trace.format import Request, Trace
from respkv.trace.generate import Plan as Making
from respkv.trace.generate import generate
from respkv.trace.replay import Plan, page_of, replay
from respkv.trace.simulate import Cell, simulate
from tests.conftest import StartServer
from tests.server_process import ServerProcess

pytestmark = pytest.mark.anyio
MAKING = Making(seed=2, sessions=60, seconds=600.0)


def plan_for(server: ServerProcess, **more: object) -> Plan:
    return replace(Plan(url=server.url, settings={"answer-lease": "0"}), **more)  # type: ignore[arg-type]


def setting(server: ServerProcess, name: str) -> str:
    with Client(server.url) as client:
        found = client.command("CONFIG", "GET", name)
    assert isinstance(found, dict)
    (value,) = found.values()
    assert isinstance(value, bytes)
    return value.decode()


def num_keys(server: ServerProcess) -> int:
    with Client(server.url) as client:
        count = client.command("DBSIZE")
    assert isinstance(count, int)
    return count


async def test_a_server_with_room_hits_what_can_be_hit(server: ServerProcess) -> None:
    trace = generate(MAKING)
    before = num_keys(server)
    report = await replay(trace, plan_for(server))
    ideal = simulate(Cell("belady", 10**6), trace)
    assert report.hit_tokens == ideal.hit_tokens
    assert report.hit_flops == pytest.approx(ideal.hit_flops)
    assert report.num_requests == len(trace.requests)
    assert (report.num_wrong, report.num_lost, report.num_refused) == (0, 0, 0)
    assert set(report.tiers) == {"c"}
    assert report.tiers["c"] == ideal.num_hits
    assert len(report.latencies["match"]) == len(trace.requests)
    assert 0 < report.percentile_us("match", 0.5) <= report.percentile_us("match", 1.0)
    assert num_keys(server) == before


async def test_the_policy_is_set_and_set_back(start_server: StartServer) -> None:
    server = start_server(maxmemory="8mb")
    trace = generate(MAKING)
    before = setting(server, "maxmemory-policy"), setting(server, "answer-lease")
    plan = plan_for(
        server, page_bytes=65_536, settings={"answer-lease": "0", "maxmemory-policy": "fifo"}
    )
    report = await replay(trace, plan)
    assert (setting(server, "maxmemory-policy"), setting(server, "answer-lease")) == before
    assert report.num_wrong == 0
    assert 0 < report.hit_tokens < simulate(Cell("belady", 10**6), trace).hit_tokens


async def test_many_workers_at_a_pace_serve_every_request(server: ServerProcess) -> None:
    trace = generate(MAKING).first(40)
    seconds = trace.requests[-1].at_s - trace.requests[0].at_s
    report = await replay(trace, plan_for(server, num_workers=4, speed=seconds / 0.5))
    assert report.num_requests == 40
    assert report.num_wrong == 0
    assert report.seconds >= 0.5


async def test_bytes_that_are_not_those_that_were_put_are_counted(server: ServerProcess) -> None:
    trace = Trace("t", 512, (Request(0.0, 1024, (1, 2)),))
    plan = plan_for(server, keeps=True, namespace="wrong")
    assert (await replay(trace, plan)).num_wrong == 0
    async with AsyncClient(server.url) as client:
        key = f"wrong:{1:064x}"
        await client.delete(key)
        await client.put(key, b"x" * 4096)
        report = await replay(trace, replace(plan, keeps=False))
        assert (report.num_wrong, report.tiers["c"]) == (1, 2)
        await client.delete(key, f"wrong:{2:064x}")


async def test_a_server_that_is_full_refuses_and_the_replay_goes_on(
    start_server: StartServer,
) -> None:
    server = start_server(maxmemory="4mb", reserve_timeout=0)
    requests = [Request(float(number), 512, (number,)) for number in range(40)]
    # All that matches is held for a minute, so nothing can be evicted for what comes after it.
    twice = tuple(request for request in requests for _ in range(2))
    plan = Plan(url=server.url, page_bytes=200_000, settings={"answer-lease": "60000"})
    report = await replay(Trace("t", 512, twice), plan)
    assert report.num_refused > 0
    assert (report.num_requests, report.num_wrong, report.num_lost) == (80, 0, 0)


async def test_answers_are_stored_behind_the_prompt(server: ServerProcess) -> None:
    requests = (Request(0.0, 512, (1,), answer=(2,)), Request(1.0, 1024, (1, 2)))
    report = await replay(Trace("t", 512, requests), plan_for(server))
    assert (report.hit_tokens, report.num_put) == (1024, 2)


async def test_a_setting_that_the_server_does_not_know_is_named(server: ServerProcess) -> None:
    with pytest.raises(ConfigError, match="no setting 'nonsense'"):
        await replay(generate(MAKING).first(1), plan_for(server, settings={"nonsense": "1"}))
    with pytest.raises(ServerError, match="maxmemory-policy"):
        await replay(
            generate(MAKING).first(1), plan_for(server, settings={"maxmemory-policy": "best"})
        )


def test_no_two_pages_have_the_same_bytes() -> None:
    pages = {page_of(f"ns:{number:064x}", 64) for number in range(1000)}
    assert len(pages) == 1000


@pytest.mark.parametrize("wrong", [{"speed": -1.0}, {"num_workers": 0}, {"page_bytes": 0}])
def test_a_wrong_plan_is_refused_with_the_value(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="it must be"):
        Plan(url="respkv://nowhere", **wrong)  # type: ignore[arg-type]
