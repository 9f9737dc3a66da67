"""The text of INFO: Redis's sections and field names, and a ``kv`` section of our own.

Exporters and clients read fields by name (``role``, ``loading``, ``used_memory``, ``db0``), so a
field that Redis has keeps its name and meaning here; what only respkv has begins with ``kv_``.
"""

import os
import platform
import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import respkv
from respkv.engine.copies import RECORD_BYTES
from respkv.engine.entry import ENTRY_BYTES
from respkv.server.publishing import event_fields
from respkv.server.retention_info import retention_fields
from respkv.server.tier_info import file_fields, gpu_fields, prefetch_fields

if TYPE_CHECKING:
    from respkv.server.state import Server

REDIS_VERSION = "7.0.15"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Fields = dict[str, object]


def info_text(server: "Server", wanted: list[str]) -> str:
    """Return the sections ``wanted``; none, ``default``, ``all`` and ``everything`` mean all."""
    is_all = not wanted or bool({"all", "default", "everything"} & set(wanted))
    parts = []
    for name, section in SECTIONS.items():
        if is_all or name in wanted:
            lines = "".join(f"{field}:{value}\r\n" for field, value in section(server).items())
            parts.append(f"# {name.capitalize() if name != 'kv' else 'KV'}\r\n{lines}")
    return "\r\n".join(parts)


def used_memory(server: "Server") -> int:
    """Bytes in use: slots, values on the heap, index entries, and what the process began with.

    Of values in files, the entries and what is known of their copies. Of pages that came as tokens,
    wherever they are, the tokens too.
    """
    cache = server.cache
    in_slots = sum(each.slots_used for each in cache.slabs.classes())
    copies = cache.copies.cold_bytes + cache.copies.num_records * RECORD_BYTES
    values = cache.slabs.used_bytes + cache.room.small_bytes + in_slots * ENTRY_BYTES
    return server.base_bytes + values + copies + server.sequences.branches.nbytes


def resident_bytes() -> int:
    """Return this process's resident set, the shared arena included."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES


def _server(server: "Server") -> Fields:
    uptime = int(server.clock.now - server.started_s)
    return {
        "redis_version": REDIS_VERSION,
        "respkv_version": respkv.__version__,
        "redis_mode": "standalone",
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "arch_bits": 64,
        "multiplexing_api": "uvloop",
        "process_id": server.pid,
        "run_id": server.run_id,
        "tcp_port": max(server.port, 0),
        "server_time_usec": time.time_ns() // 1000,
        "uptime_in_seconds": uptime,
        "uptime_in_days": uptime // 86400,
        "hz": 10,
        "python_version": platform.python_version(),
    }


def _clients(server: "Server") -> Fields:
    return {
        "connected_clients": len(server.sessions),
        "maxclients": server.config.maxclients,
        "client_recent_max_input_buffer": max(
            (each.held_bytes for each in server.sessions.values()), default=0
        ),
        "pubsub_clients": sum(each.subscriptions is not None for each in server.sessions.values()),
        "blocked_clients": sum(not each.wants_input for each in server.sessions.values()),
    }


def _memory(server: "Server") -> Fields:
    used, resident = used_memory(server), resident_bytes()
    return {
        "used_memory": used,
        "used_memory_rss": resident,
        "used_memory_peak": max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, used),
        "used_memory_dataset": server.cache.slabs.payload_bytes + server.cache.room.small_bytes,
        "maxmemory": server.config.maxmemory,
        "maxmemory_policy": f"allkeys-{server.config.maxmemory_policy}",
        "mem_fragmentation_ratio": f"{resident / used:.2f}",
        "mem_allocator": "arena",
    }


def _persistence(server: "Server") -> Fields:
    redis: Fields = {"loading": 0, "rdb_bgsave_in_progress": 0, "aof_enabled": 0}
    return redis | file_fields(server)


def _stats(server: "Server") -> Fields:
    stats = server.cache.stats
    return {
        "total_connections_received": server.num_connections,
        "total_commands_processed": server.num_commands,
        "total_net_input_bytes": server.input_bytes,
        "total_net_output_bytes": server.output_bytes,
        "rejected_connections": server.num_rejected,
        "expired_keys": stats.expired,
        "evicted_keys": stats.evicted,
        "keyspace_hits": stats.hits,
        "keyspace_misses": stats.misses,
        "pubsub_channels": server.pubsub.num_channels,
        "pubsub_patterns": server.pubsub.num_patterns,
        "total_error_replies": server.num_errors,
        "protocol_errors": server.num_protocol_errors,
        "client_output_buffer_limit_disconnections": server.num_slow_readers,
        "pubsub_output_limit_disconnections": server.num_slow_subscribers,
        "idle_timeout_disconnections": server.num_idle_closed,
        "overdue_writer_disconnections": server.num_overdue_writers,
    }


def _replication(server: "Server") -> Fields:
    return {"role": "master", "connected_slaves": 0, "master_replid": server.run_id}


def _cpu(server: "Server") -> Fields:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"used_cpu_sys": f"{usage.ru_stime:.6f}", "used_cpu_user": f"{usage.ru_utime:.6f}"}


def _keyspace(server: "Server") -> Fields:
    index = server.cache.index
    if not index.entries:
        return {}
    return {"db0": f"keys={len(index)},expires={index.num_volatile},avg_ttl=0"}


def kv_fields(server: "Server") -> Fields:
    """Return the fields of the kv section."""
    cache = server.cache
    landings, sending = cache.in_flight()
    fields: Fields = {
        "kv_arena_bytes": cache.slabs.capacity_bytes,
        "kv_arena_used_bytes": cache.slabs.used_bytes,
        "kv_arena_payload_bytes": cache.slabs.payload_bytes,
        "kv_arena_hugepages": int(server.arena.hugepages),
        "kv_shm": server.config.shm,
        "kv_small_bytes": cache.room.small_bytes,
        "kv_small_bytes_max": cache.room.small_max,
        "kv_entries": len(cache.entries),
        "kv_namespaces": len(cache.namespaces),
        "kv_leases": len(cache.leases),
        "kv_quarantined": cache.leases.quarantined,
        "kv_landings": landings,
        "kv_sending": sending,
        "kv_slabs_cleared": cache.room.slabs_cleared,
        "kv_assemblies": len(server.assemblies),
        "kv_assembly_bytes": server.assemblies.nbytes,
        "kv_assemblies_dropped": server.assemblies.num_dropped,
        **gpu_fields(server),
        **prefetch_fields(server),
        **{f"kv_{name}": value for name, value in event_fields(server).items()},
    }
    counters = {f"kv_{name}": value for name, value in cache.stats.snapshot().items()}
    return fields | counters | retention_fields(server)


SECTIONS: dict[str, Callable[["Server"], Fields]] = {
    "server": _server,
    "clients": _clients,
    "memory": _memory,
    "persistence": _persistence,
    "stats": _stats,
    "replication": _replication,
    "cpu": _cpu,
    "keyspace": _keyspace,
    "kv": kv_fields,
}
