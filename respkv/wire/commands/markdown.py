"""docs/commands.md, written from the table."""

from collections.abc import Iterator

from respkv.wire.commands.command import Command
from respkv.wire.commands.table import COMMANDS

_GROUPS = {
    "connection": "Connection",
    "string": "Values",
    "generic": "Keys",
    "pubsub": "Pub/sub",
    "server": "Server",
    "kv": "KV pages",
}

_HEAD = """\
# Commands

<!-- Written by `python -m respkv.wire.commands`; change the table, not this file. -->

Every command respkv answers. Redis commands have Redis 7.0's replies and error texts unless a line
here says otherwise; options are words in any case. Arguments in brackets may be left out, of
arguments between bars one is meant, dots stand for more of the same.

*Arity* counts the name; a negative arity means at least so many. *Keys* are the positions of keys:
first, last (negative: from the end), step. A command whose number of keys is one of its arguments,
or that has keys among its options, is marked *movable*; `COMMAND GETKEYS` tells its keys.
"""


def commands_markdown() -> str:
    """Return the text of docs/commands.md."""
    lines = [_HEAD]
    for group, title in _GROUPS.items():
        lines += [f"## {title}", ""]
        for command in COMMANDS.values():
            if command.group == group:
                lines += _section(command)
    return "\n".join(lines).rstrip() + "\n"


def _section(command: Command) -> Iterator[str]:
    yield f"### {command.name.upper()}"
    yield ""
    if command.subcommands and command.accepts(1):
        yield from _body(command)
    for one in command.subcommands.values() or [command]:
        yield from _body(one)


def _body(command: Command) -> Iterator[str]:
    yield f"    {command.syntax}"
    yield ""
    yield f"{command.summary.rstrip('.')}. {command.notes}".rstrip()
    yield ""
    yield _facts(command)
    yield ""


def _facts(command: Command) -> str:
    since = command.since if command.group == "kv" else f"Redis {command.since}"
    facts = [f"since {since}", command.complexity.rstrip("."), f"arity {command.arity}"]
    if command.first_key:
        facts.append(f"keys {command.first_key} {command.last_key} {command.step}")
    if "movablekeys" in command.flags:
        facts.append("keys movable")
    facts.append(" ".join(f"@{name}" for name in command.acl_categories))
    if command.deprecated_since:
        instead = command.replaced_by.replace("!", "")
        facts.append(f"deprecated since Redis {command.deprecated_since}: use {instead}")
    return "*" + " · ".join(facts) + "*"
