"""Requests: which go on, what the model learns of them, hints, and what is kept of what went."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.request import Request, chain_of
from respkv.engine.requests import PAGES_A_RECORD, RECORDS_MIN, Requests
from respkv.engine.survival import CENSOR_S, LEFT, TAIL, TURN_MAX, kind_of

T = 16  # tokens of a page


class Pages:
    """Chains of pages without bytes: a page's name is its prompt's, as in a chain of hashes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.now = 1.0
        self.requests = Requests(self.clock)
        self.entries: dict[str, Entry] = {}

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def serve(self, prompt: str, *, session: bytes = b"", tail: int = 0) -> Request | None:
        """Match a prompt, a letter for each page, and store what is missing of it."""
        names = [prompt[:number] for number in range(1, len(prompt) + 1)]
        run: list[Entry] = []
        for name in names:
            if name not in self.entries:
                break
            run.append(self.entries[name])
        num_tokens = len(prompt) * T + tail
        for entry in run:
            entry.touched = self.clock.now
        request = self.requests.matched(run, num_tokens, self.clock.now, session)
        for name in names[len(run) :]:
            self.store(name, T, session)
        if tail and f"{prompt}*" not in self.entries:
            self.store(f"{prompt}*", tail, session)
        return self.entries[prompt].request if prompt in self.entries else request

    def store(self, name: str, tokens: int, session: bytes = b"") -> Entry:
        entry = self.entries[name] = Entry(b"ns:" + name.encode(), "kvpage", 1, self.clock.now)
        entry.namespace = b"ns"
        entry.tokens, entry.depth = tokens, (len(name) - 1) * T
        entry.branch = b"b"
        parent = self.entries.get(name[:-1])
        if parent is not None:
            entry.parent = parent
            parent.children = parent.children or set()
            parent.children.add(entry)
        self.requests.stored(entry, is_new=True)
        if session:
            self.requests.belongs(entry, session)
        return entry

    def evict(self, name: str) -> None:
        entry = self.entries[name]
        assert not entry.children
        self.requests.removed(entry, "evicted")
        del self.entries[name]
        if entry.parent is not None and entry.parent.children is not None:
            entry.parent.children.discard(entry)
            entry.parent = None

    def continued(self, kind: int) -> float:
        return sum(self.requests.survival.curves[kind].continued)

    def lost(self, kind: int) -> float:
        return sum(self.requests.survival.curves[kind].lost)

    def request_of(self, name: str) -> Request:
        request = self.entries[name].request
        assert isinstance(request, Request)
        return request


def test_a_prompt_that_extends_another_is_its_next_turn() -> None:
    pages = Pages()
    pages.serve("abc")
    first = pages.request_of("abc")
    pages.wait(60)
    pages.serve("abcde")
    second = pages.request_of("abcde")
    assert (first.turn, second.turn) == (0, 1)
    assert all(pages.request_of("abcde"[:n]) is second for n in range(1, 6))
    assert pages.continued(kind_of(0, 3 * T)) == 1
    for turn in range(2, 9):
        pages.wait(60)
        pages.serve("abcde" + "f" * turn)
        assert pages.request_of("abcde" + "f" * turn).turn == min(turn, TURN_MAX)


def test_a_prompt_that_parts_where_others_parted_begins_a_conversation() -> None:
    pages = Pages()
    pages.serve("sab")
    pages.wait(10)
    pages.serve("scd")
    pages.wait(10)
    pages.serve("sef")
    third = pages.request_of("sef")
    pages.wait(10)
    for left in ("sab", "sa", "scd", "sc"):
        pages.evict(left)
    pages.serve("sgh")  # one child is left there, but it is known where that one parted
    assert third.turn == 0
    assert third.kind != LEFT
    assert pages.request_of("sgh").turn == 0
    assert pages.request_of("sef") is third


def test_a_prompt_that_rewrites_the_end_of_another_goes_on_and_leaves_the_rest_behind() -> None:
    pages = Pages()
    pages.serve("abcdef")
    before = pages.request_of("abcdef")
    pages.wait(30)
    pages.serve("abcxyz")
    assert pages.request_of("abcxyz").turn == 1
    assert pages.request_of("abcdef") is before
    assert before.kind == LEFT


def test_the_tail_of_a_prompt_is_learned_of_on_its_own() -> None:
    pages = Pages()
    pages.serve("abc", tail=5)
    pages.wait(30)
    pages.serve("abcd", tail=3)
    assert pages.continued(kind_of(0, 3 * T + 5)) == 1
    assert (pages.continued(TAIL), pages.lost(TAIL)) == (0, 1)
    pages.wait(30)
    run = [pages.entries[name] for name in ("a", "ab", "abc", "abcd", "abcd*")]
    request = pages.requests.matched(run, 100, pages.clock.now)
    assert request is not None
    assert request.turn == 2
    assert pages.continued(TAIL) == 1


def test_the_same_prompt_a_moment_later_is_the_same_request() -> None:
    pages = Pages()
    first = pages.serve("abc")
    pages.wait(0.5)
    assert pages.serve("abc") is first
    pages.wait(60)
    second = pages.serve("abc")
    assert second is not first
    assert second is not None
    assert second.turn == 1


def test_a_request_is_known_again_after_its_pages_went() -> None:
    pages = Pages()
    pages.serve("abcd")
    for name in ("abcd", "abc", "ab", "a"):
        pages.evict(name)
    pages.wait(100)
    pages.serve("abcdef")
    assert pages.request_of("abcdef").turn == 1
    assert pages.continued(kind_of(0, 4 * T)) == 1


def test_a_request_that_nothing_continues_is_lost_sight_of() -> None:
    pages = Pages()
    pages.serve("abc")
    request = pages.request_of("abc")
    pages.wait(CENSOR_S + 1)
    pages.serve("xyz")
    assert not request.is_open
    assert pages.lost(request.kind) == 1
    pages.serve("abcd")  # late, but a next turn all the same
    assert pages.request_of("abcd").turn == 1


def test_pages_without_parents_belong_to_no_request_until_they_are_matched() -> None:
    pages = Pages()
    alone = Entry(b"ns:1", "kvpage", 1, 1.0)
    pages.requests.stored(alone, is_new=True)
    assert alone.request is None
    other = Entry(b"ns:2", "kvpage", 1, 1.0)
    other.parent, alone.children = alone, {other}
    pages.requests.stored(other, is_new=True)
    assert alone.request is other.request is not None
    third = Entry(b"ns:3", "kvpage", 1, 1.0)
    pages.requests.stored(third, is_new=True)
    assert pages.requests.matched([third], T, 2.0) is third.request
    assert pages.requests.matched([], T, 2.0) is None


def test_sessions_end_and_begin_again() -> None:
    pages = Pages()
    pages.serve("abc", session=b"s")
    request = pages.request_of("abc")
    assert not request.is_ended
    assert pages.requests.end(b"s", b"ns")
    assert request.is_ended
    assert pages.requests.chance(request, pages.clock.now, 1e6) == 0.0
    assert not pages.requests.end(b"other", b"ns")
    pages.wait(20)
    pages.serve("abcd", session=b"s")
    assert not pages.request_of("abcd").is_ended
    assert pages.request_of("abcd").turn == 1
    assert pages.continued(kind_of(0, 3 * T)) == 0  # what was announced teaches nothing


def test_sessions_of_namespaces_without_a_schema_are_told_apart() -> None:
    requests = Requests(Clock())
    for key in (b"a:1", b"b:1"):
        entry = Entry(key, "kvpage", 1, 1.0)
        requests.stored(entry, is_new=True)
        requests.belongs(entry, b"s")
        assert entry.namespace == b""
        assert requests.entries_of(b"s", key[:1]) == [entry]
    assert requests.find(b"", b"s") is None


def test_an_expected_session_says_when() -> None:
    pages = Pages()
    pages.serve("abc", session=b"s")
    assert pages.requests.expect(b"s", b"ns", 100.0)
    assert pages.request_of("abc").expected_at == 100.0
    pages.wait(50)
    pages.serve("abcd", session=b"s")
    assert pages.request_of("abcd").expected_at == 0.0
    assert not pages.requests.expect(b"other", b"ns", 100.0)


def test_the_pages_of_a_session_come_leaf_first_and_only_those_it_used_last() -> None:
    pages = Pages()
    pages.serve("sab", session=b"1", tail=3)
    pages.wait(10)
    pages.serve("scd", session=b"2")
    pages.wait(10)
    pages.serve("sxy", session=b"1")
    keys = [entry.key.decode()[3:] for entry in pages.requests.entries_of(b"1", b"ns")]
    assert set(keys) >= {"sab*", "sab", "sa", "sxy", "sx", "s"}
    assert not {"sc", "scd"}.intersection(keys)
    for number, key in enumerate(keys):
        assert key[:-1] not in keys[:number]
    assert pages.requests.entries_of(b"3", b"ns") == []


def test_pages_that_all_chains_of_a_session_share_are_passed_once() -> None:
    pages = Pages()
    for end in "uvwxyz":
        pages.serve("ab" + end, session=b"A")
        pages.wait(10)
    found = pages.requests.entries_of(b"A", b"ns")
    names = [entry.key.decode()[3:] for entry in found]
    assert sorted(names) == ["a", "ab", *("ab" + end for end in "uvwxyz")]
    assert names[-2:] == ["ab", "a"]
    session = pages.requests.find(b"ns", b"A")
    assert session is not None
    seen = {pages.entries["ab"]}
    assert [*chain_of(pages.entries["abu"], session, seen)] == [pages.entries["abu"]]
    assert pages.entries["abu"] in seen


def test_a_session_is_forgotten_with_its_requests() -> None:
    pages = Pages()
    pages.serve("ab", session=b"s")
    assert pages.requests.find(b"ns", b"s") is not None
    pages.evict("ab")
    pages.evict("a")
    pages.wait(CENSOR_S + 1)
    pages.serve("xy")
    pages.wait(1)
    pages.serve("zz")
    assert pages.requests.find(b"ns", b"s") is None


def test_records_stay_in_proportion_to_pages() -> None:
    pages = Pages()
    for number in range(3000):
        pages.wait(0.01)
        prompt = chr(0x4E00 + number)
        pages.serve(prompt + "a")
        if number >= 100:
            gone = chr(0x4E00 + number - 100)
            pages.evict(gone + "a")
            pages.evict(gone)
    num_pages = len(pages.entries)
    assert pages.requests.num_records <= RECORDS_MIN + num_pages // PAGES_A_RECORD + 1
    assert pages.requests.ghost_bytes <= 64 * num_pages + 600 * RECORDS_MIN


def test_a_flush_forgets_all() -> None:
    pages = Pages()
    pages.serve("abc", session=b"s")
    pages.requests.cleared()
    assert pages.requests.num_records == 0
    assert not any(curve.waiting for curve in pages.requests.survival.curves)


class RequestsMachine(RuleBasedStateMachine):
    """Random prompts, evictions and hints; what must hold of requests always."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages()

    @rule(
        prompt=st.text("ab", min_size=1, max_size=6),
        session=st.sampled_from([b"", b"", b"1", b"2"]),
        tail=st.sampled_from([0, 5]),
        seconds=st.sampled_from([0.0, 1.0, 30.0, 400.0]),
    )
    def serve(self, prompt: str, session: bytes, tail: int, seconds: float) -> None:
        self.pages.wait(seconds)
        request = self.pages.serve(prompt, session=session, tail=tail)
        assert request is not None
        if session:
            found = self.pages.requests.find(b"ns", session)
            assert found is not None
            assert not found.is_ended

    @precondition(lambda self: self.pages.entries)
    @rule(number=st.integers(0, 99))
    def evict(self, number: int) -> None:
        leaves = [name for name, entry in self.pages.entries.items() if not entry.children]
        self.pages.evict(leaves[number % len(leaves)])

    @rule(session=st.sampled_from([b"1", b"2"]), seconds=st.floats(0.0, 100.0))
    def hint(self, session: bytes, seconds: float) -> None:
        requests = self.pages.requests
        is_known = requests.find(b"ns", session) is not None
        if seconds < 50:
            assert requests.end(session, b"ns") == is_known
        else:
            assert requests.expect(session, b"ns", self.pages.clock.now + seconds) == is_known

    @invariant()
    def last_pages_are_present_and_their_request_s(self) -> None:
        present = set(self.pages.entries.values())
        for entry in present:
            request = entry.request
            assert isinstance(request, Request)
            if request.last is not None:
                assert request.last in present
                assert request.last.request is request

    @invariant()
    def as_many_wait_as_are_open(self) -> None:
        survival = self.pages.requests.survival
        waiting = sum(sum(curve.waiting.values()) for curve in survival.curves)
        assert waiting == self.pages.requests.num_open

    @invariant()
    def tails_are_pages_of_their_session(self) -> None:
        for name in (b"1", b"2"):
            found = self.pages.requests.find(b"ns", name)
            if found is None:
                continue
            for tail in found.tails:
                assert tail in self.pages.entries.values()
                assert tail.request.session is found
            mine = self.pages.requests.entries_of(name, b"ns")
            assert len(mine) == len(set(mine))
            for number, page in enumerate(mine):
                assert page.parent not in mine[:number]


TestRandomRequests = RequestsMachine.TestCase
TestRandomRequests.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
