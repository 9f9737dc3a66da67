"""The asynchronous face, on both event loops."""

import anyio
import pytest

import respkv
from respkv.client import AsyncClient
from respkv.errors import ConfigError, ConnectionLost
from respkv.semantic import AsyncSemanticCache
from tests.server_process import ServerProcess

pytestmark = pytest.mark.anyio

EAST, NORTH = [1, 0, 0, 0], [0, 1, 0, 0]


async def test_it_does_what_the_blocking_face_does(server: ServerProcess, namespace: str) -> None:
    async with AsyncClient(server.url) as client:
        async with (
            AsyncSemanticCache(client, namespace, dim=4) as answers,
            AsyncSemanticCache(server.url, namespace, dim=4) as other,
        ):
            assert await other.get(EAST) is None
            key = await answers.put(EAST, b"east", metadata={"a": 1}, ttl_s=100)
            found = await other.get(EAST)
            assert found is not None
            assert (found.payload, found.score, found.metadata) == (b"east", 1.0, {"a": 1})
            assert [hit.key for hit in await other.search(EAST, 3)] == [key]
            assert await other.delete(key)
            assert await answers.get(EAST) is None
            await answers.put(EAST, b"east")
            assert await answers.clear() == 1
            assert answers.stats().puts == 2
        await client.ping()  # it is its owner's still
    with pytest.raises(TypeError, match="cache is an AsyncClient"):
        AsyncSemanticCache(5, dim=4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dim = 0"):
        AsyncSemanticCache(server.url, dim=0)


async def test_it_works_over_an_engine_in_this_process() -> None:
    async with respkv.open(maxmemory="64mb", prefault=False) as engine:
        async with (
            AsyncSemanticCache(engine, dim=4) as answers,
            AsyncSemanticCache(engine, dim=4) as other,
        ):
            await answers.put(EAST, "east")
            found = await other.get(EAST)
            assert found is not None
            assert found.payload == "east"
            assert await other.get(NORTH) is None


async def test_tasks_share_it_and_cancelled_calls_leave_it_whole(
    server: ServerProcess, namespace: str
) -> None:
    async with AsyncSemanticCache(server.url, namespace, dim=4) as answers:

        async def work(number: int) -> None:
            vector = [1, number, 1, 0]
            with anyio.move_on_after(0.0005 * (number % 4)):
                await answers.put(vector, str(number))
            await answers.put(vector, str(number))
            found = await answers.get(vector, threshold=1.0)
            assert found is not None
            assert found.payload == str(number)

        async with anyio.create_task_group() as tasks:
            for number in range(24):
                tasks.start_soon(work, number)
        assert len(await answers.search(EAST, 99)) == 24


async def test_it_can_be_closed_while_others_wait_for_it_and_says_so_then(
    server: ServerProcess, namespace: str
) -> None:
    async with AsyncClient(server.url) as client:
        answers = AsyncSemanticCache(client, namespace, dim=4)
        ends: list[str] = []

        async def ask() -> None:
            try:
                while True:
                    await answers.put(EAST, "east")
                    await answers.get(EAST)
            except ConnectionLost as error:
                ends.append(str(error))

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(ask)
            await anyio.sleep(0.05)
            await answers.close()
        assert ends == ["the semantic cache is closed"] * 3
        channel = f"kv:events:semantic:{namespace}"
        with anyio.fail_after(60):  # the server sees the end of the connection in its own time
            while await client.command("PUBSUB", "NUMSUB", channel) != [channel.encode(), 0]:  # noqa: ASYNC110
                await anyio.sleep(0.01)
