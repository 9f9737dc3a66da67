"""Every error respkv raises on purpose.

A ``CacheError`` is an answer: something outside the program said no, and the asker decides what to
do. Anything else that escapes is a bug and is left to crash its actor. ``code`` is the first word
of the RESP error that a server makes of it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import ClassVar


class CacheError(Exception):
    """The request could not be served; the cache itself is healthy."""

    code: ClassVar[str] = "ERR"


class ActorDown(CacheError):
    """The actor crashed while it held this request. Ask again after it restarts."""


class ProtocolError(CacheError):
    """The peer sent bytes that are not RESP. The connection must be closed."""


class ConfigError(CacheError):
    """A setting is wrong. The message names where it stands, its value and what is accepted."""


class MissingExtra(CacheError, ModuleNotFoundError):
    """A package that comes with an extra is not installed. The message says what to install."""


class Busy(CacheError):
    """There is no room now for one more; try again later."""

    code = "BUSY"


class OutOfMemory(CacheError):
    """No slot can be had: everything is pinned, leased or in flight, or the value never fits."""

    code = "OOM"


class QuotaExceeded(CacheError):
    """A namespace or tenant has used what it may, and nothing of it may go now."""

    code = "KVQUOTA"


class PinRefused(CacheError):
    """Too much is pinned already for one more pin."""

    code = "KVPIN"


class SchemaMismatch(CacheError):
    """What was sent does not fit the schema of its namespace."""

    code = "KVSCHEMA"


class SequenceGap(CacheError):
    """The pages in front of what was to be put are not here; the message names where to go on."""

    code = "KVGAP"


class LeaseGone(CacheError):
    """The lease lapsed or never was; bytes read under it must not be trusted."""

    code = "KVLEASE"


class PageCorrupt(CacheError):
    """Bytes are not the ones that were written for this key."""

    code = "KVCORRUPT"


class TierError(CacheError):
    """A tier could not read or write."""

    code = "KVTIER"


class CommandError(CacheError):
    """A command was refused. ``word`` is the first word of the error reply."""

    def __init__(self, message: str, word: str = "ERR") -> None:
        super().__init__(message, word)
        self.message = message
        self.word = word

    def __str__(self) -> str:
        return self.message


class ServerError(CacheError):
    """The server answered with an error: ``word`` is its first word, ``message`` the rest."""

    def __init__(self, word: str, message: str) -> None:
        super().__init__(word, message)
        self.word = word
        self.message = message

    def __str__(self) -> str:
        return f"{self.word} {self.message}"


class ConnectionLost(CacheError):
    """The connection broke; a command that was already sent may or may not have been carried out."""


class TimedOut(CacheError):
    """No answer came in time; the connection was closed."""


def require(what: str, extra: str, *packages: str) -> None:
    """Raise MissingExtra unless all packages that ``what`` needs are installed. Imports none."""
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise MissingExtra(
            f"{what} needs {', '.join(missing)}, not installed: pip install 'respkv[{extra}]'",
            name=missing[0],
        )


@contextmanager
def required(what: str, extra: str, *packages: str) -> Iterator[None]:
    """``require``, as a block around the imports that need it, which have to be at a module's top."""
    require(what, extra, *packages)
    yield


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # refused by a finder; or put there without a spec
        return package in sys.modules
