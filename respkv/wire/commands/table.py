"""The command table and the way into it: from the words of a request to its command."""

from collections.abc import Sequence

from respkv.errors import CommandError
from respkv.wire.commands.command import Command
from respkv.wire.commands.connection import CONNECTION
from respkv.wire.commands.keyspace import KEYSPACE
from respkv.wire.commands.kv import KV
from respkv.wire.commands.pubsub import PUBSUB
from respkv.wire.commands.retention import RETENTION
from respkv.wire.commands.sequences import SEQUENCES
from respkv.wire.commands.server import SERVER
from respkv.wire.commands.strings import STRINGS

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (*CONNECTION, *STRINGS, *KEYSPACE, *PUBSUB, *SERVER, *KV, *RETENTION, *SEQUENCES)
}

# Both common spellings, so that most requests cost one look-up and no copy of a word.
_BY_WORD: dict[bytes, Command] = {
    spelling: command
    for name, command in COMMANDS.items()
    for spelling in (name.encode(), name.upper().encode())
}
_WORD_BYTES_MAX = 64
_QUOTED_BYTES_MAX = 128


def look_up(word: bytes) -> Command | None:
    """Return the command of that name in any case, or None."""
    command = _BY_WORD.get(word)
    if command is None and len(word) <= _WORD_BYTES_MAX:
        command = _BY_WORD.get(word.lower())
    return command


def look_up_sub(command: Command, word: bytes) -> Command | None:
    """Return the subcommand of that second word in any case, or None."""
    if len(word) > _WORD_BYTES_MAX:
        return None
    return command.subcommands.get(word.decode("latin-1").lower())


def find_command(args: Sequence[bytes]) -> Command:
    """Return the command, or subcommand, that a request calls for.

    args:   all words of the request, at least one.
    Raises: CommandError with Redis's text when there is none or the arity does not fit.
    """
    command = look_up(args[0])
    if command is None:
        raise CommandError(_unknown(args))
    if command.subcommands and len(args) > 1:
        found = look_up_sub(command, args[1])
        if found is None:
            word, container = _quoted(args[1]), command.name.upper()
            raise CommandError(f"unknown subcommand '{word}'. Try {container} HELP.")
        command = found
    if not command.accepts(len(args)):
        raise CommandError(f"wrong number of arguments for '{command.name}' command")
    return command


def _unknown(args: Sequence[bytes]) -> str:
    beginning = b""
    for arg in args[1:]:
        if len(beginning) >= _QUOTED_BYTES_MAX:
            break
        room = _QUOTED_BYTES_MAX - len(beginning)
        beginning += b"'%b' " % arg[:room].partition(b"\0")[0]
    shown = beginning.decode("utf-8", "surrogateescape")
    return f"unknown command '{_quoted(args[0])}', with args beginning with: {shown}"


def _quoted(word: bytes) -> str:
    """Cut a client's word as C would for an error text: at 128 bytes or the first zero."""
    return word[:_QUOTED_BYTES_MAX].partition(b"\0")[0].decode("utf-8", "surrogateescape")
