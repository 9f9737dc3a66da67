"""What the server tells about its commands: COMMAND, and HELP of those that have subcommands."""

from respkv.server.registry import command
from respkv.server.session import Session
from respkv.wire.commands import COMMANDS
from respkv.wire.commands.introspection import answer_command, help_lines
from respkv.wire.parser import Args

_COMMANDS = ("command", *(f"command|{sub}" for sub in COMMANDS["command"].subcommands))
_HELPS = [
    f"{name}|help"
    for name, row in COMMANDS.items()
    if "help" in row.subcommands and name != "command"
]


def _command(session: Session, args: Args) -> None:
    session.send(answer_command(args))


def _help(session: Session, args: Args) -> None:
    session.send(help_lines(COMMANDS[args[0].decode().lower()]))


for _name in _COMMANDS:
    command(_name)(_command)
for _name in _HELPS:
    command(_name)(_help)
