"""Small models of every family with random weights, for tests of what runs on transformers.

They are as small as a model can be and still have what makes its family different: grouped or
single key and value heads, sliding windows, soft caps, learned positions, tied or fused weights.
"""

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

VOCAB = 101
PAD, EOS = 0, 1
POSITIONS = 2048
WINDOW = 24  # of sliding layers: short enough for a test's prompt to leave it

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}

# Model type of transformers, and what its configuration has beside _SHAPE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 3}),
    "tinyllama": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi": ("phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "gemma2",
        {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}

_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

# Families that have something of their own about positions, masks, heads or experts.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "sliding_window": WINDOW, "head_dim": 8}),
    "llama4": ("llama4_text", {"attention_chunk_size": 32, "head_dim": 8, "num_local_experts": 2}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **_EXPERTS}),
    "roformer": ("roformer", {"is_decoder": True, "embedding_size": 32}),
}

# Families whose prefixes cannot be told by the keys and values of tokens, and why.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("bert", {"is_decoder": False}, "attends to tokens that come later"),
    "cpmant": ("cpmant", {"dim_head": 8, "dim_ff": 64}, "keeps 33 tokens where it is given 1"),
    "deepseek_v3": (
        "deepseek_v3",
        {"kv_lora_rank": 16, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        | {"v_head_dim": 8, "first_k_dense_replace": 2, "num_key_value_heads": 4},
        "pages hold keys and values of one shape",
    ),
    "gemma3 both ways": (
        "gemma3_text",
        {"head_dim": 8, "use_bidirectional_attention": True},
        "attends to tokens that come later",
    ),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}, "lie token by token: view size is not"),
    "moshi": ("moshi", {"head_dim": 8, "sliding_window": WINDOW}, "slides in its cache alone"),
}


def tiny_model(
    family: str, *, seed: int = 0, attention: str = "sdpa", **changes: Any
) -> PreTrainedModel:
    """Return a model of a family, float32, on the CPU, in eval mode; the same one for equal seeds.

    family:    a key of FAMILIES, OTHERS or REFUSED.
    attention: ``attn_implementation``: sdpa, eager, or one that was registered. The soft caps of
               gemma2 need eager.
    changes:   of its configuration.
    """
    kind, own = (FAMILIES | OTHERS | {name: each[:2] for name, each in REFUSED.items()})[family]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.for_model(kind, **_renamed(kind, {**_SHAPE, **own, **changes}))
    if family == "gemma2" and attention == "sdpa":
        attention = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Any = AutoModelForCausalLM
        model: PreTrainedModel = made.from_config(
            config,
            # The others have what is best of those that they support.
            attn_implementation=attention if family in FAMILIES else None,
        )
    _sharpen(model, seed)
    model.requires_grad_(False)
    model.train(False)
    return model


def length_model() -> PreTrainedModel:
    """Return a Llama whose keys are turned otherwise in texts of more than 64 tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
        "factor": POSITIONS / 64,
    }
    return tiny_model("llama", rope_parameters=rope)


@cache
def shared_model(family: str) -> PreTrainedModel:
    """Return the model of a family that tests share; it is not to be changed."""
    return tiny_model(family)


def prompt(count: int, *, seed: int = 0, like: list[int] | None = None) -> list[int]:
    """Return random tokens that are no special ones.

    like: what it begins with, before ``count`` tokens of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(3, VOCAB, (count,), generator=generator).tolist()
    return [*(like or []), *made]


def _sharpen(model: PreTrainedModel, seed: int) -> None:
    """Draw the weights anew, so that what attention sees decides which token comes next.

    Freshly initialised models are nearly linear in the last token; one with a wrong cache would
    often choose the same tokens. So embeddings are small beside what attention adds to them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                is_embedding = weight.shape[0] in (VOCAB, POSITIONS)
                spread = 0.1 if is_embedding else 2.0 * weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)


def _renamed(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    if kind != "gpt2":
        return fields
    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    }
    return {names.get(name, name): value for name, value in fields.items() if "key" not in name}
