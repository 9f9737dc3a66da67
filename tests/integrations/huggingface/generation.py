"""Generate twice, with and without a cache, and compare."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from respkv.integrations.huggingface import KVCacheAdapter
from tests.integrations.huggingface.models import PAD

NEW_TOKENS = 6
# Nothing here depends on how fast the machine is, or on whether it stands still for a while.
QUIET: dict[str, Any] = {
    "page_tokens": 16,
    "never_slower": False,
    "match_timeout_s": 60.0,
    "spare_bytes": 1 << 20,
}


def batch_of(*prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return ids and mask of prompts, padded in front."""
    columns = max(map(len, prompts))
    ids = [[PAD] * (columns - len(each)) + list(each) for each in prompts]
    mask = [[0] * (columns - len(each)) + [1] * len(each) for each in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def both_ways(
    adapter: KVCacheAdapter, ids: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return the sequences of the model alone, and those of the adapter; what is new is stored."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    found = []
    model: Any = adapter.model
    for generate in (model.generate, adapter.generate):
        torch.manual_seed(7)
        given = torch.ones_like(ids) if mask is None else mask
        output = generate(input_ids=ids, attention_mask=given, **options)
        found.append(output if isinstance(output, Tensor) else output.sequences)
    assert adapter.flush(60)
    assert adapter.pages.stats().errors == 0, adapter.pages.stats().last_error
    return found[0], found[1]


def assert_equal(
    adapter: KVCacheAdapter, ids: Tensor, mask: Tensor | None = None, **options: Any
) -> None:
    """Assert that both ways give the same tokens."""
    plain, cached = both_ways(adapter, ids, mask, **options)
    assert cached.tolist() == plain.tolist()


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Count the tokens of each forward pass of a model."""
    widths: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        widths.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield widths
    finally:
        hook.remove()
