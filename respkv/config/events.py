"""The settings of events: who is told what becomes of pages."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from respkv.config.kinds import KIB, MIB, Count, Flag, Kind, Size
from respkv.config.prefetch import PrefetchSettings
from respkv.errors import ConfigError

_ENDPOINT = re.compile(r"[>@]?(tcp://.+:(\d{1,5}|\*)|ipc://.+)", re.ASCII)
_PLACES = re.compile(r"\{(?!namespace\})")


@dataclass(frozen=True, kw_only=True)
class Endpoint(Kind):
    """An address of ZMQ: bound, or connected to where it begins with ``>``."""

    @property
    def accepted(self) -> str:
        """What may be written."""
        return "tcp://127.0.0.1:5557, tcp://*:5557, ipc:///path, >tcp://host:5557 and empty"

    def read(self, value: object) -> Any:
        """Return the text when it is an address."""
        if not isinstance(value, str) or "\0" in value:
            return None
        return value if not value or _ENDPOINT.fullmatch(value) else None


@dataclass(frozen=True, kw_only=True)
class Topic(Kind):
    """A topic of ZMQ, in which the namespace may stand."""

    @property
    def accepted(self) -> str:
        """What may be written."""
        return "a text in which {namespace} may stand, and nothing else in braces"

    def read(self, value: object) -> Any:
        """Return the text."""
        if not isinstance(value, str) or "\0" in value or _PLACES.search(value):
            return None
        return value


class EventSettings(PrefetchSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Who is told what becomes of pages."""

    pubsub_output_limit: Annotated[
        int,
        Size(
            about="A subscriber for whom more messages than this wait is disconnected.",
            least=KIB,
            runtime=True,
        ),
    ] = 32 * MIB
    events_endpoint: Annotated[
        str,
        Endpoint(
            about=(
                "Where vLLM's KV events are published over ZMQ, without any login; > before it"
                " connects instead of binding, empty means nowhere."
            )
        ),
    ] = ""
    events_replay_endpoint: Annotated[
        str, Endpoint(about="Where missed batches of them are asked for; empty means nowhere.")
    ] = ""
    events_topic: Annotated[
        str,
        Topic(about="Topic of each batch; {namespace} stands for that of its pages."),
    ] = "kv@respkv@{namespace}"
    events_buffer: Annotated[
        int, Count(about="Batches that are kept to be sent again.", least=1, most=1_000_000)
    ] = 10_000
    events_hwm: Annotated[
        int,
        Count(
            about="Batches that wait for one slow subscriber before it misses some.",
            least=1,
            most=10_000_000,
        ),
    ] = 10_000
    events_namespaces: Annotated[
        str,
        Kind(about="Namespaces whose events are published over ZMQ, by commas; empty means all."),
    ] = ""
    events_int_hashes: Annotated[
        bool,
        Flag(about="Publish 64-bit numbers, as vLLM does when told to, instead of 32-byte ids."),
    ] = False
    events_tokens: Annotated[
        bool,
        Flag(about="Publish the tokens of pages, which indexers need and which are the prompts."),
    ] = True

    def event_namespaces(self) -> tuple[bytes, ...]:
        """Return the namespaces whose events are published over ZMQ; none means all."""
        names = (name.strip() for name in self.events_namespaces.split(","))
        return tuple(name.encode() for name in names if name)

    def check_events(self) -> None:
        """Raise ConfigError when there is a replay of nothing."""
        if self.events_replay_endpoint and not self.events_endpoint:
            raise ConfigError(
                f"events-replay-endpoint = {self.events_replay_endpoint!r}: without"
                " events-endpoint there is nothing to send again"
            )
        if self.events_replay_endpoint.startswith(">"):
            raise ConfigError(
                f"events-replay-endpoint = {self.events_replay_endpoint!r}: it is bound;"
                " leave out the >"
            )
