"""The place of a page in its prompt, as files keep it."""

from hypothesis import given
from hypothesis import strategies as st

from respkv.engine.entry import Entry
from respkv.engine.lineage import pack_lineage, take_lineage

Fields = tuple[int, bytes, bytes, bytes]


def page(fields: Fields = (0, b"", b"", b"")) -> Entry:
    entry = Entry(b"key", "kvpage", 1, 0.0)
    entry.depth, entry.branch, entry.tenant, entry.token_ids = fields
    return entry


def fields_of(entry: Entry) -> Fields:
    return entry.depth, entry.branch, entry.tenant, entry.token_ids


lineages = st.tuples(
    st.integers(0, 2**40), st.binary(max_size=24), st.binary(max_size=300), st.binary(max_size=99)
)


@given(lineages)
def test_it_is_read_back_as_it_was(fields: Fields) -> None:
    if not fields[1]:
        fields = (*fields[:3], b"")  # no page has tokens without a branch
    entry = page((9, b"other", b"other", b"other"))
    take_lineage(entry, pack_lineage(page(fields)))
    assert fields_of(entry) == fields


def test_what_has_none_takes_no_bytes() -> None:
    assert pack_lineage(page()) == b""
    string = page((1, b"b", b"t", b""))
    string.kind = "string"
    assert pack_lineage(string) == b""


@given(lineages, st.integers(0, 400))
def test_what_is_cut_short_is_never_taken_for_another_branch_or_tenant(
    fields: Fields, length: int
) -> None:
    entry = page((9, b"other", b"other", b"other"))
    take_lineage(entry, pack_lineage(page(fields))[:length])
    depth, branch, tenant, token_ids = fields_of(entry)
    assert (depth, branch, tenant) in (fields[:3], (0, b"", b""))
    assert fields[3].startswith(token_ids)
