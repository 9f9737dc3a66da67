"""The commands. Importing this package registers every handler."""

from respkv.server.commands import (
    clients,
    connection,
    expiry,
    inspection,
    introspection,
    keyspace,
    leases,
    pages,
    pubsub,
    quality,
    retention,
    schemas,
    sequences,
    server,
    strings,
    tiers,
)

__all__ = [
    "clients",
    "connection",
    "expiry",
    "inspection",
    "introspection",
    "keyspace",
    "leases",
    "pages",
    "pubsub",
    "quality",
    "retention",
    "schemas",
    "sequences",
    "server",
    "strings",
    "tiers",
]
