"""The asynchronous face of working memory, on both event loops."""

import anyio
import pytest

from respkv.agents import AsyncWorkingMemory
from respkv.client import AsyncClient
from tests.server_process import ServerProcess

pytestmark = pytest.mark.anyio


async def test_it_does_what_the_blocking_face_does(server: ServerProcess, session: str) -> None:
    async with AsyncClient(server.url) as client:
        async with AsyncWorkingMemory(client, "a", session) as memory:
            await memory.clear()
            await memory.set("plan", {"x": b"y"})
            assert await memory.get("plan") == {"x": b"y"}
            assert await memory.append("log", 1, 2) == 2
            assert await memory.list("log", 1) == [2]
            assert await memory.update("n", lambda n: n + 1, 0) == 1
            assert await memory.names() == ["plan", "log", "n"]
            assert await memory.delete("n")
            assert await memory.snapshot() == {"plan": {"x": b"y"}, "log": [1, 2]}
            assert await memory.touch()
            assert await memory.clear()
        await client.ping()
    with pytest.raises(TypeError, match="cache is an AsyncClient"):
        AsyncWorkingMemory(5, "a", "s")  # type: ignore[arg-type]


async def test_tasks_lose_nothing_and_cancelled_ones_change_all_or_nothing(
    server: ServerProcess, session: str
) -> None:
    async with AsyncWorkingMemory(server.url, "tasks", session) as memory:
        await memory.clear()

        async def work(number: int) -> None:
            await memory.append("log", number)
            with anyio.move_on_after(0.0005 * (number % 3)):
                await memory.append("tries", number, number)

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(work, number)
        assert sorted(await memory.list("log")) == list(range(20))
        tries = await memory.list("tries")
        assert all(tries[at] == tries[at + 1] for at in range(0, len(tries), 2))
