"""Where the server is and how to talk to it: URLs and options into Settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from respkv.errors import ConfigError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from respkv.client.stream import Stream

DEFAULT_PORT = 7379
DEFAULT_URL = f"respkv://127.0.0.1:{DEFAULT_PORT}"
_PLAIN, _TLS, _UNIX = ("respkv", "redis"), ("respkvs", "rediss"), "unix"


class Options(TypedDict, total=False):
    """What a client takes beside its URL; see Settings for meanings and defaults."""

    username: str | None
    password: str | None
    name: str | None
    protocol: int
    pool_max: int
    timeout_s: float
    connect_timeout_s: float
    reconnect_max: int
    tls: ssl.SSLContext | None


@dataclass(frozen=True, slots=True)
class Settings:
    """How a client connects.

    path:              a Unix socket; empty for TCP.
    name:              what CLIENT LIST shows for the connections.
    protocol:          3, falling back to 2 where the server knows no other; or 2.
    pool_max:          connections open at a time, leases included; one more call waits its turn.
    timeout_s:         for a whole call: waiting for a connection, retries and transfer included.
    connect_timeout_s: for opening one connection, handshake included.
    reconnect_max:     attempts after the first, with growing pauses.
    tls:               wraps the connection; None is no TLS, or the system's trust for a TLS URL.
    dial:              opens a stream to a server in this process, which has no address.
    """

    host: str = ""
    port: int = DEFAULT_PORT
    path: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    name: str | None = None
    protocol: int = 3
    pool_max: int = 8
    timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    reconnect_max: int = 5
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    dial: Callable[[], Stream] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check(self.protocol in (2, 3), "protocol", self.protocol, "2 or 3")
        _check(self.pool_max >= 1, "pool_max", self.pool_max, "at least 1")
        _check(self.timeout_s > 0, "timeout_s", self.timeout_s, "more than 0")
        _check(self.connect_timeout_s > 0, "connect_timeout_s", self.connect_timeout_s, "above 0")
        _check(self.reconnect_max >= 0, "reconnect_max", self.reconnect_max, "at least 0")
        _check(self.username is None or self.password is not None, "password", None, "given, too")

    @property
    def address(self) -> str:
        """Return the server's address for messages; never a password."""
        if self.dial is not None:
            return "the embedded engine"
        return f"unix://{self.path}" if self.path else f"{self.host}:{self.port}"


def settings(url: str, options: Options) -> Settings:
    """Read a URL; options win over what it says.

    url: ``respkv://``, ``redis://`` (TCP), ``respkvs://``, ``rediss://`` (TLS), all
         ``user:password@host:port/database``, or ``unix://user:password@/path?db=database``.
    Raises ConfigError naming the part that is wrong.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"url {_hidden(url)!r}: {error}") from None
    if parts.scheme not in (*_PLAIN, *_TLS, _UNIX):
        known = ", ".join((*_PLAIN, *_TLS, _UNIX))
        raise ConfigError(
            f"url {_hidden(url)!r}: the scheme must be one of {known}, as in {DEFAULT_URL}"
        )
    given: Options = {
        "username": unquote(parts.username) if parts.username else None,
        "password": unquote(parts.password) if parts.password else None,
        **options,
    }
    database = _database(parts, url)
    if parts.scheme == _UNIX:
        path = unquote(parts.path)
        _check(path not in ("", "/"), "url", _hidden(url), "unix:// and a path")
        _check(not parts.hostname, "url", _hidden(url), "unix:/// with three slashes and a path")
        return Settings(path=path, database=database, **given)
    if parts.scheme in _TLS and given.get("tls") is None:
        import ssl  # not before it is needed: it takes longer to import than all of this package

        given["tls"] = ssl.create_default_context()
    host = parts.hostname or "127.0.0.1"
    port = DEFAULT_PORT if port is None else port
    return Settings(host=host, port=port, database=database, **given)


def _database(parts: SplitResult, url: str) -> int:
    queries = parse_qs(parts.query)
    _check(set(queries) <= {"db"}, "url", _hidden(url), "only ?db=number after the path")
    path = "" if parts.scheme == _UNIX else parts.path.strip("/")
    text = queries["db"][0] if "db" in queries else path
    _check(
        not text or (text.isascii() and text.isdigit()), "url", _hidden(url), "a database number"
    )
    return int(text or 0)


def _hidden(url: str) -> str:
    scheme, slashes, rest = url.partition("://")
    return scheme + slashes + rest.rpartition("@")[2]


def _check(good: bool, name: str, value: object, accepted: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value!r}; it must be {accepted}")
