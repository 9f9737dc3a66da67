"""Schemas and quotas survive a restart: each file tier's directory has all in ``schemas.json``.

One JSON object: ``format``, ``version``, ``serial`` (of two files the greater is the newer),
``schemas``, ``quotas``, and ``checksum``, the xxh3_64 of the object without it, keys sorted, no
spaces. Bytes are hex digits. A damaged file is ignored, and the other tier's one is used.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from respkv.engine.accounts import Accounts, Saved
from respkv.engine.namespaces import Group, Kind, Namespaces, Schema
from respkv.errors import PageCorrupt, TierError
from respkv.kernels.layout import Codec
from respkv.page import Geometry, Latents
from respkv.tiers.format import hash64
from respkv.tiers.record import Level

if TYPE_CHECKING:
    from respkv.tiers.file_tier import FileTier

logger = logging.getLogger(__name__)

Chosen = dict[bytes, tuple[tuple[Codec, Codec], ...]]

FILE_NAME = "schemas.json"
FORMAT = "respkv schemas"
VERSION = 1
FILE_BYTES_MAX = 16 << 20


class SchemaFiles:
    """The schemas of a server, kept in its file tiers.

    num_damaged: files that were not what was written.
    num_failed:  times that a tier could not take them.
    """

    def __init__(
        self, namespaces: Namespaces, tiers: "Sequence[FileTier]", accounts: Accounts | None = None
    ) -> None:
        self.num_damaged = 0
        self.num_failed = 0
        self._namespaces = namespaces
        self._accounts = accounts
        self._tiers = tiers
        self._lock = anyio.Lock()
        self._serial = 0  # of the present state
        self._saved = 0  # of the last that some tier has

    @property
    def is_saved(self) -> bool:
        """Whether a restart would find the schemas as they are now."""
        return self._saved == self._serial

    async def load(self) -> list[Schema]:
        """Put the newest schemas that are found into force, and return them.

        Raises TierError when a file has a newer version than this server knows.
        """
        newest: tuple[int, list[Schema]] = (0, [])
        chosen: Chosen = {}
        quotas: list[Saved] = []
        for tier in self._tiers:
            data = await tier.load(FILE_NAME)
            try:
                found = (0, list[Schema]()) if data is None else decode(data)
            except PageCorrupt as error:
                self.num_damaged += 1
                logger.error("%s of tier %s is ignored: %s", FILE_NAME, tier.name, error)
                continue
            if data is not None and found[0] > newest[0]:
                newest, chosen, quotas = found, chosen_in(data), quotas_in(data)
        self._serial, schemas = newest
        self._saved = self._serial
        for schema in schemas:
            self._namespaces.put(schema)
        self._namespaces.chosen.update(chosen)
        if self._accounts is not None:
            self._accounts.restore(quotas)
        return schemas

    async def save(self) -> None:
        """Write the schemas as they are now to every tier. Those who ask meanwhile share a write.

        Raises TierError when no tier takes them; they are in force all the same.
        Cancelled: they may be saved or not.
        """
        self._serial += 1
        wanted = self._serial
        async with self._lock:
            if self._saved >= wanted:
                return
            serial = self._serial
            schemas = [self._namespaces.find(name) for name in self._namespaces.names()]
            chosen = self._namespaces.chosen
            quotas = [] if self._accounts is None else self._accounts.saved()
            present = [schema for schema in schemas if schema is not None]
            data = encode(serial, present, chosen, quotas)
            failures = [
                str(error) for error in [await self._save(t, data) for t in self._tiers] if error
            ]
            if len(failures) == len(self._tiers):
                raise TierError(f"schemas are in force, but could not be saved: {failures[0]}")
            self._saved = serial

    async def _save(self, tier: "FileTier", data: bytes) -> TierError | None:
        try:
            await tier.save(FILE_NAME, data)
        except TierError as error:
            self.num_failed += 1
            logger.warning("%s of tier %s could not be saved: %s", FILE_NAME, tier.name, error)
            return error
        return None


def encode(
    serial: int,
    schemas: Iterable[Schema],
    chosen: Chosen | None = None,
    quotas: Iterable[Saved] = (),
) -> bytes:
    """Return the text of a file.

    chosen: the codecs of namespaces whose codec is chosen by measuring.
    quotas: what namespaces and tenants may keep.
    """
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "serial": serial,
        "schemas": [_plain(schema) for schema in schemas],
        "chosen": {
            name.hex(): [[key.name, value.name] for key, value in layers]
            for name, layers in (chosen or {}).items()
        },
        "quotas": [
            [name.hex(), None if tenant is None else tenant.hex(), nbytes, tenant_bytes]
            for name, tenant, nbytes, tenant_bytes in quotas
        ],
    }
    body["checksum"] = checksum(body)
    return json.dumps(body, indent=1).encode()


def decode(data: bytes) -> tuple[int, list[Schema]]:
    """Return serial and schemas.

    Raises PageCorrupt when these are not the bytes that were written, TierError when they are of a
    newer version.
    """
    try:
        body = json.loads(data)
        stored = body.pop("checksum")
        if body["format"] != FORMAT or stored != checksum(body):
            raise PageCorrupt("its bytes do not match their checksum")
        version = body["version"]
        if version > VERSION:
            raise TierError(
                f"{FILE_NAME} has version {version}, this server reads up to {VERSION}: "
                "use a newer server"
            )
        return body["serial"], [_schema(each) for each in body["schemas"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PageCorrupt("it is not what was written") from error


def chosen_in(data: bytes) -> Chosen:
    """Return the codecs that were chosen, from a file that ``decode`` took; some have none."""
    found = json.loads(data).get("chosen", {})
    return {
        bytes.fromhex(name): tuple((Codec[key], Codec[value]) for key, value in layers)
        for name, layers in found.items()
    }


def quotas_in(data: bytes) -> list[Saved]:
    """Return the quotas, from a file that ``decode`` took; some have none."""
    return [
        (bytes.fromhex(name), None if tenant is None else bytes.fromhex(tenant), nbytes, each)
        for name, tenant, nbytes, each in json.loads(data).get("quotas", ())
    ]


def checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return f"{hash64(text.encode()):016x}"


def _plain(schema: Schema) -> dict[str, Any]:
    shape = schema.geometry
    return {
        "namespace": schema.namespace.hex(),
        "layers": shape.layers,
        "heads": shape.heads,
        "dim": shape.dim,
        "tokens": shape.tokens,
        "dtype": shape.dtype,
        "fingerprint": schema.fingerprint.hex(),
        "hash": schema.hash_algorithm.hex(),
        "seed": schema.seed.hex(),
        "codecs": [[tier.hex(), codec.hex()] for tier, codec in schema.codecs],
        "ttl_ms": schema.ttl_ms,
        "durability": None if schema.level is None else schema.level.name.lower(),
        "exact": [schema.exact_first, schema.exact_last],
        "error_max": schema.error_max,
        "ratio_min": schema.ratio_min,
        "kind": schema.group(b"").kind.value,
        "groups": [_plain_group(group) for group in schema.groups],
    }


def _plain_group(group: Group) -> dict[str, Any]:
    shape = group.geometry
    kept = {"name": group.name.hex(), "kind": group.kind.value}
    if shape is None:
        return {**kept, "bytes": group.nbytes}
    names = ("layers", "heads", "dim", "tokens", "dtype")
    return {**kept, "window": group.window, **{name: getattr(shape, name) for name in names}}


def _schema(plain: dict[str, Any]) -> Schema:
    level = plain["durability"]
    exact_first, exact_last = plain.get("exact", (0, 0))  # files of 0.1 have none of the five
    return Schema(
        namespace=bytes.fromhex(plain["namespace"]),
        geometry=_geometry(plain, Kind(plain.get("kind", "full"))),
        fingerprint=bytes.fromhex(plain["fingerprint"]),
        hash_algorithm=bytes.fromhex(plain["hash"]),
        seed=bytes.fromhex(plain["seed"]),
        codecs=tuple((bytes.fromhex(a), bytes.fromhex(b)) for a, b in plain["codecs"]),
        ttl_ms=plain["ttl_ms"],
        level=None if level is None else Level[level.upper()],
        exact_first=exact_first,
        exact_last=exact_last,
        error_max=plain.get("error_max", 0.0),
        ratio_min=plain.get("ratio_min", 0.0),
        groups=tuple(map(_group, plain.get("groups", ()))),
    )


def _group(plain: dict[str, Any]) -> Group:
    name, kind = bytes.fromhex(plain["name"]), Kind(plain["kind"])
    if kind is Kind.STATE:
        return Group(name, kind, nbytes=plain["bytes"])
    return Group(name, kind, _geometry(plain, kind), plain["window"])


def _geometry(plain: dict[str, Any], kind: Kind) -> Geometry:
    make = Latents if kind is Kind.MLA else Geometry
    return make(**{name: plain[name] for name in ("layers", "heads", "dim", "tokens", "dtype")})
