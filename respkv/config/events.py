"""The settings of events: who is told what becomes of pages."""

from respkv.config.prefetch import PrefetchSettings


class EventSettings(PrefetchSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Who is told what becomes of pages."""
