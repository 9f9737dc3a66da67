"""The picture that ``respkv top`` draws. The one module that needs rich; ``top`` imports it late."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from respkv.cli.sample import Rates, Sample, Tier

BAR_CELLS = 30
HISTORY_MAX = 240
_SPARKS = " ▁▂▃▄▅▆▇█"
_FULL_AT, _NEARLY_AT = 0.95, 0.8


def frame(
    address: str,
    sample: Sample,
    now: Rates,
    history: Sequence[float],
    *,
    width: int,
    note: str = "",
) -> RenderableType:
    """Draw one frame.

    history: bytes per second in and out together, the latest last.
    note:    what is wrong at the moment.
    """
    return Group(
        _title(address, sample, note),
        Panel(_tiers(sample.tiers), title="tiers", title_align="left"),
        Panel(_figures(sample, now), title="now", title_align="left"),
        Panel(
            Text(sparkline(history, width - 4), style="cyan"),
            title=f"in and out, peak {_rate(max(history, default=0.0))}",
            title_align="left",
        ),
    )


def sparkline(values: Sequence[float], cells: int) -> str:
    """Draw the last values as columns; the highest is full, and only zero is blank."""
    shown = values[-cells:]
    peak = max(shown, default=0.0)
    steps = len(_SPARKS) - 1
    return "".join(
        _SPARKS[max(round(value / peak * steps), 1)] if value > 0 else _SPARKS[0] for value in shown
    )


def size(number: float) -> str:
    """Print bytes with three digits or four and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def duration(seconds: int) -> str:
    """Print the two largest units of a time."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60}m"
    return f"{minutes}m {seconds % 60}s" if minutes else f"{seconds}s"


def _title(address: str, sample: Sample, note: str) -> RenderableType:
    info = sample.info
    name = "respkv" if "respkv_version" in info else "redis"
    version = info.get("respkv_version") or info.get("redis_version", "")
    row = Table.grid(expand=True)
    row.add_column()
    row.add_column(justify="right")
    title = Text.assemble(
        (f" {name} {version}", "bold"),
        f"  {address}  up {duration(sample.count('uptime_in_seconds'))}",
        f"  policy {info.get('maxmemory_policy', '-').removeprefix('allkeys-')}",
    )
    row.add_row(title, Text("q quits ", "dim"))
    if note:
        return Group(row, Text(f" {note}", "bold red", no_wrap=True, overflow="ellipsis"))
    return row


def _tiers(tiers: Sequence[Tier]) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    for justify in ("left", "left", "right", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    for tier in tiers:
        share_known = tier.capacity_bytes > 0  # a Redis may have no limit
        share = tier.used_bytes / tier.capacity_bytes if share_known else 0.0
        table.add_row(
            Text(tier.name, style="bold"),
            _bar(share),
            f"{share:.0%}" if share_known else "",
            size(tier.used_bytes) + (f" of {size(tier.capacity_bytes)}" if share_known else ""),
            "" if tier.num_pages is None else f"{tier.num_pages:,} pages",
        )
        if tier.note:
            table.add_row("", Text(tier.note, style="bold red", overflow="ellipsis"))
    return table


def _bar(share: float) -> Text:
    full = min(round(share * BAR_CELLS), BAR_CELLS)
    style = "red" if share >= _FULL_AT else "yellow" if share >= _NEARLY_AT else "green"
    return Text.assemble(("█" * full, style), ("░" * (BAR_CELLS - full), "dim"))


def _figures(sample: Sample, now: Rates) -> RenderableType:
    hits = sample.counter("hits", "keyspace_hits")
    misses = sample.counter("misses", "keyspace_misses")
    evicted = sample.counter("evicted", "evicted_keys")
    total = hits / (hits + misses) if hits + misses else None
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(2):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True, ratio=1)
    rows = (
        ("commands", f"{now.commands:,.0f}/s", "clients", f"{sample.count('connected_clients'):,}"),
        ("in", _rate(now.in_bytes), "leases", f"{sample.count('kv_leases'):,}"),
        ("out", _rate(now.out_bytes), "evicted", f"{evicted:,}, {now.evicted:,.0f}/s"),
        ("hit rate", _percent(now.hit_rate), "of all", _percent(total)),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _rate(number: float) -> str:
    return f"{size(number)}/s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
