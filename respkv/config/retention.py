"""The settings of retention: what clients may ask to be kept, and what files take."""

from respkv.config.sequences import SequenceSettings


class RetentionSettings(SequenceSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What clients may ask to be kept, and what files take."""
