"""The settings of sequences: pages that come with their tokens."""

from typing import Annotated

from respkv.config.gpu import GpuSettings
from respkv.config.kinds import Count, Size

_DAY_MS = 86_400_000
ASSEMBLY_SHARE = 4


class SequenceSettings(GpuSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Pages that come with their tokens."""

    assembly_timeout: Annotated[
        int,
        Count(
            about=(
                "How long a page waits for the rest of its layers and heads, from one part to the"
                " next, before it is dropped."
            ),
            unit="ms",
            least=1,
            most=_DAY_MS,
            runtime=True,
        ),
    ] = 60_000
    assembly_memory: Annotated[
        int,
        Size(
            about=(
                "Most bytes of pages that wait for the rest of their layers and heads; 0 means"
                " maxmemory / 4."
            ),
            runtime=True,
        ),
    ] = 0

    def assembly_bytes(self, maxmemory: int) -> int:
        """Return how many bytes of pages may be put together at once."""
        return self.assembly_memory or maxmemory // ASSEMBLY_SHARE
