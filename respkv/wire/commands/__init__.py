"""The command table, the one source of dispatch, COMMAND, key permissions and docs/commands.md."""

from respkv.wire.commands.command import CATEGORIES, Command, KeySpec, parse_integer
from respkv.wire.commands.table import COMMANDS, find_command, look_up, look_up_sub

__all__ = [
    "CATEGORIES",
    "COMMANDS",
    "Command",
    "KeySpec",
    "find_command",
    "look_up",
    "look_up_sub",
    "parse_integer",
]
