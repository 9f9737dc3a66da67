"""How pages are stored in each tier: what their namespaces ask for."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import anyio.to_thread

from respkv.engine.namespaces import AUTO, Namespaces, Schema, shape_of
from respkv.kernels.layout import Codec
from respkv.page import Geometry, Latents, group_of, namespace_of
from respkv.tiers import lossy
from respkv.tiers.codec import PageSpec, has_torch, load_lossless, parse_codec, takes_dtype
from respkv.tiers.record import Meta

Chosen = tuple[tuple[Codec, Codec], ...]
KNOWN_MAX = 10_000

logger = logging.getLogger(__name__)


class _Known(NamedTuple):
    schema: Schema
    chosen: Chosen | None
    spec: PageSpec | None


class PageSpecs:
    """The specs of all namespaces, made anew when a schema or a chosen codec is another one."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._known: dict[tuple[bytes, str, bytes, int], _Known] = {}

    def of(self, tier: str, meta: Meta) -> PageSpec | None:
        """Return how a tier is to store a page; None: as it does by itself."""
        namespace = namespace_of(meta.key)
        schema = self._namespaces.find(namespace)
        if schema is None or not schema.codecs:
            return None
        shape = shape_of(schema, meta.key, meta.payload_bytes, meta.tokens)
        if shape is None:
            return None
        chosen = self._namespaces.chosen.get(namespace)
        name = namespace, tier, group_of(meta.key), shape.tokens
        known = self._known.get(name)
        if known is None or known.schema is not schema or known.chosen is not chosen:
            if len(self._known) >= KNOWN_MAX:  # of namespaces that have gone, most of them
                self._known.clear()
            known = _Known(schema, chosen, spec_of(schema, tier, chosen, shape, name[2]))
            self._known[name] = known
        return known.spec


async def make_ready(schemas: Iterable[Schema]) -> None:
    """Load what the codecs of some schemas take, before a page has to wait for that.

    Whoever moves a page to a tier gives up after a while, and torch takes seconds to import; numpy
    takes a fifth of one, which the first page would have to wait.
    """
    texts = {text for schema in schemas for _, text in schema.codecs}
    if texts - {b"raw"}:
        await anyio.to_thread.run_sync(load_lossless)
    if any(text == AUTO or _is_lossy(text) for text in texts) and has_torch():
        await anyio.to_thread.run_sync(lossy.load)


def _is_lossy(text: bytes) -> bool:
    try:
        return not all(codec.is_lossless for codec in parse_codec(text.decode(errors="replace")))
    except ValueError:
        return False


def spec_of(
    schema: Schema, tier: str, chosen: Chosen | None, shape: Geometry, group: bytes = b""
) -> PageSpec | None:
    """Return what a schema asks of a tier.

    chosen: the codecs of its layers, where measuring is to choose them; None: not yet, so lossless.
    shape:  of the page: of a full one or a tail, of the namespace's own geometry or of a group's.
            Groups are not measured, their numbers may be codes, and latents have no K and V: they
            have lossless codecs then.
    """
    text = dict(schema.codecs).get(tier.encode())
    if text is None:
        return None
    exact_first, exact_last = schema.exact_first, schema.exact_last
    try:
        pair = (Codec.XS, Codec.XS) if text == AUTO else parse_codec(text.decode(errors="replace"))
        if isinstance(shape, Latents):
            halves = shape.halves
            return None if halves is None else PageSpec.of(halves, *pair).without_loss()
        if group and not all(takes_dtype(codec, shape.dtype) for codec in pair):
            pair = Codec.XS, Codec.XS  # the codec was said for the namespace's own dtype
        codecs = (pair,) * shape.layers
        if text == AUTO and chosen is not None and not group:
            codecs = chosen
        return PageSpec(shape, codecs, exact_first, exact_last)
    except ValueError as error:  # of a schema that another version saved
        logger.error("namespace %r: tier %s keeps to itself: %s", schema.namespace, tier, error)
        return None
