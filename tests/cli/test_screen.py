"""The picture of ``respkv top``."""

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from respkv.cli.sample import Rates, Sample, Tier
from respkv.cli.screen import duration, frame, size, sparkline

INFO = {
    "respkv_version": "1.2.3",
    "uptime_in_seconds": "3723",
    "maxmemory_policy": "allkeys-s3fifo",
    "connected_clients": "12",
    "kv_leases": "3",
}
STATS = {"hits": 90, "misses": 10, "evicted": 1234}
TIERS = [
    Tier("cpu", 128 << 20, 256 << 20, 1500),
    Tier("nvme", 0, 1 << 40, 0),
    Tier("disk", 999, 1000, 7),
]
NOW = Rates(commands=12_345.6, in_bytes=1.5 * 2**30, out_bytes=0, evicted=2, hit_rate=0.973)


def drawn(
    width: int = 100,
    history: Sequence[float] = (),
    note: str = "",
    tiers: Sequence[Tier] = TIERS,
) -> list[str]:
    """Return the lines of a frame, of which none may be wider than the terminal."""
    look = Sample(at_s=0.0, info=INFO, stats=STATS, tiers=list(tiers))
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    console.print(frame("host:7379", look, NOW, history, width=width, note=note))
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    return lines


def test_a_frame_says_what_the_server_does() -> None:
    lines = drawn()
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "respkv 1.2.3 host:7379 up 1h 2m policy s3fifo" in text
    assert "50% 128.0 MiB of 256.0 MiB 1,500 pages" in text
    assert "0% 0 B of 1.0 TiB 0 pages" in text
    assert "commands 12,346/s clients 12" in text
    assert "in 1.5 GiB/s leases 3" in text
    assert "out 0 B/s evicted 1,234, 2/s" in text
    assert "hit rate 97.3% of all 90.0%" in text


def test_a_tier_that_ails_says_so_on_a_line_of_its_own() -> None:
    ill = [*TIERS[:1], Tier("nvme", 5, 10, 1, "read-only: no space left on device")]
    lines = drawn(tiers=ill)
    (line,) = [number for number, line in enumerate(lines) if "read-only: no space" in line]
    assert "nvme" in lines[line - 1]


def test_a_bar_is_as_full_as_its_tier() -> None:
    bars = [line.count("█") for line in drawn() if "pages" in line]
    assert bars == [15, 0, 30]


def test_a_note_has_a_line_of_its_own_and_moves_nothing_else() -> None:
    calm, noted = drawn(), drawn(note="cannot connect " * 20)
    assert noted[1].startswith(" cannot connect cannot connect")
    assert noted[:1] + noted[2:] == calm


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_frame_fits_its_terminal(width: int) -> None:
    lines = drawn(width, history=[float(number) for number in range(500)])
    assert max(len(line) for line in lines) == width
    assert any(line.count("█") > 0 and "pages" not in line for line in lines)


def test_a_sparkline_shows_the_last_values_under_their_peak() -> None:
    assert sparkline([9.0, 0.0, 0.001, 4.0, 8.0], 4) == " ▁▄█"
    assert sparkline([0.0, 0.0], 10) == "  "
    assert sparkline([], 10) == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_bytes_have_a_unit(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (61, "1m 1s"), (3599, "59m 59s"), (7200, "2h 0m"), (180_000, "2d 2h")],
)
def test_a_time_has_its_two_largest_units(seconds: int, text: str) -> None:
    assert duration(seconds) == text
