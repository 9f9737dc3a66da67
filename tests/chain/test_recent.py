"""Prompts of late: their ids are those of hashing anew, whatever was named before, and within bounds."""

import hashlib
from typing import Final, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.chain import ALGORITHMS, NO_EXTRAS, Chain, Extras, Media, Prompt, pack_tokens
from respkv.chain.recent import RecentPrompts

CHAINS: Final = [
    Chain(algorithm, seed, page_tokens)
    for algorithm in ALGORITHMS
    for seed in (b"", b"weights")
    for page_tokens in (1, 2, 4)
]
EXTRAS: Final = [
    NO_EXTRAS,
    Extras(salt=b"pepper"),
    Extras(tenant=b"pepper"),
    Extras(lora=b"sql"),
    Extras(lora=b"sql", lora_path=b"/adapters/sql"),
    Extras(media=(Media(1, 3, b"cat"),)),
    Extras(media=(Media(1, 3, b"dog"),)),
    Extras(media=(Media(2, 3, b"cat"),)),
    Extras(media=(Media(1, 3, b"cat"), Media(5, 1, b"dog"))),
]
Named: TypeAlias = tuple[Chain, bytes, bytes, Extras, bytes, int]


@st.composite
def named(draw: st.DrawFn) -> list[Named]:
    """Draw prompts, and for how many of the ids of each is asked.

    There are few of all that tells them apart, so that most have nearly all of it in common.
    """
    texts = draw(st.lists(st.lists(st.sampled_from([0, 1, 1 << 30]), max_size=12), max_size=2))
    chains = draw(st.lists(st.sampled_from(CHAINS), min_size=1, max_size=2))
    extras = draw(st.lists(st.sampled_from(EXTRAS), min_size=1, max_size=2))
    found = list[Named]()
    for _ in range(draw(st.integers(0, 10))):
        text = draw(st.sampled_from([*texts, [0, 1, 0, 1, 0, 1, 0, 1]]))
        data = pack_tokens([*text[: draw(st.integers(4, 12))], *draw(st.sampled_from([[], [1]]))])
        chain, name = draw(st.sampled_from(chains)), draw(st.sampled_from([b"m", b"n"]))
        tag = draw(st.sampled_from([b"", b"8 bytes."]))
        asked = draw(st.integers(0, len(data) // 4 // chain.page_tokens))
        found.append((chain, name, data, draw(st.sampled_from(extras)), tag, asked))
    return found


@settings(max_examples=300, deadline=None)
@given(prompts=named(), bytes_max=st.sampled_from([0, 3000, 5000, 1 << 20, 1 << 20]))
def test_ids_are_those_of_hashing_anew_whatever_was_named_before(
    prompts: list[Named], bytes_max: int
) -> None:
    recent = RecentPrompts(bytes_max)
    made = list[tuple[Prompt, Prompt]]()
    for chain, namespace, data, extras, tag, asked in prompts:
        prompt = recent.prompt(chain, namespace, data, extras, tag)
        anew = chain.prompt(namespace, data, extras, tag)
        assert prompt.ids(asked)[:asked] == anew.ids(asked)
        made.append((prompt, anew))
        assert recent.num_bytes <= bytes_max
    for prompt, anew in made:  # also of those that have been forgotten meanwhile
        assert prompt.tokens == anew.tokens
        assert prompt.ids(prompt.num_pages) == anew.ids(anew.num_pages)
        assert prompt.keys(0, prompt.num_pages) == anew.keys(0, anew.num_pages)
        if prompt.num_tokens:
            assert prompt.position_key(prompt.num_tokens) == anew.position_key(anew.num_tokens)
        assert [prompt.branch(each) for each in range(prompt.num_pages)] == [
            anew.branch(each) for each in range(anew.num_pages)
        ]


class Counting:
    """sha256, and how often it was asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, data: bytes) -> "hashlib._Hash":
        self.count += 1
        return hashlib.sha256(data)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> tuple[Chain, Counting]:
    """A chain whose hashes are counted."""
    hashes, chain = Counting(), Chain("sha256", b"", 4)
    monkeypatch.setattr(chain.scheme, "_hash", hashes)
    return chain, hashes


def test_a_prompt_is_hashed_once(counting: tuple[Chain, Counting]) -> None:
    chain, hashes = counting
    recent = RecentPrompts(1 << 20)
    for _ in range(3):
        recent.prompt(chain, b"m", pack_tokens(range(40))).ids(10)
    assert hashes.count == 10


def test_what_a_prompt_begins_with_is_not_hashed_again(counting: tuple[Chain, Counting]) -> None:
    chain, hashes = counting
    recent = RecentPrompts(1 << 20)
    recent.prompt(chain, b"m", pack_tokens(range(40))).ids(10)
    longer = recent.prompt(chain, b"m", pack_tokens(range(48)))
    assert longer.ids(12)[9] == recent.prompt(chain, b"m", pack_tokens(range(40))).id(9)
    assert hashes.count == 12
    other = [*range(23), 7, *range(24, 40)]
    recent.prompt(chain, b"m", pack_tokens(other)).ids(10)
    assert hashes.count == 17, "the first five pages are those of the other one"


def test_the_one_named_longest_ago_goes_first(counting: tuple[Chain, Counting]) -> None:
    chain, hashes = counting
    recent = RecentPrompts(5000)
    some = [pack_tokens(range(first, first + 40)) for first in (0, 100, 200, 300)]
    for data in some[:2]:
        recent.prompt(chain, b"m", data).ids(10)
    for data in (some[0], some[2], some[0]):
        recent.prompt(chain, b"m", data).ids(10)
    assert hashes.count == 30
    recent.prompt(chain, b"m", some[1]).ids(10)
    assert hashes.count == 40
    assert len(recent) == 2


def test_a_prompt_that_would_take_most_of_the_room_leaves_the_others_there() -> None:
    chain, recent = Chain("blake3", b"", 4), RecentPrompts(8000)
    recent.prompt(chain, b"m", pack_tokens(range(40)))
    recent.prompt(chain, b"m", pack_tokens(range(400)))
    assert len(recent) == 1
    assert 40 * 4 < recent.num_bytes <= 4000


def test_nothing_is_known_after_clear(counting: tuple[Chain, Counting]) -> None:
    chain, hashes = counting
    recent = RecentPrompts(1 << 20)
    recent.prompt(chain, b"m", pack_tokens(range(40))).ids(10)
    recent.clear()
    assert (len(recent), recent.num_bytes) == (0, 0)
    recent.prompt(chain, b"m", pack_tokens(range(40))).ids(10)
    assert hashes.count == 20


def test_tokens_that_are_none_are_refused_and_not_kept() -> None:
    recent = RecentPrompts(1 << 20)
    for _ in range(2):
        with pytest.raises(ValueError, match="multiple"):
            recent.prompt(CHAINS[0], b"m", b"abc")
    assert not len(recent)
