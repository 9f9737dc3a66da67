"""``respkv trace record | replay | simulate | generate``: what a cache is asked, and what it would hit."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from respkv.cli import Refused
from respkv.cli.target import url_option
from respkv.config.kinds import size_bytes
from respkv.errors import ConfigError

T = TypeVar("T")

trace_file = click.argument("file", type=click.Path(path_type=Path))
limit_option = click.option(
    "--limit", type=click.IntRange(1), help="Only so many requests from the start."
)
page_tokens_option = click.option(
    "--page-tokens",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Of pages of which a recording does not know it.",
)
json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all figures there, too."
)


def _size(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    size = size_bytes(value)
    if size is None or size < 1:
        raise click.BadParameter(f"{value!r}: accepted are sizes, such as 4096, 64k or 1mb")
    return size


def _numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    words = value.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        raise click.BadParameter(f"{value!r}: accepted are numbers with commas between")
    numbers = tuple(int(word) for word in words)
    if 0 in numbers:
        raise click.BadParameter(f"{value!r}: a cache of 0 blocks holds nothing")
    return numbers


@click.group(short_help="Record, replay and simulate what a cache is asked.")
def command() -> None:
    """Record what clients ask of a server, replay it, or simulate caches on it without a server.

    FILE is a recording, or a trace in the public format of Mooncake (FAST 2025).
    """


@command.command(short_help="Write down what clients ask of a server, as a proxy between them.")
@trace_file
@click.option(
    "--listen",
    default="respkv://127.0.0.1:7380",
    show_default=True,
    metavar="URL",
    help="Where clients connect: respkv://host:port or unix:///path.",
)
@click.option(
    "--target",
    envvar="RESPKV_URL",
    default="respkv://127.0.0.1:7379",
    show_default=True,
    metavar="URL",
    help="The server, which may be any that speaks RESP; without TLS.",
)
@click.option(
    "--page-tokens",
    type=click.IntRange(0),
    default=0,
    help="Of pages in namespaces whose schema the server does not tell; 0: leave it open.",
)
def record(file: Path, listen: str, target: str, page_tokens: int) -> None:
    """Pass on what clients and a server say, and write one JSON object a command into FILE.

    Keys are hashed with a salt that is drawn for the recording and kept nowhere; neither tokens nor
    payloads are written. Ends with SIGINT or SIGTERM.
    """
    from respkv.client.url import settings
    from respkv.trace.notes import Notes
    from respkv.trace.record import Recorder, Recording, run

    at, to = settings(listen, {}), settings(target, {})
    if to.tls or at.tls:
        raise ConfigError("a recording is of connections without TLS: use respkv:// or unix://")
    notes = Notes(page_tokens)
    _learn_schemas(target, notes.learn)
    try:
        # Not readable for others: it tells when who asked for what, if not what it was.
        file.touch(mode=0o600, exist_ok=False)
        opened = file.open("w", encoding="utf-8")
    except FileExistsError:
        raise ConfigError(
            f"{file} is there already: move it, or record into another file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error
    with opened:
        recording = Recording(opened)
        recorder = Recorder(to, notes, recording)
        run(
            recorder,
            recording,
            at,
            lambda where: click.echo(f"respkv: recording on {where}", err=True),
        )
    click.echo(f"respkv: {recording.num_commands} commands are in {file}", err=True)
    if recorder.num_refused:
        raise Refused(f"{to.address} was away for {recorder.num_refused} connections")


def _learn_schemas(target: str, learn: Callable[[bytes, int], None]) -> None:
    """Ask the server how many tokens the pages of its namespaces have; it need not know."""
    from respkv.client import Client
    from respkv.errors import CacheError

    try:
        with Client(target, name="respkv-trace", pool_max=1, reconnect_max=0) as client:
            for name in client.schema_list():
                schema = client.schema_get(name)
                if schema is not None:
                    learn(name.encode(), int(schema["tokens"]))
    except CacheError:
        return  # a plain Redis, one that is not up yet, or one that wants a password


@command.command(short_help="Ask a server what a trace asked, and check what it answers.")
@trace_file
@url_option
@click.option(
    "--speed",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Times the pace of the trace; 0: as fast as possible.",
)
@click.option("--policy", help="Set maxmemory-policy, and set it back afterwards.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set something else for the time of the replay, such as answer-lease=0.",
)
@click.option("--page-bytes", callback=_size, default="4kb", show_default=True, metavar="SIZE")
@click.option("--workers", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--keep", is_flag=True, help="Leave the pages in the server.")
@limit_option
@page_tokens_option
@json_option
def replay(
    file: Path,
    url: str,
    speed: float,
    policy: str | None,
    settings: tuple[str, ...],
    page_bytes: int,
    workers: int,
    keep: bool,
    limit: int | None,
    page_tokens: int,
    json_path: Path | None,
) -> None:
    """Match, get and put the pages of a trace's requests, and print what was hit.

    Each page's bytes follow from its name and are compared when they come back. At another pace than
    the trace's, what was matched is held longer, in the time of the trace: --set answer-lease=0 ends
    that. A page is deleted afterwards unless --keep is given.
    """
    from respkv.trace.read import read_trace
    from respkv.trace.replay import Plan, run
    from respkv.trace.report import replay_summary, replay_table, write_json

    changes = _settings(settings) | ({"maxmemory-policy": policy} if policy else {})
    trace = read_trace(file, page_tokens=page_tokens).first(limit)
    plan = Plan(
        url=url,
        speed=speed,
        num_workers=workers,
        page_bytes=page_bytes,
        settings=changes,
        keeps=keep,
    )
    report = run(trace, plan)
    if json_path is not None:
        write_json(json_path, replay_summary(trace, plan, report))
    click.echo(replay_table(trace, plan, report))
    if report.num_wrong:
        raise Refused(f"{report.num_wrong} pages came back with other bytes than were put")


def _settings(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {word!r}: accepted is NAME=VALUE, such as answer-lease=0")
        found[name] = value
    return found


@command.command(short_help="Run the engine's policies on a trace, without a server.")
@trace_file
@click.option(
    "--policy", default="all", show_default=True, help="Names with commas between, or all."
)
@click.option(
    "--capacity",
    callback=_numbers,
    default="1000,3000,6000,10000,20000,30000,50000,100000",
    show_default=True,
    help="In blocks of the trace.",
)
@click.option(
    "--hints",
    type=click.Choice(["none", "end"]),
    default="none",
    show_default=True,
    help="end: policies that listen are told of each session's last request.",
)
@click.option(
    "--files", type=click.IntRange(0), default=0, help="Blocks in a file tier behind memory."
)
@click.option(
    "--admission",
    default="all",
    show_default=True,
    help="What goes to files: all, second or tinylfu, or several with commas between.",
)
@click.option("--bytes-per-block", callback=_size, metavar="SIZE", help="To print sizes as well.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw capacity against hit rate.")
@click.option("--processes", type=click.IntRange(1), help="As many as there are processors.")
@limit_option
@page_tokens_option
@json_option
def simulate(
    file: Path,
    policy: str,
    capacity: tuple[int, ...],
    hints: str,
    files: int,
    admission: str,
    bytes_per_block: int | None,
    plot: Path | None,
    processes: int | None,
    limit: int | None,
    page_tokens: int,
    json_path: Path | None,
) -> None:
    """Print what each policy would hit of a trace at each capacity, and what could be hit at most.

    The ceiling is Belady's optimum, which knows the future. Of each cell: how much of the gap from lru
    to it is closed; computation saved, of a dense model of 8 billion parameters; bytes written for
    each byte hit, stored ones or, with --files, those that went there; microseconds of processor for
    each decision; and bytes remembered of each block that is gone.
    """
    from respkv.trace.plot import check_can_draw, draw
    from respkv.trace.read import read_trace
    from respkv.trace.report import simulate_summary, simulate_table, write_json
    from respkv.trace.simulate import cells_of, simulate_all

    if admission != "all" and not files:
        raise ConfigError(f"--admission {admission} is about what goes to files: say --files, too")
    if plot is not None:
        check_can_draw()  # before minutes go by
    cells = cells_of(
        policy,
        capacity,
        has_end_hints=hints == "end",
        files_max=files,
        admissions=admission,
    )
    trace = read_trace(file, page_tokens=page_tokens).first(limit)
    if not trace.num_tokens:
        raise Refused(f"{file} has no requests with a chain of pages")
    outcomes = _with_bar(
        len(cells),
        lambda tell: simulate_all(cells, trace, num_processes=processes, progress=tell),
    )
    click.echo(simulate_table(trace, outcomes, bytes_per_block))
    if json_path is not None:
        write_json(json_path, simulate_summary(trace, outcomes, bytes_per_block))
    if plot is not None:
        draw(outcomes, plot, f"{trace.name}: blocks of {trace.block_tokens} tokens")
        click.echo(f"drawn in {plot}")


def _with_bar(length: int, run: Callable[[Callable[[object], None]], T]) -> T:
    if not sys.stderr.isatty():
        return run(lambda outcome: None)
    with click.progressbar(length=length, file=sys.stderr, label="simulating") as bar:
        return run(lambda outcome: bar.update(1))


@command.command(short_help="Make a trace of conversations by chance.")
@click.argument("file", type=click.File("w", encoding="utf-8", lazy=True))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--sessions", type=click.IntRange(1), default=1000, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0), default=3600.0, show_default=True, help="Of arrivals."
)
@click.option(
    "--follow-up",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    help="Probability that a turn is followed by another.",
)
@click.option(
    "--gap",
    type=click.FloatRange(0, min_open=True),
    default=66.0,
    show_default=True,
    help="Median pause between two turns, in seconds.",
)
@click.option("--documents", type=click.IntRange(0), default=100, show_default=True)
def generate(
    file: Any,
    seed: int,
    sessions: int,
    seconds: float,
    follow_up: float,
    gap: float,
    documents: int,
) -> None:
    """Write a made-up trace in the public format into FILE; - is standard output.

    Sessions with turns, system prompts and documents in common; the same seed makes the same trace.
    """
    from respkv.trace.format import mooncake_line
    from respkv.trace.generate import Plan
    from respkv.trace.generate import generate as make

    plan = Plan(
        seed=seed,
        sessions=sessions,
        seconds=seconds,
        follow_up=follow_up,
        gap_s=gap,
        documents=documents,
    )
    for request in make(plan).requests:
        file.write(mooncake_line(request) + "\n")
