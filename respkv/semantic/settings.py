"""What a semantic cache is told when it is opened, checked."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy

from respkv.errors import ConfigError, require
from respkv.semantic.embeddings import METRICS, Metric
from respkv.semantic.index import KINDS, Kind
from respkv.semantic.records import Names

DIM_MAX = 65_536
TTL_S_MAX = 10 * 365 * 86_400.0


class Options(TypedDict, total=False):
    """Settings of a semantic cache that have defaults; see ``SemanticCache``."""

    threshold: float | None
    ttl_s: float | None
    metric: Metric
    index: Kind
    max_entries: int
    max_payload_bytes: int
    tenants_max: int
    durability: Literal["written", "durable"] | None


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one semantic cache. Raises ConfigError naming the wrong one."""

    namespace: str
    dim: int
    threshold: float
    default_ttl_s: float | None
    metric: Metric
    index: Kind
    max_entries: int
    max_payload_bytes: int
    tenants_max: int
    durability: Literal["written", "durable"] | None

    @property
    def names(self) -> Names:
        """The keys of the namespace."""
        return Names(self.namespace)

    def check_threshold(self, threshold: float) -> float:
        """Return a threshold. Raises TypeError, or ValueError when nothing can reach it."""
        highest = {"cosine": 1.0, "ip": math.inf, "l2": 0.0}[self.metric]
        _check_number("threshold", threshold)
        if math.isnan(threshold) or threshold > highest:
            raise ValueError(
                f"threshold = {threshold}: the {self.metric} score is at most {highest:g}"
                + ("; it is minus the distance" if self.metric == "l2" else "")
            )
        return threshold

    def check_payload(self, payload: Any) -> bytes | str:
        """Return a payload. Raises TypeError or ValueError."""
        if isinstance(payload, bytearray | memoryview):
            payload = bytes(payload)
        if not isinstance(payload, bytes | str):
            raise TypeError(
                f"a payload is bytes or str, not {type(payload).__name__}; make bytes of it first"
            )
        nbytes = len(payload) if isinstance(payload, bytes) else _utf8_bytes(payload)
        if nbytes > self.max_payload_bytes:
            raise ValueError(
                f"a payload of {nbytes} bytes; max_payload_bytes is {self.max_payload_bytes}"
            )
        return payload

    def ttl_ms(self, ttl_s: float | None) -> int:
        """Return a time to live in milliseconds, 0 for none. Raises TypeError or ValueError."""
        seconds = self.default_ttl_s if ttl_s is None else ttl_s
        if seconds is None:
            return 0
        _check_number("ttl_s", seconds)
        if not 0 < seconds <= TTL_S_MAX:
            raise ValueError(f"ttl_s = {seconds}: accepted are more than 0 and up to {TTL_S_MAX:g}")
        return max(1, math.ceil(seconds * 1000))


def make_settings(namespace: str, dim: int, options: Options) -> Settings:
    """Return settings with defaults filled in.

    Raises ConfigError naming the wrong one, MissingExtra for hnsw without usearch.
    """
    metric = options.get("metric", "cosine")
    kind = options.get("index", "exact")
    _check_one_of("metric", metric, METRICS)
    _check_one_of("index", kind, KINDS)
    if kind == "hnsw":
        require("index = 'hnsw'", "semantic", "usearch")
    durability = options.get("durability")
    _check_one_of("durability", durability, (None, "written", "durable"))
    if unknown := options.keys() - Options.__optional_keys__:
        accepted = ", ".join(sorted(Options.__optional_keys__))
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}; accepted are {accepted}")
    threshold = options.get("threshold")
    if threshold is None:
        if metric != "cosine":
            raise ConfigError(
                f"metric = {metric!r} needs a threshold: its scores have no usual one"
            )
        threshold = 0.9
    settings = Settings(
        namespace=namespace,
        dim=_at_least_1("dim", dim, DIM_MAX),
        threshold=threshold,
        default_ttl_s=options.get("ttl_s"),
        metric=metric,
        index=kind,
        max_entries=_at_least_1("max_entries", options.get("max_entries", 10_000)),
        max_payload_bytes=_at_least_1(
            "max_payload_bytes", options.get("max_payload_bytes", 16 << 20)
        ),
        tenants_max=_at_least_1("tenants_max", options.get("tenants_max", 64)),
        durability=durability,
    )
    try:
        settings.check_threshold(threshold)
        settings.ttl_ms(None)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    _ = settings.names
    return settings


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | numpy.number):
        raise TypeError(f"{name} = {value!r}: a number is needed")


def _utf8_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the payload is no text that can be written as UTF-8 ({error}); make bytes of it first"
        ) from error


def _check_one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted:
        raise ConfigError(f"{name} = {value!r}: accepted are {', '.join(map(repr, accepted))}")


def _at_least_1(name: str, value: int, most: int = 1 << 62) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        limit = "" if most == 1 << 62 else f" to {most}"
        raise ConfigError(f"{name} = {value!r}: accepted are whole numbers from 1{limit}")
    return value
