"""What namespaces ask for becomes specs of the tiers' codecs."""

import logging
import subprocess
import sys
from dataclasses import replace

import pytest

from respkv.engine.namespaces import AUTO, Group, Kind, Namespaces, Schema
from respkv.kernels.layout import Codec
from respkv.page import Geometry, Latents
from respkv.server import page_specs
from respkv.server.page_specs import PageSpecs
from respkv.tiers.codec import PageSpec, decode_stored, encode_page
from respkv.tiers.record import Meta

SHAPE = Geometry(2, 2, 16, 32, "bfloat16")
META = Meta(b"ns:" + b"0" * 64, "kvpage", SHAPE.page_bytes, 0, 1)
SCHEMA = Schema(
    b"ns",
    SHAPE,
    codecs=((b"nvme", b"xs"), (b"disk", b"rh4/rhz"), (b"cpu", b"raw")),
    exact_first=4,
    exact_last=2,
)


def specs_of(schema: Schema) -> tuple[PageSpecs, Namespaces]:
    namespaces = Namespaces()
    namespaces.put(schema)
    return PageSpecs(namespaces), namespaces


def test_each_tier_has_the_codecs_that_the_namespace_names() -> None:
    specs, _ = specs_of(SCHEMA)
    exact = {"exact_first": 4, "exact_last": 2}
    assert specs.of("nvme", META) == PageSpec.of(SHAPE, Codec.XS, Codec.XS, **exact)
    assert specs.of("disk", META) == PageSpec.of(SHAPE, Codec.RH4, Codec.RHZ3, **exact)
    assert specs.of("disk", META) is specs.of("disk", META)
    assert specs.of("elsewhere", META) is None
    assert specs.of("nvme", META._replace(key=b"other:" + b"0" * 64)) is None


def test_a_schema_that_changes_is_followed() -> None:
    specs, namespaces = specs_of(SCHEMA)
    assert specs.of("nvme", META) is not None
    namespaces.put(replace(SCHEMA, codecs=((b"nvme", b"i8"),)))
    assert specs.of("nvme", META) == PageSpec.of(
        SHAPE, Codec.I8, Codec.I8, exact_first=4, exact_last=2
    )
    assert specs.of("disk", META) is None
    namespaces.drop(b"ns")
    assert specs.of("nvme", META) is None


def test_tails_have_the_codecs_of_pages_with_fewer_tokens() -> None:
    specs, _ = specs_of(SCHEMA)
    tail = replace(SHAPE, tokens=5)
    meta = META._replace(payload_bytes=tail.page_bytes, tokens=5)
    exact = {"exact_first": 4, "exact_last": 2}
    assert specs.of("disk", meta) == PageSpec.of(tail, Codec.RH4, Codec.RHZ3, **exact)
    assert specs.of("disk", meta) is specs.of("disk", meta)
    assert specs.of("disk", META) == PageSpec.of(SHAPE, Codec.RH4, Codec.RHZ3, **exact)
    assert specs.of("disk", meta._replace(tokens=6)) is None, "it is something else"


def test_pages_of_groups_have_their_own_shape_and_what_has_none_is_left_alone() -> None:
    full = Geometry(3, 1, 64, 16, "float16")
    codes = replace(full, dtype="uint8")
    latents = Latents(5, 1, 6, 16, "bfloat16")
    groups = (
        Group(b"codes", Kind.SLIDING, codes, 4),
        Group(b"full", Kind.FULL, full),
        Group(b"mamba", Kind.STATE, nbytes=SHAPE.page_bytes),
        Group(b"mla", Kind.MLA, latents),
    )
    specs, namespaces = specs_of(replace(SCHEMA, groups=groups))

    def of(tier: str, suffix: bytes, shape: Geometry) -> PageSpec | None:
        meta = META._replace(
            key=META.key + suffix, payload_bytes=shape.page_bytes, tokens=shape.tokens
        )
        return specs.of(tier, meta)

    exact = {"exact_first": 4, "exact_last": 2}
    assert of("disk", b".g.full", full) == PageSpec.of(full, Codec.RH4, Codec.RHZ3, **exact)
    assert of("nvme", b".g.codes", codes) == PageSpec.of(codes, Codec.XS, Codec.XS, **exact)
    lossless = of("disk", b".g.codes", codes)
    assert lossless == PageSpec.of(codes, Codec.XS, Codec.XS, **exact), "codes are no numbers"
    halves = Geometry(5, 1, 3, 16, "bfloat16")
    assert of("disk", b".g.mla", latents) == PageSpec.of(halves, Codec.XS, Codec.XS)
    for suffix in (b".s.mamba", b".logits", b".hidden", b".g.absent"):
        assert of("disk", suffix, SHAPE) is None
    auto = replace(SCHEMA, codecs=((b"disk", AUTO),), error_max=0.1, groups=groups)
    namespaces.put(auto)
    namespaces.chosen[b"ns"] = ((Codec.I8, Codec.RH4), (Codec.I8, Codec.RH2))
    assert of("disk", b".g.full", full) == PageSpec.of(full, Codec.XS, Codec.XS, **exact)
    assert of("disk", b"", SHAPE) == PageSpec(SHAPE, namespaces.chosen[b"ns"], **exact)


@pytest.mark.parametrize("codec", sorted(Codec))
@pytest.mark.parametrize("tokens", [1, 3, 7, 15])
def test_tails_come_back_through_every_codec(codec: Codec, tokens: int) -> None:
    torch = pytest.importorskip("torch")
    shape = replace(SHAPE, tokens=tokens, dim=64)
    numbers = torch.randn(
        2, 2, tokens, 2, 64, generator=torch.Generator().manual_seed(1)
    ).bfloat16()
    payload = memoryview(numbers.view(torch.uint8).numpy().reshape(-1)).cast("B")
    for exact_first in (0, 2):
        spec = PageSpec.of(shape, codec, codec, exact_first=exact_first)
        number, stored = encode_page(payload, spec, has_parent=False)
        back = bytearray(len(payload))
        is_lossless = decode_stored(number, memoryview(stored), memoryview(back))
        assert is_lossless >= codec.is_lossless
        found = torch.frombuffer(back, dtype=torch.bfloat16).view(numbers.shape)
        assert (found[:, :, :exact_first] == numbers[:, :, :exact_first]).all()
        error = (found.float() - numbers.float()).norm() / numbers.float().norm()
        assert error == 0 if is_lossless else error < 0.6


def test_latents_come_back_to_the_bit_and_smaller() -> None:
    numpy = pytest.importorskip("numpy")
    latents = Latents(5, 1, 64, 13, "bfloat16")
    schema = replace(SCHEMA, geometry=replace(latents, tokens=16), exact_first=0, exact_last=0)
    specs, _ = specs_of(schema)
    spec = specs.of("disk", META._replace(payload_bytes=latents.page_bytes, tokens=13))
    assert spec is not None
    numbers = numpy.random.default_rng(1).normal(size=5 * 64 * 13).astype("float32")
    payload = (numbers.view("uint32") >> 16).astype("uint16").tobytes()
    number, stored = encode_page(memoryview(payload), spec, has_parent=False)
    assert len(stored) < len(payload) * 0.8
    back = bytearray(len(payload))
    assert decode_stored(number, memoryview(stored), memoryview(back))
    assert back == payload


def test_namespaces_that_come_and_go_leave_little_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_specs, "KNOWN_MAX", 4)
    namespaces = Namespaces()
    specs = PageSpecs(namespaces)
    for number in range(20):
        name = b"ns%d" % number
        namespaces.put(replace(SCHEMA, namespace=name))
        assert specs.of("nvme", META._replace(key=name + b":" + b"0" * 64)) is not None
        namespaces.drop(name)
    assert len(specs._known) <= 4


def test_what_is_to_be_measured_is_lossless_until_it_was() -> None:
    specs, namespaces = specs_of(Schema(b"ns", SHAPE, codecs=((b"disk", AUTO),), error_max=0.1))
    assert specs.of("disk", META) == PageSpec.of(SHAPE, Codec.XS, Codec.XS)
    chosen = ((Codec.I8, Codec.RH4), (Codec.XS, Codec.RH2))
    namespaces.chosen[b"ns"] = chosen
    assert specs.of("disk", META) == PageSpec(SHAPE, chosen)
    namespaces.chosen[b"ns"] = chosen[::-1]
    assert specs.of("disk", META) == PageSpec(SHAPE, chosen[::-1])


@pytest.mark.parametrize("codec", [b"rh9", b"\xff", b"f8"])
def test_a_schema_of_another_version_leaves_the_tier_to_itself(
    codec: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    shape = replace(SHAPE, dtype="int8")
    specs, _ = specs_of(Schema(b"ns", shape, codecs=((b"disk", codec),)))
    with caplog.at_level(logging.ERROR):
        meta = META._replace(payload_bytes=shape.page_bytes)
        assert specs.of("disk", meta) is None
        assert specs.of("disk", meta) is None
    assert len(caplog.records) == 1


def test_what_codecs_take_is_loaded_before_pages_wait_for_it() -> None:
    code = """
import sys, anyio
from respkv.engine.namespaces import Schema
from respkv.page import Geometry, Latents
from respkv.server.page_specs import make_ready
for codec in (b"xs", b"unknown", b"xs/i8"):
    schema = Schema(b"ns", Geometry(1, 1, 8, 8, "bfloat16"), codecs=((b"disk", codec),))
    anyio.run(make_ready, [schema])
    print("torch" in sys.modules, "respkv.kernels.ladder" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 4 + ["True"] * 2
