"""The settings of prefetching: what is raised before somebody asks."""

from respkv.config.retention import RetentionSettings


class PrefetchSettings(RetentionSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What is raised before somebody asks."""
