"""Redis's commands answer what redis-server 7.0 answers, byte for byte, in RESP2 and RESP3.

An error may say more than Redis's: a syntax error names the word that it is about. Everything that
is different on purpose stands in ``DIFFERENCES``, with the reason.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from socket import create_connection

import pytest

from respkv.wire.commands import COMMANDS
from tests.redis_server import RedisServer
from tests.server.raw import Raw
from tests.server.sequences import EXPIRY, KEYSPACE, STRINGS, sequences
from tests.server_process import ServerProcess

Words = Sequence[str | bytes | int]


class Pair:
    """A connection to redis-server and one to ours, both servers empty, speaking one protocol."""

    def __init__(self, theirs: Raw, ours: Raw, protocol: int) -> None:
        self.theirs, self.ours = theirs, ours
        for each in (theirs, ours):
            each.ask("HELLO", protocol)
            assert each.ask("FLUSHALL") == b"OK"

    def check(self, requests: Sequence[Words]) -> None:
        """Send the same commands to both; assert equal answers."""
        pairs = zip(self.theirs.raw_all(requests), self.ours.raw_all(requests), strict=True)
        for words, (theirs, ours) in zip(requests, pairs, strict=True):
            assert ours == theirs or is_longer_error(theirs, ours), f"{list(words)}"


def is_longer_error(theirs: bytes, ours: bytes) -> bool:
    """Whether our error begins with Redis's and goes on about the word that is wrong."""
    return theirs.startswith(b"-ERR syntax error") and ours.startswith(theirs[:-2] + b", ")


@pytest.fixture(params=[2, 3], ids=["RESP2", "RESP3"])
def pair(
    request: pytest.FixtureRequest, redis: RedisServer, server: ServerProcess
) -> Iterator[Pair]:
    with ExitStack() as stack:
        theirs = stack.enter_context(Raw(create_connection(("127.0.0.1", redis.port))))
        ours = stack.enter_context(Raw(server.connect()))
        yield Pair(theirs, ours, request.param)


def named(text: str) -> list[object]:
    return [
        pytest.param(commands, id=" ; ".join(shlex.join(words) for words in commands)[:80])
        for commands in sequences(text)
    ]


@pytest.mark.parametrize("commands", named(STRINGS))
def test_string_commands_answer_as_redis_does(commands: list[Words], pair: Pair) -> None:
    pair.check(commands)


@pytest.mark.parametrize("commands", named(EXPIRY))
def test_expiry_commands_answer_as_redis_does(commands: list[Words], pair: Pair) -> None:
    pair.check(commands)


@pytest.mark.parametrize("commands", named(KEYSPACE))
def test_keyspace_and_connection_commands_answer_as_redis_does(
    commands: list[Words], pair: Pair
) -> None:
    pair.check(commands)


def test_a_wrong_number_of_arguments_is_told_in_redis_words(pair: Pair) -> None:
    """Every command and subcommand that Redis has too, with every number of arguments up to 6."""
    known = {name for name in COMMANDS if pair.theirs.ask("COMMAND", "INFO", name) != [None]}
    assert len(known) > 40
    wrong = []
    for name in sorted(known):
        rows = {name: COMMANDS[name], **COMMANDS[name].subcommands}
        for row in rows.values():
            if len(pair.theirs.ask("COMMAND", "DOCS", row.name)) == 0:
                continue  # a subcommand that is newer than this redis-server
            words = row.name.split("|")
            wrong += [
                [*words, *["x"] * (number - len(words))]
                for number in range(len(words), 8)
                if not row.accepts(number) and not (row.subcommands and number > 1)
            ]
    assert len(wrong) > 150
    pair.check(wrong)


@pytest.mark.parametrize(
    "nbytes", [0, 1, 44, 447, 448, 449, 4095, 16384, 16385, 65535, 65536, 65537, 1 << 20]
)
def test_values_of_every_path_come_back_whole(nbytes: int, pair: Pair) -> None:
    value = bytes(range(256)) * (nbytes // 256 + 1)
    value = value[:nbytes]
    pair.check(
        [
            ("SET", "k", value),
            ("GET", "k"),
            ("STRLEN", "k"),
            ("GETSET", "k", value[::-1]),
            ("SET", "k", value, "GET"),
            ("MSET", "a", value, "k", b"", "b", value),
            ("MGET", "a", "k", "absent", "b"),
            ("MSETNX", "c", value, "a", "x"),
            ("MSETNX", "c", value, "d", value),
            ("SETNX", "c", value),
            ("SETEX", "e", 100, value),
            ("PSETEX", "e", 100000, value),
            ("SET", "e", value, "XX", "KEEPTTL"),
            ("TTL", "e"),
            ("GETEX", "e", "PERSIST"),
            ("GETDEL", "e"),
            ("EXISTS", "a", "b", "c", "d", "e"),
            ("SET", "a", value, "NX"),
            ("SET", "z", value, "XX"),
            ("SET", "k", value, "EX", "x"),
            ("SET", "k", value, "BOGUS"),
            ("SETEX", "k", 0, value),
            ("GET", "k"),
        ]
    )


def test_keys_and_values_are_any_bytes(pair: Pair) -> None:
    every = [bytes([byte]) for byte in range(256)]
    odd = [*every, b"\r\n", b"$5\r\nhello\r\n", b"\xff\xfe\x00", b"k" * 70_000, "ключ".encode()]
    pair.check([("SET", key, b"<%b>" % key[:99]) for key in odd])
    pair.check([("GET", key) for key in odd])
    pair.check([("MGET", *odd), ("DBSIZE",), ("EXISTS", *odd), ("DEL", *odd), ("DBSIZE",)])


def test_time_left_is_counted_down_as_redis_does(pair: Pair) -> None:
    for each in (pair.theirs, pair.ours):
        each.ask("SET", "k", "v", "PX", 100_000)
        left = each.ask("PTTL", "k")
        assert 60_000 < left <= 100_000
        each.ask("PEXPIRE", "k", 1)
        while each.ask("EXISTS", "k"):
            pass
        assert each.ask("PTTL", "k") == -2
        before, _ = each.ask("TIME")
        each.ask("SET", "k", "v", "EX", 1000)
        after, _ = each.ask("TIME")
        assert int(before) <= each.ask("EXPIRETIME", "k") - 1000 <= int(after) + 1


def test_a_scan_meets_every_key_once_as_redis_promises(pair: Pair) -> None:
    names = {b"key-%d" % number for number in range(500)}
    pair.check([("MSET", *[word for name in sorted(names) for word in (name, b"v")])])
    for each in (pair.theirs, pair.ours):
        met: list[bytes] = []
        cursor = b"0"
        while True:
            cursor, found = each.ask("SCAN", cursor, "COUNT", 17)
            met += found
            if cursor == b"0":
                break
        assert sorted(met) == sorted(names)
        _, found = each.ask("SCAN", 0, "COUNT", 100_000, "MATCH", "key-1?")
        assert set(found) == {b"key-%d" % number for number in range(10, 20)}
        assert set(each.ask("KEYS", "key-?")) == {b"key-%d" % number for number in range(10)}
        assert each.ask("RANDOMKEY") in names


# What differs on purpose: commands, Redis's last answer, ours, why.
DIFFERENCES = [
    (
        "SET k 5 ; OBJECT ENCODING k",
        b"$3\r\nint\r\n",
        b"$6\r\nembstr\r\n",
        "there is no command that counts, so numbers are kept as the bytes they came in",
    ),
    (
        f"SET k {'x' * 100} ; OBJECT ENCODING k",
        b"$3\r\nraw\r\n",
        b"$6\r\nembstr\r\n",
        "embstr tells a value on the heap, up to 448 bytes, from one in a slot",
    ),
    (
        "SET k v ; OBJECT FREQ k",
        b"-ERR An LFU maxmemory policy is not selected, access frequency not tracked. Please note "
        b"that when switching between policies at runtime LRU and LFU data will take some time to "
        b"adjust.\r\n",
        b":0\r\n",
        "uses are counted under every policy",
    ),
    ("SELECT 1", b"+OK\r\n", b"-ERR DB index is out of range\r\n", "there is one database"),
    (
        "LPUSH k v",
        b":1\r\n",
        b"-ERR unknown command 'LPUSH', with args beginning with: 'k' 'v' \r\n",
        "a cache of values has no lists, sets, hashes or streams",
    ),
    (
        f"SET {'k' * 513} {'v' * 449}",
        b"+OK\r\n",
        b"-ERR a value of more than 448 bytes takes a key of at most 512, not 513\r\n",
        "keys are on the heap, so beside values in slots they have to be small",
    ),
    (
        "CLIENT SETINFO LIB-NAME x",
        b"-ERR unknown subcommand 'SETINFO'. Try CLIENT HELP.\r\n",
        b"+OK\r\n",
        "of Redis 7.2, and every client library sends it",
    ),
    (
        "SET k v ; SET k w IFEQ v ; GET k",
        b"$1\r\nv\r\n",
        b"$1\r\nw\r\n",
        "of Valkey 8.1: whoever changes a value can see that nobody else did meanwhile",
    ),
    (
        "CLIENT NO-TOUCH ON",
        b"-ERR unknown subcommand 'NO-TOUCH'. Try CLIENT HELP.\r\n",
        b"+OK\r\n",
        "of Redis 7.2",
    ),
]


@pytest.mark.parametrize(("commands", "theirs", "ours", "reason"), DIFFERENCES)
def test_what_differs_is_known(
    commands: str, theirs: bytes, ours: bytes, reason: str, pair: Pair
) -> None:
    requests = sequences(commands)[0]
    assert pair.theirs.raw_all(requests)[-1] == theirs
    assert pair.ours.raw_all(requests)[-1] == ours, reason
