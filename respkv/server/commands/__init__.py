"""The commands. Importing this package registers every handler."""

from respkv.server.commands import (
    clients,
    connection,
    expiry,
    introspection,
    keyspace,
    leases,
    pages,
    quality,
    schemas,
    server,
    strings,
    tiers,
)

__all__ = [
    "clients",
    "connection",
    "expiry",
    "introspection",
    "keyspace",
    "leases",
    "pages",
    "quality",
    "schemas",
    "server",
    "strings",
    "tiers",
]
