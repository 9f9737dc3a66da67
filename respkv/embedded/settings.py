"""What an embedded engine is opened with: the settings of a server, but those of its sockets."""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from respkv.config import OF_SOCKETS, SETTINGS, Config
from respkv.errors import ConfigError


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
    if not isinstance(config, Config | str | os.PathLike | None):
        raise ConfigError(f"config is a {type(config).__name__}; it is a path or a Config")
    if isinstance(config, Config):
        found = config.with_values(named)
    else:
        path = None if config is None else os.fspath(config)
        found = Config.load(path, named, source="respkv.open")
    # A server's file can be used as it is: what it says of sockets is passed over.
    plain = {SETTINGS[name].field: SETTINGS[name].default for name in OF_SOCKETS}
    return msgspec.structs.replace(found, **{**plain, "port": 0})


def _plain(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
