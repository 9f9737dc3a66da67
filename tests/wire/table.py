"""What the tests of the command table share."""

from collections.abc import Iterator
from typing import Any

from respkv.errors import CommandError
from respkv.wire import reply
from respkv.wire.commands import COMMANDS, Command, KeySpec

# Redis 7.0 lacks these: the first two came with 7.2, the third with Redis's cloud.
LATER = {"client|setinfo", "client|no-touch", "client|maint_notifications"}

# Redis subcommands that this server does not have.
NOT_YET = {
    *("client|trackinginfo", "client|getredir", "client|unblock", "client|tracking"),
    *("client|pause", "client|unpause"),
    *("client|caching", "command|getkeysandflags", "config|rewrite", "memory|malloc-stats"),
    *("memory|doctor", "memory|purge", "memory|stats", "module|load", "module|unload"),
    *("module|loadex", "pubsub|shardchannels", "pubsub|shardnumsub"),
}


def everything() -> Iterator[Command]:
    for command in COMMANDS.values():
        yield command
        yield from command.subcommands.values()


ALL = {command.name: command for command in everything()}
REDIS = [name for name in ALL if ALL[name].group != "kv" and name not in LATER]
KV = [name for name in ALL if ALL[name].group == "kv"]


def words(line: str) -> list[bytes]:
    return [word.encode() for word in line.split()]


def answer(function: Any, args: list[bytes]) -> bytes:
    """Return the reply's bytes, an error's too."""
    try:
        return reply.encode(function(args), 2)
    except CommandError as error:
        return reply.error(f"{error.word} {error}")


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
