"""From a folder with a checkpoint to a model that is ready: weights, tokenizer, cache, model loop."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import respkv
from respkv.batching.model_loop import Limits, ModelLoop
from respkv.batching.runner import Runner
from respkv.client import Client
from respkv.errors import ConfigError
from respkv.gateway.model import Local, Model
from respkv.gateway.settings import GatewaySettings
from respkv.gateway.tokenizer import TextCoder, load_tokenizer
from respkv.integrations.huggingface import PromptPages
from respkv.integrations.huggingface.dynamic_runner import DynamicRunner

STEP_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is served, and the cache behind it.

    folder:    with config.json, weights and tokenizer; nothing is downloaded.
    name:      what clients call it; the folder's name when empty.
    url:       of a respkv server; None: an engine in this process, of ``settings``.
    config, settings: of the embedded engine: a file, and what wins over it, such as maxmemory; as
               respkv.open_sync takes them.
    kv_memory: bytes for the KV of what runs, and of what ran until their room is needed.
    threads:   of torch; None leaves its default.
    """

    folder: Path
    name: str = ""
    url: str | None = None
    config: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    namespace: str | None = None
    page_tokens: int = 64
    kv_memory: int = 1 << 30
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if not (self.folder / "config.json").is_file():
            raise ConfigError(
                f"--model {str(self.folder)!r}: accepted is a folder with a checkpoint"
                " (config.json, weights, tokenizer.json)"
            )


def load(checkpoint: Checkpoint, settings: GatewaySettings) -> Model:
    """Load a checkpoint and start its model loop; takes from seconds to minutes.

    Raises ConfigError for a checkpoint that cannot be read or used; CacheError when the server is
    away. Nothing is left open then.
    """
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if checkpoint.threads is not None:
        torch.set_num_threads(checkpoint.threads)
    try:
        coder = TextCoder(load_tokenizer(checkpoint.folder))
        model = _weights(checkpoint)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--model {str(checkpoint.folder)!r}: {error}") from error
    with ExitStack() as undo:
        store = _store(checkpoint)
        undo.callback(store.close)
        pages = PromptPages(
            store, model=model, namespace=checkpoint.namespace, page_tokens=checkpoint.page_tokens
        )
        undo.callback(pages.close)
        pages.check()
        runner = DynamicRunner(model)
        limits = Limits(
            sequences_max=settings.max_concurrency,
            waiting_max=settings.max_waiting,
            step_tokens_max=max(STEP_TOKENS, settings.max_concurrency),
            prompt_tokens_max=settings.max_prompt_tokens,
            new_tokens_max=settings.max_new_tokens,
        )
        made = Model(
            name=checkpoint.name or checkpoint.folder.resolve().name,
            coder=coder,
            loop=ModelLoop(runner, limits=limits),
            stop_tokens=_stop_tokens(model) or coder.stop_tokens,
            store=store,
            pages=pages,
            local=_local(runner),
        )
        made.close_store = undo.pop_all().close
    return made


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


def _local(runner: Runner) -> Callable[[], Local]:
    def ask() -> Local:
        return Local()

    return ask
