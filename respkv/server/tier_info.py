"""What a file tier tells about itself, for INFO, KV.TIERS and KV.STATS."""

from typing import TYPE_CHECKING

from respkv.kernels.container import codec_name

if TYPE_CHECKING:
    from respkv.server.state import Server
    from respkv.tiers.file_tier import FileTier
    from respkv.tiers.gpu import GpuTier

Field = str | int | float


def prefetch_fields(server: "Server") -> dict[str, object]:
    """Return the fields of INFO about what is raised ahead and what is written; or none."""
    if server.prefetcher is None:
        return {}
    raised, written = server.prefetcher.info_fields(), server.cache.copies.admission.info_fields()
    fields = {f"kv_prefetch_{name}": value for name, value in raised.items()}
    return fields | {f"kv_admission_{name}": value for name, value in written.items()}


def file_tier_fields(tier: "FileTier") -> dict[str, Field]:
    """Return what is to be known of a tier, by name.

    write_amplification:  bytes that went to the device for each byte of payload that was stored.
    written_per_byte_hit: bytes that went to the device for each byte of payload that was read.
    payload_bytes, live_bytes: of the values that are there, as clients sent them, and as they are
                          stored, headers included; ratio: how many of the first there are for each
                          of the others; codecs: how many values have which.
    """
    stats, health, device = tier.stats, tier.health, tier.device
    return {
        "state": health.state,
        "reason": health.reason,
        "engine": device.engine,
        "engine_reason": device.fallback_reason,
        "direct": int(device.is_direct),
        "capacity_bytes": tier.capacity_bytes,
        "used_bytes": stats.file_bytes,
        "payload_bytes": stats.contents.payload_bytes,
        "pages": stats.records,
        "live_bytes": stats.live_bytes,
        "ratio": _ratio(stats.contents.payload_bytes, stats.live_bytes),
        "codecs": _codecs(stats.contents.by_codec),
        "encoded_bytes": stats.encoded_bytes,
        "encode_us": stats.encode_us,
        "decoded_bytes": stats.decoded_bytes,
        "decode_us": stats.decode_us,
        "hits": stats.reads,
        "hit_bytes": stats.read_bytes,
        "writes": stats.writes,
        "stored_bytes": stats.stored_bytes,
        "written_bytes": stats.written_bytes,
        "syncs": stats.syncs,
        "write_amplification": _ratio(stats.written_bytes, stats.stored_bytes),
        "written_per_byte_hit": _ratio(stats.written_bytes, stats.read_bytes),
        "evicted": stats.evicted,
        "reclaimed": stats.reclaimed,
        "relocated_bytes": stats.relocated_bytes,
        "corrupt": stats.corrupt,
        "lost": stats.lost,
        "dropped": stats.dropped,
        "read_errors": stats.read_errors,
        "write_errors": stats.write_errors + stats.sync_errors,
        "too_large": stats.too_large,
        "checkpoints": stats.checkpoints,
        "recovered": stats.recovered,
        "skipped_damaged": stats.skipped_damaged,
        "stale": stats.stale,
        "latency_us": int(tier.latency_us),
        "bytes_per_s": int(tier.bytes_per_s),
    }


def gpu_tier_fields(server: "Server", tier: "GpuTier") -> dict[str, str | int]:
    """Return what is to be known of the gpu tier, by name.

    payload_bytes: of its pages as they were put; used_bytes: of their slots, in their codecs.
    """
    gpu, stats = server.cache.gpu, tier.stats
    return {
        "state": tier.state,
        "reason": tier.reason,
        "device": str(tier.device),
        "pinned": int(tier.pinned is not None),
        "capacity_bytes": tier.capacity_bytes,
        "used_bytes": tier.slots.used_bytes,
        "payload_bytes": gpu.bytes,
        "pages": len(gpu.by_entry),
        "leases": len(gpu.leases),
        "hits": stats.reads,
        "hit_bytes": stats.read_bytes,
        "writes": stats.writes,
        "stored_bytes": stats.write_bytes,
        "unfit": stats.unfit,
        "errors": stats.errors,
        **gpu.stats.snapshot(),
        "latency_us": int(tier.latency_us),
        "bytes_per_s": int(tier.bytes_per_s),
    }


def gpu_fields(server: "Server") -> dict[str, Field]:
    """Return what INFO says about the gpu tier."""
    tier = server.gpu_tier
    if tier is None:
        return {"kv_gpu_tiers": 0}
    named = gpu_tier_fields(server, tier).items()
    return {"kv_gpu_tiers": 1, **{f"kv_gpu_{name}": value for name, value in named}}


def file_fields(server: "Server") -> dict[str, Field]:
    """Return what INFO says about all file tiers, and what is on its way to them."""
    tiers, copies = server.file_tiers, server.cache.copies
    if not tiers:
        return {"kv_file_tiers": 0}
    schema_files = server.schema_files
    fields: dict[str, Field] = {
        "kv_file_tiers": len(tiers),
        "kv_cold": copies.num_cold,
        "kv_cold_index_bytes": copies.cold_bytes,
        "kv_copies": copies.num_records,
        "kv_dirty": copies.num_dirty,
        "kv_dirty_bytes": copies.queued_bytes + copies.queued_small_bytes,
        "kv_writing": len(copies.writing),
        "kv_writing_bytes": copies.writing_bytes,
        "kv_is_behind": int(copies.is_behind),
        "kv_schemas_damaged": 0 if schema_files is None else schema_files.num_damaged,
        "kv_schemas_failed": 0 if schema_files is None else schema_files.num_failed,
    }
    for tier in tiers:
        named = file_tier_fields(tier).items()
        fields |= {f"kv_{tier.name}_{name}": value for name, value in named}
    return fields


def _codecs(by_codec: dict[int, int]) -> str:
    counts = sorted(by_codec.items(), key=lambda pair: -pair[1])
    return ",".join(f"{codec_name(codec)}={count}" for codec, count in counts)


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 3) if whole else 0.0
