"""Workers of every layout store and read the same pages, bit by bit."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from respkv.client import Client
from tests.conftest import StartServer
from tests.server.prompts import HEADS, LAYERS, TOKENS, declare, model, text
from tests.server_process import ServerProcess

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (4, 2)]


@pytest.fixture(scope="module")
def shared() -> Iterator[ServerProcess]:
    running = ServerProcess(maxmemory="256mb")
    with Client(running.url) as client:
        declare(client)
    yield running
    info = running.info()
    assert (info["kv_assemblies"], info["kv_assembly_bytes"]) == ("0", "0")
    assert (info["kv_landings"], info["kv_sending"]) == ("0", "0")
    assert "Traceback" not in running.log, running.log
    assert running.stop() == 0


@pytest.mark.parametrize(("stored", "read"), [*itertools.product(LAYOUTS, LAYOUTS)], ids=str)
def test_what_one_layout_stored_every_other_reads(
    shared: ServerProcess, stored: tuple[int, int], read: tuple[int, int]
) -> None:
    seed = LAYOUTS.index(stored) * 100 + LAYOUTS.index(read)
    prompt = text(5 * TOKENS + 7, seed)
    with model(shared, *stored) as writers, model(shared, *read) as readers:
        writers.put(prompt)
        readers.check(prompt)
        readers.check(prompt, first=TOKENS + 3)
        other = prompt.head(3 * TOKENS + 5).followed_by(text(40, seed + 10_000))
        readers.check(other, 3 * TOKENS + 5)


@pytest.mark.parametrize(
    ("stored", "going_on"), [((4, 1), (2, 1)), ((1, 1), (4, 1)), ((2, 2), (1, 4))], ids=str
)
def test_another_layout_goes_on_where_one_has_stopped(
    shared: ServerProcess, stored: tuple[int, int], going_on: tuple[int, int]
) -> None:
    seed = 20_000 + LAYOUTS.index(stored)
    whole = text(6 * TOKENS + 9, seed)
    begun = whole.head(2 * TOKENS + 5)
    with model(shared, *stored) as before, model(shared, *going_on) as after:
        before.put(begun)
        after.check(begun)
        assert all(worker.put(whole).skipped == 2 for worker in after.workers)
        before.check(whole)
        after.check(whole, first=2 * TOKENS)


def test_ranks_that_put_at_the_same_time_make_whole_pages(shared: ServerProcess) -> None:
    prompts = [text(4 * TOKENS + 3, 30_000 + number) for number in range(8)]
    with model(shared, 4, 2) as writers, model(shared, 1) as readers:
        threads = [
            threading.Thread(target=lambda own=worker: [own.put(each) for each in prompts])
            for worker in writers.workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for prompt in prompts:
            readers.check(prompt)


def test_a_page_is_absent_until_its_last_rectangle_has_come(shared: ServerProcess) -> None:
    prompt = text(2 * TOKENS, 40_000)
    with model(shared, 4) as writers, model(shared, 1) as readers:
        for worker in writers.workers[:-1]:
            assert worker.put(prompt).stored == 0
            readers.check(prompt, 0)
        assert shared.info()["kv_assemblies"] == "2"
        writers.workers[0].put(prompt)  # twice is as good as once
        readers.check(prompt, 0)
        assert writers.workers[-1].put(prompt).stored == 2
        readers.check(prompt)


def test_layers_come_and_go_one_by_one(shared: ServerProcess) -> None:
    prompt = text(3 * TOKENS + 2, 50_000)
    with Client(shared.url) as client, model(shared, 2) as readers:
        for layer in reversed(range(LAYERS)):
            part = prompt.part((layer, 1), (0, HEADS))
            put = client.seq.put_layer("m", prompt.tokens, layer, part[0])
            assert put.stored == (4 if layer == 0 else 0)
        readers.check(prompt)
        for layer in range(LAYERS):
            matched, got = client.seq.get_layer("m", prompt.tokens, layer, first=5)
            assert matched == len(prompt.tokens)
            assert bytes(got) == prompt.part((layer, 1), (0, HEADS), 5)[0].tobytes()


def test_rectangles_may_overlap(shared: ServerProcess) -> None:
    prompt = text(TOKENS + 1, 60_000)
    with Client(shared.url) as client, model(shared, 2) as readers:
        for layers, heads in [((0, 3), (0, 5)), ((0, 4), (4, 4)), ((2, 2), (0, 8))]:
            part = prompt.part(layers, heads)
            client.seq.put("m", prompt.tokens, part, layers=layers, heads=heads)
        readers.check(prompt)


def test_a_rank_that_has_gone_leaves_its_part(shared: ServerProcess) -> None:
    prompt = text(2 * TOKENS + 4, 70_000)
    with ExitStack() as stack:
        writers = stack.enter_context(model(shared, 2))
        writers.workers[0].put(prompt)
        writers.workers[0].client.close()
        writers.workers[1].put(prompt)
        stack.enter_context(model(shared, 1)).check(prompt)


def test_pages_of_one_layout_are_read_by_another_after_a_restart(
    start_server: StartServer, tmp_path: Path
) -> None:
    files = {"nvme_path": str(tmp_path), "nvme_bytes": "64mb", "port": 0}
    first = start_server(**files)
    prompts = [text(4 * TOKENS + 1 + 3 * number, 80_000 + number) for number in range(3)]
    with model(first, 4) as four, model(first, 1) as one, model(first, 2) as two:
        declare(one.workers[0].client)
        for writers, prompt in zip((four, one, two), prompts, strict=True):
            writers.put(prompt, durability="written")
    first.stop()
    second = start_server(**files)
    for tp in (4, 2, 1):
        with model(second, tp) as readers:
            for prompt in prompts:
                readers.check(prompt)
                readers.check(prompt.head(TOKENS + 5).followed_by(text(9, 90_000)), TOKENS + 5)
    assert int(second.info()["kv_loads"]) > 0
