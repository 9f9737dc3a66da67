"""What COMMAND and the HELP subcommands answer, all of it read from the table.

The answers are plain values for ``respkv.wire.reply.encode``, in Redis 7.0's shape and order. Two
parts of COMMAND DOCS are left out: ``arguments``, for which docs/commands.md and HELP show the
syntax, and ``history``.
"""

from collections.abc import Iterable, Iterator, Sequence

from respkv.errors import CommandError
from respkv.wire.commands.command import Command, KeySpec
from respkv.wire.commands.table import COMMANDS, look_up, look_up_sub
from respkv.wire.glob import compile_glob
from respkv.wire.reply import Reply, ReplySet, Simple


def answer_command(args: Sequence[bytes]) -> Reply:
    """Answer COMMAND and all its subcommands.

    args:   the whole request, whose arity ``find_command`` has checked.
    Raises: CommandError with Redis's text.
    """
    match args[1].lower() if len(args) > 1 else b"info":
        case b"count":
            return len(COMMANDS)
        case b"info":
            return command_info(args[2:])
        case b"docs":
            return command_docs(args[2:])
        case b"list":
            return command_list(args[2:])
        case b"getkeys":
            return command_getkeys(args[2:])
        case b"help":
            return help_lines(COMMANDS["command"])
        case word:
            raise AssertionError(f"{word!r} is in the table and not here")


def command_info(names: Sequence[bytes] = ()) -> list[Reply]:
    """Describe the named commands, null for one that is unknown; without names, all commands."""
    if not names:
        return [describe(command) for command in COMMANDS.values()]
    return [describe(command) if (command := _by_full_name(name)) else None for name in names]


def command_docs(names: Sequence[bytes] = ()) -> dict[str, Reply]:
    """Document the named commands, without those that are unknown; without names, all commands."""
    found = [_by_full_name(name) for name in names] if names else list(COMMANDS.values())
    return {command.name: _docs(command) for command in found if command is not None}


def command_list(options: Sequence[bytes] = ()) -> list[str]:
    """List the names of commands and subcommands.

    options: none, or FILTERBY and MODULE, ACLCAT or PATTERN and what to filter by.
    Raises:  CommandError for anything else.
    """
    everything = list(_with_subcommands(COMMANDS.values()))
    if not options:
        return [command.name for command in everything]
    if len(options) != 3 or options[0].upper() != b"FILTERBY":
        raise CommandError("syntax error")
    wanted = options[2]
    match options[1].upper():
        case b"MODULE":
            return []
        case b"ACLCAT":
            category = wanted.decode("latin-1").lower()
            return [one.name for one in everything if category in one.acl_categories]
        case b"PATTERN":
            glob = compile_glob(wanted, ignore_case=True)
            return [one.name for one in everything if glob.match(one.name.encode())]
        case _:
            raise CommandError("syntax error")


def command_getkeys(args: Sequence[bytes]) -> list[bytes]:
    """Return the keys of a whole command. Raises CommandError with Redis's text if it has none."""
    command = look_up(args[0])
    if command is not None and command.subcommands and len(args) > 1:
        command = look_up_sub(command, args[1])
    if command is None:
        raise CommandError("Invalid command specified")
    if not command.key_specs:
        raise CommandError("The command has no key arguments")
    if not command.accepts(len(args)):
        raise CommandError("Invalid number of arguments specified for command")
    try:
        keys = command.keys(args)
    except CommandError as error:
        raise CommandError("Invalid arguments specified for command") from error
    if not keys and "no_mandatory_keys" not in command.flags:
        raise CommandError("Invalid arguments specified for command")
    return keys


def help_lines(command: Command) -> list[Reply]:
    """Return the answer to a container's HELP: each subcommand's syntax, then what it does."""
    container = command.name.upper()
    lines = [f"{container} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"]
    for sub in command.subcommands.values():
        lines += [sub.syntax.removeprefix(container).strip(), f"    {sub.summary}."]
    return [Simple(line) for line in lines]


def _with_subcommands(commands: Iterable[Command]) -> Iterator[Command]:
    for command in commands:
        yield command
        yield from command.subcommands.values()


def _by_full_name(name: bytes) -> Command | None:
    """Find a command by the name that COMMAND prints, such as ``client|id``."""
    first, bar, second = name.partition(b"|")
    command = look_up(first)
    return look_up_sub(command, second) if command and bar else command


def describe(command: Command) -> Reply:
    """Return the ten elements that COMMAND INFO gives for one command."""
    return [
        command.name,
        command.arity,
        _statuses(command.flags),
        command.first_key,
        command.last_key,
        command.step,
        _statuses([f"@{name}" for name in command.acl_categories]),
        ReplySet(command.tips),
        ReplySet(tuple(_key_spec(spec) for spec in command.key_specs)),
        [describe(sub) for sub in command.subcommands.values()] or ReplySet(()),
    ]


def _statuses(words: Sequence[str]) -> ReplySet:
    return ReplySet(tuple(Simple(word) for word in words))


def _key_spec(spec: KeySpec) -> Reply:
    described: dict[str, Reply] = {"notes": spec.notes} if spec.notes else {}
    described["flags"] = _statuses(spec.flags)
    if isinstance(spec.begin, int):
        described["begin_search"] = _step("index", {"index": spec.begin})
    else:
        described["begin_search"] = _step(
            "keyword", {"keyword": spec.begin, "startfrom": spec.start}
        )
    if spec.counted:
        described["find_keys"] = _step(
            "keynum", {"keynumidx": 0, "firstkey": 1, "keystep": spec.step}
        )
    else:
        described["find_keys"] = _step(
            "range", {"lastkey": spec.last, "keystep": spec.step, "limit": 0}
        )
    return described


def _step(kind: str, figures: dict[str, Reply]) -> Reply:
    step: dict[str, Reply] = {"type": kind, "spec": figures}
    return step


def _docs(command: Command) -> Reply:
    docs: dict[str, Reply] = {
        "summary": command.summary,
        "since": command.since,
        "group": command.group,
        "complexity": command.complexity,
    }
    if command.deprecated_since:
        docs["doc_flags"] = _statuses(["deprecated"])
        docs["deprecated_since"] = command.deprecated_since
        docs["replaced_by"] = command.replaced_by
    if command.subcommands:
        docs["subcommands"] = {sub.name: _docs(sub) for sub in command.subcommands.values()}
    return docs
