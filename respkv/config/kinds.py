"""The kinds of setting: how a value is read from a text or from TOML, printed and explained.

A kind answers None for what it does not accept and says what it does; the caller knows the file and
the key, and makes the error of it.
"""

import re
from dataclasses import dataclass
from typing import Any

KIB, MIB = 1 << 10, 1 << 20
SHOWN_CHARS_MAX = 100
# As in Redis: k is decimal, kb is binary. It has no t; tiers of terabytes need one.
_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS |= {_letter: 1000**_power, _letter + "b": 1024**_power}
_SIZE = re.compile(r"([0-9]{1,19})([a-z]{0,2})")
_COUNT = re.compile(r"-?[0-9]{1,19}")
_SIZE_MAX = 1 << 50
_FLAGS = {"yes": True, "true": True, "no": False, "false": False}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a setting is and which values it takes; its default is the field's.

    unit:    of a bare number, empty when it has none.
    runtime: CONFIG SET may change it while the server runs.
    """

    about: str
    unit: str = ""
    runtime: bool = False

    @property
    def accepted(self) -> str:
        """What may be written, as error messages and the documentation say it."""
        return "any text in quotes"

    def read(self, value: object) -> Any:
        """Return the plain value for a TOML value or a text, or None when it is not accepted."""
        return value if isinstance(value, str) and "\0" not in value else None

    def text(self, value: Any) -> str:
        """Print a plain value as CONFIG GET does; ``read`` takes it back."""
        return str(value)

    def shown(self, value: object) -> str:
        """Print a wrong value in an error message."""
        return repr(value)[:SHOWN_CHARS_MAX]


@dataclass(frozen=True, kw_only=True)
class Secret(Kind):
    """A text that no message shows."""

    def shown(self, value: object) -> str:
        """Return a stand-in."""
        return "(hidden)"


@dataclass(frozen=True, kw_only=True)
class Mode(Kind):
    """File permissions, written in octal as chmod takes them; never a TOML number, which is decimal."""

    @property
    def accepted(self) -> str:
        """Octal digits."""
        return 'three octal digits in quotes, such as "700"'

    def read(self, value: object) -> Any:
        """Return the permission bits."""
        if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value):
            return int(value, 8)
        return None

    def text(self, value: Any) -> str:
        """Print octal digits."""
        return f"{value:o}"


@dataclass(frozen=True, kw_only=True)
class Flag(Kind):
    """A switch: yes or no."""

    @property
    def accepted(self) -> str:
        """Both pairs of words."""
        return "yes, no, true, false"

    def read(self, value: object) -> Any:
        """Return a bool."""
        if isinstance(value, str):
            return _FLAGS.get(value.lower())
        return value if isinstance(value, bool) else None

    def text(self, value: Any) -> str:
        """Print Redis's words."""
        return "yes" if value else "no"


@dataclass(frozen=True, kw_only=True)
class Choice(Kind):
    """One word of a few. prefix: may stand before each, as it does in Redis's names."""

    words: tuple[str, ...]
    prefix: str = ""

    @property
    def accepted(self) -> str:
        """The words."""
        return ", ".join(self.words)

    def read(self, value: object) -> Any:
        """Return the word in lower case and without the prefix."""
        word = value.lower().removeprefix(self.prefix) if isinstance(value, str) else None
        return word if word in self.words else None


@dataclass(frozen=True, kw_only=True)
class Count(Kind):
    """A whole number from ``least`` to ``most``."""

    least: int = 0
    most: int

    @property
    def accepted(self) -> str:
        """The range."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.least} to {self.most}{unit}"

    def read(self, value: object) -> Any:
        """Return the number when it is in range."""
        if isinstance(value, str) and _COUNT.fullmatch(value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        return value if self.least <= value <= self.most else None


@dataclass(frozen=True, kw_only=True)
class Size(Count):
    """A number of bytes, with Redis's units when it is a text."""

    unit: str = "bytes"
    most: int = _SIZE_MAX

    @property
    def accepted(self) -> str:
        """The range, in the units it is usually written in."""
        return (
            f"{size_text(self.least)} to {size_text(self.most)}, such as 65536, 64k, 512mb or 1gb"
        )

    def read(self, value: object) -> Any:
        """Return bytes when they are in range."""
        return super().read(size_bytes(value) if isinstance(value, str) else value)


def size_bytes(text: str) -> int | None:
    """Read a size as Redis writes it: digits, then b, k, kb, m, mb, g, gb, t, tb in any case."""
    match = _SIZE.fullmatch(text.lower())
    factor = _FACTORS.get(match[2]) if match else None
    return int(match[1]) * factor if match and factor else None


def size_text(size: int) -> str:
    """Print a size in the largest binary unit that divides it; ``size_bytes`` takes it back."""
    for power, unit in ((4, "tb"), (3, "gb"), (2, "mb"), (1, "kb")):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return str(size)
