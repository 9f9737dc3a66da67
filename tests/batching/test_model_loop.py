"""The model loop: any number of requests in, their own tokens out, whatever happens to others."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import anyio
import pytest
import torch
from torch import Tensor

from respkv.batching.model_loop import Limits, ModelLoop
from respkv.batching.request import (
    BadRequest,
    GenerationFailed,
    GenerationRequest,
    LoopClosed,
    Sampling,
)
from respkv.batching.sequence import Chunk
from respkv.batching.ticket import Ticket
from respkv.errors import Busy
from tests.batching.toy_runner import VOCAB, ToyRunner, expected


class GatedRunner(ToyRunner):
    """Computes a step for each time it is let; tells when it is asked to."""

    def __init__(self, *, num_blocks: int = 100, block_tokens: int = 4) -> None:
        super().__init__(num_blocks=num_blocks, block_tokens=block_tokens)
        self.allowed = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.fault: Callable[[Sequence[Chunk], Tensor], Tensor] = lambda chunks, logits: logits

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        self.asked.release()
        self.allowed.acquire()
        return self.fault(chunks, super().step(chunks))

    def let(self, steps: int = 1000) -> None:
        self.allowed.release(steps)


@pytest.fixture
def runner() -> GatedRunner:
    return GatedRunner()


@pytest.fixture(name="loop")
def running_loop(runner: GatedRunner) -> Iterator[ModelLoop]:
    with ModelLoop(runner, limits=Limits(sequences_max=2, waiting_max=2)) as running:
        yield running
        runner.let()


def start(loop: ModelLoop, runner: GatedRunner, *requests: GenerationRequest) -> list[Ticket]:
    """Submit requests, and return when the model is in its first step with them."""
    tickets = [loop.submit(each) for each in requests[:1]]
    runner.asked.acquire()
    tickets += [loop.submit(each) for each in requests[1:]]
    if requests[1:]:
        runner.let(1)
        runner.asked.acquire()
    return tickets


def prompt(count: int, *, seed: int = 0) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(VOCAB) for _ in range(count)]


def test_requests_of_many_threads_get_their_own_tokens_in_little_memory() -> None:
    runner = ToyRunner(num_blocks=20)
    limits = Limits(sequences_max=5, waiting_max=1000, step_tokens_max=16)
    wrong: list[list[int]] = []

    def ask(seed: int) -> None:
        drawn = random.Random(seed)
        for turn in range(15):
            tokens = prompt(drawn.randint(1, 40), seed=seed * 100 + turn)
            request = GenerationRequest(
                tokens,
                drawn.randint(1, 20),
                use_cache=drawn.random() > 0.1,
                use_prefix_cache=drawn.random() > 0.3,
            )
            ticket = loop.submit(request)
            if drawn.random() < 0.2:
                ticket.cancel()
            got = ticket.result(60)
            want = expected(tokens, request.max_new_tokens)
            if list(got.tokens) != want[: len(got.tokens)] or (
                got.finish_reason != "cancelled" and len(got.tokens) != len(want)
            ):
                wrong.append(tokens)

    with ModelLoop(runner, limits=limits) as loop:
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loop.clear()  # after the step that ended the last one
        stats = loop.stats()
    assert wrong == []
    assert (stats.running, stats.waiting, stats.tokens_in_flight) == (0, 0, 0)
    assert stats.submitted == 150 == stats.finished + stats.cancelled
    assert stats.preemptions > 0
    assert runner.num_free == 20
    assert (runner.is_closed, runner.was_good) == (True, True)


def test_an_answer_ends_with_the_first_stop_token() -> None:
    tokens = prompt(5)
    whole = expected(tokens, 20)
    stop = frozenset(whole[6:7])
    with ModelLoop(ToyRunner()) as loop:
        got = loop.submit(GenerationRequest(tokens, 20, stop_tokens=stop)).result(60)
    assert list(got.tokens) == expected(tokens, 20, stop) != whole
    assert got.finish_reason == "stop"


def test_what_was_cached_is_told() -> None:
    tokens = prompt(10)
    with ModelLoop(ToyRunner()) as loop:
        first = loop.submit(GenerationRequest(tokens, 3)).result(60)
        again = loop.submit(GenerationRequest(tokens, 3)).result(60)
        more = loop.submit(GenerationRequest([*tokens, 1, 2], 3)).result(60)
        without = loop.submit(GenerationRequest(tokens, 3, use_prefix_cache=False)).result(60)
        stats = loop.stats()
    assert first.tokens == again.tokens == without.tokens
    saved = [each.timings.prefix_tokens_saved for each in (first, again, more, without)]
    assert saved == [0, 10, 10, 0]
    assert more.timings.local_tokens == 10
    assert (stats.prefix_hits, stats.prefix_misses, stats.prefix_tokens_saved) == (2, 1, 20)
    assert (stats.prompt_tokens, stats.prompt_tokens_computed) == (42, 22)
    assert stats.tokens_generated == 12
    for each in (first, again):
        timings = each.timings
        assert 0 <= timings.queue_s + timings.cache_lookup_s <= timings.ttft_s <= timings.total_s
        assert timings.ttft_s + timings.decode_s == pytest.approx(timings.total_s, abs=1e-3)


def test_one_request_too_many_is_refused_until_another_has_gone(
    loop: ModelLoop, runner: GatedRunner
) -> None:
    start(loop, runner, GenerationRequest([1], 5), GenerationRequest([2], 5))
    waiting = [loop.submit(GenerationRequest([each], 5)) for each in (3, 4)]
    with pytest.raises(Busy, match="2 requests wait already"):
        loop.submit(GenerationRequest([5], 5))
    assert (loop.stats().rejected, loop.stats().waiting) == (1, 2)
    waiting[0].cancel()
    runner.let()
    assert waiting[0].result(60).finish_reason == "cancelled"
    assert waiting[0].result().tokens == ()
    assert waiting[1].result(60).tokens == tuple(expected([4], 5))
    assert loop.submit(GenerationRequest([5], 5)).result(60).finish_reason == "length"


@pytest.mark.parametrize(
    ("tokens", "new_tokens", "message"),
    [
        ([0, VOCAB], 1, f"token {VOCAB} is not one of the model's {VOCAB}"),
        ([0, -3], 1, f"token -3 is not one of the model's {VOCAB}"),
        ([0] * 21, 1, "a prompt of 21 tokens is more than the 20 allowed"),
        ([0], 31, "max_new_tokens of 31 tokens is more than the 30 allowed"),
        ([0] * 18, 23, "a prompt and its answer of 41 tokens is more than the 40 allowed"),
        (["a"], 1, "tokens must be integers"),
        (["1"], 1, "tokens must be integers"),
        ([1.5], 1, "tokens must be integers"),
        ([None], 1, "tokens must be integers"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(
    tokens: list[int], new_tokens: int, message: str
) -> None:
    limits = Limits(prompt_tokens_max=20, new_tokens_max=30)
    with ModelLoop(ToyRunner(num_blocks=10), limits=limits) as loop:
        with pytest.raises(BadRequest, match=message):
            loop.submit(GenerationRequest(tokens, new_tokens))
        assert loop.stats().submitted == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"sequences_max": 0}, "sequences_max 0 must be 1 or more"),
        ({"new_tokens_max": 0}, "new_tokens_max 0 must be 1 or more"),
        ({"step_tokens_max": 8, "sequences_max": 9}, "step_tokens_max 8 must be at least"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**limits)


def test_a_request_that_is_cancelled_leaves_its_memory_and_others_alone(
    loop: ModelLoop, runner: GatedRunner
) -> None:
    first, second = start(
        loop, runner, GenerationRequest([1], 9), GenerationRequest([2, 3, 4, 5], 300)
    )
    event = next(first)
    assert event.token == expected([1], 1)[0]
    second.cancel()
    second.cancel()
    runner.let()
    assert second.result(60).finish_reason == "cancelled"
    assert first.result(60).tokens == tuple(expected([1], 9))
    first.cancel()  # too late, and no harm
    loop.clear()
    assert runner.num_free == runner.num_blocks
    assert (loop.stats().finished, loop.stats().cancelled) == (1, 1)


def test_logits_that_are_no_numbers_fail_their_own_request(
    loop: ModelLoop, runner: GatedRunner
) -> None:
    def poison(chunks: Sequence[Chunk], logits: Tensor) -> Tensor:
        rows = [row for row, each in enumerate(chunks) if each.sequence.id == 2]
        logits[rows] = float("nan")
        return logits

    runner.fault = poison
    good, bad = start(
        loop,
        runner,
        GenerationRequest([1], 9),
        GenerationRequest([2], 9, Sampling(temperature=1.0, seed=1)),
    )
    runner.let()
    with pytest.raises(GenerationFailed, match="no numbers"):
        bad.result(60)
    assert good.result(60).tokens == tuple(expected([1], 9))
    assert loop.submit(GenerationRequest([3], 2)).result(60).finish_reason == "length"
    assert loop.stats().failed == 1


def test_a_crash_of_the_model_is_told_to_everyone(loop: ModelLoop, runner: GatedRunner) -> None:
    crash = RuntimeError("CUDA error: an illegal memory access")

    def break_down(chunks: Sequence[Chunk], logits: Tensor) -> Tensor:
        raise crash

    tickets = start(loop, runner, GenerationRequest([1], 9), GenerationRequest([2], 9))
    tickets += [loop.submit(GenerationRequest([3], 9))]
    runner.fault = break_down
    runner.let()
    for ticket in tickets:
        with pytest.raises(GenerationFailed, match="illegal memory access") as raised:
            ticket.result(60)
        assert raised.value.__cause__ is crash
    loop.close()
    assert not loop.is_alive
    assert (runner.is_closed, runner.was_good) == (True, False)
    assert loop.stats().failed == 3
    for call in (lambda: loop.submit(GenerationRequest([1])), loop.clear):
        with pytest.raises(LoopClosed, match="the model crashed: RuntimeError"):
            call()


def test_closing_ends_what_is_under_way(loop: ModelLoop, runner: GatedRunner) -> None:
    running, other = start(loop, runner, GenerationRequest([1], 9), GenerationRequest([2], 9))
    waiting = loop.submit(GenerationRequest([3], 9))
    closing = threading.Thread(target=loop.close)
    closing.start()
    while loop.is_alive:
        time.sleep(0.001)
    runner.let()
    for ticket in (running, other, waiting):
        assert ticket.result(60).finish_reason == "cancelled"
    closing.join()
    assert not loop.is_alive
    assert runner.is_closed
    stats = loop.stats()
    assert (stats.running, stats.waiting, stats.tokens_in_flight, stats.cancelled) == (0, 0, 0, 3)
    with pytest.raises(LoopClosed, match="the model loop is closed"):
        loop.submit(GenerationRequest([1]))
    loop.close()


def test_whoever_has_less_patience_decides_when_a_closing_loop_ends(
    loop: ModelLoop, runner: GatedRunner
) -> None:
    [ticket] = start(loop, runner, GenerationRequest([1], 390))
    patient = threading.Thread(target=loop.close, args=(600,))
    patient.start()
    while loop.is_alive:
        time.sleep(0.001)
    hasty = threading.Thread(target=loop.close)
    hasty.start()
    while loop._close_at is None or loop._close_at > time.perf_counter():
        time.sleep(0.001)
    while not ticket.is_finished:
        runner.let(1)
        time.sleep(0.001)
    assert ticket.result(0).finish_reason == "cancelled"
    patient.join()
    hasty.join()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked_is_told_that_the_model_is_elsewhere(
    loop: ModelLoop, runner: GatedRunner
) -> None:
    [ticket] = start(loop, runner, GenerationRequest([1], 3))
    with loop._news:  # as a thread may have it, which is not there in the child
        child = os.fork()
    if not child:
        try:
            for call in (lambda: loop.submit(GenerationRequest([1])), loop.clear, loop.stats):
                with pytest.raises(LoopClosed, match=r"runs in process \d+, .* make a loop here"):
                    call()
            ticket.cancel()
            loop.close()
            os._exit(0 if not loop.is_alive else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    runner.let()
    assert ticket.result(60).tokens == tuple(expected([1], 3))


def test_those_who_had_to_leave_are_counted_among_those_who_wait() -> None:
    runner = GatedRunner(num_blocks=3)
    with ModelLoop(runner, limits=Limits(waiting_max=1)) as loop:
        first, second = start(loop, runner, GenerationRequest([1], 8), GenerationRequest([2], 8))
        while not loop.stats().preemptions:
            runner.let(1)
            runner.asked.acquire()
        assert (loop.stats().running, loop.stats().waiting) == (1, 1)
        with pytest.raises(Busy, match="1 requests wait already"):
            loop.submit(GenerationRequest([3], 2))
        runner.let()
        assert first.result(60).tokens == tuple(expected([1], 8))
        assert second.result(60).tokens == tuple(expected([2], 8))


def test_closing_can_let_requests_finish(loop: ModelLoop, runner: GatedRunner) -> None:
    tickets = start(loop, runner, GenerationRequest([1], 9), GenerationRequest([2], 9))
    tickets.append(loop.submit(GenerationRequest([3], 9)))
    runner.let()
    loop.close(drain_s=60)
    assert [each.result(0).finish_reason for each in tickets] == ["length"] * 3


@pytest.mark.anyio
async def test_many_tasks_of_an_event_loop_read_their_own_tokens() -> None:
    answers: dict[int, list[int | None]] = {}

    async def ask(seed: int) -> None:
        async with loop.submit(GenerationRequest(prompt(9, seed=seed), 12)) as ticket:
            answers[seed] = [event.token async for event in ticket]

    with ModelLoop(ToyRunner(num_blocks=30)) as loop:
        async with anyio.create_task_group() as tasks:
            for seed in range(40):
                tasks.start_soon(ask, seed)
    assert answers == {seed: expected(prompt(9, seed=seed), 12) for seed in range(40)}


def test_sampled_tokens_depend_on_the_seed_alone() -> None:
    class Even(ToyRunner):
        def step(self, chunks: Sequence[Chunk]) -> Tensor:
            return super().step(chunks) / 10

    wish = Sampling(temperature=2.0, seed=5)
    request = GenerationRequest(prompt(6), 10, wish, use_prefix_cache=False)
    with ModelLoop(Even()) as loop:
        alone = loop.submit(request).result(60).tokens
        torch.manual_seed(1)
        others = [
            loop.submit(GenerationRequest(prompt(4, seed=seed), 10, Sampling(1.0, seed=seed)))
            for seed in range(5)
        ]
        assert loop.submit(request).result(60).tokens == alone
        assert len({other.result(60).tokens for other in others}) == 5
