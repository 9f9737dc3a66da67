"""The scheduler: everyone gets the right tokens in the end, whoever had to leave on the way."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from respkv.batching.request import GenerationRequest
from respkv.batching.scheduler import Scheduler
from respkv.batching.sequence import Sequence
from tests.batching.toy_runner import VOCAB, ToyRunner, expected


def new(
    prompt: int,
    *,
    new_tokens: int = 4,
    id: int = 0,  # noqa: A002
    use_cache: bool = True,
    use_prefix_cache: bool = True,
) -> Sequence:
    tokens = [(7 * id + position) % VOCAB for position in range(prompt)]
    request = GenerationRequest(
        tokens, new_tokens, use_cache=use_cache, use_prefix_cache=use_prefix_cache
    )
    return Sequence(request, id)


class Served:
    """A scheduler with a toy model, a step at a time, as the model loop runs it."""

    def __init__(self, runner: ToyRunner, *, sequences: int, step_tokens: int) -> None:
        self.runner = runner
        self.scheduler = Scheduler(sequences_max=sequences, step_tokens_max=step_tokens)
        self.done: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.step_tokens = step_tokens

    def step(self) -> int:
        """Compute a step; returns how many tokens it had."""
        for sequence, admission in self.scheduler.admit(self.runner):
            if not sequence.preemptions:
                self.admitted.append(sequence)
            if admission.logits is not None:
                self.choose(sequence, int(admission.logits.argmax()))
        chunks = self.scheduler.plan(self.runner)
        if not chunks:
            assert not self.scheduler.running
            return 0
        rows = iter(self.runner.step(chunks).argmax(-1).tolist())
        for chunk in chunks:
            self.scheduler.computed(chunk)
            if chunk.is_last:
                self.choose(chunk.sequence, next(rows))
        cached = [each for each in chunks if each.sequence.request.use_cache]
        assert sum(each.stop - each.start for each in cached) <= self.step_tokens
        return sum(each.stop - each.start for each in chunks)

    def choose(self, sequence: Sequence, token: int) -> None:
        self.scheduler.chosen(sequence, token)
        if sequence.num_generated == sequence.request.max_new_tokens:
            self.remove(sequence)
            self.done.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        if self.scheduler.remove(sequence) and sequence.request.use_cache:
            self.runner.end(sequence, is_good=True)

    @property
    def is_busy(self) -> bool:
        scheduler = self.scheduler
        return bool(scheduler.running or scheduler.loading or scheduler.waiting)

    def drain(self) -> None:
        """Compute until nothing is left; a bound on the steps shows that everyone advances."""
        for _ in range(2000):
            if not self.is_busy:
                return
            self.step()
        raise AssertionError("somebody starves")


def check(sequence: Sequence) -> None:
    request = sequence.request
    want = expected(request.tokens, request.max_new_tokens)
    assert sequence.tokens == [*request.tokens, *want]


def test_decodes_ride_along_with_the_chunks_of_a_long_prompt() -> None:
    served = Served(ToyRunner(), sequences=4, step_tokens=10)
    short, long = new(3, new_tokens=8, id=1), new(50, id=2)
    served.scheduler.add(short)
    served.step()
    served.scheduler.add(long)
    served.step()
    assert served.runner.steps[-1] == [(1, 1), (2, 9)]
    served.drain()
    assert served.done == [short, long]
    check(short)
    check(long)


def test_prompts_are_computed_in_the_order_they_came_in() -> None:
    served = Served(ToyRunner(), sequences=4, step_tokens=10)
    first, second = new(15, id=1), new(15, id=2)
    served.scheduler.add(first)
    served.scheduler.add(second)
    served.step()
    served.step()
    assert served.runner.steps == [[(1, 10)], [(1, 5), (2, 5)]]


def test_without_room_the_newest_leaves_and_comes_back_with_the_same_tokens() -> None:
    served = Served(ToyRunner(num_blocks=6), sequences=4, step_tokens=64)
    old, young = new(8, new_tokens=15, id=1), new(8, new_tokens=12, id=2)
    served.scheduler.add(old)
    served.scheduler.add(young)
    served.drain()
    assert served.done == [old, young]
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert served.scheduler.preemptions == 1
    check(old)
    check(young)


def test_one_that_has_to_leave_goes_in_front_of_those_who_wait() -> None:
    served = Served(ToyRunner(num_blocks=5), sequences=2, step_tokens=64)
    sequences = [new(8, new_tokens=11, id=1), new(7, new_tokens=10, id=2), new(3, id=3)]
    for each in sequences:
        served.scheduler.add(each)
    while not served.scheduler.preemptions:
        served.step()
    assert list(served.scheduler.waiting) == sequences[1:]


def test_a_sequence_that_does_not_fit_now_keeps_those_behind_it_waiting() -> None:
    served = Served(ToyRunner(num_blocks=4), sequences=4, step_tokens=64)
    for each in (new(6, id=1), new(10, id=2), new(1, id=3)):
        served.scheduler.add(each)
    served.step()
    assert [each.id for each in served.scheduler.running] == [1]
    served.drain()
    assert [each.id for each in served.admitted] == [1, 2, 3]


def test_without_a_cache_all_tokens_are_computed_for_each_token() -> None:
    served = Served(ToyRunner(num_blocks=1), sequences=1, step_tokens=4)
    plain = new(10, new_tokens=3, use_cache=False)
    served.scheduler.add(plain)
    assert [served.step() for _ in range(3)] == [10, 11, 12]
    check(plain)


def test_a_prompt_whose_logits_are_known_needs_no_step_for_its_first_token() -> None:
    served = Served(ToyRunner(), sequences=4, step_tokens=64)
    for times in (4, 1):
        served.scheduler.add(new(9, new_tokens=times))
        served.drain()
    assert len(served.runner.steps) == 4  # all of the first
    for each in served.done:
        check(each)


class SchedulerMachine(RuleBasedStateMachine):
    """Any arrivals, cancellations and steps, in little memory."""

    is_slow = False

    def __init__(self) -> None:
        super().__init__()
        runner = ToyRunner(num_blocks=8, block_tokens=3, is_slow=self.is_slow)
        self.served = Served(runner, sequences=4, step_tokens=9)
        self.arrived: list[Sequence] = []
        self.gone: set[Sequence] = set()

    @rule(
        prompt=st.integers(1, 16),
        new_tokens=st.integers(1, 8),
        family=st.integers(0, 2),
        use_cache=st.booleans() | st.just(True),
        use_prefix_cache=st.booleans(),
    )
    def arrive(
        self, prompt: int, new_tokens: int, family: int, use_cache: bool, use_prefix_cache: bool
    ) -> None:
        sequence = new(
            prompt,
            new_tokens=new_tokens,
            id=family,
            use_cache=use_cache,
            use_prefix_cache=use_prefix_cache,
        )
        self.arrived.append(sequence)
        self.served.scheduler.add(sequence)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.served.step()

    @precondition(lambda self: self.served.is_busy)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        scheduler = self.served.scheduler
        sequence = data.draw(
            st.sampled_from([*scheduler.running, *scheduler.loading, *scheduler.waiting])
        )
        self.served.remove(sequence)
        self.gone.add(sequence)

    @invariant()
    def memory_is_held_by_those_who_run(self) -> None:
        scheduler, runner = self.served.scheduler, self.served.runner
        admitted = [*scheduler.running, *scheduler.loading]
        assert len(set(admitted)) == len(admitted) <= 4
        assert not set(admitted) & set(scheduler.waiting)
        assert set(runner.held) == {each for each in admitted if each.request.use_cache}
        assert set(runner.coming) == set(scheduler.loading)
        for each in scheduler.waiting:
            assert each.computed == 0
        for each in set(runner.held) - set(scheduler.loading):
            assert runner.state[each][0] == each.computed <= len(each.tokens)

    def teardown(self) -> None:
        self.served.drain()
        assert set(self.served.done) | self.gone == set(self.arrived)
        assert self.served.runner.num_free == 8
        order = [each for each in self.arrived if each in set(self.served.admitted)]
        assert self.served.admitted == order or self.is_slow
        for each in self.served.done:
            check(each)


class SlowMachine(SchedulerMachine):
    """And what is cached comes late."""

    is_slow = True


@pytest.mark.parametrize("machine", [SchedulerMachine, SlowMachine])
def test_everyone_is_served_in_turn_whatever_happens(machine: type[SchedulerMachine]) -> None:
    run_machine(machine, settings=settings(max_examples=50, stateful_step_count=30, deadline=None))


def test_others_do_not_wait_for_what_is_being_loaded() -> None:
    served = Served(ToyRunner(is_slow=True), sequences=4, step_tokens=64)
    served.scheduler.add(new(9, new_tokens=1, id=1))
    served.drain()
    running, loading = new(5, new_tokens=9, id=2), new(12, id=1)
    served.scheduler.add(running)
    served.step()
    served.scheduler.add(loading)
    served.step()
    assert served.scheduler.loading == [loading]
    assert served.runner.steps[-1] == [(2, 1)]
    served.step()
    served.step()
    assert served.runner.steps[-1] == [(2, 1), (1, 3)]
    served.drain()
    check(loading)


@pytest.mark.parametrize(("sequences", "num_blocks"), [(2, 100), (9, 8)])
def test_with_nothing_to_compute_what_is_loading_is_waited_for(
    sequences: int, num_blocks: int
) -> None:
    """Otherwise the loop would ask again and again, as fast as it can, and nothing else."""
    served = Served(
        ToyRunner(num_blocks=num_blocks, is_slow=True), sequences=sequences, step_tokens=64
    )
    for known in (1, 2):
        served.scheduler.add(new(16, new_tokens=1, id=known))
        served.drain()
    others = [new(3, new_tokens=1, id=3), new(17, id=1), new(17, id=2), new(9, id=4)]
    for each in others:
        served.scheduler.add(each)
    while served.is_busy:
        assert served.step() > 0
    for each in others:
        check(each)


def test_who_can_take_what_another_computes_lets_others_go_first() -> None:
    served = Served(ToyRunner(is_slow=True), sequences=4, step_tokens=8)
    alike, third = [new(16, id=1), new(16, id=1)], new(3, id=3)
    for each in (*alike, third):
        served.scheduler.add(each)
    served.step()
    served.step()
    assert served.scheduler.running == [alike[0], third]
    served.drain()
    check(alike[1])


@pytest.mark.parametrize("step_tokens", [4, 5, 17])
def test_the_oldest_is_never_asked_to_leave(step_tokens: int) -> None:
    served = Served(ToyRunner(num_blocks=7, block_tokens=2), sequences=4, step_tokens=step_tokens)
    for id_ in range(6):
        served.scheduler.add(new(3, new_tokens=9, id=id_))
    while served.scheduler.running or served.scheduler.waiting:
        oldest = served.scheduler.running[0] if served.scheduler.running else None
        before = oldest.preemptions if oldest else 0
        served.step()
        assert oldest is None or oldest.preemptions == before
    assert served.scheduler.preemptions > 0
