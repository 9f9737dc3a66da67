"""Encoded pages of every version that was ever released are read, and give what they gave."""

from pathlib import Path

import pytest
import torch

from respkv.kernels.container import VERSION, codec_name, read_head
from respkv.kernels.layout import Codec
from respkv.tiers.codec import decode_page, encoded_page
from tests.tiers.golden.write_pages import payload_of, specs

GOLDEN = Path(__file__).parent / "golden"
PAGES = [
    pytest.param(path, id=f"v{version} {path.stem}")
    for version in range(1, VERSION + 1)
    for path in sorted((GOLDEN / f"pages-v{version}").glob("*.encoded"))
]


@pytest.mark.parametrize("path", PAGES)
def test_every_version_is_read(path: Path) -> None:
    stored, expected = path.read_bytes(), path.with_suffix(".decoded").read_bytes()
    head = read_head(stored)
    into = bytearray(head.geometry.page_bytes)
    decode_page(memoryview(stored), memoryview(into))
    if head.is_lossless:
        assert into == expected
        return
    # Numbers that were rounded on the way may be rounded otherwise by another torch.
    dtype = getattr(torch, head.geometry.dtype)
    found, known = (torch.frombuffer(bytearray(each), dtype=dtype) for each in (into, expected))
    torch.testing.assert_close(found, known, equal_nan=True)


@pytest.mark.parametrize("name", specs())
def test_what_is_written_today_is_what_was_written(name: str) -> None:
    spec = specs()[name]
    stored = encoded_page(payload_of(spec.geometry), spec, has_parent=False)
    known = (GOLDEN / f"pages-v{VERSION}" / f"{name}.encoded").read_bytes()
    head = read_head(known)
    if any(plane.form for plane in head.planes):
        assert read_head(stored).planes[0][:2] == head.planes[0][:2], "zstd may change its mind"
    else:
        assert stored == known


def test_golden_pages_cover_every_codec_and_what_is_special() -> None:
    heads = {path.values[0].stem: read_head(path.values[0].read_bytes()) for path in PAGES}  # type: ignore[union-attr]
    assert {codec.name.lower() for codec in Codec} <= heads.keys()
    codecs = {plane.codec for head in heads.values() for plane in head.planes}
    assert codecs == set(Codec)
    assert {plane.form for head in heads.values() for plane in head.planes} == {0, 1}
    assert {head.geometry.dtype for head in heads.values()} == {"bfloat16", "float16", "float32"}
    assert codec_name(heads["mixed"].codec_id) == "mixed"
    # One plane has a number that no lossy codec holds.
    assert [plane.codec for plane in heads["rh4"].planes] == [Codec.RH4] * 3 + [Codec.RAW]
    assert max(head.exact_first for head in heads.values()) == 4
