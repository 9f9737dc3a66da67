"""``respkv serve``: settings from a file and the command line, then the server."""

import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import click

from respkv.config import SETTINGS, Config
from respkv.errors import ConfigError

# The settings with an option of their own; --set takes the rest.
OPTIONS = (
    *("host", "port", "unixsocket", "maxmemory", "shm"),
    *("nvme-path", "nvme-bytes", "disk-path", "disk-bytes", "durability"),
    *("gpu-bytes", "gpu-device"),
)
_METAVARS = {
    **{"maxmemory": "SIZE", "unixsocket": "PATH", "port": "N", "shm": "off|ro|rw"},
    **{"nvme-path": "DIR", "nvme-bytes": "SIZE", "disk-path": "DIR", "disk-bytes": "SIZE"},
    **{"gpu-bytes": "SIZE", "gpu-device": "cuda:N|cpu"},
    "durability": "memory|written|durable",
}


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every setting of OPTIONS, worded as the setting is."""
    for name in reversed(OPTIONS):
        setting = SETTINGS[name]
        default = f"  [default: {setting.default_text}]" if setting.default_text else ""
        metavar = _METAVARS.get(name, "TEXT")
        help_text = f"{setting.kind.about}{default}"
        command = click.option(f"--{name}", setting.field, metavar=metavar, help=help_text)(command)
    return command


def _wrapped(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(names), 78, break_on_hyphens=False)


@click.command(
    short_help="Run the server.",
    epilog=f"\b\nSettings, explained in docs/config.md:\n{_wrapped(SETTINGS)}",
)
@click.option("--config", "path", metavar="FILE", help="Settings in TOML, such as port = 7379.")
@setting_options
@click.option(
    "--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Any setting; may be repeated."
)
def command(path: str | None, pairs: tuple[str, ...], **options: str | None) -> None:
    """Run the server until SIGTERM or SIGINT; the command line wins over the file."""
    overrides = dict(pair_of(pair) for pair in pairs)
    named = {name: options[SETTINGS[name].field] for name in OPTIONS}
    overrides |= {name: text for name, text in named.items() if text is not None}
    config = Config.load(path, overrides)
    # Not before the settings are known to be right: it imports everything.
    from respkv.server.serve import main

    sys.exit(main(config))


def pair_of(text: str) -> tuple[str, str]:
    """Return the name and the value of a --set. Raises ConfigError without an equals sign."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"command line: --set {text!r}: accepted are NAME=VALUE")
    return name.strip(), value.strip()
