"""Pages are copied to where they belong, in runs where they lie so, from any start to any end."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.client import as_bytes
from respkv.integrations.huggingface.page_copies import Stored, Target, address_of, as_one
from respkv.page import Geometry

SHAPE = Geometry(layers=2, heads=2, dim=4, tokens=8, dtype="float32")
TOKENS = 44  # five pages and a tail


@settings(max_examples=80, deadline=None)
@given(
    st.permutations(range(6)),
    st.sampled_from([64, 100]),
    st.integers(0, TOKENS - 1),
    st.integers(1, TOKENS),
    st.booleans(),
)
def test_rows_are_those_of_the_pages(
    order: list[int], gap: int, first: int, count: int, is_grid: bool
) -> None:
    kv = torch.randn(2, 2, TOKENS, 2, 4)
    slot = SHAPE.page_bytes + gap * 4
    memory = torch.zeros(6 * slot, dtype=torch.uint8)
    pages = []
    for number, place in enumerate(order):
        rows = kv[:, :, number * 8 : number * 8 + 8].contiguous()
        part = memory[place * slot : place * slot + rows.nbytes]
        part.copy_(rows.view(-1).view(torch.uint8))
        view = as_bytes(part)
        pages.append(Stored(number * 8, rows.shape[2], address_of(view), len(view)))
    stop = min(first + count, TOKENS)
    whole = torch.full((2, 2, stop - first + 3, 2, 4), torch.nan)
    into = [(layer[0], layer[1]) for layer in whole]
    if not is_grid:
        into = [(key.clone(), value.clone()) for key, value in into]
    Target(into, SHAPE, first).copy(pages, stop)
    for layer, pair in enumerate(into):
        for side, tensor in enumerate(pair):
            assert torch.equal(tensor[: stop - first], kv[layer, side, first:stop])
            assert tensor[stop - first :].isnan().all()


def test_what_lies_in_one_piece_is_seen_as_one() -> None:
    whole = torch.randn(3, 2, 9, 2, 4)
    pairs = [(layer[0, 2:7], layer[1, 2:7]) for layer in whole]
    found = as_one(pairs)
    assert found is not None
    assert found.data_ptr() == pairs[0][0].data_ptr()
    assert torch.equal(found, whole[:, :, 2:7])
    assert as_one([pairs[0], pairs[2], pairs[1]]) is None
    assert as_one([(value, key) for key, value in pairs]) is None
    assert as_one([*pairs[:2], (pairs[2][0].clone(), pairs[2][1])]) is None
    single = as_one(pairs[:1])
    assert single is not None
    assert torch.equal(single, whole[:1, :, 2:7])
