"""KV.TIERS and KV.STATS: what each tier holds, and what was counted."""

from typing import TYPE_CHECKING

from respkv.server.info import kv_fields
from respkv.server.places import CPU_LETTER, LOAD_BYTES_PER_US, LOAD_US_FIXED
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.server.tier_info import file_fields, file_tier_fields, gpu_tier_fields
from respkv.wire.parser import Args

if TYPE_CHECKING:
    from respkv.tiers.file_tier import FileTier


@command("kv.tiers")
def kv_tiers(session: Session, args: Args) -> None:
    """Describe every tier."""
    cache = session.cache
    gpu = session.server.gpu_tier
    session.send(
        [
            *(
                [{"name": gpu.name, "letter": gpu.letter, **gpu_tier_fields(session.server, gpu)}]
                if gpu is not None
                else ()
            ),
            {
                "name": "cpu",
                "letter": CPU_LETTER,
                "capacity_bytes": cache.slabs.capacity_bytes,
                "budget_bytes": cache.slabs.budget_bytes,
                "used_bytes": cache.slabs.used_bytes,
                "payload_bytes": cache.slabs.payload_bytes,
                "pages": len(cache.entries) - cache.copies.num_cold,
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
            },
            *(
                {"name": tier.name, "letter": tier.letter, **_sendable(tier)}
                for tier in session.server.file_tiers
            ),
        ]
    )


def _sendable(tier: "FileTier") -> dict[str, str | int]:
    """Return a tier's fields in types that every client reads."""
    fields = file_tier_fields(tier).items()
    return {name: str(value) if isinstance(value, float) else value for name, value in fields}


@command("kv.stats")
def kv_stats(session: Session, args: Args) -> None:
    """Answer with every counter of the cache."""
    known = kv_fields(session.server) | file_fields(session.server)
    fields = {name.removeprefix("kv_"): value for name, value in known.items()}
    session.send(
        {name: value if isinstance(value, int) else str(value) for name, value in fields.items()}
    )
