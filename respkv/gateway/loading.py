"""From a folder with a checkpoint to a model that is ready: weights, tokenizer, cache, model loop."""

import inspect
import logging
import threading
from contextlib import ExitStack

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

import respkv
from respkv.batching.model_loop import Limits, ModelLoop
from respkv.batching.runner import Runner
from respkv.client import Client
from respkv.errors import ConfigError
from respkv.gateway.checkpoint import Checkpoint
from respkv.gateway.failures import Refused
from respkv.gateway.model import Local, Model
from respkv.gateway.settings import GatewaySettings
from respkv.gateway.tokenizer import TextCoder, load_tokenizer
from respkv.integrations.huggingface import PromptPages, UnsupportedModel
from respkv.integrations.huggingface.dynamic_runner import DynamicRunner
from respkv.integrations.huggingface.paged_runner import PagedRunner

STEP_TOKENS = 512

logger = logging.getLogger(__name__)


def load(checkpoint: Checkpoint, settings: GatewaySettings) -> Model:
    """Load a checkpoint and start its model loop; takes from seconds to minutes.

    Raises ConfigError for a checkpoint that cannot be read or used; CacheError when the server is
    away. Nothing is left open then.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if checkpoint.threads is not None:
        torch.set_num_threads(checkpoint.threads)
    try:
        coder = TextCoder(load_tokenizer(checkpoint.folder))
        model = _weights(checkpoint)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--model {str(checkpoint.folder)!r}: {error}") from error
    try:
        return _with_pages(checkpoint, settings, coder, model)
    except UnsupportedModel as error:
        if not _takes_any_cache(model):
            raise ConfigError(f"--model {str(checkpoint.folder)!r}: {error}") from error
        logger.warning("one sequence at a time, and nothing kept for the next: %s", error)
    return _model(checkpoint, settings, coder, model, DynamicRunner(model))


def _with_pages(
    checkpoint: Checkpoint, settings: GatewaySettings, coder: TextCoder, model: PreTrainedModel
) -> Model:
    """Serve a model with a store. Raises UnsupportedModel; nothing is left open then."""
    with ExitStack() as undo:
        store = _store(checkpoint)
        undo.callback(store.close)
        pages = PromptPages(
            store, model=model, namespace=checkpoint.namespace, page_tokens=checkpoint.page_tokens
        )
        undo.callback(pages.close)
        runner = PagedRunner(
            model,
            pages=pages,
            memory_bytes=checkpoint.kv_memory,
            never_slower=not checkpoint.always_load,
        )
        # Not before it is known that the model is served like this: it leaves a namespace behind.
        pages.check()
        made = _model(checkpoint, settings, coder, model, runner)
        made.store, made.pages = store, StorePages(store, pages)
        made.local = lambda: _local(runner)
        made.close_store = undo.pop_all().close
    return made


def _model(
    checkpoint: Checkpoint,
    settings: GatewaySettings,
    coder: TextCoder,
    model: PreTrainedModel,
    runner: Runner,
) -> Model:
    """Start the loop, around a runner that has no store yet."""
    try:
        coder.encode_chat([{"role": "user", "content": "Hello"}])
    except Refused as failure:
        logger.warning("no conversation can be served: %s", failure.message)
    return Model(
        name=checkpoint.name or checkpoint.folder.resolve().name,
        coder=coder,
        loop=ModelLoop(runner, limits=limits_of(settings)),
        stop_tokens=_stop_tokens(model) or coder.stop_tokens,
    )


def _takes_any_cache(model: PreTrainedModel) -> bool:
    """Whether DynamicRunner can serve it: others let the cache they are given pass in silence."""
    takes = "past_key_values" in inspect.signature(model.forward).parameters
    return takes and not model.config.is_encoder_decoder


def limits_of(settings: GatewaySettings) -> Limits:
    """Return the limits of the model loop that the settings come to."""
    return Limits(
        sequences_max=settings.max_concurrency,
        waiting_max=settings.max_waiting,
        step_tokens_max=max(STEP_TOKENS, settings.max_concurrency),
        prompt_tokens_max=settings.max_prompt_tokens,
        new_tokens_max=settings.max_new_tokens,
    )


class StorePages:
    """A model's pages in the store."""

    def __init__(self, store: Client, pages: PromptPages) -> None:
        self.namespace = pages.namespace
        self._store = store
        self._pages = pages
        self._lock = threading.Lock()

    def clear(self) -> int:
        """Forget them all; returns how many there were. Raises CacheError.

        The namespace goes and is declared again; a store that comes in between fails and is counted.
        """
        with self._lock:
            before = self._store.quota(self.namespace)
            self._store.command("KV.SCHEMA", "DEL", self.namespace)
            self._pages.check()
            limits = {name: before[name] for name in ("max_bytes", "tenant_bytes")}
            if any(limits.values()):
                self._store.quota(self.namespace, **limits)
        return int(before["pages"])


def _weights(checkpoint: Checkpoint) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=checkpoint.dtype, local_files_only=True
    )
    assert isinstance(model, PreTrainedModel)
    return model.to(checkpoint.device).eval()  # type: ignore[no-any-return, arg-type]


def _store(checkpoint: Checkpoint) -> Client:
    if checkpoint.url is not None:
        return Client(checkpoint.url)
    return respkv.open_sync(config=checkpoint.config, **checkpoint.settings)


def _stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens that end a text, as the checkpoint says; it may name one or several."""
    found: set[int] = set()
    for config in (model.generation_config, model.config):
        end = getattr(config, "eos_token_id", None)
        found.update([end] if isinstance(end, int) else end or ())
    return frozenset(found)


def _local(runner: PagedRunner) -> Local:
    stats = runner.local_stats()
    size = stats.blocks_cached * runner.cache.config.block_bytes
    return Local(stats.blocks_cached, size, stats.evictions)
