"""Every setting of the server, said once.

Each field of ``Config`` carries a ``Kind``: what it is about, its unit and what it accepts. From
that one line follow reading it from TOML, from the command line and from CONFIG SET, printing it for
CONFIG GET, the error for a wrong value, ``--help`` and docs/config.md; nothing is validated by hand,
except the few rules between two settings in ``_check_together``. The settings of the file tiers are
in files.py, those of the gpu tier in gpu.py.

A ``Config`` holds plain values (sizes as bytes) and never changes; CONFIG SET makes a new one.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from respkv.config.events import EventSettings
from respkv.config.kinds import KIB, MIB, Choice, Count, Flag, Kind, Mode, Secret, Size, size_text
from respkv.errors import ConfigError

NAME_CHARS_MAX = 64
_DAY_S = 86_400
_POLICIES = (
    "lru",
    "lfu",
    "fifo",
    "sieve",
    "s3fifo",
    "arc",
    "wtinylfu",
    "gdsf",
    "survival",
)


class Config(
    EventSettings,
    kw_only=True,
    frozen=True,
    forbid_unknown_fields=True,
    rename=lambda name: name.replace("_", "-"),
):
    """The settings of one server, as plain values; the units are those of each ``Kind``."""

    host: Annotated[str, Kind(about="Address that TCP listens on.")] = "127.0.0.1"
    port: Annotated[
        int, Count(about="TCP port; 0 takes any free one, -1 means no TCP.", least=-1, most=65535)
    ] = 7379
    unixsocket: Annotated[
        str, Kind(about="Path of a Unix socket to listen on; empty means none.")
    ] = ""
    unixsocketperm: Annotated[int, Mode(about="Permissions of the Unix socket.")] = 0o700
    tcp_backlog: Annotated[
        int, Count(about="Connections that may wait to be accepted.", least=1, most=65535)
    ] = 511
    maxclients: Annotated[
        int, Count(about="Connections served at once.", least=1, most=1_000_000, runtime=True)
    ] = 10_000
    timeout: Annotated[
        int,
        Count(
            about="An idle connection is closed after this; 0 means never.",
            unit="seconds",
            most=365 * _DAY_S,
            runtime=True,
        ),
    ] = 0
    requirepass: Annotated[
        str, Secret(about="Password that clients must send; empty means none.", runtime=True)
    ] = ""
    protected_mode: Annotated[
        bool,
        Flag(about="Refuse other machines' clients while no password is set.", runtime=True),
    ] = True

    maxmemory: Annotated[
        int,
        Size(
            about="Hard budget of all values, also in flight; CONFIG SET may lower it.",
            least=MIB,
            runtime=True,
        ),
    ] = 256 * MIB
    maxmemory_policy: Annotated[
        str,
        Choice(
            about="Which page is evicted first; Redis's allkeys-lru means lru, and so on.",
            words=_POLICIES,
            prefix="allkeys-",
            runtime=True,
        ),
    ] = "survival"
    small_value_memory: Annotated[
        int, Size(about="Budget of the values kept outside the arena; 0 means maxmemory / 16.")
    ] = 0
    hugepages: Annotated[bool, Flag(about="Use huge pages when the system gives them.")] = True
    prefault: Annotated[bool, Flag(about="Touch the whole arena at start.")] = True
    shm: Annotated[
        str,
        Choice(
            about="May clients of this machine map the arena: not at all, to read, to write, too.",
            words=("off", "ro", "rw"),
        ),
    ] = "off"
    shm_path: Annotated[str, Kind(about="Arena file; empty means /dev/shm/respkv-PORT.arena.")] = ""

    answer_lease: Annotated[
        int,
        Count(
            about="How long EXISTS and KV.MATCH hold what they found; 0 means not at all.",
            unit="ms",
            most=600_000,
            runtime=True,
        ),
    ] = 5_000
    lease_default: Annotated[
        int,
        Count(
            about="How long a KV.LEASE without MS holds.",
            unit="ms",
            least=1,
            most=_DAY_S * 1000,
            runtime=True,
        ),
    ] = 10_000
    lease_max: Annotated[
        int,
        Count(
            about="Longest lease or reservation that a client may ask for.",
            unit="ms",
            least=1,
            most=_DAY_S * 1000,
            runtime=True,
        ),
    ] = 60_000
    reserve_timeout: Annotated[
        int,
        Count(
            about="How long a write waits for a free slot before it fails with OOM.",
            unit="ms",
            most=600_000,
            runtime=True,
        ),
    ] = 5_000

    proto_max_bulk_len: Annotated[
        int, Size(about="Longest argument of a command.", least=64 * KIB, runtime=True)
    ] = 512 * MIB
    max_args: Annotated[
        int, Count(about="Most arguments of a command.", least=16, most=1 << 24)
    ] = 65536
    inline_max: Annotated[int, Size(about="Longest inline command.", least=KIB, most=MIB)] = (
        64 * KIB
    )
    query_buffer_limit: Annotated[
        int,
        Size(about="Most bytes of one command held outside the arena.", least=64 * KIB),
    ] = 64 * MIB
    client_output_buffer_limit: Annotated[
        int,
        Size(
            about="A reader that has more unsent bytes than this and takes none for 1 s is disconnected.",
            least=KIB,
            runtime=True,
        ),
    ] = 256 * MIB
    output_timeout: Annotated[
        int,
        Count(
            about="A reader that takes no byte for this long is disconnected.",
            unit="seconds",
            least=1,
            most=_DAY_S,
            runtime=True,
        ),
    ] = 60

    shutdown_timeout: Annotated[
        int,
        Count(
            about="How long a shutdown waits for replies to leave, and for values to be written to files.",
            unit="seconds",
            most=_DAY_S,
            runtime=True,
        ),
    ] = 10
    check_interval: Annotated[
        int,
        Count(
            about="Pause between integrity checks while idle; 0 means none.",
            unit="seconds",
            most=_DAY_S,
            runtime=True,
        ),
    ] = 60
    loglevel: Annotated[
        str,
        Choice(
            about="Least important messages that are logged.",
            words=("debug", "verbose", "notice", "warning"),
            runtime=True,
        ),
    ] = "notice"
    logfile: Annotated[str, Kind(about="File to log to; empty means standard error.")] = ""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Return every field for printing, the password hidden."""
        return [
            (field, "(hidden)" if isinstance(kind, Secret) else getattr(self, field))
            for field, kind in ((setting.field, setting.kind) for setting in SETTINGS.values())
        ]

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    @classmethod
    def load(
        cls,
        path: str | None = None,
        overrides: Mapping[str, object] | None = None,
        *,
        source: str = "command line",
    ) -> "Config":
        """Read a TOML file, then let the command line's texts, or other values, win.

        source: where those come from, for errors.
        Raises ConfigError for a file that cannot be read, an unknown key and a wrong value.
        """
        values: dict[str, Any] = {}
        if path is not None:
            with _named(path):
                values = _read_all(_toml(path))
        with _named(source):
            values |= _read_all(overrides or {})
        config = msgspec.convert(values, cls)
        with _named(path or source):
            config._check_together()
        return config

    @staticmethod
    def names() -> tuple[str, ...]:
        """Return every setting's name, as TOML and CONFIG write it."""
        return tuple(SETTINGS)

    def text(self, name: str) -> str:
        """Return a value as CONFIG GET prints it. Raises ConfigError for an unknown name."""
        setting = _find(name)
        return setting.kind.text(getattr(self, setting.field))

    def with_value(self, name: str, text: str) -> "Config":
        """Return a copy with one value changed. Raises ConfigError as ``with_values`` does."""
        return self.with_values({name: text})

    def with_values(self, texts: Mapping[str, object]) -> "Config":
        """Return a copy with values changed together, as CONFIG SET does for names in RUNTIME.

        Raises ConfigError for an unknown name, a wrong value and values that do not go together.
        """
        fields = {SETTINGS[name].field: value for name, value in _read_all(texts).items()}
        changed = msgspec.structs.replace(self, **fields)
        changed._check_together()
        return changed

    def small_value_bytes(self) -> int:
        """Return the budget of the values kept outside the arena."""
        return self.small_value_memory or self.maxmemory // 16

    def arena_path(self, port: int) -> str:
        """Return the arena's file. port: the one really bound; without TCP the process id stands in."""
        return self.shm_path or f"/dev/shm/respkv-{port if port > 0 else os.getpid()}.arena"

    def _check_together(self) -> None:
        if self.port < 0 and not self.unixsocket:
            raise ConfigError("port = -1: without TCP, unixsocket must be set")
        if self.lease_default > self.lease_max:
            raise ConfigError(
                f"lease-default = {self.lease_default}: accepted are values"
                f" up to lease-max, {self.lease_max}"
            )
        if self.small_value_memory > self.maxmemory:
            raise ConfigError(
                f"small-value-memory = {self.small_value_memory}: accepted are values"
                f" up to maxmemory, {self.maxmemory}"
            )
        self.check_files()
        self.check_gpu()
        self.check_events()


@dataclass(frozen=True)
class Setting:
    """One field of Config: its name outside, its name in Python, its kind and its default."""

    name: str
    field: str
    kind: Kind
    default: Any

    @property
    def default_text(self) -> str:
        """The default as a person writes it: sizes with a unit."""
        return (size_text if isinstance(self.kind, Size) else self.kind.text)(self.default)


def _settings() -> Iterator[Setting]:
    # A base's fields come first; what matters with every start is to be read first.
    fields, of_files = msgspec.structs.fields(Config), set(EventSettings.__struct_fields__)
    for field in sorted(fields, key=lambda field: field.name in of_files):
        kind = field.type.__metadata__[0]
        assert isinstance(kind, Kind)
        yield Setting(field.encode_name, field.name, kind, field.default)


SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in _settings()}
RUNTIME = frozenset(name for name, setting in SETTINGS.items() if setting.kind.runtime)
# What an engine without sockets, in a process that is not its own, has no use for.
OF_SOCKETS = frozenset(
    (
        *("host", "port", "unixsocket", "unixsocketperm", "tcp-backlog", "maxclients", "timeout"),
        *("requirepass", "protected-mode", "shm", "shm-path", "logfile", "loglevel"),
    )
)
# What clients ask of a Redis and has one answer here.
FIXED: Mapping[str, str] = {
    "save": "",
    "appendonly": "no",
    "appendfsync": "no",
    "databases": "1",
    "cluster-enabled": "no",
    "replica-read-only": "yes",
    "replicaof": "",
    "maxmemory-samples": "0",
    "maxmemory-clients": "0",
    "notify-keyspace-events": "",
    "io-threads": "1",
    "tls-port": "0",
    "activedefrag": "no",
    "daemonize": "no",
    "supervised": "no",
    "stop-writes-on-bgsave-error": "no",
}


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _toml(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(error.strerror) from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise ConfigError(f"not a TOML file: {error}") from error


def _read_all(values: Mapping[str, object]) -> dict[str, Any]:
    return {name.lower(): _read(_find(name), value) for name, value in values.items()}


def _find(name: str) -> Setting:
    setting = SETTINGS.get(name.lower())
    if setting is not None:
        return setting
    short = name[:NAME_CHARS_MAX]  # a client may send anything, and the search is quadratic
    close = difflib.get_close_matches(short.lower().replace("_", "-"), SETTINGS, n=1)
    hint = f"did you mean {close[0]}?" if close else "docs/config.md has all that there are"
    raise ConfigError(f"{short!r}: unknown key; {hint}")


def _read(setting: Setting, value: object) -> Any:
    read = setting.kind.read(value)
    if read is None:
        shown = setting.kind.shown(value)
        raise ConfigError(f"{setting.name} = {shown}: accepted are {setting.kind.accepted}")
    return read
