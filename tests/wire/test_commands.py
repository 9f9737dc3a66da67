"""The command table and the way into it, held against the real redis-server."""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from respkv.errors import CommandError
from respkv.wire import reply
from respkv.wire.commands import CATEGORIES, COMMANDS, KeySpec, find_command, parse_integer
from respkv.wire.commands.introspection import command_getkeys
from tests.redis_server import RedisServer
from tests.wire.table import ALL, KV, LATER, NOT_YET, REDIS, answer, everything, made, words


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from([name for name in REDIS if ALL[name].key_specs]),
    args=st.lists(st.sampled_from([b"", b"k", b"K", b"2", b"EX", b"GET", b"\0\r\n"]), max_size=7),
)
@example(name="mset", args=[b"a", b"1", b"b"])
@example(name="del", args=[b"a", b"a", b"b", b"a"])
def test_the_keys_are_those_that_redis_finds(
    redis: RedisServer, name: str, args: list[bytes]
) -> None:
    assume(args)
    request = [*name.encode().split(b"|"), *args]
    assert answer(command_getkeys, request) == redis.raw("COMMAND", "GETKEYS", *request)
    if ALL[name].accepts(len(request)):
        assert ALL[name].keys(request) == redis.ask("COMMAND", "GETKEYS", *request)


@pytest.mark.parametrize("request_line", ["ping a", "nosuch a", "memory foo k", "object help"])
def test_what_has_no_keys_is_refused_as_redis_refuses_it(
    redis: RedisServer, request_line: str
) -> None:
    request = words(request_line)
    assert answer(command_getkeys, request) == redis.raw("COMMAND", "GETKEYS", *request)


@pytest.mark.parametrize(
    ("line", "spec"),
    [
        ("zinter 2 a b", KeySpec(("RO", "access"), counted=True)),
        ("zinter 2 a a WITHSCORES", KeySpec(("RO", "access"), counted=True)),
        ("zinter 3 a b", KeySpec(("RO", "access"), counted=True)),
        ("zinter 0 a b", KeySpec(("RO", "access"), counted=True)),
        ("zinter -1 a b", KeySpec(("RO", "access"), counted=True)),
        ("zinter 99999999999999999999 a", KeySpec(("RO", "access"), counted=True)),
        ("georadius k 1 2 3 m STORE d", KeySpec(("OW",), begin="STORE", start=6)),
        ("georadius k 1 2 3 m ASC store d", KeySpec(("OW",), begin="STORE", start=6)),
    ],
)
def test_counted_and_named_keys_are_found_as_redis_finds_them(
    redis: RedisServer, line: str, spec: KeySpec
) -> None:
    request = words(line)
    fixed = (KeySpec(("RO",)),) if line.startswith("georadius") else ()
    command = made(request[0].decode(), *fixed, spec)
    raw = redis.raw("COMMAND", "GETKEYS", *request)
    try:
        assert reply.encode(command.keys(request), 2) == raw
    except CommandError:
        assert raw == b"-ERR Invalid arguments specified for command\r\n"


KV_KEYS = [
    ("KV.PUT k v", "k"),
    ("KV.PUT k PARENT", "k"),
    ("KV.PUT k v TOKENS 16 parent p NX", "k p"),
    ("KV.PUT k v PARENT PARENT", "k PARENT"),
    ("KV.PUT k v PARENT", "k"),
    ("KV.PUT k v PARENT k", "k k"),
    ("KV.GET k LAYERS 0 4", "k"),
    ("KV.MGET 2 a b LAYERS 0 4", "a b"),
    ("kv.mget 3 a a b", "a a b"),
    ("KV.MATCH 1 a", "a"),
    ("KV.TOUCH 2 a b", "a b"),
    ("KV.PREFETCH 2 a b TO cpu", "a b"),
    ("KV.LEASE 2 a b MS 100", "a b"),
    ("KV.INFO k", "k"),
    ("KV.PIN k 100", "k"),
    ("KV.UNPIN k", "k"),
    ("KV.EXPLAIN k", "k"),
    ("KV.RETAIN k PIN 100", "k"),
    ("KV.RESERVE k 4096 MS 100", "k"),
    ("KV.COMMIT 7", ""),
    ("KV.COMMIT 7 TOKENS 16 PARENT p", "p"),
]


@pytest.mark.parametrize(("line", "keys"), KV_KEYS)
def test_the_keys_of_kv_commands(line: str, keys: str) -> None:
    assert find_command(words(line)).keys(words(line)) == words(keys)
    assert command_getkeys(words(line)) == words(keys)


def test_every_kv_command_with_keys_has_a_case_above() -> None:
    assert {words(line)[0].decode().lower() for line, _ in KV_KEYS} == {
        name for name in KV if ALL[name].key_specs
    }


@pytest.mark.parametrize("name", ["KV.MGET", "KV.MATCH", "KV.TOUCH", "KV.LEASE", "KV.PREFETCH"])
@pytest.mark.parametrize(
    ("count", "message"),
    [
        ("0", "numkeys should be greater than 0"),
        ("-1", "numkeys should be greater than 0"),
        ("3", "Number of keys can't be greater than number of args"),
        ("9223372036854775807", "Number of keys can't be greater than number of args"),
        ("9223372036854775808", "value is not an integer or out of range"),
        ("1.0", "value is not an integer or out of range"),
        ("+1", "value is not an integer or out of range"),
        ("01", "value is not an integer or out of range"),
        ("9" * 5000, "value is not an integer or out of range"),
    ],
)
def test_a_wrong_count_of_keys_is_refused(name: str, count: str, message: str) -> None:
    request = words(f"{name} {count} a b")
    with pytest.raises(CommandError) as caught:
        find_command(request).keys(request)
    assert str(caught.value) == message


UNKNOWN = st.sampled_from([b"", b"nosuch", b"get|x", b"no\0such", b"\xff\r\n"])
NAMES = st.sampled_from([name.encode() for name in ALL]) | UNKNOWN
ARGS = st.lists(
    st.sampled_from([b"id", b"nosuch", b"USAGE", b"", b"x" * 127, b"a\r\nb", b"c\0d", b"'"])
    | st.binary(max_size=70),
    max_size=6,
)


@settings(max_examples=400, deadline=None)
@given(name=NAMES, args=ARGS, upper=st.booleans())
@example(name=b"n" * 200, args=[b"a" * 130, b"b"], upper=False)
@example(name=b"nosuch", args=[b"a" * 60, b"b" * 60, b"c" * 60], upper=False)
@example(name=b"nosuch", args=[b"a\0b", b"\0"], upper=False)
@example(name=b"client", args=[b"x" * 200], upper=False)
@example(name=b"client", args=[b"x\0y"], upper=False)
@example(name=b"client", args=[b"\r\n+OK"], upper=False)
@example(name=b"command", args=[], upper=True)
def test_a_request_is_refused_with_redis_words(
    redis: RedisServer, name: bytes, args: list[bytes], upper: bool
) -> None:
    assume(not name.startswith(b"kv."))
    request = [*name.split(b"|"), *args] if name.decode("latin-1") in ALL else [name, *args]
    request[0] = request[0].upper() if upper else request[0]
    second = request[1].decode("latin-1").lower() if len(request) > 1 else ""
    first = request[0].decode("latin-1").lower()
    assume(f"{first}|{second}" not in NOT_YET | LATER)
    refused = answer(lambda args: [find_command(args).name], request)
    if refused.startswith(b"-"):
        assert refused == redis.raw(*request)
    else:
        assert find_command(request).accepts(len(request))


@pytest.mark.parametrize("line", ["client id", "CLIENT ID", "Client iD", "cLIENT id"])
def test_names_are_found_in_any_case(line: str) -> None:
    assert find_command(words(line)).name == "client|id"


@settings(max_examples=200, deadline=None)
@given(
    data=st.integers(-(2**65), 2**65).map(lambda number: str(number).encode())
    | st.text("0123456789-+ .e", max_size=22).map(str.encode)
    | st.binary(max_size=4)
)
@example(data=b"-9223372036854775808")
@example(data=b"9223372036854775807")
@example(data=b"9223372036854775808")
@example(data=b"-0")
@example(data=b"")
def test_integers_are_read_as_redis_reads_them(redis: RedisServer, data: bytes) -> None:
    raw, _ = redis.raw("INCRBY", "counter", data), redis.ask("DEL", "counter")
    number = parse_integer(data)
    if number is None:
        assert raw == reply.error("ERR value is not an integer or out of range")
    else:
        assert raw == reply.integer(number)


def test_names_subcommands_and_categories_agree() -> None:
    assert set(COMMANDS) == {command.name for command in COMMANDS.values()}
    for command in everything():
        assert set(command.acl_categories) <= set(CATEGORIES), command.name
        assert "kv" in command.acl_categories or command.group != "kv"
        assert command.syntax.split()[0] == command.name.split("|")[0].upper()
        for word, sub in command.subcommands.items():
            assert sub.name == f"{command.name}|{word}"


def test_a_command_is_marked_movable_when_its_key_positions_do_not_tell_all() -> None:
    for command in everything():
        told = [spec for spec in command.key_specs if isinstance(spec.begin, int)]
        movable = any(spec.counted for spec in told) or len(told) != len(command.key_specs)
        assert movable == ("movablekeys" in command.flags), command.name


PAYLOADS = {
    "SET key P EX 1": 2,
    "SETEX key 1 P": 3,
    "PSETEX key 1 P": 3,
    "SETNX key P": 2,
    "GETSET key P": 2,
    "MSET a P b P c P": 6,
    "MSETNX a P b P": 4,
    "KV.PUT key P NX PX 1": 2,
    "KV.SEQ.PUT ns tokens 2 P P": 4,
}


def test_payloads_are_the_values_and_nothing_else() -> None:
    for line in PAYLOADS:
        request = words(line)
        command = find_command(request)
        landing = [index for index in range(len(request)) if command.is_payload(index)]
        assert landing == [index for index, word in enumerate(request) if word == b"P"], line
    with_payload = {command.name for command in everything() if command.payload}
    assert with_payload == {line.split()[0].lower() for line in PAYLOADS}
