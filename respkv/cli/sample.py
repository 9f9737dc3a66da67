"""What ``respkv top`` knows: one look at a server, and what changed between two.

A look is INFO, KV.TIERS and KV.STATS. A server that does not know the last two, such
as a Redis, still shows what INFO says.
"""

import time
from dataclasses import dataclass

from respkv.client import Client
from respkv.client.replies import Reply
from respkv.errors import ProtocolError, ServerError


@dataclass(frozen=True, slots=True)
class Tier:
    """One tier. num_pages counts plain values, too, where the server does. note: what ails it."""

    name: str
    used_bytes: int
    capacity_bytes: int
    num_pages: int | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. at_s: of the monotonic clock."""

    at_s: float
    info: dict[str, str]
    stats: dict[str, int]
    tiers: list[Tier]

    def count(self, name: str) -> int:
        """Return a number that INFO says, 0 when it does not."""
        value = self.info.get(name, "")
        return int(value) if value.isascii() and value.isdigit() else 0

    def counter(self, name: str, info_name: str) -> int:
        """Return a counter of KV.STATS, or the one of INFO that comes closest."""
        return self.stats[name] if name in self.stats else self.count(info_name)


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened between two looks, per second; the hit rate is None when nothing was asked."""

    commands: float
    in_bytes: float
    out_bytes: float
    evicted: float
    hit_rate: float | None


def take_sample(client: Client) -> Sample:
    """Look at a server. Raises what the client raises."""
    info = client.info()
    tiers, stats = _ask(client, "KV.TIERS"), _ask(client, "KV.STATS")
    counters = {} if stats is None else _map(stats)
    return Sample(
        at_s=time.monotonic(),
        info=info,
        stats={name: value for name, value in counters.items() if isinstance(value, int)},
        tiers=[_memory(info)] if tiers is None else [_tier(_map(tier)) for tier in _list(tiers)],
    )


def rates(before: Sample, after: Sample) -> Rates:
    """Return what happened between two looks at a server; nothing when it was started in between."""
    seconds = after.at_s - before.at_s

    def moved(name: str, info_name: str) -> int:
        change = after.counter(name, info_name) - before.counter(name, info_name)
        return max(change, 0)  # CONFIG RESETSTAT and a restart begin at zero again

    hits = moved("hits", "keyspace_hits")
    asked = hits + moved("misses", "keyspace_misses")
    return Rates(
        commands=moved("commands", "total_commands_processed") / seconds,
        in_bytes=moved("bytes_in", "total_net_input_bytes") / seconds,
        out_bytes=moved("bytes_out", "total_net_output_bytes") / seconds,
        evicted=moved("evicted", "evicted_keys") / seconds,
        hit_rate=hits / asked if asked else None,
    )


def _ask(client: Client, command: str) -> Reply:
    try:
        return client.command(command)
    except ServerError as error:
        if error.word != "ERR":  # as NOAUTH; an unknown command is a plain ERR
            raise
        return None


def _memory(info: dict[str, str]) -> Tier:
    used, most = info.get("used_memory", "0"), info.get("maxmemory", "0")
    return Tier("memory", int(used), int(most), None)


def _tier(values: dict[str, Reply]) -> Tier:
    name, used, capacity = (values.get(key) for key in ("name", "used_bytes", "capacity_bytes"))
    pages = values.get("pages")
    if not isinstance(used, int) or not isinstance(capacity, int):
        raise ProtocolError("KV.TIERS was answered without used_bytes or capacity_bytes")
    state, reason = (_text(values.get(key) or b"") for key in ("state", "reason"))
    note = "" if state in ("", "ok") else f"{state}: {reason}"
    return Tier(_text(name), used, capacity, pages if isinstance(pages, int) else None, note)


def _map(reply: Reply) -> dict[str, Reply]:
    if isinstance(reply, list):  # RESP2 has no maps
        reply = dict(zip(map(_text, reply[::2]), reply[1::2], strict=True))
    if not isinstance(reply, dict):
        raise ProtocolError(f"expected a map, the server answered {type(reply).__name__}")
    return {name.decode() if isinstance(name, bytes) else str(name): reply[name] for name in reply}


def _list(reply: Reply) -> list[Reply]:
    if not isinstance(reply, list):
        raise ProtocolError(f"expected an array, the server answered {type(reply).__name__}")
    return reply


def _text(reply: Reply) -> str:
    if not isinstance(reply, bytes | memoryview):
        raise ProtocolError(f"expected text, the server answered {type(reply).__name__}")
    return bytes(reply).decode(errors="replace")
