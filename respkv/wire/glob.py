"""Glob patterns as Redis reads them, matched in time that no pattern can blow up.

Redis's own matcher backtracks, which has cost it two CVEs, and ``fnmatch`` and ``re`` do too. Here
a pattern becomes a Shift-And automaton: the state is one int whose bit ``i`` says that the first
``i`` elements have matched, a byte costs two ands, a shift and an or, and a star is a bit that
stays set. A key shorter than the pattern has elements is turned away first, so the state never has
more bits than the key has bytes. Patterns without classes and question marks, which are most, need
no automaton: their pieces between the stars are searched for from left to right.

What Redis 7.0 does and one might not guess, kept here: a class that is not closed ends with the
pattern; ``]`` closes a class even as its first byte; a range compares bytes as C's signed char does
on x86, so ``[a-\\xff]`` runs from -1 to 97; an escaped byte of a class keeps its case even when
the match ignores case; ``**`` does not match the empty key, ``*`` does.
Source: stringmatchlen in Redis 7.0, src/util.c.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from respkv.errors import CommandError

PATTERN_BYTES_MAX = 64 * 1024

_ALL = (1 << 256) - 1
_LOWER = ((1 << 26) - 1) << ord("a")
_UPPER = ((1 << 26) - 1) << ord("A")
_CASE = ord("a") - ord("A")

Match = Callable[[bytes], bool]


@dataclass(frozen=True, slots=True)
class Glob:
    """A compiled pattern; ``match(key)`` tells whether it covers the whole key."""

    pattern: bytes
    match: Match


def compile_glob(
    pattern: bytes, *, ignore_case: bool = False, pattern_bytes_max: int = PATTERN_BYTES_MAX
) -> Glob:
    """Compile a pattern; its ``*``, ``?``, ``[a-z]``, ``[^a]`` and backslash mean what Redis says.

    Raises: CommandError when the pattern is longer than ``pattern_bytes_max``.
    """
    if len(pattern) > pattern_bytes_max:
        raise CommandError(
            f"pattern of {len(pattern)} bytes is too long, at most {pattern_bytes_max} are allowed"
        )
    elements, stars = _parse(pattern, ignore_case)
    if not elements:
        # Redis asks for "*" by name before it matches; its matcher takes no star for nothing.
        return Glob(pattern, _anything if pattern == b"*" else _something if stars else _nothing)
    literals = [_literal(element) for element in elements]
    plain = bytes(byte for byte in literals if byte is not None)
    if len(plain) == len(elements):
        return Glob(pattern, _pieces_match(plain, sorted(stars)))
    return Glob(pattern, _automaton_match(elements, stars, literals))


def _parse(pattern: bytes, ignore_case: bool) -> tuple[list[int], set[int]]:
    """Return the pattern's elements and the places, 0 to len(elements), that have a star.

    An element is the set of bytes that it takes: bit b stands for byte b.
    """
    elements: list[int] = []
    stars: set[int] = set()
    at, end = 0, len(pattern)
    while at < end:
        byte = pattern[at]
        if byte == 0x2A:  # *
            stars.add(len(elements))
        elif byte == 0x3F:  # ?
            elements.append(_ALL)
        elif byte == 0x5B:  # [
            element, at = _parse_class(pattern, at + 1, ignore_case)
            elements.append(element)
        else:
            if byte == 0x5C and at + 1 < end:  # backslash
                at += 1
                byte = pattern[at]
            elements.append(_fold(1 << byte) if ignore_case else 1 << byte)
        at += 1
    return elements, stars


def _parse_class(pattern: bytes, at: int, ignore_case: bool) -> tuple[int, int]:
    """Parse from the byte after ``[``. Returns the element, and the place where the class ends."""
    end = len(pattern)
    inverted = pattern[at : at + 1] == b"^"
    at += inverted
    element = 0
    while at < end:
        byte = pattern[at]
        if byte == 0x5C and at + 1 < end:  # backslash
            at += 1
            element |= 1 << pattern[at]
        elif byte == 0x5D:  # ]
            break
        elif at + 2 < end and pattern[at + 1] == 0x2D:  # -
            element |= _range(byte, pattern[at + 2], ignore_case)
            at += 2
        else:
            element |= _fold(1 << byte) if ignore_case else 1 << byte
        at += 1
    return element ^ _ALL if inverted else element, at


def _range(start: int, stop: int, ignore_case: bool) -> int:
    """Return the bytes from ``start`` to ``stop``, both included, ordered as signed chars."""
    start, stop = sorted((_signed(start), _signed(stop)))
    if ignore_case:
        start, stop = _lower(start), _lower(stop)
    element = 0
    if stop >= 0:
        element |= (2 << stop) - (1 << max(start, 0))
    if start < 0:
        element |= (2 << (256 + min(stop, -1))) - (1 << (256 + start))
    element = max(element, 0)  # [Z-a], once in lower case, begins after its end
    if ignore_case:
        element = element & ~_UPPER | (element & _LOWER) >> _CASE
    return element


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _lower(char: int) -> int:
    return char + _CASE if ord("A") <= char <= ord("Z") else char


def _fold(element: int) -> int:
    """Add the other case of every letter."""
    return element | (element & _LOWER) >> _CASE | (element & _UPPER) << _CASE


def _literal(element: int) -> int | None:
    """Return the only byte that the element takes, or None."""
    if element == 0 or element & (element - 1):
        return None
    return element.bit_length() - 1


def _anything(_key: bytes) -> bool:
    return True


def _something(key: bytes) -> bool:
    return key != b""


def _nothing(key: bytes) -> bool:
    return key == b""


def _pieces_match(literal: bytes, stars: list[int]) -> Match:
    """Match plain bytes with stars before the given places of them."""
    if not stars:
        return lambda key: key == literal
    first, last = literal[: stars[0]], literal[stars[-1] :]
    if stars == [len(literal)]:
        return lambda key: key.startswith(first)
    middle = [literal[start:stop] for start, stop in pairwise(stars)]
    least = len(literal)

    def match(key: bytes) -> bool:
        if len(key) < least or not key.startswith(first) or not key.endswith(last):
            return False
        at, end = len(first), len(key) - len(last)
        for piece in middle:
            at = key.find(piece, at, end)
            if at < 0:
                return False
            at += len(piece)
        return True

    return match


class _Takers(dict[int, int]):
    """Which elements take a byte, one bit each, worked out when that byte is first met."""

    def __init__(self, elements: list[int]) -> None:
        self._elements = elements[::-1]

    def __missing__(self, byte: int) -> int:
        takers = int("".join("1" if e >> byte & 1 else "0" for e in self._elements), 2)
        self[byte] = takers
        return takers


def _automaton_match(elements: list[int], stars: set[int], literals: list[int | None]) -> Match:
    takers = _Takers(elements)
    least = len(elements)
    stays = sum(1 << place for place in stars)
    first = _run(literals, min(stars, default=least))
    last = _run(literals[::-1], least - max(stars, default=0))[::-1]
    begin = 1 << len(first)

    def match(key: bytes) -> bool:
        if len(key) < least or not (stays or len(key) == least):
            return False
        if not key.startswith(first) or not key.endswith(last):
            return False
        state = begin
        for byte in key[len(first) :]:
            state = (state & takers[byte]) << 1 | state & stays
            if not state:
                return False
        return state >> least != 0

    return match


def _run(literals: list[int | None], limit: int) -> bytes:
    """Return the plain bytes at the start of ``literals``, before ``limit``."""
    run = bytearray()
    for byte in literals[:limit]:
        if byte is None:
            break
        run.append(byte)
    return bytes(run)
