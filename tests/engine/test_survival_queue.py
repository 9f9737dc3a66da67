"""The survival policy: who goes of known requests, what hints change, and random prompts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.eviction import PriorityPolicy, Verdict, make_policy
from respkv.engine.queues import LOOKS_MAX
from respkv.engine.requests import Requests
from respkv.engine.survival import CENSOR_S
from respkv.engine.survival_queue import SurvivalQueue

T = 16


class Prompts:
    """A cache of ``pages_max`` pages that serves prompts, a letter for each page."""

    def __init__(self, pages_max: int, policy: str = "survival") -> None:
        self.pages_max = pages_max
        self.clock = Clock()
        self.clock.now = 1.0
        self.requests = Requests(self.clock)
        self.policy = make_policy(policy, self.requests.survival)
        self.entries: dict[str, Entry] = {}
        self.in_use: Entry | None = None

    def serve(self, prompt: str, *, session: bytes = b"", tail: int = 0) -> int:
        """Match a prompt and store what is missing; return how many pages were there."""
        names = [prompt[:number] for number in range(1, len(prompt) + 1)]
        run: list[Entry] = []
        for name in names:
            if name not in self.entries:
                break
            run.append(self.entries[name])
        for entry in run:
            entry.touched, entry.hits = self.clock.now, entry.hits + 1
        self.requests.matched(run, len(prompt) * T + tail, self.clock.now, session)
        self.in_use = run[-1] if run else None
        for name in names[len(run) :]:
            self.store(name, T, session)
        if tail and f"{prompt}*" not in self.entries:
            self.store(f"{prompt}*", tail, session)
        self.in_use = None
        return len(run)

    def store(self, name: str, tokens: int, session: bytes) -> None:
        if len(self.entries) >= self.pages_max:
            assert self.evict() is not None
        entry = self.entries[name] = Entry(b"ns:" + name.encode(), "kvpage", 1, self.clock.now)
        entry.namespace, entry.branch = b"ns", b"b"
        entry.tokens, entry.depth = tokens, (len(name) - 1) * T
        self.policy.insert(entry)
        parent = self.in_use
        if parent is not None:
            entry.parent = parent
            parent.children = parent.children or set()
            parent.children.add(entry)
        self.requests.stored(entry, is_new=True)
        if session:
            self.requests.belongs(entry, session)
        self.in_use = entry

    def verdict(self, entry: Entry) -> Verdict:
        if entry.children:
            return Verdict.PARENT
        return Verdict.HELD if entry is self.in_use else Verdict.EVICT

    def evict(self) -> str | None:
        victim = self.policy.victim(self.verdict, self.clock.now)
        if victim is None:
            return None
        assert not victim.children
        self.requests.removed(victim, "evicted")
        self.policy.remove(victim)
        parent, victim.parent = victim.parent, None
        if parent is not None and parent.children is not None:
            parent.children.remove(victim)
            if not parent.children:
                parent.children = None
                self.policy.insert(parent)
        name = victim.key.decode()[3:]
        del self.entries[name]
        return name

    def check(self) -> None:
        self.policy.check(list(self.entries.values()))


def test_the_request_idle_longest_goes_first_and_from_its_end() -> None:
    prompts = Prompts(100)
    for prompt in ("abc", "xyz"):
        prompts.serve(prompt)
        prompts.clock.now += 10
    victims = [prompts.evict() for _ in range(6)]
    assert victims == ["abc", "ab", "a", "xyz", "xy", "x"]
    prompts.check()


def test_an_ended_session_goes_first_and_comes_back_when_it_goes_on() -> None:
    prompts = Prompts(100)
    prompts.serve("abc", session=b"old")
    prompts.clock.now += 10
    prompts.serve("xyz", session=b"new")
    assert prompts.requests.end(b"new", b"ns")
    assert prompts.evict() == "xyz"
    prompts.check()
    prompts.clock.now += 10
    prompts.serve("xyz", session=b"new")
    assert prompts.evict() == "abc"


def test_an_expected_session_stays_until_it_lapses() -> None:
    prompts = Prompts(100)
    prompts.serve("abc", session=b"soon")
    prompts.serve("xyz", session=b"late")
    prompts.clock.now += 10
    prompts.serve("mno")
    prompts.requests.expect(b"soon", b"ns", prompts.clock.now + 1)
    prompts.requests.expect(b"late", b"ns", prompts.clock.now + 1e6)
    prompts.clock.now += 10
    assert prompts.evict() == "xyz"
    prompts.check()
    prompts.clock.now += 1e3  # "soon" is as any other now, and older
    prompts.serve("q")
    assert prompts.evict() in ("abc", "xy")
    prompts.check()


def test_what_a_rewritten_prompt_left_behind_goes_before_what_is_waited_for() -> None:
    prompts = Prompts(10_000)
    for number in range(300):  # so that it is known what becomes of either
        prompt = chr(0x4E00 + number)
        prompts.clock.now += 5
        prompts.serve(prompt + "abc")
        prompts.clock.now += 25
        prompts.serve(prompt + "axy")
        prompts.clock.now += 25
        prompts.serve(prompt + "axyz")
    prompts.clock.now += 2 * CENSOR_S
    prompts.serve("!abc")
    for name in list(prompts.entries):
        if not name.startswith("!"):
            prompts.policy.remove(prompts.entries.pop(name))
    prompts.clock.now += 20
    prompts.serve("!a?")
    prompts.serve("#bcd")
    prompts.clock.now += 5
    assert [prompts.evict() for _ in range(2)] == ["!abc", "!ab"]


def test_a_page_read_without_a_match_keeps_its_request() -> None:
    prompts = Prompts(100)
    for prompt in ("abc", "xyz"):
        prompts.serve(prompt)
        prompts.clock.now += 10
    prompts.entries["abc"].touched = prompts.clock.now
    prompts.clock.now += 1
    assert prompts.evict() == "xyz"
    prompts.check()


def test_conversations_are_told_from_prompts_that_never_go_on() -> None:
    """Twenty conversations come back after 20 s each; what else comes would fill the cache in 15."""
    found: dict[str, int] = {}
    for policy in ("lru", "survival"):
        prompts, order = Prompts(200, policy), random.Random(5)
        talks = [chr(0xAC00 + number) for number in range(20)]
        hits = 0
        for number in range(1500):
            prompts.clock.now += 1
            for kind in (0x4E00, 0x6E00):
                prompts.serve(chr(kind + number) + "abcd")
            at = order.randrange(20)
            talks[at] += "e"
            hits += prompts.serve(talks[at])
            if len(talks[at]) == 8:
                talks[at] = chr(0xAC00 + 20 + number)
        prompts.check()
        found[policy] = hits
    assert found["survival"] > 1.5 * found["lru"]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.text("abc", min_size=1, max_size=7),
            st.sampled_from([b"", b"", b"1", b"2"]),
            st.sampled_from(["", "", "", "end", "expect", "read"]),
            st.sampled_from([0, 5]),
            st.sampled_from([0.0, 0.5, 20.0, 300.0]),
        ),
        max_size=60,
    ),
    pages_max=st.integers(9, 20),
)
def test_random_prompts_leave_no_hole_and_lose_no_page(
    steps: list[tuple[str, bytes, str, int, float]], pages_max: int
) -> None:
    prompts = Prompts(pages_max)
    for prompt, session, then, tail, seconds in steps:
        prompts.clock.now += seconds
        prompts.serve(prompt, session=session, tail=tail)
        if then == "end":
            prompts.requests.end(b"1", b"ns")
        elif then == "expect":
            prompts.requests.expect(b"2", b"ns", prompts.clock.now + 10)
        elif then == "read":
            for entry in prompts.entries.values():
                entry.touched = prompts.clock.now
        prompts.check()
        for name in prompts.entries:
            assert len(name) == 1 or name[:-1] in prompts.entries
    while prompts.entries:
        assert prompts.evict() is not None
        prompts.check()


@pytest.mark.parametrize("num_requests", [3, 300])
def test_its_state_beside_the_pages_is_small(num_requests: int) -> None:
    prompts = Prompts(1000)
    for number in range(10 * num_requests):
        prompts.clock.now += 1
        prompts.serve(chr(0x4E00 + number) + "abc")
    records = prompts.requests.ghost_bytes + prompts.policy.ghost_bytes
    assert records <= 64 * max(len(prompts.entries), 500)


@pytest.mark.parametrize("num_pages", [LOOKS_MAX - 1, LOOKS_MAX, LOOKS_MAX + 1, 2 * LOOKS_MAX])
def test_somebody_is_chosen_however_many_came_at_once(num_pages: int) -> None:
    requests = Requests(Clock())
    policy = make_policy("survival", requests.survival)
    entries = [Entry(b"%d" % at, "kvpage", 1, 1.0 + at) for at in range(num_pages)]
    for entry in entries:
        policy.insert(entry)
    for entry in entries[:3]:
        assert policy.victim(lambda _: Verdict.EVICT, num_pages + 9.0) is entry
        policy.remove(entry)
    policy.check(entries[3:])


def test_tails_that_were_replaced_are_forgotten() -> None:
    prompts = Prompts(1000)
    prompts.serve("ab", tail=3)  # the oldest tail stays in front of all others
    for _ in range(500):
        prompts.clock.now += 1
        prompts.in_use = prompts.entries["ab"]
        prompts.store("ab+", 3, b"")
        tail = prompts.entries.pop("ab+")
        prompts.policy.age(prompts.clock.now)
        prompts.requests.removed(tail, "replaced")
        prompts.policy.remove(tail)
        assert prompts.in_use is tail
        assert prompts.entries["ab"].children is not None
        prompts.entries["ab"].children.remove(tail)
    assert isinstance(prompts.policy, PriorityPolicy)
    (queue,) = prompts.policy._queues.values()
    assert isinstance(queue, SurvivalQueue)
    assert 0 < len(queue._tails) < 200
    prompts.check()
