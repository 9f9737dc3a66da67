"""What an embedded engine is opened with: the settings of a server, but those of its sockets."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from respkv.config import Config
from respkv.errors import ConfigError

# In a file they are passed over, so that a server's file can be used as it is.
OF_SOCKETS = {
    "host",
    "port",
    "unixsocket",
    "unixsocketperm",
    "tcp-backlog",
    "maxclients",
    "timeout",
    "requirepass",
    "protected-mode",
    "shm",
    "shm-path",
    "logfile",
    "loglevel",
}


def read_settings(config: "str | Path | Config | None", settings: Mapping[str, object]) -> Config:
    """Return the configuration that a file, or a Config, and settings by name come to.

    Raises ConfigError naming what is wrong.
    """
    named = {name.replace("_", "-"): _plain(value) for name, value in settings.items()}
    for name in sorted(OF_SOCKETS & named.keys()):
        raise ConfigError(
            f"respkv.open: {name} = {named[name]!r}: an embedded engine has no sockets and logs as"
            " this process does; leave it out"
        )
    if isinstance(config, Config):
        found = config.with_values(named)
    else:
        path = None if config is None else os.fspath(config)
        found = Config.load(path, named, source="respkv.open")
    quiet: dict[str, Any] = {"port": 0, "unixsocket": "", "requirepass": "", "shm": "off"}
    return msgspec.structs.replace(found, **quiet)


def _plain(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
