"""The settings of prefetching and admission: what is raised before somebody asks, what is written."""

from typing import Annotated

from respkv.config.kinds import Choice, Size
from respkv.config.retention import RetentionSettings

SHARE = 8  # prefetch-bytes-max takes one in so many bytes of maxmemory unless it is set


class PrefetchSettings(RetentionSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What is raised from files before somebody asks, and what is written to them ahead."""

    prefetch: Annotated[
        str,
        Choice(
            about=(
                "Raise pages from files before somebody asks: auto, while that pays, and each of its"
                " reasons for itself; on, always; off, never."
            ),
            words=("auto", "on", "off"),
            runtime=True,
        ),
    ] = "auto"
    prefetch_bytes_max: Annotated[
        int,
        Size(
            about="Pages raised ahead that nobody has used yet; 0 means maxmemory / 8.",
            runtime=True,
        ),
    ] = 0
    admission: Annotated[
        str,
        Choice(
            about=(
                "Which values are written to files while memory has room: all; second, those used"
                " since they were put; tinylfu, those used more often than what files drop."
            ),
            words=("all", "second", "tinylfu"),
            runtime=True,
        ),
    ] = "all"

    def prefetch_budget(self, maxmemory: int) -> int:
        """Return how many bytes of pages may be raised that nobody has used yet."""
        return self.prefetch_bytes_max or maxmemory // SHARE
