"""``respkv ping``: is the server there? A container's health check."""

import time

import click

from respkv.cli.target import url_option
from respkv.client import Client


@click.command(short_help="Ask a server whether it is there.")
@url_option
@click.option("--timeout", default=5.0, show_default=True, help="Seconds to wait for the answer.")
def command(url: str, timeout: float) -> None:
    """Ask a server whether it is there; exit with 1 when it is not."""
    with Client(
        url, pool_max=1, reconnect_max=0, connect_timeout_s=timeout, timeout_s=timeout
    ) as client:
        client.ping()  # opens the connection, which is not what is measured
        start = time.perf_counter()
        client.ping()
        click.echo(f"PONG {(time.perf_counter() - start) * 1e3:.3f} ms")
