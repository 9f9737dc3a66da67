"""Events in vLLM's words: what is told of what becomes of a page."""

from typing import Any

import msgspec
import pytest

from respkv.chain import Chain, Extras, Media
from respkv.engine.events import Event, Kind
from respkv.server.vllm_events import Batch, Translator, number_of, whole
from tests.server import vllm
from tests.server.vllm import AllBlocksCleared, BlockRemoved, stored

TOKENS = b"".join(number.to_bytes(4, "little", signed=True) for number in (1, 2, 3, -4))


def page_id(number: int) -> bytes:
    return number.to_bytes(32, "big")


def event(kind: Kind, number: int, **fields: Any) -> Event:
    key = b"ns:" + page_id(number).hex().encode()
    filled = Event(kind, b"ns", 1, key, 4, 4, tier="cpu", reason="new", nbytes=100)
    return filled._replace(**fields)


def translated(
    *events: Event, has_tokens: bool = True, has_files: bool = False, ints: bool = False
) -> list[object]:
    """Return what vLLM's own structs make of the events once they were sent."""
    translator = Translator(
        number_of if ints else whole, has_tokens=has_tokens, has_files=has_files
    )
    batch = Batch(1.5, translator.translate(events))
    found = vllm.DECODER.decode(msgspec.msgpack.encode(batch))
    assert found.ts == 1.5
    assert found.data_parallel_rank is None
    return list(found.events)


def test_a_stored_page_has_its_hash_parent_tokens_and_size() -> None:
    parent = b"ns:" + page_id(1).hex().encode()
    found = translated(event("stored", 2, token_ids=TOKENS, parent=parent))
    assert found == [stored([page_id(2)], page_id(1), [1, 2, 3, -4])]


def test_pages_of_one_chain_are_told_of_together() -> None:
    chain = [
        event("stored", number, token_ids=TOKENS, parent=b"ns:%064x" % (number - 1))
        for number in range(1, 5)
    ]
    other = event("stored", 9, token_ids=TOKENS)
    found = translated(*chain[:3], other, chain[3])
    assert found == [
        stored([page_id(1), page_id(2), page_id(3)], page_id(0), [1, 2, 3, -4] * 3),
        stored([page_id(9)], None, [1, 2, 3, -4]),
        stored([page_id(4)], page_id(3), [1, 2, 3, -4]),
    ]


def test_tokens_with_media_among_them_are_not_said() -> None:
    """Two images that stand for the same tokens would have the same hash to who hashes those."""
    image = Media(2, 1, b"digest of an image")
    prompt = Chain("blake3", b"", 4).prompt(b"ns", bytes(16), Extras(media=(image,)))
    found = translated(event("stored", 2, token_ids=prompt.token_ids(0)))
    assert found == [stored([page_id(2)], None, [])]


def test_pages_with_and_without_tokens_are_told_of_apart() -> None:
    found = translated(
        event("stored", 1, token_ids=TOKENS), event("stored", 2, parent=b"ns:%064x" % 1)
    )
    assert found == [
        stored([page_id(1)], None, [1, 2, 3, -4]),
        stored([page_id(2)], page_id(1), []),
    ]


def test_a_page_that_moves_leaves_one_medium_for_the_other() -> None:
    """In this order: an indexer that knows no media ends with the block, too."""
    assert translated(event("demoted", 1, tier="nvme")) == [
        BlockRemoved([page_id(1)], "CPU"),
        stored([page_id(1)], None, [], "STORAGE"),
    ]
    assert translated(event("promoted", 1)) == [
        BlockRemoved([page_id(1)], "STORAGE"),
        stored([page_id(1)], None, []),
    ]


def test_a_page_is_removed_from_the_medium_it_was_in() -> None:
    found = translated(event("removed", 1), event("removed", 2), event("removed", 3, tier="disk"))
    assert found == [
        BlockRemoved([page_id(1), page_id(2)], "CPU"),
        BlockRemoved([page_id(3)], "STORAGE"),
    ]


def test_a_page_with_another_value_is_in_no_file_any_more() -> None:
    replaced = event("stored", 1, reason="replaced")
    assert translated(replaced) == [stored([page_id(1)], None, [])]
    assert translated(replaced, has_files=True) == [
        BlockRemoved([page_id(1)], "STORAGE"),
        stored([page_id(1)], None, []),
    ]


def test_a_flush_is_told_once_for_a_topic() -> None:
    cleared = Event("cleared", b"a", 7)
    found = translated(event("removed", 1), cleared, cleared._replace(namespace=b"b"))
    assert found == [BlockRemoved([page_id(1)], "CPU"), AllBlocksCleared()]


@pytest.mark.parametrize(
    "other",
    [
        event("stored", 1, tokens=3),
        event("removed", 1, key=b"ns:%064x.logits" % 1),
        event("stored", 1, key=b"ns:%064x.g.window" % 1),
        event("stored", 1, key=b"ns:document"),
    ],
)
def test_tails_parts_and_pages_without_an_id_are_not_told_of(other: Event) -> None:
    assert translated(other) == []


def test_without_a_schema_a_page_says_its_size_itself() -> None:
    (found,) = translated(event("stored", 1, tokens=16, page_tokens=0))
    assert isinstance(found, vllm.BlockStored)
    assert found.block_size == 16


def test_hashes_may_be_numbers_and_tokens_be_kept_back() -> None:
    big = (7 << 64) + 5
    found = translated(
        event("stored", big, token_ids=TOKENS, parent=b"ns:%064x" % 3), ints=True, has_tokens=False
    )
    assert found == [stored([5], 3, [])]
