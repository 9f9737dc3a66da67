"""``respkv info``: what INFO says, as it is or as JSON."""

import json

import click

from respkv.cli import Refused
from respkv.cli.target import url_option
from respkv.client import Client

Sections = dict[str, dict[str, str | int | float]]


@click.command(short_help="Print a server's INFO.")
@click.argument("section", required=False)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one object with an object per section."
)
@url_option
def command(section: str | None, as_json: bool, url: str) -> None:
    """Print a server's INFO, whole or one SECTION of it, such as kv or memory."""
    with Client(url, name="respkv-info", pool_max=1, reconnect_max=0) as client:
        reply = client.command("INFO", *([section] if section else []))
    assert isinstance(reply, bytes | memoryview)
    text = bytes(reply).decode()
    if section and not text.strip():
        raise Refused(f"INFO of this server has no section {section!r}; without one it shows all")
    if as_json:
        click.echo(json.dumps(sections(text), indent=2))
    else:
        click.echo(text.replace("\r\n", "\n").rstrip())


def sections(text: str) -> Sections:
    """Read INFO's lines: ``# Section`` heads and ``field:value`` below them.

    Returns: fields by section; what prints as the same number is a number.
    """
    found: Sections = {}
    fields: dict[str, str | int | float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            fields = found.setdefault(line[1:].strip().lower(), {})
        elif ":" in line:
            name, _, value = line.partition(":")
            fields[name] = number(value)
    return found


def number(value: str) -> str | int | float:
    """Return the number that a text is, or the text when a number would print differently."""
    if value.isascii() and value.removeprefix("-").isdigit() and str(int(value)) == value:
        return int(value)
    digits, point, fraction = value.removeprefix("-").partition(".")
    if value.isascii() and point and digits.isdigit() and fraction.isdigit():
        return float(value)
    return value
