"""The core without a face: what it does when the store is not what its index says."""

import time
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import pytest

from respkv.client import Client, PageEvent
from respkv.errors import ConnectionLost, TimedOut
from respkv.semantic import records
from respkv.semantic.core import Core
from respkv.semantic.effects import Ask, Effect, Hear, Heard, Steps
from respkv.semantic.settings import make_settings
from tests.server_process import ServerProcess

T = TypeVar("T")

EAST, NEAR, NORTH = [1, 0, 0, 0], [1, 0.1, 0, 0], [0, 1, 0, 0]


class DeafFace:
    """Carries out what a core asks over a client, but hears only what it is told to.

    breaks_at: the number of the effect that fails; 0: none.
    news: what is heard at the next opportunity.
    """

    def __init__(self, client: Client, namespace: str) -> None:
        self.client = client
        self.settings = make_settings(namespace, 4, {})
        self.core = Core(self.settings)
        self.is_new = True
        self.news: list[PageEvent] = []
        self.breaks_at = 0

    def run(self, steps: Steps[T]) -> T:
        number = 0
        try:
            effect = next(steps)
            while True:
                number += 1
                if number == self.breaks_at:
                    effect = steps.throw(TimedOut("broken on purpose"))
                else:
                    effect = steps.send(self.carry_out(effect))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def carry_out(self, effect: Effect) -> Any:
        if isinstance(effect, Hear):
            heard, self.is_new, self.news = Heard(self.news, self.is_new), False, []
            return heard
        pipeline = self.client.pipeline()
        for command in effect.commands:
            pipeline.command(*command)
        return pipeline.execute(raise_on_error=False)

    def tell(self, key: str, *kinds: Literal["stored", "removed"]) -> None:
        """Let the next operation hear of an entry of the tenant without a name."""
        names = self.settings.names
        page = names.key(records.tenant_hash(""), records.entry_hash(key))
        namespace = names.of_pages.encode()
        self.news += [PageEvent(namespace, kind, 1, False, key=page) for kind in kinds]

    def run_until_sent(self, steps: Steps[T], word: str) -> Any:
        """Run until a command has been carried out; return its answer, which is not handed over."""
        effect = next(steps)
        while not (isinstance(effect, Ask) and effect.commands[0][0] == word):
            effect = steps.send(self.carry_out(effect))
        return self.carry_out(effect)

    def go_on(self, steps: Steps[T], answer: Any) -> T:
        """Hand over an answer and run to the end."""
        try:
            effect = steps.send(answer)
            while True:
                effect = steps.send(self.carry_out(effect))
        except StopIteration as stop:
            result: T = stop.value
            return result


@pytest.fixture
def face(server: ServerProcess, namespace: str) -> Iterator[DeafFace]:
    with Client(server.url) as client:
        yield DeafFace(client, namespace)


@pytest.fixture
def other(face: DeafFace, namespace: str) -> DeafFace:
    return DeafFace(face.client, namespace)


def test_an_entry_that_is_gone_is_no_answer_and_leaves_the_index(
    face: DeafFace, other: DeafFace
) -> None:
    key = face.run(face.core.put(EAST, "east"))
    face.run(face.core.put(NEAR, "near"))
    assert other.run(other.core.delete(key))
    found = face.run(face.core.get(EAST))
    assert found is not None
    assert found.payload == "near"
    stats = face.core.stats()
    assert (stats.gone, stats.entries) == (1, 1)
    assert other.run(other.core.delete(found.key))
    assert face.run(face.core.search(EAST, 5)) == []
    assert face.core.stats().entries == 0


def test_an_entry_that_has_another_embedding_now_is_found_where_it_is(
    face: DeafFace, other: DeafFace
) -> None:
    face.run(face.core.put(EAST, "old", key="a"))
    face.run(face.core.put(NEAR, "near", key="b"))
    other.run(other.core.put(NORTH, "new", key="a"))
    found = face.run(face.core.get(EAST))
    assert found is not None
    assert found.key == "b"
    assert [hit.payload for hit in face.run(face.core.search(NORTH, 5))] == ["new", "near"]
    found = face.run(face.core.get(NORTH))
    assert found is not None
    assert (found.payload, found.score) == ("new", 1.0)


def test_an_answer_that_was_replaced_is_answered_as_it_is_now(
    face: DeafFace, other: DeafFace
) -> None:
    face.run(face.core.put(EAST, "old"))
    other.run(other.core.put(EAST, "new"))
    found = face.run(face.core.get(EAST))
    assert found is not None
    assert found.payload == "new"


@pytest.mark.parametrize("breaks_at", range(1, 7))
def test_whatever_breaks_in_a_get_the_next_one_is_right(
    face: DeafFace, other: DeafFace, breaks_at: int
) -> None:
    """Listening, the description, the scan, the reading of embeddings, the answer itself."""
    other.run(other.core.put(EAST, "east"))
    face.breaks_at = breaks_at
    try:
        found = face.run(face.core.get(EAST))
    except TimedOut:
        face.breaks_at = 0
        found = face.run(face.core.get(EAST))
    assert found is not None
    assert found.payload == "east"


@pytest.mark.parametrize("breaks_at", range(1, 6))
def test_whatever_breaks_in_a_put_is_told_and_can_be_done_again(
    face: DeafFace, breaks_at: int
) -> None:
    face.breaks_at = breaks_at
    try:
        face.run(face.core.put(EAST, "east"))
    except TimedOut:
        face.breaks_at = 0
        assert face.run(face.core.get(EAST)) is None
        face.run(face.core.put(EAST, "east"))
    found = face.run(face.core.get(EAST))
    assert found is not None
    assert found.payload == "east"
    assert face.core.stats().entries == 1


def test_a_put_whose_answer_was_lost_is_found_if_it_was_carried_out(face: DeafFace) -> None:
    steps = face.core.put(EAST, "east")
    effect = next(steps)
    while not (isinstance(effect, Ask) and effect.commands[0][0] == "KV.PUT"):
        effect = steps.send(face.carry_out(effect))
    face.carry_out(effect)
    with pytest.raises(ConnectionLost):
        steps.throw(ConnectionLost("after it was sent"))
    found = face.run(face.core.get(EAST))
    assert found is not None
    assert found.payload == "east"


@pytest.mark.parametrize("kinds", [("stored", "removed", "stored"), ("stored", "removed")], ids=len)
def test_an_entry_that_was_put_again_is_there_although_its_end_is_told_of_late(
    face: DeafFace, kinds: tuple[Literal["stored", "removed"], ...]
) -> None:
    face.run(face.core.put(EAST, "old", key="a"))
    face.run(face.core.delete("a"))
    face.run(face.core.put(EAST, "new", key="a"))
    face.run(face.core.put(NORTH, "north"))
    face.tell("a", *kinds)
    assert [hit.payload for hit in face.run(face.core.search(EAST, 9))] == ["new", "north"]
    assert face.core.stats().entries == 2


def test_what_another_put_while_an_answer_was_on_its_way_is_found_where_it_is(
    face: DeafFace, other: DeafFace
) -> None:
    """Two threads share one cache: one puts, the other hears meanwhile of a later put elsewhere."""
    face.run(face.core.put(NEAR, "near", key="b"))
    putting = face.core.put(EAST, "mine", key="a")
    answer = face.run_until_sent(putting, "KV.PUT")
    other.run(other.core.put(NORTH, "theirs", key="a"))
    face.tell("a", "stored", "stored")
    assert face.run(face.core.get(NORTH)) is not None
    face.go_on(putting, answer)
    found = face.run(face.core.get(NORTH))
    assert found is not None
    assert found.payload == "theirs"
    found = face.run(face.core.get(EAST))
    assert found is not None
    assert found.payload == "near"


def test_a_late_answer_to_a_get_does_not_bring_back_what_it_was(
    face: DeafFace, other: DeafFace
) -> None:
    face.run(face.core.put(EAST, "mine", key="a"))
    getting = face.core.get(EAST)
    answer = face.run_until_sent(getting, "KV.GET")
    other.run(other.core.put(NORTH, "theirs", key="a"))
    face.tell("a", "stored")
    assert face.run(face.core.get(NORTH)) is not None
    assert face.go_on(getting, answer) is None
    assert face.run(face.core.get(NORTH)) is not None


def test_a_late_answer_that_an_entry_is_gone_does_not_hide_it_when_it_was_put_again(
    face: DeafFace, other: DeafFace
) -> None:
    face.run(face.core.put(EAST, "old", key="a"))
    other.run(other.core.delete("a"))
    getting = face.core.get(EAST)
    answer = face.run_until_sent(getting, "KV.GET")
    other.run(other.core.put(EAST, "new", key="a"))
    face.tell("a", "removed", "stored")
    assert face.run(face.core.get(EAST)) is not None
    found = face.go_on(getting, answer)
    assert found is not None
    assert found.payload == "new"


@pytest.mark.parametrize("clock", ["runs", "stands"])
def test_who_only_puts_keeps_no_more_than_may_be_and_reads_nothing_before(
    server: ServerProcess, namespace: str, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if clock == "stands":  # a fast machine puts all of them in one millisecond
        now = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now)
    with Client(server.url) as client:
        one, two = DeafFace(client, namespace), DeafFace(client, namespace)
        two.core = Core(make_settings(namespace, 4, {"max_entries": 3}))
        for number in range(3):
            one.run(one.core.put([1, number, 0, 0], str(number), key=str(number)))
        two.run(two.core.put(EAST, "0", key="0"))
        two.run(two.core.put([1, 3, 0, 0], "3", key="3"))
        # Of "1" and "2", which it never used itself, either may be the one that goes.
        found = {hit.key for hit in two.run(two.core.search(EAST, 9))}
        assert found in ({"0", "1", "3"}, {"0", "2", "3"})
