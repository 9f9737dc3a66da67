"""Write the golden encoded pages of this version: python -m tests.tiers.golden.write_pages

Run once when container.VERSION grows, or for a codec that is new, and commit what it makes beside
what is there. What is there is never written again: that it can still be read is what
test_golden_pages.py checks. There are a page of each dtype, what codecs made of it, and what that
decodes to.
"""

from pathlib import Path

import torch

from respkv.kernels.container import VERSION
from respkv.kernels.layout import Codec
from respkv.page import Geometry
from respkv.tiers.codec import PageSpec, decode_page, encoded_page
from tests.kernels import data

HERE = Path(__file__).parent / f"pages-v{VERSION}"
SHAPE = Geometry(layers=2, heads=2, dim=16, tokens=40, dtype="bfloat16")
MIXED = ((Codec.I8, Codec.RH2), (Codec.XS, Codec.RHZ4))


def specs() -> dict[str, PageSpec]:
    """Return a page for each codec, some with exact tokens, and what is special."""
    made = {
        codec.name.lower(): PageSpec.of(SHAPE, codec, codec, exact_first=number % 3)
        for number, codec in enumerate(Codec)
    }
    wide = Geometry(layers=1, heads=2, dim=24, tokens=40, dtype="float32")
    made["xs-float32"] = PageSpec.of(wide, Codec.XS, Codec.XS)
    made["rh4-float32"] = PageSpec.of(wide, Codec.RH4, Codec.RH4)
    made["i4-float16"] = PageSpec.of(
        Geometry(layers=1, heads=1, dim=33, tokens=35, dtype="float16"), Codec.I4, Codec.I4
    )
    made["mixed"] = PageSpec(SHAPE, MIXED, exact_first=4, exact_last=3)
    return made


def payload_of(shape: Geometry) -> memoryview:
    """Return the page of this dtype that was written beside the others."""
    return memoryview((HERE / f"{shape.dtype}.payload").read_bytes())


def make_payload(shape: Geometry) -> bytes:
    """Make a page with keys and values as a model has them, and one plane that fits no codec."""
    dtype = getattr(torch, shape.dtype)
    sides = [
        generate(shape.tokens, shape.heads, shape.dim, seed, dtype=dtype)
        for seed in range(shape.layers)
        for generate in (data.keys, data.values)
    ]
    page = torch.stack(sides)
    if shape.layers > 1:
        page[3, 7, 1, 3] = float("nan")
    return page.view(torch.uint8).numpy().tobytes()


def main() -> None:
    """Write what is not there yet."""
    HERE.mkdir(exist_ok=True)
    for name, spec in specs().items():
        payload = HERE / f"{spec.geometry.dtype}.payload"
        if not payload.exists():
            payload.write_bytes(make_payload(spec.geometry))
        if (HERE / f"{name}.encoded").exists():
            continue
        stored = encoded_page(payload_of(spec.geometry), spec, has_parent=False)
        into = bytearray(spec.geometry.page_bytes)
        decode_page(memoryview(stored), memoryview(into))
        (HERE / f"{name}.encoded").write_bytes(stored)
        (HERE / f"{name}.decoded").write_bytes(into)


if __name__ == "__main__":
    main()
