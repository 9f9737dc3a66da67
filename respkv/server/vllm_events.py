"""Events of pages in the form in which vLLM tells of its blocks, for the indexers that read those.

A batch is a msgpack array ``[time, events, data parallel rank]``, each event an array that begins
with its name. Indexers (llm-d, Dynamo) keep for each block the media it is in: BlockStored adds one,
BlockRemoved takes one away. So a page is always told to be in one medium, the fastest it can be
read from: one that moves is removed from the old medium and stored in the new one, in this order and
in one batch, so that an indexer that knows no media ends with the block, too. That memory and a file
may both have a page is not told: the file's copy may be dropped without a word while memory has it.

Full pages alone are told of. Tails have no counterpart, and parts (logits, states, other groups)
are of no use to who looks for prefixes. Source: vllm/distributed/kv_events.py of vLLM 0.33.
"""

from collections.abc import Callable, Iterable

import msgspec

from respkv.chain.tokens import MARKER
from respkv.engine.events import MEMORY_TIER, Event, page_id_of

CPU, STORAGE = "CPU", "STORAGE"
_LOWER_64 = (1 << 64) - 1

Hash = bytes | int


class BlockStored(msgspec.Struct, array_like=True, tag=True, gc=False):
    """Blocks of one chain are in a medium, one behind the other. Defaults: what is not known here."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[str] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead_token_ids: list[int] | None = None


class BlockRemoved(msgspec.Struct, array_like=True, tag=True, gc=False):
    """Blocks are no more in a medium."""

    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, array_like=True, tag=True, gc=False):
    """No block is anywhere."""


Told = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, array_like=True, gc=False):
    """What is published at once."""

    ts: float
    events: list[Told]
    data_parallel_rank: int | None = None


class Translator:
    """Says events in vLLM's words.

    hash_of:    makes the published hash of a 32-byte page id.
    has_tokens: whether tokens are said where they are known.
    has_files:  whether a page that gets another value may have been in a file.
    """

    def __init__(
        self, hash_of: Callable[[bytes], Hash], *, has_tokens: bool, has_files: bool
    ) -> None:
        self._hash_of = hash_of
        self._has_tokens = has_tokens
        self._has_files = has_files

    def translate(self, events: Iterable[Event]) -> list[Told]:
        """Return what is to be told of events of one topic, in their order; some are not."""
        told: list[Told] = []
        for event in events:
            if event.kind == "cleared":
                if not told or not isinstance(told[-1], AllBlocksCleared):
                    told.append(AllBlocksCleared())
            elif event.part == "page" and (page_id := page_id_of(event.key)) is not None:
                self._add(told, event, self._hash_of(page_id))
        return told

    def _add(self, told: list[Told], event: Event, page: Hash) -> None:
        medium = CPU if event.tier == MEMORY_TIER else STORAGE
        if event.kind == "removed":
            _remove(told, page, medium)
            return
        moved = event.kind in ("demoted", "promoted")
        if moved or (event.reason == "replaced" and self._has_files):
            _remove(told, page, STORAGE if medium == CPU else CPU)
        parent_id = page_id_of(event.parent) if event.parent else None
        parent = None if parent_id is None else self._hash_of(parent_id)
        tokens: list[int] = []
        # Where media stand among them, an indexer that hashes them would take one image for another.
        if self._has_tokens and event.token_ids and MARKER not in event.token_ids:
            tokens = memoryview(event.token_ids).cast("i").tolist()
        size = event.page_tokens or event.tokens
        last = told[-1] if told else None
        if isinstance(last, BlockStored) and _goes_on(last, parent, tokens, size, medium):
            last.block_hashes.append(page)
            last.token_ids += tokens
        else:
            told.append(BlockStored([page], parent, tokens, size, medium=medium))


def _goes_on(
    last: BlockStored, parent: Hash | None, tokens: list[int], size: int, medium: str
) -> bool:
    """Whether a page stands right behind those that were stored, so that one event tells of all."""
    is_behind = parent is not None and last.block_hashes[-1] == parent
    is_alike = last.block_size == size and last.medium == medium
    return is_behind and is_alike and bool(last.token_ids) == bool(tokens)


def _remove(told: list[Told], page: Hash, medium: str) -> None:
    last = told[-1] if told else None
    if isinstance(last, BlockRemoved) and last.medium == medium:
        last.block_hashes.append(page)
    else:
        told.append(BlockRemoved([page], medium))


def number_of(page_id: bytes) -> int:
    """Return the hash that vLLM publishes with VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES: its last 64 bits."""
    return int.from_bytes(page_id, "big") & _LOWER_64


def whole(page_id: bytes) -> bytes:
    """Return the hash that vLLM publishes otherwise: all of it."""
    return page_id
