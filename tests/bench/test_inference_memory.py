"""What a cached token costs: the counts are those of what is kept, and what comes back is checked."""

import pytest
import torch

from bench.inference_memory import (
    QUICK,
    Line,
    Prompt,
    in_dynamic_caches,
    in_respkv,
    make_model,
    markdown,
    read,
    saved_by_torch,
)

TOKENS = list(range(128))
TOKEN_BYTES = QUICK.layers * 2 * QUICK.kv_heads * (QUICK.hidden // QUICK.heads) * 2


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    torch.set_num_threads(1)
    return list(read(make_model(QUICK), [TOKENS, [*TOKENS[:64], *TOKENS[:64]]]))


def test_a_dynamic_cache_and_a_file_keep_each_prompt_whole(prompts: list[Prompt]) -> None:
    assert prompts[0].kv.nbytes == 128 * TOKEN_BYTES
    assert in_dynamic_caches(prompts) == 2 * 128 * TOKEN_BYTES
    assert 2 * 128 * TOKEN_BYTES < saved_by_torch(prompts) < 2 * 128 * TOKEN_BYTES + 10_000


def test_a_tier_keeps_what_prompts_share_once_and_gives_it_back(
    prompts: list[Prompt],
) -> None:
    shared = 3 * 64 * TOKEN_BYTES
    nbytes, error = in_respkv(prompts, "disk", "default", with_error=True)
    assert 0.3 * shared < nbytes < 0.9 * shared
    assert error == 0


def test_the_table_shows_what_was_not_measured_as_nothing() -> None:
    lines = [Line("w", "a", 1000, 10, 1.0, 0.0), Line("w", "b", 2500, 1000, 0.025, None)]
    text = markdown(lines, {"cpu": "x"})
    assert "| w | a | 100 | 1.000 | 0 |" in text
    assert "| w | b | 2 | 0.025 |  |" in text
