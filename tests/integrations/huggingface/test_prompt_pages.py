"""Pages of prompts over a server, with and without its memory, and over an engine in the process."""

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor

import respkv
from respkv.client import Client
from respkv.errors import CacheError, ServerError
from respkv.integrations.huggingface import availability
from respkv.integrations.huggingface.page_copies import KVPair
from respkv.integrations.huggingface.prefix_cache import RespKVCache
from respkv.integrations.huggingface.prompt_pages import NO_MATCH, PromptPages
from respkv.page import Geometry
from tests.conftest import StartServer
from tests.integrations.huggingface.models import prompt, shared_model, tiny_model
from tests.server_process import ServerProcess

SHAPE = Geometry(layers=3, heads=2, dim=8, tokens=16, dtype="bfloat16")
NAMES = (f"pages-{number}" for number in count())


def kv_of(tokens: list[int], *, first: int = 0) -> list[KVPair]:
    """Return keys and values that say which token and layer they are of, not contiguous."""
    made = []
    for layer in range(SHAPE.layers):
        pair = []
        for side in range(2):
            ids = torch.tensor(tokens[first:]).float()[:, None, None]
            rows = ids + 256 * layer + 1024 * side + torch.arange(16.0).view(2, 8) / 16
            padded = torch.zeros(len(ids), 2, 2, 8, dtype=torch.bfloat16)
            padded[:, 1] = rows
            pair.append(padded[:, 1])
        made.append((pair[0], pair[1]))
    return made


def room(tokens: int, *, is_grid: bool) -> list[KVPair]:
    """Return memory for tokens: of all layers in one piece, or each for itself."""
    if is_grid:
        whole = torch.full((3, 2, tokens + 5, 2, 8), torch.nan, dtype=torch.bfloat16)
        return [(layer[0, :tokens], layer[1, :tokens]) for layer in whole]
    made = torch.full((6, 2, tokens, 8), torch.nan, dtype=torch.bfloat16).unbind()
    planes = [each.clone().transpose(0, 1) for each in made]
    return list(zip(planes[::2], planes[1::2], strict=True))


def assert_same(found: list[KVPair], expected: list[KVPair], stop: int) -> None:
    for got, wanted in zip(found, expected, strict=True):
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one[:stop], other[:stop])


@pytest.fixture(scope="module", params=["socket", "memory", "engine"])
def cache(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Client | str]:
    if request.param == "memory":
        yield server.url
    elif request.param == "socket":
        running = ServerProcess(maxmemory="16mb")
        yield running.url
        running.stop()
    else:
        with respkv.open_sync(maxmemory="16mb", prefault=False) as engine:
            yield engine


@pytest.fixture
def pages(cache: Client | str) -> Iterator[PromptPages]:
    how: Any = {"geometry": SHAPE, "fingerprint": b"f", "match_timeout_s": 60}
    with PromptPages(cache, namespace=next(NAMES), **how) as made:
        yield made


@pytest.mark.parametrize("is_grid", [True, False])
@pytest.mark.parametrize(("first", "stop"), [(0, None), (0, 41), (21, None), (32, 48), (37, 39)])
def test_what_was_stored_is_loaded(
    pages: PromptPages, is_grid: bool, first: int, stop: int | None
) -> None:
    tokens = prompt(70)
    assert pages.store(tokens, kv_of(tokens))
    assert pages.flush(60)
    match = pages.match(tokens)
    assert (match.tokens, match.pages, match.has_logits) == (70, 4, False)
    end = 70 if stop is None else stop
    into = room(end - first, is_grid=is_grid)
    assert pages.load(tokens, into, first=first, stop=stop, match=match) == end
    assert_same(into, kv_of(tokens, first=first), end - first)
    assert pages.stats().errors == 0


def test_a_prompt_that_parts_within_a_page_is_loaded_to_the_token(pages: PromptPages) -> None:
    tokens = prompt(70)
    pages.store(tokens, kv_of(tokens))
    assert pages.flush(60)
    other = [*tokens[:44], *prompt(30, seed=1)]
    into = room(74, is_grid=True)
    assert pages.match(other).tokens == 44
    assert pages.load(other, into) == 44  # without a match it is found out
    assert_same(into, kv_of(other), 44)
    # The last of 70 tokens can be left out: the tail is longer than what is wanted of it.
    assert pages.load(tokens, into, stop=69, match=pages.match(tokens)) == 69
    assert_same(into, kv_of(tokens), 69)


def test_only_what_is_missing_is_stored(pages: PromptPages) -> None:
    tokens, asked = prompt(70), []
    pages.store(tokens[:40], kv_of(tokens[:40]))

    def gather(start: int, end: int) -> list[KVPair]:
        asked.append((start, end))
        return kv_of(tokens[:end], first=start)

    done = threading.Event()
    assert pages.store(tokens, gather, done=done.set)
    assert done.wait(60)
    assert pages.flush(60)
    assert asked == [(32, 70)]
    assert pages.stats().stored_pages == 3 + 3
    late = prompt(20, seed=2, like=tokens[:64])
    assert pages.store(late, kv_of(late, first=64), first=64)
    assert pages.flush(60)
    into = room(84, is_grid=True)
    assert pages.load(late, into) == 84
    assert_same(into, kv_of(late), 84)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_come_back_as_they_were(pages: PromptPages, dtype: torch.dtype) -> None:
    tokens = prompt(33)
    logits: Tensor = torch.randn(1001).to(dtype)
    assert pages.logits(tokens) is None
    pages.store(tokens, kv_of(tokens), logits=logits)
    longer = prompt(30, seed=1, like=tokens)
    pages.store(longer, kv_of(longer))
    pages.store(longer, None, logits=logits + 1)
    assert pages.flush(60)
    for text, expected in ((tokens, logits), (longer, logits + 1)):
        assert pages.match(text).has_logits
        found = pages.logits(text)
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    assert pages.logits(longer[:-1]) is None


def test_prompts_of_other_tenants_share_nothing(pages: PromptPages) -> None:
    tokens = prompt(40)
    pages.store(tokens, kv_of(tokens), salt="a", tenant=b"t")
    assert pages.flush(60)
    assert pages.match(tokens) == NO_MATCH
    assert pages.match(tokens, salt="a").tokens == 0
    into = room(40, is_grid=True)
    assert pages.load(tokens, into) == 0
    assert pages.load(tokens, into, salt="a", tenant=b"t") == 40
    assert_same(into, kv_of(tokens), 40)


def test_clear_forgets_this_namespace_alone(pages: PromptPages, cache: Client | str) -> None:
    tokens = prompt(40)
    with PromptPages(cache, geometry=SHAPE, namespace=f"{pages.namespace}*x") as other:
        for each in (pages, other):
            each.store(tokens, kv_of(tokens), logits=torch.zeros(3))
            assert each.flush(60)
        assert other.clear() == 3
        assert (other.match(tokens).tokens, pages.match(tokens).tokens) == (0, 40)
        assert pages.clear() == 3


def test_after_a_flush_of_everything_it_goes_on(pages: PromptPages) -> None:
    tokens = prompt(40)
    pages.store(tokens, kv_of(tokens))
    assert pages.flush(60)
    pages.client.command("FLUSHALL")
    assert pages.match(tokens).tokens == 0
    pages.store(tokens, kv_of(tokens))
    assert pages.flush(60)
    assert pages.match(tokens).tokens == 40


def test_what_does_not_fit_is_an_error_of_the_caller(pages: PromptPages) -> None:
    tokens = prompt(40)
    with pytest.raises(ValueError, match=r"into has 2 layers, pages have 3"):
        pages.load(tokens, room(40, is_grid=True)[:2])
    with pytest.raises(ValueError, match=r"expected are \[40, 2, 8\] of torch.bfloat16"):
        pages.load(tokens, [(key.float(), value.float()) for key, value in kv_of(tokens)])
    with pytest.raises(ValueError, match="kv has 40 tokens, 41 are to be stored"):
        pages.store([*tokens, 3], kv_of(tokens))
    with pytest.raises(ValueError, match="first = 8: accepted are multiples of 16"):
        pages.store(tokens, kv_of(tokens, first=8), first=8)
    with pytest.raises(ValueError, match=r"logits are \[V\] floats"):
        pages.store(tokens, None, logits=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="-1"):
        pages.match([4, -1])
    assert pages.stats().errors == 0


def test_another_model_is_refused(engine: Client) -> None:
    llama, other = shared_model("llama"), tiny_model("llama", seed=1)
    tokens = prompt(20)
    with PromptPages(engine, model=llama, namespace="one") as pages:
        pages.check()
        assert pages.geometry.tokens == 256
        assert pages.model_kv is not None
        assert len(pages.model_kv.layers) == 3
    with PromptPages(engine, model=other, namespace="one") as pages:
        assert pages.match(tokens) == NO_MATCH
        assert "one" in pages.stats().last_error
        assert not pages.store(tokens, None, logits=torch.zeros(3))
        with pytest.raises(ServerError, match="KVSCHEMA"):
            pages.check()
    # By default each has a namespace of its own.
    assert PromptPages(engine, model=llama).namespace != PromptPages(engine, model=other).namespace
    with pytest.raises(TypeError, match="a model, or the geometry"):
        PromptPages(engine)
    for nameless in (None, b""):  # another model of this shape would get its pages
        with pytest.raises(TypeError, match="a model, a fingerprint or a namespace"):
            PromptPages(engine, geometry=SHAPE, fingerprint=nameless)


@pytest.fixture
def _endless_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error nobody is asked again, however long the machine stands still."""
    monkeypatch.setattr(availability, "PAUSE_S", 3600.0)


@pytest.mark.usefixtures("_endless_pauses")
def test_a_server_that_is_away_is_not_waited_for(start_server: StartServer) -> None:
    server = start_server()
    tokens = prompt(40)
    with PromptPages(server.url, geometry=SHAPE, fingerprint=b"f") as pages:
        pages.store(tokens, kv_of(tokens))
        assert pages.flush(60)
        match = pages.match(tokens)
        server.stop()
        assert pages.load(tokens, room(40, is_grid=True), match=match) == 0
        errors = pages.stats().errors
        assert errors == 1
        for _ in range(100):  # nobody is asked
            assert pages.match(tokens) == NO_MATCH
            assert not pages.store(tokens, kv_of(tokens))
        assert pages.stats().errors == errors
        with pytest.raises(CacheError):
            pages.check()


@contextmanager
def stopped(server: ServerProcess) -> Iterator[None]:
    """Have a server hang: it takes what is sent, and answers when the block has ended."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


@pytest.mark.usefixtures("_endless_pauses")
def test_a_server_that_hangs_is_given_up_soon_from_the_first_question_on(
    start_server: StartServer,
) -> None:
    server, tokens = start_server(), prompt(40)
    # Whoever waited for as long as the client does would still wait when the test is ended.
    how: Any = {"geometry": SHAPE, "fingerprint": b"f", "match_timeout_s": 0.1}
    with Client(server.url, timeout_s=3600, connect_timeout_s=3600) as client:
        with PromptPages(client, **how) as pages, PromptPages(client, **how) as other:
            patient = patiently(pages)
            patient.store(tokens, kv_of(tokens), logits=torch.arange(8.0))
            assert patient.flush(60)
            match = patient.match(tokens)
            assert match.tokens == 40
            for each in (pages, other):
                each.check()
            with stopped(server):
                assert PromptPages(client, **how).match(tokens) == NO_MATCH
                assert pages.load(tokens, room(40, is_grid=True), match=match) == 0
                assert other.logits(tokens) is None
                for each in (pages, other):
                    assert each.stats().errors == 1
                    assert "did not answer in time" in each.stats().last_error
                    assert each.match(tokens) == NO_MATCH  # it is not asked again
                    assert not each.store(tokens, None, logits=torch.zeros(3))
                    assert each.stats().errors == 1
            assert patiently(pages).load(tokens, room(40, is_grid=True), match=match) == 40


def test_a_load_may_take_as_long_as_its_match_says(start_server: StartServer) -> None:
    server, tokens = start_server(), prompt(40)
    how: Any = {"geometry": SHAPE, "fingerprint": b"f", "match_timeout_s": 1e-9}
    with PromptPages(server.url, geometry=SHAPE, fingerprint=b"f") as pages:
        pages.store(tokens, kv_of(tokens))
        assert pages.flush(60)
        match = patiently(pages).match(tokens)
    into = room(40, is_grid=True)
    with Client(server.url) as client, ThreadPoolExecutor(1) as thread:
        hasty, slow = PromptPages(client, **how), match._replace(load_us=60_000_000)
        hasty.check()
        with stopped(server):  # one that runs may have answered by the first look at the clock
            assert hasty.load(tokens, into, match=match._replace(load_us=0)) == 0
        hasty = PromptPages(client, **how)
        hasty.check()
        for patience in (slow, None):  # without a match, as long as the client waits
            with stopped(server):
                loading = thread.submit(hasty.load, tokens, into, match=patience)
                sleep(0.05)
                assert not loading.done()
            assert loading.result(60) == 40
        with stopped(server):
            assert hasty.match(tokens) == NO_MATCH
    assert_same(into, kv_of(tokens), 40)
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="match_timeout_s must be more than 0"):
            PromptPages("respkv://nowhere", geometry=SHAPE, match_timeout_s=seconds)


def patiently(pages: PromptPages) -> PromptPages:
    """Return pages of the same namespace that wait for a machine that is busy."""
    shape, name = pages.geometry, pages.namespace
    return PromptPages(
        pages.client,
        geometry=shape,
        fingerprint=pages.fingerprint,
        namespace=name,
        match_timeout_s=60,
    )


def test_logits_that_came_with_the_match_are_asked_for_no_more(pages: PromptPages) -> None:
    tokens, logits = prompt(40), torch.linspace(-3, 3, 7)
    pages.store(tokens, kv_of(tokens), logits=logits)
    assert pages.flush(60)
    plain, match = pages.match(tokens), pages.match(tokens, logits=True)
    assert (plain.logits, plain.has_logits, match.has_logits) == (None, True, True)
    assert pages.match(prompt(41), logits=True).logits is None
    pages.client.command("FLUSHALL")
    found = pages.logits(tokens, match=match)
    assert found is not None
    assert torch.equal(found, logits)
    assert pages.logits(tokens, match=plain) is None
    assert pages.logits(tokens) is None


def test_what_has_threads_and_connections_says_that_it_is_not_pickled(engine: Client) -> None:
    with PromptPages(engine, model=tiny_model("llama"), page_tokens=16) as pages:
        cache = RespKVCache(pages, [1, 2, 3], store=False)
        for each in (pages, cache):
            with pytest.raises(TypeError, match=r"PromptPages is neither pickled nor copied.*make"):
                pickle.dumps(each)


def test_threads_load_prompts_that_begin_alike_together(pages: PromptPages) -> None:
    prompts = [prompt(64)[: 64 - 16 * number] + [number] * 16 for number in range(3)]
    for tokens in prompts:
        pages.store(tokens, kv_of(tokens))
    assert pages.flush(60)

    def load(number: int) -> None:
        tokens = prompts[number % 3]
        into = room(len(tokens), is_grid=True)
        match = pages.match(tokens)
        assert pages.load(tokens, into, match=match) == len(tokens)
        assert_same(into, kv_of(tokens), len(tokens))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(load, range(24)))


def test_what_finds_no_room_in_the_queue_is_dropped(engine: Client) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def gather(start: int, end: int) -> list[KVPair]:
        entered.set()
        assert go_on.wait(60)
        return kv_of(tokens, first=start)

    tokens, done = prompt(16), []
    with PromptPages(engine, geometry=SHAPE, namespace="queue", queue_max=1) as pages:
        assert pages.store(tokens, gather)
        assert entered.wait(60)
        assert pages.store(tokens, None, logits=torch.zeros(3))
        assert not pages.store(tokens, None, done=lambda: done.append(1))
        assert not pages.flush(0.01)
        go_on.set()
        assert pages.flush(60)
        assert (pages.stats().stores, pages.stats().stores_dropped, done) == (2, 1, [])
    assert not pages.store(tokens, None)
