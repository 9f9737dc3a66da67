"""Continuous batching of a transformers model over a paged cache, with respkv behind it.

What a request is spared comes from two places. The blocks of this process hold what was computed
here of late, and are shared as they are; respkv holds what any worker computed, and is copied into
blocks when a sequence is admitted. Prompts that came to their end have their last logits kept, here
and there: the same prompt again has its first token without a forward pass.

A request whose prompt begins like one that is being computed waits for that one: ten clients that
ask about the same document at once have it computed once.
"""

import time
from collections.abc import Hashable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from respkv.batching.request import GenerationRequest
from respkv.batching.runner import Admission, Loading, Refusal
from respkv.batching.sequence import Chunk, Sequence
from respkv.client.sequences import ChainOptions
from respkv.integrations.huggingface.dynamic_runner import context_tokens, forward, vocab_size
from respkv.integrations.huggingface.paged_attention import PagedModel, paged_config
from respkv.integrations.huggingface.paged_loads import ASIDE_BYTES, Load, LoadThreads
from respkv.integrations.huggingface.paged_logits import LastLogits
from respkv.integrations.huggingface.paged_pages import PagedPages
from respkv.integrations.huggingface.prompt_pages import PromptPages
from respkv.integrations.huggingface.rates import Rates
from respkv.paged import Chunk as PagedChunk
from respkv.paged import OutOfBlocks, PagedAttentionCache, PagedStats

MEMORY_BYTES: Final = 1 << 30
LOGITS_BYTES: Final = 64 << 20
LEARNED_TOKENS_MIN: Final = 32  # a step of fewer says little about what a token costs


@dataclass(slots=True)
class _Held:
    """A sequence that is in the blocks.

    number:   what the paged cache calls it.
    begun:    when it came, by the clock of time.perf_counter.
    local:    tokens that lay in the blocks when it came.
    load:     of what respkv has beyond these, until it is over.
    unstored: the logits of its prompt's end, which has been computed and not been stored.
    """

    number: int
    salt: Hashable
    chain: ChainOptions
    begun: float
    local: int = 0
    load: Load | None = None
    unstored: Tensor | None = None


class PagedRunner:
    """A model, its blocks, and its pages in respkv.

    model:        one that blocks can serve; its attention is replaced until ``close``.
    pages:        where KV is found and stored; None for this process's blocks alone. It stays the
                  caller's, who closes it after the loop.
    memory_bytes, num_blocks: of the blocks; 1 GiB, or what 64 longest contexts take, when neither is
                  given. On the CPU it is taken as it is first used.
    block_tokens: tokens of a block.
    tokens_max:   of one sequence; the model's longest context when None. No more than fit the blocks.
    logits_bytes: of the last logits of prompts that are kept here.
    aside_bytes:  a load of more, or of what lies in files, does not keep others from computing.
    never_slower: what respkv has is computed instead where that is expected to take less time.
    Raises UnsupportedModel for a model that blocks cannot serve: see DynamicRunner. Raises ValueError
    for one in training mode, whose dropout others would find in what it stored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pages: PromptPages | None = None,
        *,
        memory_bytes: int | None = None,
        num_blocks: int | None = None,
        block_tokens: int = 16,
        tokens_max: int | None = None,
        logits_bytes: int = LOGITS_BYTES,
        never_slower: bool = True,
        aside_bytes: int = ASIDE_BYTES,
    ) -> None:
        if model.training:
            raise ValueError("the model is in training mode; model.eval() leaves it")
        context = tokens_max or context_tokens(model)
        if memory_bytes is None and num_blocks is None:
            config = paged_config(model, num_blocks=1, block_tokens=block_tokens)
            enough = 64 * -(-context // block_tokens)
            config = config.with_blocks(min(enough, max(MEMORY_BYTES // config.block_bytes, 1)))
        else:
            config = paged_config(
                model, num_blocks=num_blocks, memory_bytes=memory_bytes, block_tokens=block_tokens
            )
        self.model = model
        self.cache = PagedAttentionCache(config)
        self.vocab_size = vocab_size(model)
        self.tokens_max = min(context, config.num_blocks * block_tokens)
        self._paged = PagedModel(model, self.cache)
        self._rates = Rates() if never_slower else None
        self._pages = (
            None if pages is None else PagedPages(self.cache, pages, self._rates, aside_bytes)
        )
        self._last = LastLogits(logits_bytes)
        self._threads = LoadThreads()
        self._held: dict[Sequence, _Held] = {}
        # So that a waiting line is not compared with everyone in each step.
        self._follows: WeakKeyDictionary[Sequence, tuple[Sequence, int]] = WeakKeyDictionary()
        self._refused: tuple[Sequence | None, int] = None, 0
        self._come: list[Sequence] = []  # their loads are over, and nobody has been told
        self._unwanted: dict[Sequence, int] = {}  # they ended while they were loaded

    def begin(self, sequence: Sequence) -> Admission | Loading | Refusal:
        """Take a sequence in, with what the blocks and respkv have of it."""
        begun = time.perf_counter()
        request, tokens = sequence.request, sequence.tokens
        self._take_back()
        if self._held and self.cache.num_free_blocks <= self._too_few_for(sequence):
            return Refusal.NO_ROOM
        salt = request.salt, request.tenant
        if request.shares and self._is_coming(sequence, salt):
            return Refusal.SOON
        logits = self._last.find(salt, tokens) if request.shares else None
        limit = None if logits is None else len(tokens)
        held = _Held(
            self.cache.allocate_sequence(tokens, salt=salt, limit=limit, share=request.shares),
            salt,
            _chain(request),
            begun,
        )
        if self._held and not self._fits(held.number):  # alone it always does
            self.cache.free_sequence(held.number)
            self._refused = sequence, self.cache.num_free_blocks
            return Refusal.NO_ROOM
        self._held[sequence] = held
        held.local = self.cache.computed(held.number)
        if held.local == len(tokens):
            return Admission(held.local, held.local, logits, time.perf_counter() - begun)
        if self._pages is not None and request.shares:
            held.load = self._pages.begin_load(held.number, tokens, held.chain)
        if held.load is not None and held.load.is_long:
            self._threads.start(sequence, held.load.run)
            return Loading.LOADING
        if held.load is not None:
            held.load.run()
        return self._admission(sequence, held)

    def arrived(self, *, wait: bool) -> Several[tuple[Sequence, Admission]]:
        """Return the sequences whose loads are over."""
        self._collect(wait=wait and not self._come)
        come, self._come = self._come, []
        return [(each, self._admission(each, self._held[each])) for each in come]

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room in the blocks; waits for stores that hold some before it says no."""
        self._store_prompt(sequence, self._held[sequence])
        number = self._held[sequence].number
        known = self.cache.length(number)
        if num_tokens > known:
            self.cache.extend(number, sequence.tokens[known:num_tokens])
        count = num_tokens - self.cache.computed(number)
        while True:
            try:
                self.cache.reserve(number, count)
            except OutOfBlocks:
                if not self._wait_for_blocks():
                    return False
            else:
                return True

    def drop(self, sequence: Sequence) -> None:
        """Give the blocks back; what is in them can be found until they are needed."""
        held = self._held.pop(sequence)
        self._store_prompt(sequence, held)
        self.cache.free_sequence(held.number)

    def step(self, chunks: Several[Chunk]) -> Tensor:
        """Compute all chunks with a cache in one forward pass, and each of the others in its own."""
        cached = [each for each in chunks if each.sequence.request.use_cache]
        batch = [
            PagedChunk(self._held[each.sequence].number, each.stop - each.start, each.is_last)
            for each in cached
        ]
        computed = iter(self._compute(batch) if batch else ())
        rows: list[Tensor] = []
        for chunk in chunks:
            if not chunk.sequence.request.use_cache:
                rows.append(forward(self.model, chunk.tokens, None))
            elif chunk.is_last:
                rows.append(next(computed))
                self._keep(chunk.sequence, rows[-1])
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def end(self, sequence: Sequence, *, is_good: bool) -> None:
        """Give the blocks back, and store what was computed, in the background."""
        held = self._held.pop(sequence)
        if sequence in self._come:
            self._come.remove(sequence)
        elif held.load is not None:  # a thread still writes to its blocks
            self._unwanted[sequence] = held.number
            return
        if is_good:
            self._store_prompt(sequence, held)
            self._store_answer(sequence, held)
        self.cache.free_sequence(held.number, keep=is_good)
        if not is_good:  # who knows what else it shares blocks with
            self.clear()

    def clear(self) -> int:
        """Forget the blocks that no sequence has, and all logits; returns their bytes."""
        while self._wait_for_blocks():
            pass
        return self.cache.clear() * self.cache.config.block_bytes + self._last.clear()

    def close(self, *, is_good: bool = True) -> None:
        """Store what is to be stored, and give the model its attention back."""
        for sequence in list(self._held):
            self.end(sequence, is_good=is_good)
        while self._wait_for_blocks():
            pass
        self._threads.close()
        self._paged.close()

    def local_stats(self) -> PagedStats:
        """Return what the blocks hold; from any thread."""
        return self.cache.stats()

    def _compute(self, batch: list[PagedChunk]) -> Tensor:
        """Compute a step, and learn what it costs."""
        begun = time.perf_counter()
        logits = self._paged.step(batch)
        count = sum(each.count for each in batch)
        if self._rates is not None and (count == 1 or count >= LEARNED_TOKENS_MIN):
            if logits.is_cuda:  # it is waited for in any case, to choose tokens
                torch.cuda.synchronize(logits.device)
            self._rates.computed(count, time.perf_counter() - begun)
        return logits

    def _admission(self, sequence: Sequence, held: _Held) -> Admission:
        """Say what a sequence has, now that its load is over, if there was one."""
        load, held.load = held.load, None
        if load is None or self._pages is None:
            return Admission(held.local, held.local, None, time.perf_counter() - held.begun)
        self._pages.end_load(held.number, load)
        logits = load.logits
        if logits is not None:
            # They come from the CPU. A request chooses all its tokens on one device, with one generator.
            logits = logits.to(self.model.device)
            self._last.keep(held.salt, sequence.tokens, logits)
        computed, lookup_s = self.cache.computed(held.number), time.perf_counter() - held.begun
        return Admission(computed, held.local, logits, lookup_s, int(load.has_failed))

    def _collect(self, *, wait: bool) -> None:
        """Take note of loads that are over, and give back the blocks of those nobody wants."""
        for sequence in self._threads.finished(wait=wait):
            number = self._unwanted.pop(sequence, None)
            if number is None:
                self._come.append(sequence)
            else:
                self.cache.free_sequence(number)

    def _take_back(self) -> None:
        """Have the blocks again that were held for threads that are done with them."""
        if self._unwanted:
            self._collect(wait=False)
        if self._pages is not None:
            self._pages.take_back()

    def _wait_for_blocks(self) -> bool:
        """Wait for a thread that has blocks of no sequence; returns whether there was one."""
        if self._pages is not None and self._pages.wait():
            return True
        if self._unwanted:
            self._collect(wait=True)
            return True
        return False

    def _fits(self, number: int) -> bool:
        """Whether all its tokens, one more, and one more of each other sequence have room."""
        length = self.cache.length(number)
        missing = self.cache.blocks_needed(number, length - self.cache.computed(number))
        missing += length % self.cache.config.block_tokens == 0
        return missing + len(self._held) <= self.cache.num_free_blocks

    def _too_few_for(self, sequence: Sequence) -> int:
        """Return a number of free blocks with which it need not be tried."""
        refused, had = self._refused
        return had if refused is sequence else len(self._held)

    def _is_coming(self, sequence: Sequence, salt: Hashable) -> bool:
        """Whether another is computing, or loading, a longer prefix of a sequence than is there."""
        known = self._follows.get(sequence)
        if known is not None and known[0] in self._held and known[0].computed < known[1]:
            return True
        size = self.cache.config.block_tokens
        leader, coming = None, 0
        for other, held in self._held.items():
            if other.pending > 1 and held.salt == salt and other.request.shares:
                common = _common(sequence.tokens, other.tokens) // size * size
                if common > max(coming, other.computed):
                    leader, coming = other, common
        if leader is None or self.cache.match(sequence.tokens[:coming], salt) >= coming:
            return False
        self._follows[sequence] = leader, coming
        return True

    def _keep(self, sequence: Sequence, logits: Tensor) -> None:
        """Keep the logits of a prompt's end, to be stored once its first token has been told."""
        if sequence.request.shares and not sequence.num_generated:
            held = self._held[sequence]
            held.unstored = logits.clone()

    def _store_prompt(self, sequence: Sequence, held: _Held) -> None:
        """Store a prompt that has just come to its end, if it has."""
        if held.unstored is None:
            return
        prompt, logits, held.unstored = sequence.tokens[: sequence.num_prompt], held.unstored, None
        self._last.keep(held.salt, prompt, logits)
        if self._pages is not None:
            self._pages.store(held.number, prompt, held.chain, logits)

    def _store_answer(self, sequence: Sequence, held: _Held) -> None:
        """Store prompt and answer, for whoever goes on from there."""
        computed = self.cache.computed(held.number)
        if self._pages is None or not sequence.request.shares or computed <= sequence.num_prompt:
            return
        self._pages.store(held.number, sequence.tokens[:computed], held.chain, None)


def _chain(request: GenerationRequest) -> ChainOptions:
    chain = ChainOptions()
    if request.salt is not None:
        chain["salt"] = request.salt
    if request.tenant is not None:
        chain["tenant"] = request.tenant
    if request.session is not None:
        chain["session"] = request.session
    return chain


def _common(one: list[int], other: list[int]) -> int:
    """Return how many tokens two lists begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
