"""``respkv top``: a live view of one server in the terminal."""

import os
import select
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from respkv.cli import Refused
from respkv.cli.sample import Rates, Sample, rates, take_sample
from respkv.cli.target import url_option
from respkv.client import Client
from respkv.client.url import settings
from respkv.errors import CacheError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

ONCE_CELLS = 100
TIMEOUT_S = 5.0
_QUIT = b"qQ\x03\x04"


@click.command(short_help="Watch a server.")
@url_option
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Print one frame as plain text and exit.")
def command(url: str, interval: float, once: bool) -> None:
    """Watch a server's tiers, hit rate, clients and throughput; q or Ctrl-C leaves."""
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise Refused("top needs rich: pip install 'respkv[tui]'") from error
    if not once and not sys.stdout.isatty():
        raise Refused("top needs a terminal; --once prints one frame")
    with Client(url, name="respkv-top", pool_max=1, reconnect_max=0, timeout_s=TIMEOUT_S) as client:
        view = View(client, settings(url, {}).address)
        if once:
            time.sleep(interval)
            view.look()
            plain = Console(width=ONCE_CELLS, color_system=None, force_terminal=False)
            plain.print(view.frame(ONCE_CELLS))
        else:
            _watch(view, Console(), interval)


class View:
    """The last two looks at a server and the throughput of many more. Looks once when made."""

    def __init__(self, client: Client, address: str) -> None:
        from respkv.cli.screen import HISTORY_MAX

        self._client = client
        self._address = address
        self._sample: Sample = take_sample(client)
        self._rates = Rates(0.0, 0.0, 0.0, 0.0, None)
        self._history: deque[float] = deque(maxlen=HISTORY_MAX)
        self._note = ""

    def look(self) -> None:
        """Look again; a server that has gone is noted, and looked for the next time."""
        try:
            sample = take_sample(self._client)
        except CacheError as error:
            self._rates = Rates(0.0, 0.0, 0.0, 0.0, None)
            self._note = str(error)
        else:
            self._rates = rates(self._sample, sample)
            self._sample = sample
            self._note = ""
        self._history.append(self._rates.in_bytes + self._rates.out_bytes)

    def frame(self, width: int) -> "RenderableType":
        """Draw what is known."""
        from respkv.cli.screen import frame

        return frame(
            self._address,
            self._sample,
            self._rates,
            list(self._history),
            width=width,
            note=self._note,
        )


def _watch(view: View, console: "Console", interval: float) -> None:
    from rich.live import Live

    with suppress(KeyboardInterrupt), _ended_by_signals(), _keys():
        with Live(
            view.frame(console.width), console=console, screen=True, auto_refresh=False
        ) as live:
            while not _quits_within(interval):
                view.look()
                live.update(view.frame(console.width), refresh=True)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind, so that the terminal is put right."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _keys() -> Iterator[None]:
    """Let single keys be read; the terminal is as it was afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _quits_within(seconds: float) -> bool:
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            key = os.read(sys.stdin.fileno(), 1)
            if not key or key in _QUIT:
                return True
    return False
