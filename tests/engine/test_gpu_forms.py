"""Which form a page has in the gpu tier."""

import pytest

from respkv.engine import gpu_forms
from respkv.engine.entry import Entry
from respkv.engine.gpu_forms import Forms
from respkv.engine.namespaces import Namespaces, Schema
from respkv.kernels.layout import Codec
from respkv.kernels.page_form import PageForm
from respkv.page import Geometry, Latents, Part

SHAPE = Geometry(layers=2, heads=2, dim=64, tokens=16, dtype="bfloat16")


def forms_of(**how: object) -> tuple[Forms, Namespaces]:
    namespaces = Namespaces()
    namespaces.put(Schema(b"ns", SHAPE, **how))  # type: ignore[arg-type]
    return Forms(namespaces), namespaces


def page(key: bytes = b"ns:1", nbytes: int = SHAPE.page_bytes, parent: bytes = b"") -> Entry:
    entry = Entry(key, "kvpage", nbytes, 0.0)
    entry.parent_key = parent
    return entry


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        (b"raw", Codec.RAW, Codec.RAW),
        (b"i8", Codec.I8, Codec.I8),
        (b"rh4/i4", Codec.RH4, Codec.I4),
        (b"rhz", Codec.RHZ3, Codec.RHZ3),
        (b"xs", Codec.RAW, Codec.RAW),
        (b"auto", Codec.RAW, Codec.RAW),
    ],
)
def test_the_schema_says_the_codecs(text: bytes, key: Codec, value: Codec) -> None:
    forms, _ = forms_of(codecs=((b"disk", b"rh2"), (b"gpu", text)))
    assert forms.find(page()) == PageForm.of(SHAPE, key, value)


def test_pages_are_raw_where_the_schema_says_nothing() -> None:
    forms, _ = forms_of(codecs=((b"disk", b"rh2"),))
    assert forms.find(page()) == PageForm(SHAPE)


def test_first_tokens_are_exact_in_the_first_page_of_a_chain_alone() -> None:
    forms, _ = forms_of(codecs=((b"gpu", b"i8"),), exact_first=4, exact_last=2)
    first, later = forms.find(page()), forms.find(page(parent=b"ns:0"))
    assert first is not None
    assert later is not None
    assert (first.exact_first, first.exact_last) == (4, 2)
    assert (later.exact_first, later.exact_last) == (0, 2)


@pytest.mark.parametrize(
    "entry",
    [
        page(b"other:1"),
        page(b"plain"),
        page(nbytes=SHAPE.page_bytes - 1),
        Entry(b"ns:1", "string", SHAPE.page_bytes, 0.0),
    ],
    ids=["no schema", "no namespace", "another size", "a string"],
)
def test_only_pages_of_a_schema_have_a_form(entry: Entry) -> None:
    forms, _ = forms_of()
    assert forms.find(entry) is None


def test_latents_tails_and_pages_of_groups_are_not_taken_for_pages() -> None:
    forms, namespaces = forms_of()
    assert forms.find(page(b"ns:" + b"0" * 64)) is not None
    part = page(b"ns:" + b"0" * 64 + b".g.full")  # of the same size
    part.part = Part.BOUND
    assert forms.find(part) is None
    assert forms.find(page(nbytes=SHAPE.page_bytes // 16 * 15)) is None
    latents = Latents(2, 1, 64, 16, "bfloat16")
    namespaces.put(Schema(b"latents", latents))
    assert forms.find(page(b"latents:1", latents.page_bytes)) is None


def test_a_schema_that_changed_gives_another_form() -> None:
    forms, namespaces = forms_of()
    assert forms.find(page()) == PageForm(SHAPE)
    namespaces.put(Schema(b"ns", SHAPE, codecs=((b"gpu", b"f8"),)))
    assert forms.find(page()) == PageForm.of(SHAPE, Codec.F8, Codec.F8)


def test_namespaces_that_come_and_go_leave_little_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_forms, "MADE_MAX", 4)
    forms, namespaces = forms_of()
    for number in range(20):
        name = b"ns%d" % number
        namespaces.put(Schema(name, SHAPE))
        assert forms.find(page(name + b":1")) is not None
        namespaces.drop(name)
    assert len(forms._made) <= 4
