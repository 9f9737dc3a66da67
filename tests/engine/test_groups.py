"""Groups: what all layers of a hybrid model can serve, held against the definition, token by token."""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.chain import Prompt
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.groups import (
    Groups,
    bound_key,
    bound_options,
    clip,
    needs,
    serveable,
    state_key,
    state_options,
)
from respkv.engine.namespaces import Group, Kind, Schema
from respkv.engine.nodes import has_bound_parts_of
from respkv.engine.sequences import Found, Sequences
from respkv.errors import SchemaMismatch
from respkv.page import Geometry, Latents
from tests.fakes import make_cache

T = 4
MAIN = Geometry(1, 1, 1, T, "uint8")  # K of a page is a byte for each token, then V
FULL = Group(b"full", Kind.FULL, Geometry(1, 2, 1, T, "uint8"))
SLIDING = Group(b"local", Kind.SLIDING, Geometry(1, 1, 1, T, "uint8"), window=3)
WIDE = Group(b"wide", Kind.SLIDING, Geometry(1, 1, 1, T, "uint8"), window=7)
STATE = Group(b"mamba", Kind.STATE, nbytes=5)
LATENT = Group(b"mla", Kind.MLA, Latents(1, 1, 3, T, "uint8"))
ALL = (FULL, SLIDING, WIDE, STATE, LATENT)

Tokens = tuple[int, ...]


class Model(NamedTuple):
    """A cache with a namespace of some groups."""

    cache: Cache
    schema: Schema
    sequences: Sequences
    groups: Groups

    def prompt(self, tokens: Sequence[int]) -> Prompt:
        return self.sequences.prompt(b"ns", struct.pack(f"<{len(tokens)}i", *tokens))

    def put(self, tokens: Tokens) -> None:
        """Store the pages of a prompt, those of the namespace's own geometry."""
        prompt = self.prompt(tokens)
        for piece in self.sequences.plan(prompt):
            if not piece.is_there:
                rows = bytes(tokens[piece.first_token : piece.first_token + piece.num_tokens])
                self.cache.put(piece.key, rows * 2, self.sequences.put_options(piece, Put()))
        self.sequences.tidy()

    def put_part(self, tokens: Tokens, group: Group, page: int) -> None:
        """Store the page of a group that goes with a page of a prompt."""
        entry = self.pages(tokens).entries[page]
        rows = bytes(range(entry.tokens)) * (group.piece_bytes(entry.tokens) // entry.tokens)
        self.cache.put(bound_key(entry.key, group.name), rows, bound_options(entry, Put()))

    def put_state(self, tokens: Tokens, group: Group) -> None:
        """Store the state at the end of a prompt."""
        prompt = self.prompt(tokens)
        page = self.pages(tokens).entries[-1]
        offset = (len(tokens) - 1) % T + 1
        how = Put("kvpage", parent=page.key, depth=len(tokens) - offset)
        key = state_key(prompt, len(tokens), group.name)
        self.cache.put(key, b"s" * group.nbytes, state_options(prompt, how))

    def pages(self, tokens: Tokens) -> Found:
        """Return what is here of a prompt, whatever its groups can serve."""
        serve, self.sequences.serve = self.sequences.serve, None
        try:
            return self.sequences.find(self.prompt(tokens))
        finally:
            self.sequences.serve = serve


def make_model(*groups: Group) -> Model:
    cache, _ = make_cache(4 << 20)
    schema = Schema(b"ns", MAIN, groups=tuple(sorted(groups, key=lambda group: group.name)))
    cache.namespaces.put(schema)
    sequences = Sequences(cache)
    found = Groups(cache, sequences.branches)
    sequences.serve, sequences.is_whole = found.serve, found.is_whole
    return Model(cache, schema, sequences, found)


def is_served(model: Model, group: Group, tokens: Tokens, end: int, holders: list[Entry]) -> bool:
    """Say by the definition whether a group can serve a position of a prompt that is here."""
    if not end:
        return True
    if group.kind is Kind.STATE:
        return state_key(model.prompt(tokens), end, group.name) in model.cache.entries
    first = max(0, end - group.window) if group.window else 0
    pages = {token // T for token in range(first, end)}
    return all(bound_key(holders[page].key, group.name) in model.cache.entries for page in pages)


def holders_of(model: Model, tokens: Tokens, end: int) -> list[list[Entry]]:
    """Return each choice of pages that have a prompt up to a position."""
    prompt, num_pages = model.prompt(tokens), end // T
    front = model.pages(tokens).pages[:num_pages]
    if not end % T:
        return [front]
    branch, begin = prompt.branch(num_pages), prompt.token_ids(num_pages, end)
    return [
        [*front, entry]
        for entry in model.cache.entries.values()
        if entry.part is None and entry.branch == branch and entry.token_ids.startswith(begin)
    ]


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=18).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    groups=st.sets(st.sampled_from(ALL), min_size=1),
    stored=st.lists(PROMPTS, min_size=1, max_size=4),
    asked=st.lists(PROMPTS, min_size=1, max_size=4),
    data=st.data(),
)
def test_the_longest_position_is_served_that_every_group_has(
    groups: set[Group], stored: list[Tokens], asked: list[Tokens], data: st.DataObject
) -> None:
    model = make_model(*groups)
    for tokens in stored:
        model.put(tokens)
        entries = model.pages(tokens).entries
        for group in model.schema.groups:
            if group.kind is Kind.STATE:
                for end in data.draw(st.sets(st.integers(1, len(tokens)))):
                    model.put_state(tokens[:end], group)
                continue
            absent = data.draw(st.sets(st.integers(0, 4), max_size=2))
            for page in range(len(entries)):
                if page not in absent:
                    model.put_part(tokens, group, page)
    model.sequences.tidy()
    model.cache.check()
    for tokens in asked + stored:
        found, here = model.sequences.find(model.prompt(tokens)), model.pages(tokens)
        positions = range(here.tokens, -1, -1)
        expected = next(
            end
            for end in positions
            if any(
                all(is_served(model, group, tokens, end, pages) for group in model.schema.groups)
                for pages in holders_of(model, tokens, end)
            )
        )
        assert found.tokens == expected
        assert found.tokens == len(found.pages) * T + found.partial_tokens
        assert (found.partial is None) == (not found.partial_tokens)
        assert found.pages == here.pages[: len(found.pages)]
        for group in (model.schema.group(b""), *model.schema.groups):
            check_needs(model, tokens, found, group)


def check_needs(model: Model, tokens: Tokens, found: Found, group: Group) -> None:
    """Assert that a get reads exactly the tokens that a position needs, each from its page."""
    made = model.groups.needs(model.prompt(tokens), group, found)
    if group.kind is Kind.STATE:
        assert [(need.first_token, need.num_tokens) for need in made] == (
            [(found.tokens, 0)] if found.tokens else []
        )
        return
    first = max(0, found.tokens - group.window) if group.window else 0
    covered: list[int] = []
    for need in made:
        assert need.first_token // T == (need.first_token + need.num_tokens - 1) // T
        assert need.skip == need.first_token % T
        assert need.skip + need.num_tokens <= need.entry.tokens
        covered += range(need.first_token, need.first_token + need.num_tokens)
    assert covered == list(range(first, found.tokens))
    for start in (0, 3, found.tokens):
        clipped = clip(made, start)
        assert all(need.skip == need.first_token % T for need in clipped)
        rows = [
            at for need in clipped for at in range(need.first_token, need.first_token + need[2])
        ]
        assert rows == [at for at in covered if at >= start]


def test_a_namespace_without_groups_serves_what_is_here() -> None:
    model = make_model()
    tokens = tuple(range(10))
    model.put(tokens)
    found = model.pages(tokens)
    assert model.groups.serve(model.prompt(tokens), found) is found
    assert found.tokens == 10


def test_attention_groups_serve_positions_inside_a_page_and_a_state_only_its_own() -> None:
    model = make_model(FULL, STATE)
    tokens = tuple(range(10))
    model.put(tokens)
    for page in range(3):
        model.put_part(tokens, FULL, page)
    assert model.sequences.find(model.prompt(tokens)).tokens == 0
    model.put_state(tokens[:7], STATE)
    assert model.sequences.find(model.prompt(tokens)).tokens == 7
    assert model.sequences.find(model.prompt((*tokens[:7], 99, 98))).tokens == 7
    assert model.sequences.find(model.prompt((*tokens[:6], 99, 98))).tokens == 0
    model.put_state(tokens[:4], STATE)
    assert model.sequences.find(model.prompt((*tokens[:6], 99, 98))).tokens == 4


def test_a_state_is_found_through_a_sibling_of_the_page_that_it_hangs_on() -> None:
    model = make_model(STATE)
    model.put((1, 2, 3, 4, 5, 6, 7, 8))
    model.put_state((1, 2, 3, 4, 5, 6), STATE)
    model.put((1, 2, 3, 4, 5, 6, 9, 9, 1))
    assert model.sequences.find(model.prompt((1, 2, 3, 4, 5, 6, 9, 9))).tokens == 6


def test_a_sliding_group_needs_its_last_window_and_nothing_in_front() -> None:
    model = make_model(WIDE)
    tokens = tuple(range(20))
    model.put(tokens)
    for page in (3, 4):
        model.put_part(tokens, WIDE, page)
    assert model.sequences.find(model.prompt(tokens)).tokens == 20
    assert model.sequences.find(model.prompt(tokens[:19])).tokens == 19
    assert model.sequences.find(model.prompt(tokens[:18])).tokens == 0  # it needs token 11
    found = model.sequences.find(model.prompt(tokens))
    made = model.groups.needs(model.prompt(tokens), WIDE, found)
    assert [(need.first_token, need.num_tokens, need.skip) for need in made] == [
        (13, 3, 1),
        (16, 4, 0),
    ]


def test_states_of_pages_that_go_are_forgotten() -> None:
    model = make_model(STATE)
    model.put((1, 2, 3, 4, 5))
    model.put_state((1, 2, 3, 4, 5), STATE)
    model.put_state((1, 2), STATE)
    states = model.groups.states
    prompt = model.prompt((1, 2, 3, 4, 5))
    assert states.offsets(prompt.branch(0), b"mamba") == [2]
    assert states.offsets(prompt.branch(1), b"mamba") == [1]
    tail = model.pages((1, 2, 3, 4, 5)).entries[1]
    model.cache.delete(tail)
    assert states.offsets(prompt.branch(1), b"mamba") == []
    model.cache.flush()
    assert states.offsets(prompt.branch(0), b"mamba") == []


def test_groups_that_come_late_know_the_states_that_are_here() -> None:
    model = make_model(STATE)
    model.put((1, 2, 3))
    model.put_state((1, 2), STATE)
    model.sequences.serve = Groups(model.cache, model.sequences.branches).serve
    assert model.sequences.find(model.prompt((1, 2, 3))).tokens == 2


def test_a_part_of_the_wrong_size_is_none() -> None:
    model = make_model(FULL)
    model.put((1, 2, 3, 4))
    page = model.pages((1, 2, 3, 4)).entries[0]
    model.cache.put(bound_key(page.key, b"full"), b"x" * 7, bound_options(page, Put()))
    assert model.sequences.find(model.prompt((1, 2, 3, 4))).tokens == 0


def test_a_part_whose_time_is_over_is_none() -> None:
    model = make_model(FULL)
    model.put((1, 2, 3, 4))
    model.put_part((1, 2, 3, 4), FULL, 0)
    page = model.pages((1, 2, 3, 4)).entries[0]
    part = model.cache.entries[bound_key(page.key, b"full")]
    model.cache.expire_at(part, model.cache.clock.wall_ms)
    assert model.sequences.find(model.prompt((1, 2, 3, 4))).tokens == 0


def test_it_is_told_which_groups_of_a_page_another_one_lacks() -> None:
    model = make_model(FULL, STATE)
    model.put((1, 2))
    model.put((3, 4))
    one, other = model.pages((1, 2)).entries[0], model.pages((3, 4)).entries[0]
    model.put_state((1, 2), STATE)
    assert has_bound_parts_of(other, one)
    model.put_part((1, 2), FULL, 0)
    assert not has_bound_parts_of(other, one)
    model.put_part((3, 4), FULL, 0)
    assert has_bound_parts_of(other, one)


def test_nothing_is_needed_of_a_prompt_of_which_nothing_is_here() -> None:
    model = make_model(*ALL)
    prompt, nothing = model.prompt((1, 2)), Found(0, [])
    for group in model.schema.groups:
        assert needs(prompt, group, nothing, model.cache.find) == []
    states = model.groups.states
    assert serveable(model.schema, prompt, nothing, model.cache.find, states) == 0


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_a_piece_has_the_bytes_of_its_tokens(tokens: int) -> None:
    shape = FULL.piece_geometry(tokens)
    assert shape is not None
    assert shape.tokens == tokens
    assert FULL.piece_bytes(tokens) == shape.page_bytes == 2 * tokens * 2
    assert LATENT.piece_bytes(tokens) == 3 * tokens
    assert (STATE.piece_bytes(tokens), STATE.piece_geometry(tokens)) == (5, None)
    FULL.check_piece(tokens, 4 * tokens)
    with pytest.raises(SchemaMismatch, match=f"{tokens} tokens of group 'full' has"):
        FULL.check_piece(tokens, 4 * tokens + 1)
    with pytest.raises(SchemaMismatch, match="a state of group 'mamba' has 5 bytes"):
        STATE.check_piece(tokens, 4)


def test_a_tail_stays_until_what_is_longer_has_the_pages_of_its_groups() -> None:
    model = make_model(FULL, STATE)
    model.put((1, 2))
    model.put_part((1, 2), FULL, 0)
    model.put_state((1, 2), STATE)
    tail = model.pages((1, 2)).entries[0]
    model.put((1, 2, 3))
    assert tail.position >= 0
    assert model.sequences.find(model.prompt((1, 2))).tokens == 2
    longer = model.pages((1, 2, 3)).entries[0]
    assert longer is not tail
    model.put_part((1, 2, 3), FULL, 0)
    model.sequences.tidy()
    assert tail.position < 0
    assert model.sequences.find(model.prompt((1, 2))).tokens == 2
    assert model.sequences.find(model.prompt((1, 2, 3))).tokens == 2
    state = model.cache.entries[state_key(model.prompt((1, 2)), 2, b"mamba")]
    assert state.parent is longer
    model.cache.check()


def test_what_a_match_needs_of_all_groups_is_kept() -> None:
    model = make_model(SLIDING, STATE)
    tokens = tuple(range(8))
    model.put(tokens)
    for page in (0, 1):
        model.put_part(tokens, SLIDING, page)
    model.put_state(tokens, STATE)
    prompt, clock = model.prompt(tokens), model.cache.clock
    used = model.groups.use(prompt, model.sequences.find(prompt), clock.now + 1)
    assert [entry.key[67:] for entry in used] == [b".g.local", b".s.mamba"]
    assert all(entry.held_until == clock.now + 1 for entry in used)
    assert model.groups.use(prompt, Found(0, []), clock.now + 1) == []


def test_a_tail_is_stored_beside_what_is_longer_and_lacks_a_group() -> None:
    model = make_model(FULL, STATE)
    model.put((1, 2, 3))
    model.put((1, 2))
    assert [entry.tokens for entry in model.pages((1, 2)).entries] in ([2], [3])
    piece = model.sequences.plan(model.prompt((1, 2)))[0]
    assert piece.there is not None
    assert piece.there.tokens == 2
    key = bound_key(piece.key, FULL.name)
    options = bound_options(piece.there, Put())
    model.cache.put(key, bytes(FULL.piece_bytes(2)), options)
    model.put_state((1, 2), STATE)
    assert model.sequences.find(model.prompt((1, 2))).tokens == 2
    longer = next(entry for entry in model.cache.entries.values() if entry.tokens == 3)
    options = bound_options(longer, Put())
    model.cache.put(bound_key(longer.key, FULL.name), bytes(FULL.piece_bytes(3)), options)
    assert model.sequences.tidy() == 1, "now it is of no use"
    assert model.sequences.find(model.prompt((1, 2))).tokens == 2
    piece = model.sequences.plan(model.prompt((1,)))[0]
    assert piece.there is longer


@pytest.mark.parametrize("group", [FULL, SLIDING, LATENT], ids=lambda group: str(group.name))
def test_what_a_group_stored_before_there_was_a_schema_serves_nothing(group: Group) -> None:
    model, tokens = make_model(group), (1, 2, 3, 4)
    page_key = model.prompt(tokens).key(0)
    key, value = bound_key(page_key, group.name), bytes(group.piece_bytes(T))
    model.cache.namespaces.drop(b"ns")
    model.cache.put(key, value, Put("kvpage", parent=page_key, tokens=T))
    model.cache.namespaces.put(model.schema)
    model.put(tokens)
    assert model.cache.entries[key].parent is model.cache.entries[page_key]
    assert model.sequences.find(model.prompt(tokens)).tokens == 0
    model.put_part(tokens, group, 0)
    assert model.sequences.find(model.prompt(tokens)).tokens == 4
