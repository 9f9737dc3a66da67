"""What actors of the engine are asked."""

from dataclasses import dataclass

from respkv.engine.actor import Ask


@dataclass(frozen=True, slots=True)
class Sweep(Ask[None]):
    """Remove the entries whose TTL has ended."""


@dataclass(frozen=True, slots=True)
class Check(Ask[None]):
    """Assert that slots, index and leases agree. A failure is a bug and crashes the janitor."""
