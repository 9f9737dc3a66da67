"""Glob patterns, held against a slow matcher that is plainly right and against redis-server."""

import itertools
import random
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from respkv.errors import CommandError
from respkv.wire.glob import compile_glob
from tests.redis_server import RedisServer

# Bytes that mean something in a pattern, their neighbours, and both ends of signed and unsigned.
BYTES = b"ab-]^[\\*?Z\x00\x7f\x80\xff"
PATTERNS = st.lists(
    st.sampled_from([bytes([byte]) for byte in BYTES])
    | st.sampled_from([b"*", b"?", b"[a-b]", b"[^a]", b"[]", b"[^]", b"[b-a-]", b"\\*", b"[\\]a]"]),
    max_size=12,
).map(b"".join)
KEYS = st.lists(st.sampled_from(list(BYTES)), max_size=10).map(bytes)


def slow_match(pattern: bytes, key: bytes, ignore_case: bool = False) -> bool:
    """Try everything. Redis's own exception, that no star but "*" itself takes an empty key."""
    if not key:
        return pattern in (b"", b"*")

    @cache
    def match(at: int, rest: int) -> bool:
        if at == len(pattern):
            return rest == len(key)
        if pattern[at : at + 1] == b"*":
            return match(at + 1, rest) or (rest < len(key) and match(at, rest + 1))
        if rest == len(key):
            return False
        takes, after = slow_take(pattern, at, key[rest], ignore_case)
        return takes and match(after, rest + 1)

    return match(0, 0)


def slow_take(pattern: bytes, at: int, byte: int, ignore_case: bool) -> tuple[bool, int]:
    """Return whether the element at ``at`` takes ``byte``, and where the next element begins."""
    if pattern[at : at + 1] == b"?":
        return True, at + 1
    if pattern[at : at + 1] == b"[":
        return slow_class(pattern, at + 1, byte, ignore_case)
    if pattern[at : at + 1] == b"\\" and at + 1 < len(pattern):
        at += 1
    return same(pattern[at], byte, ignore_case), at + 1


def slow_class(pattern: bytes, at: int, byte: int, ignore_case: bool) -> tuple[bool, int]:
    inverted = pattern[at : at + 1] == b"^"
    at += inverted
    takes = False
    while at < len(pattern) and pattern[at : at + 1] != b"]":
        rest = pattern[at:]
        if rest[:1] == b"\\" and len(rest) >= 2:
            takes |= rest[1] == byte
            at += 2
        elif len(rest) >= 3 and rest[1:2] == b"-":
            low, high = sorted((signed(rest[0]), signed(rest[2])))
            if ignore_case:
                low, high, value = lower(low), lower(high), lower(signed(byte))
            else:
                value = signed(byte)
            takes |= low <= value <= high
            at += 3
        else:
            takes |= same(rest[0], byte, ignore_case)
            at += 1
    return takes != inverted, at + 1 if at < len(pattern) else at


def same(one: int, other: int, ignore_case: bool) -> bool:
    return (lower(one) == lower(other)) if ignore_case else one == other


def signed(byte: int) -> int:
    return byte - 256 if byte >= 128 else byte


def lower(char: int) -> int:
    return ord(chr(char).lower()) if 65 <= char <= 90 else char


CASES = [
    (b"*", b"", True),
    (b"**", b"", False),
    (b"", b"", True),
    (b"", b"a", False),
    (b"h?llo", b"hello", True),
    (b"h?llo", b"hllo", False),
    (b"h*llo", b"hllo", True),
    (b"h[ae]llo", b"hillo", False),
    (b"h[^e]llo", b"hillo", True),
    (b"h[b-a]llo", b"hallo", True),
    (b"[]a]", b"a]", False),
    (b"[^]", b"]", True),
    (b"[a-]", b"^", True),
    (b"[abc", b"c", True),
    (b"[", b"[", False),
    (b"\\", b"\\", True),
    (b"\\*", b"x", False),
    (b"[\\]]", b"]", True),
    (b"[\x01-\xff]", b"\x00", True),
    (b"[\x01-\xff]", b"\x80", False),
    (b"a*b*c", b"abbc", True),
    (b"ab*bc", b"abc", False),
    (b"*aab", b"aaab", True),
    (b"*ab*ba*", b"xaba", False),
    (b"*ab*ba*", b"xabba", True),
    (b"user:*:[0-9]*:?", b"user:ann:77:x", True),
]


@pytest.mark.parametrize(("pattern", "key", "expected"), CASES)
def test_the_rules_one_by_one(pattern: bytes, key: bytes, expected: bool) -> None:
    assert compile_glob(pattern).match(key) is expected
    assert slow_match(pattern, key) is expected


@settings(max_examples=400, deadline=None)
@given(pattern=PATTERNS, keys=st.lists(KEYS, min_size=1, max_size=20), ignore_case=st.booleans())
def test_it_agrees_with_a_matcher_that_tries_everything(
    pattern: bytes, keys: list[bytes], ignore_case: bool
) -> None:
    glob = compile_glob(pattern, ignore_case=ignore_case)
    for key in keys:
        assert glob.match(key) is slow_match(pattern, key, ignore_case), (pattern, key)


@pytest.mark.parametrize("ignore_case", [False, True])
@settings(max_examples=40, deadline=None)
@given(
    classes=st.lists(
        st.binary(min_size=1, max_size=3).map(lambda b: b[:1] + b"-" + b[1:]), max_size=8
    )
)
@example(
    classes=[b"@-B", b"Z-a", b"B-@", b"\x7f-\x80", b"\xff-\x00", b"a-c", b"M-m", b"\\A", b"^k"]
)
def test_a_class_takes_the_bytes_it_should(ignore_case: bool, classes: list[bytes]) -> None:
    for inside in classes:
        glob = compile_glob(b"[%b]" % inside, ignore_case=ignore_case)
        for byte in range(256):
            key = bytes([byte])
            assert glob.match(key) is slow_match(glob.pattern, key, ignore_case), (inside, byte)


@settings(max_examples=400, deadline=None)
@given(key=KEYS, data=st.data())
def test_a_key_matches_what_is_made_from_it(key: bytes, data: st.DataObject) -> None:
    """Each byte of the key is left, escaped, put in a class, made a ?, or swallowed by a star."""
    forms = st.sampled_from(["escaped", "class", "not", "?", "*"])
    pattern = b""
    for byte in key:
        one = bytes([byte])
        match data.draw(forms):
            case "escaped":
                pattern += b"\\" + one
            case "class":
                pattern += b"[x\\" + one + b"]"
            case "not":
                pattern += b"[^\\" + bytes([byte ^ 1]) + b"]"
            case "?":
                pattern += b"?"
            case _:
                pattern += b"*"
    assert compile_glob(pattern).match(key) or not key


@pytest.fixture(scope="module")
def keys(redis: RedisServer) -> list[bytes]:
    """Store the empty key, all keys of up to two of our bytes, and some longer ones."""
    rng = random.Random(20)
    short = [bytes(key) for n in range(3) for key in itertools.product(BYTES, repeat=n)]
    longer = [bytes(rng.choices(BYTES, k=rng.randint(3, 8))) for _ in range(600)]
    keys = sorted({*short, *longer})
    redis.ask("MSET", *(word for key in keys for word in (key, b"1")))
    return keys


@settings(max_examples=40, deadline=None)
@given(patterns=st.lists(PATTERNS, min_size=1, max_size=25))
@example(patterns=[pattern for pattern, _, _ in CASES])
@example(patterns=[b"[\\\x80-\xff]", b"[\xff-\x80]*", b"[\x7f-\x80]", b"[^\x00-\xff]*", b"[a-"])
def test_it_finds_the_keys_that_redis_finds(
    redis: RedisServer, keys: list[bytes], patterns: list[bytes]
) -> None:
    replies = redis.ask_all([("KEYS", pattern) for pattern in patterns])
    for pattern, found in zip(patterns, replies, strict=True):
        glob = compile_glob(pattern)
        assert [key for key in keys if glob.match(key)] == sorted(found), pattern


NAME_PATTERNS = st.lists(
    st.sampled_from(
        [b"*", b"?", b"[a-f]", b"[^s]", b"[\\SG]", b"[Z-a]", b"[T-e]", b"E", b"t", b"|"]
    )
    | st.binary(min_size=1, max_size=1),
    max_size=8,
).map(b"".join)


@settings(max_examples=40, deadline=None)
@given(patterns=st.lists(NAME_PATTERNS, min_size=1, max_size=25))
@example(patterns=[b"GET*", b"*[S-g]et", b"*[^E]", b"[\\G]et", b"[g]ET", b"*|H*"])
def test_it_finds_the_names_that_redis_finds_in_any_case(
    redis: RedisServer, patterns: list[bytes]
) -> None:
    names = sorted(redis.ask("COMMAND", "LIST"))
    requests = [("COMMAND", "LIST", "FILTERBY", "PATTERN", pattern) for pattern in patterns]
    for pattern, found in zip(patterns, redis.ask_all([*requests]), strict=True):
        glob = compile_glob(pattern, ignore_case=True)
        assert [name for name in names if glob.match(name)] == sorted(found), pattern


@pytest.mark.parametrize("pattern", [b"*a" * 5000, b"*?" * 5000, b"*[ab]" * 1000 + b"c"])
def test_thousands_of_stars_take_the_long_keys_they_should(pattern: bytes) -> None:
    glob = compile_glob(pattern)
    assert glob.match(b"a" * 5000 + (b"c" if pattern.endswith(b"c") else b""))
    assert not glob.match(b"a" * 999)


def test_a_pattern_that_is_too_long_is_refused() -> None:
    compile_glob(b"a" * 64 * 1024)
    with pytest.raises(CommandError, match="pattern of 65537 bytes is too long"):
        compile_glob(b"a" * 64 * 1024 + b"a")
    with pytest.raises(CommandError, match="at most 3"):
        compile_glob(b"abcd", pattern_bytes_max=3)
