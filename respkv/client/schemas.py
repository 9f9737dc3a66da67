"""The commands on namespaces: what their pages look like, how they are stored, how well."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from respkv.client.commands import Command, Key, list_of, option, text_of, unexpected
from respkv.client.replies import Reply
from respkv.client.requests import Arg

Durability = Literal["memory", "written", "durable"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of a hybrid model that keep something else than those of the namespace's own shape.

    kind:   "full" and "sliding" keep pages ``[layers, 2, tokens, heads, dim]``, "mla" latents,
            ``[layers, tokens, dim]``; "state" keeps one object of ``nbytes`` at a position.
    window: of "sliding", in tokens.
    dtype:  that of the namespace if None.
    """

    kind: Literal["full", "sliding", "state", "mla"]
    layers: int | None = None
    heads: int | None = None
    dim: int | None = None
    dtype: str | None = None
    window: int | None = None
    nbytes: int | None = None

    def words(self) -> list[Arg]:
        """Return what stands behind GROUP and the name."""
        args: list[Arg] = [self.kind.upper()]
        if self.window is not None:
            args.append(self.window)
        option(args, "LAYERS", self.layers)
        option(args, "HEADS", self.heads)
        option(args, "DIM", self.dim)
        option(args, "DTYPE", self.dtype)
        option(args, "BYTES", self.nbytes)
        return args


def schema_set(
    namespace: Key,
    *,
    layers: int,
    heads: int | None = None,
    dim: int,
    tokens: int,
    dtype: str,
    mla: bool = False,
    groups: Mapping[str, LayerGroup] | None = None,
    fingerprint: bytes | str | None = None,
    algorithm: str | None = None,
    seed: bytes | str | None = None,
    codecs: Mapping[str, str] | None = None,
    exact: tuple[int, int] | None = None,
    max_error: float | None = None,
    min_ratio: float | None = None,
    ttl_ms: int | None = None,
    durability: Durability | None = None,
    max_bytes: int | None = None,
    tenant_bytes: int | None = None,
) -> Command[None]:
    """Declare the pages of a namespace, ``[layers, 2, tokens, heads, dim]`` of ``dtype``.

    mla:        they are of latents, ``[layers, tokens, dim]``, and there are no heads to name.
    groups:     by name, the other layers of a hybrid model.
    algorithm, seed: how the ids of its pages are made, see respkv.chain; blake3 if None.
                ``sha256_cbor`` with the seed of vLLM's workers makes those that vLLM makes.
    codecs:     of each tier a codec, of keys and values one each, or ``auto``:
                ``{"nvme": "xs", "disk": "rh4/rh3"}``. Tiers that are not named store without loss.
    exact:      so many tokens stay exact: the first ones of pages without a parent, and the last.
    max_error, min_ratio: what ``auto`` keeps to: the relative L2 error of every layer's keys and
                values, or how many times smaller pages get.
    durability: what its pages survive once their put is answered; by the server's default if None.
    max_bytes, tenant_bytes: what the namespace, and each tenant in it, may keep; 0 for no limit,
                None: as it was.
    Raises ServerError KVSCHEMA when it was declared with another geometry, fingerprint,
    algorithm or seed.
    """
    if heads is None and not mla:
        raise TypeError("heads is missing; only latents, mla=True, have none to name")
    args: list[Arg] = ["KV.SCHEMA", "SET", namespace, *(["MLA"] if mla else [])]
    args += ["LAYERS", layers]
    option(args, "HEADS", heads)
    args += ["DIM", dim, "TOKENS", tokens, "DTYPE", dtype]
    for name, group in (groups or {}).items():
        args += ["GROUP", name, *group.words()]
    option(args, "FINGERPRINT", fingerprint)
    option(args, "HASH", algorithm)
    option(args, "SEED", seed)
    for tier, codec in (codecs or {}).items():
        args += ("CODEC", tier, codec)
    if exact is not None:
        args += ("EXACT", *exact)
    option(args, "MAXERROR", None if max_error is None else repr(max_error))
    option(args, "MINRATIO", None if min_ratio is None else repr(min_ratio))
    option(args, "TTL", ttl_ms)
    option(args, "DURABILITY", durability)
    option(args, "MAXBYTES", max_bytes)
    option(args, "TENANTBYTES", tenant_bytes)
    return Command(args, lambda reply: None)


def schema_get(namespace: Key) -> Command[dict[str, Any] | None]:
    """Return the schema of a namespace; fingerprint and seed are bytes, other words are str."""
    return Command(["KV.SCHEMA", "GET", namespace], map_of)


def schema_list() -> Command[list[str]]:
    """Return the names of all namespaces that have a schema."""
    return Command(["KV.SCHEMA", "LIST"], lambda reply: [text_of(name) for name in list_of(reply)])


def quality(namespace: Key, codec: str) -> Command[dict[str, Any]]:
    """Measure what a codec does to the pages of a namespace; takes seconds.

    codec:   a name, or that of keys and that of values: ``rh4/rh3``.
    Returns: stored bits of an element and errors, as KV.QUALITY describes them.
    Raises:  ServerError when the namespace has no schema or no pages.
    """
    return Command(["KV.QUALITY", namespace, codec], _quality)


def _quality(reply: Reply) -> dict[str, Any]:
    found = map_of(reply) or {}
    floats = ("key_", "value_")
    numbers = {name: float(found[name]) for name in found if name.startswith(floats)}
    layers = [tuple(map(float, pair)) for pair in found.get("layers", ())]
    return {**found, **numbers, "layers": layers}


def map_of(reply: Reply) -> dict[str, Any] | None:
    """Return a map with its words as str, or None. Raises ProtocolError."""
    if reply is None:
        return None
    if isinstance(reply, list):  # RESP2 has no maps
        reply = dict(zip(map(text_of, reply[::2]), reply[1::2], strict=True))
    if not isinstance(reply, dict):
        raise unexpected("a map", reply)
    named = {_words(name): value for name, value in reply.items()}
    return {
        name: value if name in ("fingerprint", "seed") else _words(value)
        for name, value in named.items()
    }


def _words(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return [_words(item) for item in value] if isinstance(value, list) else value
