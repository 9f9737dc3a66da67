"""``generate`` for any decoder-only model, with the KV of prompts kept in respkv.

``KVCacheAdapter(model, cache_config=...).generate(...)`` takes what ``model.generate`` takes and
returns what it returns. What the cache cannot serve goes to the model as it is.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from respkv.client.commands import Key
from respkv.client.sequences import ChainOptions
from respkv.integrations.huggingface.cache_config import CacheConfig
from respkv.integrations.huggingface.caching_model import caching_model
from respkv.integrations.huggingface.locks import ForkLock, OneProcess
from respkv.integrations.huggingface.model_kv import ModelKV, read_model
from respkv.integrations.huggingface.prefill import BatchCache
from respkv.integrations.huggingface.prefix_cache import GROWTH_TOKENS, as_rows
from respkv.integrations.huggingface.prompt_pages import PromptPages
from respkv.integrations.huggingface.rates import Rates
from respkv.integrations.huggingface.reuse import AdapterStats, Reuse
from respkv.integrations.huggingface.settings import Settings

logger = logging.getLogger(__name__)

# Arguments of generate that may be given without their names, behind the first two.
_OTHERS: Final = tuple(inspect.signature(vars(GenerationMixin)["generate"]).parameters)[3:-1]


class KVCacheAdapter(OneProcess):
    """A model with a cache for its prompts. Threads may share it, as far as they may share the model.

    cache_config: where the KV is kept and what is done with it; ``CacheConfig()`` if None.
    pages:        instead of what the config says of server, namespace and pages.
    Raises: UnsupportedModel for a model whose layers keep something else than keys and values of
            one shape, and TypeError for what is no model of transformers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache_config: CacheConfig | None = None,
        *,
        pages: PromptPages | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"model is a {type(model).__name__}; expected is a PreTrainedModel of transformers"
                " (of a PEFT model, what get_base_model returns; of one that torch.compile returned,"
                " the model that it was given, after model.compile())"
            )
        self.model = model
        self.config = config = cache_config or CacheConfig()
        self._owns_pages = pages is None
        self.pages = pages or PromptPages(
            config.cache,
            model=model,
            fingerprint=config.fingerprint,
            namespace=config.namespace,
            page_tokens=config.page_tokens,
            codecs=config.codecs,
            ttl_ms=config.ttl_ms,
            durability=config.durability,
            match_timeout_s=config.match_timeout_s,
            spare_bytes=config.spare_bytes,
        )
        self.model_kv: ModelKV = self.pages.model_kv or read_model(model)
        self.rates = Rates()
        self.last = Reuse()
        self._view = caching_model(model)
        # Models of images note there how far positions were moved by those of the last prompt, and
        # go on from that when a cache is not empty.
        self._noting: list[Any] = [each for each in model.modules() if hasattr(each, "rope_deltas")]
        self._stats = AdapterStats()
        self._reasons: set[str] = set()
        self._lock = ForkLock()

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *others: Any,
        session: Key | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as ``model.generate`` does, with the same arguments and the same result.

        Prompts are matched, what is stored of them is loaded, and what is new is stored in the
        background. ``last`` then says what was reused.

        session: the conversation that this is a turn of, which tells the server what will be used
                 again.
        """
        if len(others) > len(_OTHERS):
            raise TypeError(f"generate takes {2 + len(_OTHERS)} arguments without names at most")
        kwargs |= dict(zip(_OTHERS, others, strict=False))
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        settings = Settings(self.model, generation_config, kwargs)
        reason = settings.why_not(ids) or self._why_not(ids, settings)
        mask = None if reason or ids is None else settings.mask(ids)
        rows = None if mask is None or ids is None else as_rows(ids, mask)
        if rows is not None and self.model_kv.counts_padding and any(row.padding for row in rows):
            rows, reason = None, "this model has other keys behind padding"
        if ids is None or mask is None or rows is None:
            reason = reason or "padding stands elsewhere than in front of the prompts"
            self._note_uncached(reason)
            plain: Callable[..., Any] = self.model.generate  # type: ignore[assignment]
            return plain(inputs, generation_config=generation_config, **kwargs)
        if inputs is None:
            kwargs = {name: each for name, each in kwargs.items() if name != "input_ids"}
        cache = BatchCache(
            self.pages,
            self.model_kv,
            rows,
            input_ids=ids,
            mask=mask if any(row.padding for row in rows) else None,
            repeats=settings.repeats,
            room=settings.room(ids.shape[1], GROWTH_TOKENS),
            chain=self._chain(session),
            rates=self.rates,
        )
        cache.match(logits=self.config.use_logits and settings.may_skip_forward)
        self._choose(cache, settings)
        kwargs["attention_mask"] = mask
        if settings.names_a_cache:
            kwargs["cache_implementation"] = None
        for module in self._noting:
            module.rope_deltas = None
        # Called on the class, or what someone put on the model instead would be called.
        kind: Any = type(self._view)
        output = kind.generate(
            self._view, ids, generation_config=generation_config, past_key_values=cache, **kwargs
        )
        sequences = output if isinstance(output, Tensor) else output.sequences
        if not isinstance(output, Tensor):
            cache.bring_alone()  # whoever gets it back goes on with it
        self._note(cache)
        if self.config.store:
            self._store(cache, sequences, settings)
        return output

    def stats(self) -> AdapterStats:
        """Return what was reused since the beginning."""
        with self._lock:
            return self._stats

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until what was queued is stored, or has failed; False: it takes longer."""
        return self.pages.flush(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Store what is queued; close the pages if they are its own."""
        self.pages.flush(timeout_s)
        if self._owns_pages:
            self.pages.close(timeout_s)

    def __enter__(self) -> "KVCacheAdapter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chain(self, session: Key | None) -> ChainOptions:
        chain = self.config.chain
        if session is not None:
            chain["session"] = session
        return chain

    def _why_not(self, ids: Tensor | None, settings: Settings) -> str:
        """Return why what the model computes now is not to be mixed with what is stored."""
        limit = self.model_kv.text_max
        if ids is not None and limit:
            columns = ids.shape[1]
            if columns + settings.new_tokens(columns, GROWTH_TOKENS) >= limit:
                return f"texts of {limit} tokens and more have other keys, with this model's rope"
        if not self.pages.has_its_weights:
            return "the weights have changed since its fingerprint was made; make a new adapter"
        return ""

    def _choose(self, cache: BatchCache, settings: Settings) -> None:
        """Say what of the matches is used."""
        rows, config = cache.rows, self.config
        worth = [
            row.match.tokens >= config.min_tokens
            and (
                not config.never_slower
                or self.rates.is_worth(
                    row.match.tokens,
                    row.match.tokens * self.pages.token_bytes,
                    row.match.load_us / 1e6,
                )
            )
            for row in rows
        ]
        are_full = all(
            is_worth and row.match.has_logits and row.match.tokens == row.num_tokens
            for row, is_worth in zip(rows, worth, strict=True)
        )
        if are_full and config.use_logits and settings.may_skip_forward:
            cache.answer = self._answer(cache)
        if cache.answer is not None:
            cache.starts = [cache.columns] * len(rows)
            cache.set_length(cache.columns - 1)
            return
        cache.begin_at(
            [
                row.padding + (min(row.match.tokens, row.num_tokens - 1) if is_worth else 0)
                for row, is_worth in zip(rows, worth, strict=True)
            ]
        )

    def _answer(self, cache: BatchCache) -> Tensor | None:
        """Return the logits behind all prompts, [B, V], or None."""
        known: dict[bytes, Tensor] = {}
        for row in cache.rows:
            if row.tokens not in known:
                found = self.pages.logits(row.tokens, match=row.match, **cache.chain)
                if found is None:
                    return None
                known[row.tokens] = found
        return torch.stack([known[row.tokens] for row in cache.rows])

    def _store(self, cache: BatchCache, sequences: Tensor, settings: Settings) -> None:
        """Queue what is new: prompts, what was generated behind them, and logits."""
        ends: Sequence[int] = settings.end_tokens
        ids = sequences.detach().cpu()
        for number, row in enumerate(cache.rows):
            line = number * cache.repeats
            if self.config.store_generated and not settings.is_beam_search:
                for each in range(line, line + cache.repeats):
                    text = _until_end(ids[each, row.padding :], row.num_tokens, ends)
                    cache.store(number, text, line=each)
            logits = cache.logits if self.config.use_logits else None
            cache.store(
                number, row.tokens, line=line, logits=None if logits is None else logits[number]
            )

    def _note(self, cache: BatchCache) -> None:
        is_full = cache.was_answered
        reused = [row.num_tokens for row in cache.rows] if is_full else cache.reused
        if cache.load_s:
            self.rates.loaded(sum(cache.reused) * self.pages.token_bytes, cache.load_s)
        prompt = sum(row.num_tokens for row in cache.rows)
        found = sum(row.match.tokens for row in cache.rows)
        self.last = last = Reuse(prompt, found, sum(reused), is_full, cache.load_s)
        with self._lock:
            self._stats = self._stats.plus(last)

    def _note_uncached(self, reason: str) -> None:
        self.last = Reuse(reason=reason)
        with self._lock:
            self._stats = self._stats.plus(self.last)
            is_new = reason not in self._reasons
            self._reasons.add(reason)
        if is_new:
            logger.info("generating without the cache: %s", reason)


def _until_end(text: Tensor, num_tokens: int, ends: Sequence[int]) -> Tensor:
    """Cut a text behind the first end token that was generated: padding follows it."""
    if not ends:
        return text
    is_end = torch.isin(text[num_tokens:], torch.tensor(list(ends)))
    if not bool(is_end.any()):
        return text
    return text[: num_tokens + int(is_end.nonzero()[0, 0]) + 1]
