"""KV.QUALITY: what a codec would do to the pages of a namespace."""

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from respkv.engine.namespaces import Schema
from respkv.errors import CommandError
from respkv.kernels.layout import Codec
from respkv.page import Latents
from respkv.server.arguments import shown
from respkv.server.commands.schemas import codec_text
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.server.tuning import Sample, measure_namespace
from respkv.tiers.codec import check_available, parse_codec
from respkv.wire.parser import Args

if TYPE_CHECKING:
    from respkv.kernels.quality import Quality


@command("kv.quality")
def kv_quality(session: Session, args: Args) -> Awaitable[None]:
    """Measure a codec on live pages of a namespace."""
    schema = session.cache.namespaces.find(args[1])
    if schema is None:
        raise CommandError(f"namespace {shown(args[1])} has no schema (KV.SCHEMA SET)")
    if isinstance(schema.geometry, Latents):
        raise CommandError("KV.QUALITY measures keys and values; latents are stored without loss")
    try:
        codecs = parse_codec(args[2].decode(errors="replace").lower())
    except ValueError as error:
        raise CommandError(str(error)) from None
    for codec in (*codecs, Codec.RH4):  # whatever is asked for, measuring needs torch
        check_available(codec, schema.geometry.dtype)
    return _measure(session, schema, codecs)


async def _measure(session: Session, schema: Schema, codecs: tuple[Codec, Codec]) -> None:
    if session.is_muted:
        return
    with session.until_lost():
        sample = await measure_namespace(session.server, schema, codecs)
        if sample is None:
            raise CommandError(
                f"namespace {shown(schema.namespace)} has no pages to measure that are as they were put"
            )
        session.send(
            {
                "codec": codec_text(codecs),
                "pages": sample.pages,
                "tokens": sample.pages * schema.geometry.tokens,
                **_side("key", [layer[0] for layer in sample.measured[0]]),
                **_side("value", [layer[1] for layer in sample.measured[1]]),
                "layers": _layers(sample),
            }
        )


def _side(side: str, layers: "list[Quality]") -> dict[str, str]:
    """Describe keys or values: the mean of the bits, of errors the worst layer's."""
    return {
        f"{side}_bits": f"{sum(layer.bits for layer in layers) / len(layers):.3f}",
        f"{side}_relative_l2": f"{max(layer.relative_l2 for layer in layers):.6f}",
        f"{side}_max_error": f"{max(layer.max_error for layer in layers):.6g}",
        f"{side}_attention_error": f"{max(layer.attention_error for layer in layers):.6f}",
    }


def _layers(sample: Sample) -> list[list[str]]:
    """Return the relative L2 error of keys and of values of each layer."""
    pairs = zip(*sample.measured, strict=True)
    return [[f"{key[0].relative_l2:.6f}", f"{value[1].relative_l2:.6f}"] for key, value in pairs]
