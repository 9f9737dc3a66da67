"""KV.TIERS and KV.STATS: what each tier holds, and what was counted."""

from respkv.server.commands.pages import CPU_LETTER, LOAD_BYTES_PER_US, LOAD_US_FIXED
from respkv.server.info import kv_fields
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.wire.parser import Args


@command("kv.tiers")
def kv_tiers(session: Session, args: Args) -> None:
    """Describe every tier."""
    cache = session.cache
    session.send(
        [
            {
                "name": "cpu",
                "letter": CPU_LETTER,
                "capacity_bytes": cache.slabs.capacity_bytes,
                "budget_bytes": cache.slabs.budget_bytes,
                "used_bytes": cache.slabs.used_bytes,
                "payload_bytes": cache.slabs.payload_bytes,
                "pages": len(cache.entries),
                "hits": cache.stats.hits,
                "latency_us": LOAD_US_FIXED,
                "bytes_per_s": LOAD_BYTES_PER_US * 1_000_000,
                "classes": [
                    {
                        "payload_bytes": each.payload_bytes,
                        "slabs": each.slabs,
                        "slots": each.slots,
                        "slots_used": each.slots_used,
                    }
                    for each in cache.slabs.classes()
                ],
            }
        ]
    )


@command("kv.stats")
def kv_stats(session: Session, args: Args) -> None:
    """Answer with every counter of the cache."""
    fields = {name.removeprefix("kv_"): value for name, value in kv_fields(session.server).items()}
    session.send(
        {name: value if isinstance(value, int) else str(value) for name, value in fields.items()}
    )
