"""The settings of retention: what clients may ask to be kept, and what files take."""

from typing import Annotated

from respkv.config.kinds import Count, Flag
from respkv.config.sequences import SequenceSettings

_DAY_MS = 86_400_000
_YEAR_MS = 365 * _DAY_MS


class RetentionSettings(SequenceSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What clients may ask to be kept, and what files take."""

    ttl_max: Annotated[
        int,
        Count(
            about="Longest TTL of a page that a client may ask for; longer ones are cut; 0: any.",
            unit="ms",
            most=_YEAR_MS,
            runtime=True,
        ),
    ] = 0
    pin_max: Annotated[
        int,
        Count(
            about="Longest pin that a client may ask for; longer ones are cut.",
            unit="ms",
            least=1,
            most=_YEAR_MS,
            runtime=True,
        ),
    ] = 3_600_000
    pinned_share_max: Annotated[
        int,
        Count(
            about="Part of the arena that may be pinned; a pin beyond it is refused; 0: none at all.",
            unit="percent",
            most=100,
            runtime=True,
        ),
    ] = 50
    expect_max: Annotated[
        int,
        Count(
            about="Farthest return that KV.HINT EXPECT may name; farther ones are cut.",
            unit="ms",
            least=1,
            most=_YEAR_MS,
            runtime=True,
        ),
    ] = _DAY_MS
    explain_across_salts: Annotated[
        bool,
        Flag(
            about=(
                "May KV.SEQ.EXPLAIN say that a prompt is stored under another salt, tenant or LoRA;"
                " it tells one tenant about another."
            ),
            runtime=True,
        ),
    ] = False
