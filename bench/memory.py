"""Row 7: the resident memory of a server that is full of pages."""

from collections.abc import Iterator

from bench.load import Load, Transfer, Values, WrongReplyError
from bench.result import MIB, Result, size
from bench.rows import Bench
from bench.servers import respkv_server

FACTOR = 1.05
FIXED_BYTES = 64 * MIB
# What the process needs without its pages comes out of the fixed part.
PROCESS_BYTES = 48 * MIB
SMALL_BYTES = MIB


def resident_memory(bench: Bench) -> Iterator[Result]:
    """Fill a server with N pages of B bytes and look at its process."""
    for page_bytes in bench.scale.memory_page_bytes:
        yield _filled(bench, page_bytes, max(1, bench.scale.memory_bytes // page_bytes))


def _filled(bench: Bench, page_bytes: int, count: int) -> Result:
    work = f"resident with {count:,} pages of {size(page_bytes)}"
    bench.progress(f"row 7: {work}")
    total = page_bytes * count
    limit = FACTOR * total + FIXED_BYTES
    values = Values(page_bytes, count)
    # Nothing but pages is stored, so nearly all of maxmemory is to be theirs.
    settings = {"small_value_memory": SMALL_BYTES}
    with respkv_server(int(limit) - PROCESS_BYTES, **settings) as server:
        empty = server.resident_bytes
        with Load(server.unix) as load:
            pages = Transfer(load, values, put="KV.PUT", get="KV.GET")
            pages.put_all()
            if (held := load.ask("DBSIZE")) != b":%d" % count:
                raise WrongReplyError(f"of {count} pages of {size(page_bytes)}, DBSIZE is {held!r}")
            pages.check_all()
        full = server.resident_bytes
    return Result(
        row=7,
        work=work,
        peer=f"N x B = {total / MIB:,.0f} MiB",
        ours=f"{full / MIB:,.0f} MiB ({empty / MIB:,.0f} empty)",
        ratio=full / total,
        ratios=[full / total],
        target=limit / total,
        at_least=False,
        unit="bytes",
        peer_samples=[total],
        ours_samples=[full],
    )
