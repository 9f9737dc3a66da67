"""Sequences: known cases. Random ones are in test_sequences_machine.py."""

import re

import pytest

from respkv.chain import PAGE_TOKENS_MAX, Extras, Media, pack_tokens
from respkv.engine.cache import Cache
from respkv.engine.entry import Put
from respkv.engine.lineage import pack_lineage
from respkv.engine.namespaces import Schema
from respkv.engine.sequences import Sequences
from respkv.errors import CommandError, SchemaMismatch, SequenceGap
from respkv.page import Geometry
from respkv.tiers.meta import MORE_BYTES_MAX
from tests.engine.sequence_world import Context, World, row, schema_of
from tests.fakes import ManualClock, make_cache

PUT = Put()
CONTEXT = Context(schema_of(b"ns", 4))


@pytest.fixture
def world() -> World:
    cache, _ = make_cache()
    cache.namespaces.put(CONTEXT.schema)
    return World(cache)


def clock_of(world: World) -> ManualClock:
    clock = world.cache.clock
    assert isinstance(clock, ManualClock)
    return clock


def matched(world: World, *tokens: int, context: Context = CONTEXT) -> int:
    return world.match(context, tokens).tokens


def test_a_prompt_is_matched_to_the_token_whatever_page_it_ends_in(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4, 5, 6, 7, 8, 9), PUT)
    assert matched(world, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10) == 9
    assert matched(world, 1, 2, 3, 4, 5, 6, 7) == 7
    assert matched(world, 1, 2, 3, 4, 5, 6, 9, 9, 9, 9, 9) == 6
    assert matched(world, 1, 2) == 2
    assert matched(world, 2, 2) == 0
    assert matched(world) == 0


def test_a_match_counts_its_pages_as_used_and_keeps_them(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4, 5, 6), PUT)
    clock_of(world).advance(5)
    prompt = world.prompt(CONTEXT, (1, 2, 3, 4, 5))
    found = world.sequences.find(prompt)
    assert [entry.hits for entry in found.entries] == [0, 0]
    before = world.cache.stats.matches, world.cache.stats.matched_pages
    found = world.sequences.match(prompt, world.cache.clock.now + 7)
    now = world.cache.clock.now
    for entry in found.entries:
        assert (entry.hits, entry.touched, entry.held_until) == (1, now, now + 7)
    after = world.cache.stats.matches, world.cache.stats.matched_pages
    assert after == (before[0] + 1, before[1] + 2)
    assert (found.partial_tokens, len(found.pages)) == (1, 1)


def test_a_session_goes_on_where_a_tail_ended(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4, 5), PUT)
    prompt = world.prompt(CONTEXT, (1, 2, 3, 4, 5, 6))
    found = world.sequences.match(prompt, 0.0, session=b"talk")
    session = world.cache.requests.find(b"ns", b"talk")
    assert session is not None
    assert found.partial is not None
    assert found.partial.request.session is session
    other = world.prompt(CONTEXT, (1, 2, 3, 4, 9))
    found = world.sequences.match(other, 0.0, session=b"other")
    assert found.partial is None
    assert found.pages[0].request.session.name == b"other"


def test_what_is_there_is_not_put_again(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4, 5, 6), PUT)
    pieces = world.sequences.plan(world.prompt(CONTEXT, (1, 2, 3, 4, 5, 6, 7, 8, 9)))
    assert [(each.first_token, each.num_tokens, each.is_there) for each in pieces] == [
        (0, 4, True),
        (4, 4, False),
        (8, 1, False),
    ]
    (piece,) = world.sequences.plan(world.prompt(CONTEXT, (1, 2, 3, 4, 5)), 4)
    assert piece.is_there  # a longer tail begins with it
    assert piece.there is not None
    assert piece.there.tokens == 2


def test_a_put_that_would_leave_a_gap_says_where_to_go_on(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4), PUT)
    prompt = world.prompt(CONTEXT, tuple(range(1, 14)))
    with pytest.raises(SequenceGap, match=r"only 4 of the 8 tokens in front are here; .*FROM 4"):
        world.sequences.plan(prompt, 8)
    assert SequenceGap.code == "KVGAP"
    assert len(world.sequences.plan(prompt, 4)) == 3
    for first in (-4, 3, 16):
        with pytest.raises(CommandError, match=f"FROM is a multiple of 4 up to 13, not {first}"):
            world.sequences.plan(prompt, first)


def test_pages_in_front_of_a_put_stay_until_it_is_over(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4, 5, 6, 7, 8), PUT)
    clock_of(world).advance(5)
    until = world.cache.clock.now + 9
    pieces = world.sequences.plan(world.prompt(CONTEXT, (1, 2, 3, 4, 5, 6, 7, 8)), 4, until=until)
    assert [entry.held_until for entry in world.cache.entries.values()] == [until] * 2
    assert [piece.is_there for piece in pieces] == [True]


def test_a_tail_goes_when_something_longer_has_its_tokens(world: World) -> None:
    for tokens in ((1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 9)):
        world.put(CONTEXT, tokens, PUT)
    assert sorted(each.tokens for each in world.live().values()) == [(1, 2, 3, 4), (1, 2, 9)]
    assert world.cache.history.find(world.prompt(CONTEXT, (1, 2)).position_key(2)) == "replaced"


@pytest.mark.parametrize(
    ("tail", "longer", "stays"),
    [
        (Put(), Put(), False),
        (Put(priority=1), Put(), True),
        (Put(), Put(priority=1), False),
        (Put(expires_ms=1 << 60), Put(), False),
        (Put(), Put(expires_ms=1 << 60), True),
        (Put(expires_ms=1 << 60), Put(expires_ms=1 << 61), False),
        (Put(expires_ms=1 << 61), Put(expires_ms=1 << 60), True),
        (Put(pinned_until=2000.0), Put(), True),
        (Put(pinned_until=2000.0), Put(pinned_until=3000.0), False),
        (Put(pinned_until=10.0), Put(), False),
    ],
)
def test_a_tail_stays_that_was_to_be_kept_longer(
    world: World, tail: Put, longer: Put, stays: bool
) -> None:
    world.put(CONTEXT, (1, 2), tail)
    world.put(CONTEXT, (1, 2, 3), longer)
    assert ((1, 2) in [each.tokens for each in world.live().values()]) == stays
    assert matched(world, 1, 2, 3) == 3


def test_logits_stay_when_the_tail_that_they_hang_on_goes(world: World) -> None:
    world.put(CONTEXT, (1, 2), PUT, parts=True)
    world.put(CONTEXT, (1, 2, 3, 4, 5), PUT, parts=True)
    prompt = world.prompt(CONTEXT, (1, 2))
    logits = world.sequences.find_part(prompt)
    assert logits is not None
    assert world.cache.copy(logits) == row(CONTEXT, (1, 2))
    assert logits.parent is not None
    assert logits.parent.tokens == 4
    assert world.sequences.parts_of(logits.parent) == [logits]
    assert world.sequences.find_part(world.prompt(CONTEXT, (1, 2, 3))) is None
    world.cache.delete(logits.parent)
    assert world.sequences.find_part(prompt) is None


def test_logits_need_the_page_that_they_hang_on(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4, 5), PUT)
    with pytest.raises(SequenceGap, match="token 6 is not here; put it first, FROM 4"):
        world.sequences.part_options(world.prompt(CONTEXT, (1, 2, 3, 4, 5, 6)), PUT)
    with pytest.raises(SequenceGap):
        world.sequences.part_options(world.prompt(CONTEXT, ()), PUT)
    assert world.sequences.find_part(world.prompt(CONTEXT, ())) is None


def test_options_of_a_piece_that_is_there_are_applied_to_it(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3), Put(expires_ms=1 << 60, priority=2))
    (entry,) = world.cache.entries.values()
    world.put(CONTEXT, (1, 2, 3), Put(expires_ms=1 << 61, priority=1))
    assert (entry.expires_ms, entry.priority) == (1 << 61, 1)
    # What is longer than the piece loses nothing.
    world.put(CONTEXT, (1, 2), Put(expires_ms=1 << 60, priority=0))
    assert (entry.expires_ms, entry.priority, entry.tokens) == (1 << 61, 1, 3)
    world.put(CONTEXT, (1, 2), Put(expires_ms=0, priority=5))
    assert (entry.expires_ms, entry.priority, entry.tokens) == (0, 5, 3)
    world.check()


def test_a_page_whose_time_is_over_is_not_found(world: World) -> None:
    expires_ms = world.cache.clock.wall_ms + 1000
    world.put(CONTEXT, (1, 2, 3, 4), PUT)
    world.put(CONTEXT, (1, 2, 3, 4, 5, 6), Put(expires_ms=expires_ms))
    world.put(CONTEXT, (1, 2, 3, 4, 5, 7, 8), PUT)
    assert matched(world, 1, 2, 3, 4, 5, 6) == 6
    clock_of(world).advance(2)
    assert matched(world, 1, 2, 3, 4, 5, 6) == 5  # the last put took the TTL of the page
    assert world.cache.stats.expired == 1
    world.put(CONTEXT, (1, 2, 3, 4), Put(expires_ms=world.cache.clock.wall_ms + 1000))
    clock_of(world).advance(2)
    assert matched(world, 1, 2, 3, 4, 5, 6) == 0
    assert world.cache.stats.expired == 2
    world.check()


def test_pages_put_by_key_are_found_by_their_tokens_if_the_ids_are_the_same(world: World) -> None:
    tokens = (1, 2, 3, 4)
    key = world.prompt(CONTEXT, tokens).key(0)
    world.cache.put(key, bytes(CONTEXT.schema.geometry.page_bytes), Put("kvpage"))
    prompt = world.prompt(CONTEXT, (1, 2, 3, 4, 5))
    assert world.sequences.find(prompt).tokens == 4
    assert world.sequences.find(world.prompt(CONTEXT, (1, 2))).tokens == 0
    (piece, _) = world.sequences.plan(prompt)
    world.sequences.describe(piece, PUT)  # now its tokens are known
    assert world.sequences.find(world.prompt(CONTEXT, (1, 2))).tokens == 2
    world.sequences.check()


def test_pages_of_a_former_schema_are_neither_found_nor_taken_for_new_ones(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4, 5), PUT)
    changed = Context(schema_of(b"ns", 4, version=1))
    world.cache.namespaces.drop(b"ns")
    world.cache.namespaces.put(changed.schema)
    assert matched(world, 1, 2, 3, 4, 5, context=changed) == 0
    key = world.prompt(changed, (1, 2, 3, 4)).key(0)
    nbytes = changed.schema.geometry.page_bytes
    assert key in world.cache.entries
    assert world.cache.has_page(key, nbytes) is None
    world.put(changed, (1, 2, 3, 4, 5), PUT)
    assert matched(world, 1, 2, 3, 4, 5, context=changed) == 5
    assert world.cache.has_page(key, nbytes) is world.cache.entries[key]
    world.check()


def test_sequences_made_late_know_what_is_there(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4, 5), PUT)
    world.cache.put(b"a string", b"value")
    late = Sequences(world.cache)
    late.check()
    assert late.find(world.prompt(CONTEXT, (1, 2, 3, 4, 5))).tokens == 5
    world.cache.flush()
    late.check()
    assert late.find(world.prompt(CONTEXT, (1, 2, 3, 4, 5))).tokens == 0


# -- what is refused ------------------------------------------------------------------------------


def sequences_of(cache: Cache, namespace: bytes, page_tokens: int, algorithm: bytes) -> Sequences:
    shape = Geometry(1, 1, 8, page_tokens, "uint8")
    cache.namespaces.put(Schema(namespace, shape, hash_algorithm=algorithm))
    return Sequences(cache)


@pytest.mark.parametrize(
    ("page_tokens", "algorithm", "message"),
    [
        (4, b"xxh3", "namespace 'ns' takes no sequences: .*blake3, sha256, sha256_cbor, not with"),
        (4097, b"blake3", "at most 4096 tokens, those of namespace 'ns' have 4097"),
    ],
)
def test_a_schema_whose_pages_cannot_be_chained_is_refused(
    page_tokens: int, algorithm: bytes, message: str
) -> None:
    cache, _ = make_cache()
    sequences = sequences_of(cache, b"ns", page_tokens, algorithm)
    with pytest.raises(SchemaMismatch, match=message):
        sequences.prompt(b"ns", b"")


def test_a_match_keeps_no_page_shorter_than_another_was_promised(world: World) -> None:
    world.put(CONTEXT, (1, 2, 3, 4), PUT)
    now = world.cache.clock.now
    prompt = world.prompt(CONTEXT, (1, 2, 3, 4))
    (page,) = world.sequences.find(prompt).entries
    world.cache.promise(page, now + 60)
    world.sequences.match(prompt, now + 5)
    assert page.held_until == now + 60


def test_a_page_that_is_coming_is_no_gap(world: World) -> None:
    prompt = world.prompt(CONTEXT, tuple(range(10)))
    coming = {prompt.key(0), prompt.key(1)}
    pieces = world.sequences.plan(prompt, 8, is_coming=coming.__contains__)
    assert [piece.first_token for piece in pieces] == [8]
    coming.remove(prompt.key(1))
    with pytest.raises(SequenceGap, match="FROM 0"):
        world.sequences.plan(prompt, 8, is_coming=coming.__contains__)


def test_a_prompt_that_is_none_is_refused(world: World) -> None:
    with pytest.raises(SchemaMismatch, match=r"'other' has no schema.*KV\.SCHEMA SET"):
        world.sequences.prompt(b"other", b"")
    with pytest.raises(CommandError, match="5 bytes are no multiple"):
        world.sequences.prompt(b"ns", bytes(5))
    cache, _ = make_cache()
    sequences = sequences_of(cache, b"n" * 400, 4, b"sha256_cbor")
    with pytest.raises(CommandError, match=re.escape("at most 383 bytes, not 400")):
        sequences.prompt(b"n" * 400, b"")
    sequences = sequences_of(cache, b"ns", 4, b"sha256_cbor")
    with pytest.raises(CommandError, match="salt has to be UTF-8"):
        sequences.prompt(b"ns", pack_tokens([1]), Extras(salt=b"\xff"))


def test_the_largest_page_fits_into_files() -> None:
    """As many tokens, media and words as there may be; lineage.py packs them."""
    cache, _ = make_cache(8 << 20)
    sequences = sequences_of(cache, b"ns", PAGE_TOKENS_MAX, b"blake3")
    media = tuple(Media(at, 1, b"x") for at in range(128))
    extras = Extras(tenant=b"t" * 1024, media=media)
    prompt = sequences.prompt(b"ns", bytes(4 * PAGE_TOKENS_MAX), extras)
    (piece,) = sequences.plan(prompt)
    how = sequences.put_options(piece, Put(tenant=extras.tenant))
    entry = cache.put(piece.key, bytes(16 * PAGE_TOKENS_MAX), how)
    assert len(entry.token_ids) == 4 * PAGE_TOKENS_MAX + 128 * 20
    assert len(pack_lineage(entry)) <= MORE_BYTES_MAX
