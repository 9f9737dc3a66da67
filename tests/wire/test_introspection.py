"""What COMMAND and HELP answer, held against the real redis-server."""

from pathlib import Path
from typing import Any

import pytest

from respkv.wire import reply
from respkv.wire.commands import COMMANDS, KeySpec, find_command
from respkv.wire.commands.introspection import (
    answer_command,
    command_docs,
    command_info,
    command_list,
    describe,
    help_lines,
)
from respkv.wire.commands.markdown import commands_markdown
from respkv.wire.reply import Reply, Simple
from tests.redis_server import RedisServer
from tests.wire.table import ALL, LATER, NOT_YET, REDIS, answer, everything, made, words

ROOT = Path(__file__).parent.parent.parent

# Redis shows these another way: every option of KILL as repeatable, LIST's types as exclusive with
# nothing, GETKEYS without its arguments. SET has an option that only Valkey has.
OTHER_SYNTAX = {"client|kill", "client|list", "command|getkeys", "memory|usage", "set"}


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


def test_the_manual_is_what_the_table_says() -> None:
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    advice = "run: python -m respkv.wire.commands > docs/commands.md"
    assert written == commands_markdown(), advice
    for command in everything():
        assert command.subcommands or f"    {command.syntax}\n" in written
