"""The settings of sequences: pages that come with their tokens."""

from respkv.config.gpu import GpuSettings


class SequenceSettings(GpuSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Pages that come with their tokens."""
