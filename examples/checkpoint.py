"""Make a small Llama checkpoint with random weights and a tokenizer of its own: nothing is downloaded.

It is a real checkpoint (config.json, model.safetensors, tokenizer.json) that transformers loads
like any other; only its answers are noise. The seed is fixed, so the weights are the same every time.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

SEED = 20
VOCABULARY_MAX = 4096
HEAD_DIM = 64
# With the usual 0.02 a random model hardly attends and answers alike whatever it read. With this
# the answer depends on the KV, so that a wrong page would show.
INITIALIZER_RANGE = 0.08


def make_tokenizer(text: str) -> Tokenizer:
    """Train a byte-level BPE tokenizer on ``text``; every string can be encoded with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_MAX,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def make_model(*, vocabulary: int, layers: int, hidden: int) -> LlamaForCausalLM:
    """Make a Llama with random float32 weights and four query heads to each KV head."""
    torch.manual_seed(SEED)
    heads = max(hidden // HEAD_DIM, 1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        max_position_embeddings=32768,
        initializer_range=INITIALIZER_RANGE,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="what the tokenizer learns from")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=512)
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = make_tokenizer(options.text.read_text())
    model = make_model(
        vocabulary=tokenizer.get_vocab_size(), layers=options.layers, hidden=options.hidden
    )
    model.save_pretrained(options.folder)
    tokenizer.save(str(options.folder / "tokenizer.json"))


if __name__ == "__main__":
    main()
