"""What namespaces ask for becomes specs of the tiers' codecs."""

import logging
import subprocess
import sys
from dataclasses import replace

import pytest

from respkv.engine.namespaces import AUTO, Namespaces, Schema
from respkv.kernels.layout import Codec
from respkv.page import Geometry
from respkv.server import page_specs
from respkv.server.page_specs import PageSpecs
from respkv.tiers.codec import PageSpec
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
from respkv.page import Geometry
from respkv.server.page_specs import make_ready
for codec in (b"xs", b"unknown", b"xs/i8"):
    schema = Schema(b"ns", Geometry(1, 1, 8, 8, "bfloat16"), codecs=((b"disk", codec),))
    anyio.run(make_ready, [schema])
    print("torch" in sys.modules, "respkv.kernels.ladder" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 4 + ["True"] * 2
