"""The command table, held against the real redis-server's COMMAND."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from respkv.errors import CommandError
from respkv.wire import reply
from respkv.wire.commands import (
    CATEGORIES,
    COMMANDS,
    Command,
    KeySpec,
    find_command,
    parse_integer,
)
from respkv.wire.commands.introspection import (
    answer_command,
    command_docs,
    command_getkeys,
    command_info,
    command_list,
    describe,
    help_lines,
)
from respkv.wire.commands.markdown import commands_markdown
from respkv.wire.reply import Reply, Simple
from tests.wire.redis_server import RedisServer

ROOT = Path(__file__).parent.parent.parent

# Redis 7.0 lacks these: the first two came with 7.2, the third with Redis's cloud.
LATER = {"client|setinfo", "client|no-touch", "client|maint_notifications"}

# Redis shows these another way: every option of KILL as repeatable, LIST's types as exclusive with
# nothing, GETKEYS without its arguments.
OTHER_SYNTAX = {"client|kill", "client|list", "command|getkeys"}


def everything() -> Iterator[Command]:
    for command in COMMANDS.values():
        yield command
        yield from command.subcommands.values()


ALL = {command.name: command for command in everything()}
REDIS = [name for name in ALL if ALL[name].group != "kv" and name not in LATER]
KV = [name for name in ALL if ALL[name].group == "kv"]


def words(line: str) -> list[bytes]:
    return [word.encode() for word in line.split()]


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("name", [name for name in REDIS if not ALL[name].subcommands])
def test_command_info_is_what_redis_answers(redis: RedisServer, name: str, protocol: int) -> None:
    redis.ask("HELLO", protocol)
    ours = reply.encode(command_info([name.encode(), b"nosuch", b"get|x"]), protocol)
    assert ours == redis.raw("COMMAND", "INFO", name, "nosuch", "get|x")


@pytest.mark.parametrize("name", [name for name in REDIS if ALL[name].subcommands])
def test_a_container_is_what_redis_says_but_for_some_subcommands(
    redis: RedisServer, name: str
) -> None:
    redis.ask("HELLO", 3)
    info = describe(ALL[name])
    assert isinstance(info, list)
    theirs = redis.ask("COMMAND", "INFO", name)[0]
    assert reply.encode(info[:9], 3) == reply.encode(as_ours(theirs[:9]), 3)
    missing = {sub[0].decode() for sub in theirs[9]} - set(ALL)
    assert missing <= NOT_YET


# Redis subcommands that this server does not have.
NOT_YET = {
    *("client|trackinginfo", "client|getredir", "client|unblock", "client|tracking"),
    *("client|caching", "command|getkeysandflags", "config|rewrite", "memory|malloc-stats"),
    *("memory|doctor", "memory|purge", "memory|stats", "module|load", "module|unload"),
    "module|loadex",
}


def as_ours(theirs: list[Any]) -> list[Reply]:
    """Put back what hiredis loses: that flags and categories are sets of simple strings."""
    sets: dict[int, Reply] = {
        at: reply.ReplySet(tuple(Simple(word) for word in theirs[at])) for at in (2, 6)
    }
    sets |= {at: reply.ReplySet(tuple(theirs[at])) for at in (7, 8)}
    return [sets.get(at, item) for at, item in enumerate(theirs)]


@pytest.mark.parametrize("name", REDIS)
def test_command_docs_is_what_redis_answers(redis: RedisServer, name: str) -> None:
    """Without the history and the arguments, and the subcommands this server does not have."""
    redis.ask("HELLO", 3)
    theirs = redis.ask("COMMAND", "DOCS", name)
    ours = command_docs([name.encode(), b"nosuch"])
    assert read(ours) == without_details(theirs)


def without_details(docs: dict[bytes, Any]) -> dict[bytes, Any]:
    kept: dict[bytes, Any] = {}
    for name, doc in docs.items():
        if name.decode() in ALL:
            kept[name] = {
                key: without_details(value) if key == b"subcommands" else value
                for key, value in doc.items()
                if key not in (b"history", b"arguments")
            }
    return kept


def read(value: Reply) -> Any:
    """Read a reply back as a client does, LATER's subcommands taken out."""
    match value:
        case dict():
            items = {str(key): item for key, item in value.items() if key not in LATER}
            return {key.encode(): read(item) for key, item in items.items()}
        case reply.ReplySet(members):
            return [read(member) for member in members]
        case Simple(text) | str(text):
            return text.encode() if isinstance(text, str) else text
        case _:
            return value


@pytest.mark.parametrize("name", [name for name in REDIS if name not in OTHER_SYNTAX])
def test_the_syntax_is_what_redis_documents(redis: RedisServer, name: str) -> None:
    redis.ask("HELLO", 3)
    docs = redis.ask("COMMAND", "DOCS", name)[name.encode()]
    theirs = f"{name.upper().replace('|', ' ')} {render(docs.get(b'arguments', []))}".strip()
    assert ALL[name].syntax == theirs


def render(arguments: list[dict[bytes, Any]], between: str = " ") -> str:
    return between.join(map(render_one, arguments))


def render_one(argument: dict[bytes, Any]) -> str:
    kind, flags = argument[b"type"], argument.get(b"flags", [])
    token = argument.get(b"token", b"").decode()
    match kind:
        case b"pure-token":
            text = token
        case b"oneof" | b"block":
            text = render(argument[b"arguments"], " | " if kind == b"oneof" else " ")
        case _:
            text = argument[b"name"].decode()
    if token and kind != b"pure-token":
        text = f"{token} {text}"
    if b"multiple" in flags:
        text = f"{text} [{text} ...]"
    if b"optional" in flags:
        return f"[{text}]"
    return f"<{text}>" if kind == b"oneof" else text


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


def answer(function: Any, args: list[bytes]) -> bytes:
    """Return the reply's bytes, an error's too."""
    try:
        return reply.encode(function(args), 2)
    except CommandError as error:
        return reply.error(f"{error.word} {error}")


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


def made(name: str, *specs: KeySpec) -> Command:
    return Command(
        name=name,
        arity=-3,
        key_specs=specs,
        summary="",
        since="",
        group="",
        complexity="",
        syntax="",
    )


def test_counted_and_named_keys_are_described_as_redis_describes_them(redis: RedisServer) -> None:
    redis.ask("HELLO", 3)
    for name, at, spec in [
        ("zinter", 0, KeySpec(("RO", "access"), counted=True)),
        ("georadius", 1, KeySpec(("OW", "update"), begin="STORE", start=6)),
    ]:
        info = describe(made(name, spec))
        assert isinstance(info, list)
        assert isinstance(info[8], reply.ReplySet)
        assert read(info[8])[0] == redis.ask("COMMAND", "INFO", name)[0][8][at]


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
    ("KV.LEASE 2 a b MS 100", "a b"),
    ("KV.INFO k", "k"),
    ("KV.PIN k 100", "k"),
    ("KV.UNPIN k", "k"),
    ("KV.EXPLAIN k", "k"),
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


@pytest.mark.parametrize("name", ["KV.MGET", "KV.MATCH", "KV.TOUCH", "KV.LEASE"])
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


@pytest.mark.parametrize(
    "options",
    [
        "",
        *("FILTERBY ACLCAT keyspace", "filterby aclcat Dangerous", "FILTERBY ACLCAT nosuch"),
        *("FILTERBY ACLCAT @read", "FILTERBY PATTERN *Ge[S-t]*", "FILTERBY PATTERN memory|*"),
        *("FILTERBY MODULE x", "FILTERBY", "FILTERBY PATTERN", "nosuch", "FILTERBY NOSUCH x"),
        *("FILTERBY PATTERN a FILTERBY PATTERN b", "x FILTERBY PATTERN"),
    ],
)
def test_command_list_is_what_redis_lists(redis: RedisServer, options: str) -> None:
    raw = redis.raw("COMMAND", "LIST", *words(options))
    if raw.startswith(b"-"):
        assert answer(command_list, words(options)) == raw
    else:
        theirs = {name.decode() for name in redis.ask("COMMAND", "LIST", *words(options))}
        ours = {name for name in command_list(words(options)) if name in REDIS}
        assert ours == theirs & set(ALL)


@pytest.mark.parametrize("protocol", [2, 3])
def test_every_subcommand_of_command_is_answered(protocol: int) -> None:
    for sub in ["", *COMMANDS["command"].subcommands]:
        request = words(f"COMMAND {sub}" + (" GET k" if sub == "getkeys" else ""))
        find_command(request)
        assert reply.encode(answer_command(request), protocol)
    assert answer_command(words("command count")) == len(COMMANDS)
    assert answer_command(words("command")) == command_info()
    assert answer_command(words("command info get nosuch")) == command_info([b"get", b"nosuch"])


def test_docs_know_every_command() -> None:
    assert set(command_docs()) == set(COMMANDS)


def test_a_container_explains_its_subcommands(redis: RedisServer) -> None:
    redis.ask("HELLO", 2)
    for command in COMMANDS.values():
        if command.subcommands and command.group != "kv":
            lines = redis.ask(command.name, "HELP")
            helped = [line.text for line in help_lines(command) if isinstance(line, Simple)]
            assert str(helped[0]).encode() == lines[0]
            shown = [str(line) for line in helped if not str(line).startswith(" ")]
            for sub in command.subcommands:
                assert any(line.split()[0] == sub.upper() for line in shown)


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
}


def test_payloads_are_the_values_and_nothing_else() -> None:
    for line in PAYLOADS:
        request = words(line)
        command = find_command(request)
        landing = [index for index in range(len(request)) if command.is_payload(index)]
        assert landing == [index for index, word in enumerate(request) if word == b"P"], line
    with_payload = {command.name for command in everything() if command.payload}
    assert with_payload == {line.split()[0].lower() for line in PAYLOADS}


def test_the_manual_is_what_the_table_says() -> None:
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    advice = "run: python -m respkv.wire.commands docs/commands.md"
    assert written == commands_markdown(), advice
    for command in everything():
        assert command.subcommands or f"    {command.syntax}\n" in written
