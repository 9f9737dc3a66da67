"""What clients did and saw, and whether one cache in one order could have answered so.

Every key is a register that may forget. An operation has an interval, from when its client composed
it to when its client read the answer, and a place in its connection; one that ended before another
began, or stands before it in the same connection, precedes it. Then a read may return the bytes of a
write only if no operation in between, as far as that is certain, saw or left another value there.
Nothing is all right at any time: a cache may forget. What it forgot must not come back, though, so
a read of nothing counts as a deletion.

This is a necessary condition for linearizability, cheap enough for a check at every read.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from math import inf

from tests.simulation.values import Value


class WrongAnswer(AssertionError):
    """No order of the operations explains what a client was told."""


class State(Enum):
    OPEN = auto()  # not answered yet: it may have happened
    DONE = auto()
    FAILED = auto()  # answered with an error or a condition that was not met: it did not happen
    LOST = auto()  # its connection broke, or it was not answered on purpose: it may have happened


class Kind(Enum):
    READ = auto()
    WRITE = auto()  # of ``value``; None deletes
    TTL = auto()  # sets or takes away when the key ends


@dataclass(eq=False, slots=True)
class Operation:
    """One key's part in one command.

    place:  within its connection. began, ended: steps of the history; in between it happened.
    value:  what a write leaves, what a read saw.
    ttl_s:  the key ends so long after it happened; None when the operation does not say.
    """

    kind: Kind
    key: bytes
    client: int
    place: int
    began: int
    began_s: float
    value: Value | None = None
    ttl_s: float | None = None
    state: State = State.OPEN
    ended: float = inf
    ended_s: float = inf

    def precedes(self, other: "Operation") -> bool:
        """Whether it certainly happened before the other, if it happened."""
        if self.client == other.client:
            return self.place < other.place
        return self.ended < other.began

    def end(self, state: State, step: int, now: float) -> None:
        """Note that it cannot happen any more."""
        self.state, self.ended, self.ended_s = state, step, now


@dataclass(slots=True)
class Record:
    """The operations of a history by key."""

    operations: dict[bytes, list[Operation]] = field(default_factory=dict)

    def add(self, operation: Operation) -> Operation:
        """Note that an operation was begun."""
        self.operations.setdefault(operation.key, []).append(operation)
        return operation

    def see(self, read: Operation, data: bytes | None, span: tuple[int, int] | None = None) -> None:
        """Check what a read that has ended returned, and remember it.

        span: the range of the value's bytes that was asked for.
        Raises WrongAnswer.
        """
        if data is None:
            return
        reasons = []
        for write in self.operations[read.key]:
            if write.kind is Kind.WRITE and write.value is not None:
                if not _is_like(write.value, data, span):
                    continue
                reason = self._why_not(read, write, write.value)
                if reason is None:
                    read.value = write.value
                    return
                reasons.append(reason)
        why = "; ".join(reasons) or "nobody wrote that"
        raise WrongAnswer(f"{read.key!r} read as {data[:60]!r}, {len(data)} bytes: {why}")

    def _why_not(self, read: Operation, write: Operation, value: Value) -> str | None:
        if write.state is State.FAILED:
            return "that write had failed"
        if read.precedes(write):
            return "that write was begun later"
        for other in self.operations[read.key]:
            if other.kind is Kind.TTL or other.state is not State.DONE:
                continue
            if other.value != value and write.precedes(other) and other.precedes(read):
                return f"that write was over before {other}"
        return self._why_ended(read, write)

    def _why_ended(self, read: Operation, write: Operation) -> str | None:
        """Say which TTL had certainly ended before the read began."""
        timed = [
            each
            for each in self.operations[read.key]
            if each.kind is not Kind.READ and each.state is not State.FAILED
        ]
        for each in timed:
            if each.ttl_s is None or each.state is not State.DONE:
                continue
            if each is not write and not (each.kind is Kind.TTL and write.precedes(each)):
                continue
            is_last = all(other is each or other.precedes(each) for other in timed)
            if is_last and read.began_s > each.ended_s + each.ttl_s:
                return f"its TTL had ended: {each}"
        return None


def _is_like(value: Value, data: bytes, span: tuple[int, int] | None) -> bool:
    if span is None:
        return value.nbytes == len(data) and value.bytes() == data
    return value.bytes()[slice(*span)] == data
