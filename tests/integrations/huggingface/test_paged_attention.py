"""Models over the paged cache: the tokens that each prompt would have got alone, whatever shares."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from respkv.integrations.huggingface.model_kv import UnsupportedModel
from respkv.integrations.huggingface.paged_attention import NAME, PagedModel, paged_config
from respkv.paged import Chunk, OutOfBlocks, PagedAttentionCache, PagedCacheConfig
from tests.integrations.huggingface.models import FAMILIES, VOCAB, prompt, tiny_model

NEW = 10
Make = Callable[..., PagedModel]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def paged(llama: PreTrainedModel) -> Iterator[Make]:
    """Open the llama over a cache of so many blocks; closed after the test."""
    opened: list[PagedModel] = []

    def make(num_blocks: int = 64, block_tokens: int = 16) -> PagedModel:
        config = paged_config(llama, num_blocks=num_blocks, block_tokens=block_tokens)
        opened.append(PagedModel(llama, PagedAttentionCache(config)))
        return opened[-1]

    yield make
    for each in opened:
        each.cache.blocks.check()
        each.close()


@torch.inference_mode()
def alone(model: PreTrainedModel, tokens: list[int], count: int = NEW) -> tuple[list[int], Tensor]:
    """Return the greedy tokens of a prompt, and the logits of the first, by a cache of its own."""
    cache = DynamicCache(config=model.config)
    first = logits = model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1]
    made = [int(logits.argmax())]
    while len(made) < count:
        logits = model(torch.tensor([made[-1:]]), past_key_values=cache).logits[0, -1]
        made.append(int(logits.argmax()))
    return made, first


def rest(cache: PagedAttentionCache, sequence: int) -> Chunk:
    """Return all of a sequence that is not computed."""
    return Chunk(sequence, cache.length(sequence) - cache.computed(sequence))


def go_on(paged: PagedModel, made: dict[int, list[int]], count: int = NEW) -> None:
    """Make tokens for all sequences, all in one step, until each has so many."""
    while running := [each for each, tokens in made.items() if len(tokens) < count]:
        for each in running:
            paged.cache.extend(each, made[each][-1:])
        logits = paged.step([rest(paged.cache, each) for each in running])
        for each, row in zip(running, logits, strict=True):
            made[each].append(int(row.argmax()))


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_prompts_and_decodes_mix_in_every_family(family: str) -> None:
    model = tiny_model(family)
    prompts = [prompt(count, seed=count) for count in (5, 70, 33)]
    want = [alone(model, each) for each in prompts]
    with PagedModel(model, PagedAttentionCache(paged_config(model, num_blocks=64))) as paged:
        cache = paged.cache
        first, second, third = (cache.allocate_sequence(each) for each in prompts)
        [short] = paged.step([Chunk(second, 40, logits=False), Chunk(first, 5)])
        cache.extend(first, [int(short.argmax())])
        rows = paged.step([Chunk(third, 33), Chunk(first, 1), Chunk(second, 30)])
        for row, (_, logits) in zip((short, rows[2], rows[0]), want, strict=True):
            torch.testing.assert_close(row, logits, atol=1e-5, rtol=1e-5)
        made = {
            first: [int(short.argmax()), int(rows[1].argmax())],
            second: [int(rows[2].argmax())],
            third: [int(rows[0].argmax())],
        }
        go_on(paged, made)
        assert list(made.values()) == [tokens for tokens, _ in want]
        # A second time, from what the first left: all but the last token of the longest prompt.
        for each in made:
            cache.free_sequence(each)
        again = cache.allocate_sequence(prompts[1])
        assert cache.computed(again) == 69
        [row] = paged.step([Chunk(again)])
        torch.testing.assert_close(row, want[1][1], atol=1e-5, rtol=1e-5)
        cache.blocks.check()


def test_sixteen_that_share_a_thousand_tokens_take_a_fraction_of_the_memory(
    paged: Make, llama: PreTrainedModel
) -> None:
    shared, own = prompt(1000, seed=1), [prompt(3, seed=100 + each) for each in range(16)]
    one = paged(num_blocks=200)
    cache = one.cache
    seed = cache.allocate_sequence(shared)
    one.step([rest(cache, seed)])
    sequences = [cache.allocate_sequence([*shared, *each]) for each in own]
    rows = one.step([rest(cache, each) for each in sequences])
    made = {each: [int(row.argmax())] for each, row in zip(sequences, rows, strict=True)}
    go_on(one, made)
    peak = cache.stats().peak_used * cache.config.block_bytes
    batch = DynamicCache(config=llama.config)
    with torch.inference_mode():
        ids = torch.tensor([[*shared, *each] for each in own])
        tokens = [llama(ids, past_key_values=batch, logits_to_keep=1).logits[:, -1].argmax(-1)]
        while len(tokens) < NEW:
            logits = llama(tokens[-1][:, None], past_key_values=batch).logits[:, -1]
            tokens.append(logits.argmax(-1))
    assert list(made.values()) == torch.stack(tokens, 1).tolist()
    kept = sum(
        plane.nbytes
        for layer in batch.layers
        for plane in (getattr(layer, "keys"), getattr(layer, "values"))  # noqa: B009
    )
    assert kept == 16 * (1003 + NEW - 1) * cache.config.token_bytes
    # 63 blocks of what all share, and at most 2 for what each adds.
    assert cache.stats().peak_used <= 63 + 16 * 2
    assert peak <= 0.6 * kept


def test_forks_go_their_own_way(paged: Make, llama: PreTrainedModel) -> None:
    tokens = prompt(21, seed=3)
    one = paged()
    cache = one.cache
    first = cache.allocate_sequence(tokens)
    one.step([rest(cache, first)])
    forks = [cache.fork(first) for _ in range(3)]
    made = {each: [4 + index] for index, each in enumerate(forks)}
    go_on(one, made, 6)
    for fork, (start, *more) in made.items():
        assert more == alone(llama, [*tokens, start], 5)[0]
        cache.free_sequence(fork)
    cache.free_sequence(first)
    cache.clear()
    assert cache.num_free_blocks == cache.config.num_blocks
    assert cache.stats().blocks_free == cache.config.num_blocks


def test_tokens_are_equal_when_prefixes_are_evicted_in_between(
    paged: Make, llama: PreTrainedModel
) -> None:
    one = paged(num_blocks=9, block_tokens=8)
    cache, shared = one.cache, prompt(30, seed=5)
    for seed in range(6):
        tokens = shared + prompt(9, seed=seed) if seed % 2 else prompt(55, seed=seed)
        sequence = cache.allocate_sequence(tokens)
        [row] = one.step([rest(cache, sequence)])
        made = {sequence: [int(row.argmax())]}
        go_on(one, made, 6)
        assert made[sequence] == alone(llama, tokens, 6)[0]
        cache.free_sequence(sequence)
    assert cache.stats().evictions > 9


def test_without_room_a_step_changes_nothing_and_is_done_later(
    paged: Make, llama: PreTrainedModel
) -> None:
    one = paged(num_blocks=3)
    cache = one.cache
    first, second = (cache.allocate_sequence(prompt(32, seed=each)) for each in (1, 2))
    with pytest.raises(OutOfBlocks, match="needs 2 blocks"):
        one.step([Chunk(first, 32), Chunk(second, 32)])
    assert cache.num_free_blocks == 3
    [row] = one.step([Chunk(first, 32)])
    assert torch.equal(row.argmax(), alone(llama, prompt(32, seed=1))[1].argmax())
    cache.free_sequence(first)
    [row] = one.step([Chunk(second, 32)])
    assert torch.equal(row.argmax(), alone(llama, prompt(32, seed=2))[1].argmax())


def test_a_forward_that_fails_computes_nothing(paged: Make, llama: PreTrainedModel) -> None:
    one = paged()
    tokens = [*prompt(5), 10**6]  # not in the vocabulary
    sequence = one.cache.allocate_sequence(tokens)
    with pytest.raises(IndexError):
        one.step([Chunk(sequence, 6)])
    assert one.cache.computed(sequence) == 0
    [row] = one.step([Chunk(sequence, 5)])
    torch.testing.assert_close(row, alone(llama, prompt(5))[1], atol=1e-5, rtol=1e-5)


def test_steps_without_logits_make_none(paged: Make) -> None:
    one = paged()
    sequence = one.cache.allocate_sequence(prompt(5))
    assert one.step([Chunk(sequence, 4, logits=False)]).shape[0] == 0
    logits = one.step([Chunk(sequence)])
    logits.add_(1)  # it is the caller's, to change as it likes


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_model_still_generates_by_itself_and_gets_its_attention_back(family: str) -> None:
    model = tiny_model(family)
    tokens = prompt(40, seed=2)
    before = str(model.config._attn_implementation)
    want, _ = alone(model, tokens)
    with PagedModel(model, PagedAttentionCache(paged_config(model, num_blocks=4))):
        assert model.config._attn_implementation == NAME
        assert alone(model, tokens)[0] == want
    assert model.config._attn_implementation == before


def test_bfloat16_is_as_close_as_it_is_with_a_cache_of_its_own() -> None:
    exact = tiny_model("qwen3")
    tokens = prompt(60, seed=4)
    _, want = alone(exact, tokens)
    model = tiny_model("qwen3").bfloat16()
    _, theirs = alone(model, tokens)
    with PagedModel(model, PagedAttentionCache(paged_config(model, num_blocks=8))) as paged:
        sequence = paged.cache.allocate_sequence(tokens)
        paged.step([Chunk(sequence, 30, logits=False)])
        [ours] = paged.step([Chunk(sequence, 30)])
    assert ours.dtype == torch.bfloat16
    assert (ours - want).norm() <= 1.5 * (theirs - want).norm()


def test_a_model_that_was_given_its_attention_back_computes_no_step(
    llama: PreTrainedModel,
) -> None:
    cache = PagedAttentionCache(paged_config(llama, num_blocks=8))
    first, second = (PagedModel(llama, cache) for _ in range(2))
    sequence = cache.allocate_sequence([5, 6, 7])
    first.close()
    for each in (first, second):
        with pytest.raises(ValueError, match="has its own attention again"):
            each.step([Chunk(sequence, 3)])
    second.close()
    assert cache.stats().blocks_used == 0
    with PagedModel(llama, cache) as again:
        assert again.step([Chunk(sequence, 3)]).shape == (1, VOCAB)


def test_a_cache_of_another_shape_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"needs \(3, 2, 8, torch.float32\); see paged_config"):
        PagedModel(llama, PagedAttentionCache(PagedCacheConfig(3, 4, 8, 1)))
    with pytest.raises(ValueError, match="by num_blocks or by memory_bytes"):
        paged_config(llama)
    assert paged_config(llama, memory_bytes=10**6).memory_bytes <= 10**6
    assert llama.config._attn_implementation != NAME


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ("mamba", {}, "LinearAttention"),
        ("bloom", {}, "does not let attention be replaced"),
    ],
)
def test_models_that_blocks_cannot_serve_are_refused(
    family: str, changes: dict[str, object], reason: str
) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(family, **sizes, **heads, **changes)
    make: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    model = make(config)
    with pytest.raises(UnsupportedModel, match=reason):
        PagedModel(model, PagedAttentionCache(paged_config(model, num_blocks=1)))
