"""The server that a command talks to: its --url option."""

import click

from respkv.client.url import DEFAULT_URL

url_option = click.option(
    "--url",
    envvar="RESPKV_URL",
    default=DEFAULT_URL,
    show_default=True,
    show_envvar=True,
    metavar="URL",
    help="Server: respkv://[user:password@]host:port, respkvs:// for TLS, or unix:///path.",
)
