"""The command line: ``respkv serve | gateway | ping | info | bench | top | trace``.

A container runs ``respkv ping`` every few seconds as its health check, so a command's module is
imported when that command is called for and not before.
"""

import importlib
from typing import Any

import click

from respkv import __version__
from respkv.errors import CacheError, ConfigError

COMMANDS = ("serve", "gateway", "ping", "info", "bench", "top", "trace")


class Refused(Exception):
    """A command cannot do what it was asked; the message is one line."""


class Commands(click.Group):
    """The commands; each is ``command`` in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"respkv.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. A wrong setting exits with 2, a server that says no or is away with 1."""
        try:
            return super().invoke(ctx)
        except (CacheError, Refused) as error:
            click.echo(f"respkv: {error}", err=True)
            ctx.exit(2 if isinstance(error, ConfigError) else 1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="respkv")
def main() -> None:
    """A cache of KV pages for LLM inference that speaks the Redis protocol."""
