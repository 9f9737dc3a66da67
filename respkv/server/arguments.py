"""Reading a command's arguments: integers, times, and the option words after the fixed ones."""

import math
from typing import Any, Final

from respkv.errors import CommandError
from respkv.server.body import Refused
from respkv.wire.commands import parse_integer

NOT_AN_INTEGER: Final = "value is not an integer or out of range"
WALL_MS_MAX: Final = (1 << 63) - 1
DURATION_MS_MAX: Final = 1 << 52  # a wall clock and this add up to far less than 64 bits
SHOWN_BYTES_MAX: Final = 64


def integer(arg: bytes, message: str = NOT_AN_INTEGER) -> int:
    """Read a signed 64-bit integer. Raises CommandError."""
    number = parse_integer(arg)
    if number is None:
        raise CommandError(message)
    return number


def count(arg: bytes, what: str, least: int = 0) -> int:
    """Read an integer that must be at least ``least``. Raises CommandError naming it."""
    number = integer(arg, f"{what} {shown(arg)}: {NOT_AN_INTEGER}")
    if number < least:
        raise CommandError(f"{what} must be at least {least}, not {number}")
    return number


def count_ms(arg: bytes, what: str) -> int:
    """Read how many milliseconds from now. Raises CommandError, also when that is past all clocks."""
    ms = count(arg, what, 1)
    if ms > DURATION_MS_MAX:
        raise CommandError(f"{what} must be at most {DURATION_MS_MAX}, not {ms}")
    return ms


def shown(arg: bytes) -> str:
    """Return an argument for an error message: cut short and printable."""
    text = arg[:SHOWN_BYTES_MAX].decode(errors="replace")
    return text + "..." if len(arg) > SHOWN_BYTES_MAX else text


def syntax_error(word: object) -> CommandError:
    """Return the error for an option that the command does not have, or not here."""
    if isinstance(word, bytes):
        return CommandError(f"syntax error, unexpected option '{shown(word)}'")
    return CommandError("syntax error")


def value_of(arg: Any) -> Any:
    """Return a payload argument: bytes or a Landing. Raises the reason if it was refused."""
    if isinstance(arg, Refused) and arg.error is not None:
        raise arg.error
    return arg


class Words:
    """The option words of a call, taken from the front."""

    def __init__(self, args: list[Any], start: int) -> None:
        self._args = args
        self._next = start

    def __bool__(self) -> bool:
        return self._next < len(self._args)

    def word(self) -> bytes:
        """Return the next word in upper case."""
        return self.take().upper()

    def take(self) -> bytes:
        """Return the next argument as it is. Raises CommandError when there is none."""
        if self._next >= len(self._args):
            raise CommandError("syntax error, a value is missing at the end")
        arg = self._args[self._next]
        if not isinstance(arg, bytes):
            raise CommandError("syntax error, an option has too long a value")
        self._next += 1
        return arg

    def payload(self) -> Any:
        """Return the next argument, bytes or a Landing. Raises the reason if it was refused."""
        if self._next >= len(self._args):
            raise CommandError("syntax error, a value is missing at the end")
        self._next += 1
        return value_of(self._args[self._next - 1])

    def integer(self) -> int:
        """Return the next argument as a signed 64-bit integer."""
        return integer(self.take())

    def count(self, what: str, least: int = 0) -> int:
        """Return the next argument as an integer of at least ``least``."""
        return count(self.take(), what, least)

    def fraction(self, what: str) -> float:
        """Return the next argument as a positive finite number. Raises CommandError naming it."""
        text = self.take()
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf:
            raise CommandError(f"{what} must be a number greater than 0, not {shown(text)}")
        return number

    def unexpected(self) -> CommandError:
        """Return the error that names the word taken last."""
        return syntax_error(self._args[self._next - 1])


def expiry_ms(unit: bytes, number: int, wall_ms: int, command: str) -> int:
    """Return the wall-clock millisecond that EX, PX, EXAT or PXAT with a number stands for.

    Raises CommandError in Redis's words when it is not positive or overflows.
    """
    invalid = CommandError(f"invalid expire time in '{command}' command")
    if number <= 0:
        raise invalid
    ms = number * 1000 if unit in (b"EX", b"EXAT") else number
    when = ms if unit in (b"EXAT", b"PXAT") else ms + wall_ms
    if when > WALL_MS_MAX:
        raise invalid
    return when
