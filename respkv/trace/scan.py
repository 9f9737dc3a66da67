"""RESP replies, bytes in and summaries out: what a recording says of a reply. No sockets, no clocks.

A proxy passes replies on as they come and must not collect them: a page is megabytes. So bulks are
stepped over by their length, in the chunk where they are, and all that stays of a reply is how many
elements and bytes it had. RESP2 and RESP3; push messages answer nobody and are not counted.
"""

from dataclasses import dataclass
from typing import Final

from respkv.errors import ProtocolError

LINE_BYTES_MAX: Final = 64 * 1024
_BULKS: Final = b"$=!"
_AGGREGATES: Final = b"*~%|>"
_NULLS: Final = (b"$-1", b"*-1", b"_")


@dataclass(slots=True)
class Answer:
    """A whole reply.

    kind:   its type byte as in RESP; ``_`` for an absent value of any kind.
    number: the first integer at the top or in the outer array, None when there is none.
    word:   of an error, its first word.
    items, nils: elements of the outer array, and how many of them are absent.
    nbytes: of all bulks.
    """

    kind: str
    number: int | None = None
    word: str = ""
    items: int = 0
    nils: int = 0
    nbytes: int = 0


class ReplyScanner:
    """Count one connection's replies."""

    def __init__(self) -> None:
        self._line = b""  # the start of one that is not whole yet
        self._skip = 0  # bytes of a bulk, its CR LF included, that are still to come
        self._left: list[int] = []  # of each open aggregate, the elements that it lacks
        self._answer: Answer | None = None
        self._is_push = False

    def feed(self, data: bytes) -> list[Answer]:
        """Take what follows; return the replies that are whole now.

        Raises ProtocolError when it cannot be followed any further.
        """
        found: list[Answer] = []
        position = 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                position += step
                self._skip -= step
                if not self._skip:
                    self._end_value(found)
                continue
            end = data.find(b"\n", position)
            if end < 0:
                self._line += data[position:]
                if len(self._line) > LINE_BYTES_MAX:
                    raise ProtocolError(f"a reply's line is longer than {LINE_BYTES_MAX} bytes")
                break
            line = self._line + data[position:end]
            self._line = b""
            position = end + 1
            self._take(line.removesuffix(b"\r"), found)
        return found

    def _take(self, line: bytes, found: list[Answer]) -> None:
        if not line:
            raise ProtocolError("a reply has an empty line where a type should be")
        answer, kind = self._begin(line)
        is_outer = len(self._left) == 1
        if line in _NULLS:
            answer.nils += is_outer
            self._end_value(found)
        elif kind in _BULKS:
            length = _number(line)
            answer.nbytes += length
            self._skip = length + 2
        elif kind in _AGGREGATES:
            self._open(answer, kind, _number(line), found)
        else:
            if kind == b":"[0] and answer.number is None and len(self._left) <= 1:
                answer.number = _number(line, is_signed=True)
            self._end_value(found)

    def _begin(self, line: bytes) -> tuple[Answer, int]:
        kind = line[0]
        answer = self._answer
        if answer is None:
            answer = self._answer = Answer("_" if line in _NULLS else chr(kind))
            self._is_push = answer.kind == ">"
            if answer.kind == "-":
                answer.word = line[1:].split(b" ", 1)[0][:32].decode("ascii", "replace")
        return answer, kind

    def _open(self, answer: Answer, kind: int, count: int, found: list[Answer]) -> None:
        if kind in b"%|":
            count *= 2
        if not self._left:
            answer.items = count
        if kind == b"|"[0]:
            count += 1  # the value that attributes stand before
        if count:
            self._left.append(count)
        else:
            self._end_value(found)

    def _end_value(self, found: list[Answer]) -> None:
        while self._left:
            self._left[-1] -= 1
            if self._left[-1]:
                return
            self._left.pop()
        assert self._answer is not None
        if not self._is_push:
            found.append(self._answer)
        self._answer = None


def _number(line: bytes, *, is_signed: bool = False) -> int:
    digits = line[2:] if is_signed and line[1:2] in (b"-", b"+") else line[1:]
    if not digits.isdigit() or len(digits) > 20:
        raise ProtocolError(f"a reply's count is {line[:40]!r}")
    return -int(digits) if is_signed and line[1:2] == b"-" else int(digits)
