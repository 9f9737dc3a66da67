"""One inference worker of the demo: a transformers model, and respkv behind it.

Jobs come in as lines of JSON on standard input; what happens leaves as lines of JSON on standard
output. Two such processes share nothing but the server. The part that concerns respkv is in
shared_pages.py.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import xxhash
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, DynamicLayer, PreTrainedModel
from transformers.utils import logging

from examples.shared_pages import Layers, SharedPages
from respkv.client import Client
from respkv.page import Geometry

Report = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(slots=True)
class Answer:
    """What came out of one prompt, and what it took."""

    prompt_tokens: int
    pages_hit: int
    tokens_hit: int
    found_in: str  # a letter for each tier that had some of them
    bytes_read: int
    load_s: float  # to find, fetch and place them; a part of first_token_s
    first_token_s: float
    new_tokens: list[int]
    logits: str  # digest of the bits of the first logits
    pages_stored: int = 0
    bytes_stored: int = 0
    store_s: float = 0.0


class Worker:
    """A model on one core, or as many threads as torch was given."""

    def __init__(self, model: PreTrainedModel, *, page_tokens: int) -> None:
        self.model = model
        self.page_tokens = page_tokens
        # The warm-up keeps one-off costs out of the first time to first token.
        warm = DynamicCache(config=model.config)
        self.prefill([0] * page_tokens, warm, lambda done, of: None)
        self.geometry = geometry(warm, page_tokens)

    def answer(
        self,
        tokens: Sequence[int],
        pages: SharedPages,
        *,
        load: str,
        store: str,
        new_tokens: int,
        report: Report,
    ) -> Answer:
        """Read a prompt and generate greedily.

        load, store: "socket", "memory" or "" for not at all.
        """
        cache = DynamicCache(config=self.model.config)
        start = time.perf_counter()
        if load:
            for layer, (key, value) in enumerate(pages.load(tokens, load)):
                cache.update(key, value, layer)
        load_s = time.perf_counter() - start
        tokens_hit = cache.get_seq_length()
        logits = self.prefill(tokens, cache, report)
        first = int(logits.argmax())
        first_token_s = time.perf_counter() - start
        pages_hit = tokens_hit // self.page_tokens
        answer = Answer(
            prompt_tokens=len(tokens),
            pages_hit=pages_hit,
            tokens_hit=tokens_hit,
            found_in=pages.found_in if load else "",
            bytes_read=pages_hit * self.geometry.page_bytes,
            load_s=load_s,
            first_token_s=first_token_s,
            new_tokens=self.decode(first, cache, new_tokens),
            logits=hashlib.sha256(bits(logits)).hexdigest(),
        )
        if store:
            start = time.perf_counter()
            answer.pages_stored = pages.store(tokens, layers(cache), pages_hit, store)
            answer.store_s = time.perf_counter() - start
            answer.bytes_stored = answer.pages_stored * self.geometry.page_bytes
        return answer

    def prefill(self, tokens: Sequence[int], cache: DynamicCache, report: Report) -> Tensor:
        """Compute the tokens that the cache has not, page by page; returns the last logits [V].

        Pages are the steps with and without cached pages alike, so that every matrix product has
        the same shape in both and both give the same bits: tokens computed in steps of another
        size differ in their last bits, and now and then that turns a greedy choice.
        """
        done = cache.get_seq_length()
        while len(tokens) - done > self.page_tokens:
            report(done, len(tokens))
            self.step(tokens[done : done + self.page_tokens], cache)
            done += self.page_tokens
        return self.step(tokens[done:], cache)

    def decode(self, first: int, cache: DynamicCache, count: int) -> list[int]:
        """Generate ``count`` tokens greedily, the first of which is known already."""
        chosen = [first]
        while len(chosen) < count:
            chosen.append(int(self.step(chosen[-1:], cache).argmax()))
        return chosen

    def step(self, tokens: Sequence[int], cache: DynamicCache) -> Tensor:
        """Compute the tokens that follow those of the cache, which grows; returns the last logits."""
        output = self.model(
            input_ids=torch.tensor([list(tokens)]), past_key_values=cache, logits_to_keep=1
        )
        logits: Tensor = output.logits[0, -1]
        return logits


def layers(cache: DynamicCache) -> Layers:
    """Return K and V of every layer of a filled cache, each [1, H, tokens, D].

    Raises ValueError when a layer keeps something else than the K and V of every token: a sliding
    window or a recurrent state at the end of a page does not stand for all tokens before it.
    """
    pairs = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise ValueError("only models with full attention in every layer can share pages")
        pairs.append((layer.keys, layer.values))
    return pairs


def geometry(cache: DynamicCache, page_tokens: int) -> Geometry:
    """Read off a filled cache what a page of its model looks like."""
    pairs = layers(cache)
    key, _ = pairs[0]
    _, heads, _, dim = key.shape
    dtype = str(key.dtype).removeprefix("torch.")
    return Geometry(layers=len(pairs), heads=heads, dim=dim, tokens=page_tokens, dtype=dtype)


def fingerprint(model: PreTrainedModel) -> bytes:
    """Hash the configuration and every weight: two models share KV only when this is equal."""
    digest = xxhash.xxh3_128(model.config.to_json_string().encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(bits(weight))
    return digest.digest()


def bits(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, whatever its dtype."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data


def say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a local checkpoint")
    parser.add_argument("--server", required=True, help="URL of respkv")
    parser.add_argument("--namespace", default="shared-prompt")
    parser.add_argument("--page-tokens", type=int, default=128)
    parser.add_argument("--nvme-codec", default="xs", help="how files hold the pages")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(options.threads)
    # Without a dtype given, the one of the checkpoint.
    model = AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True)
    with torch.inference_mode(), Client(options.server) as client:
        worker = Worker(model, page_tokens=options.page_tokens)
        codecs = {"nvme": options.nvme_codec}
        pages = SharedPages(client, options.namespace, worker.geometry, fingerprint(model), codecs)
        page = worker.geometry
        say("ready", shape=pages.shape, dtype=page.dtype, bytes=page.page_bytes)
        for line in sys.stdin:
            answer = worker.answer(
                **json.loads(line),
                pages=pages,
                report=lambda done, of: say("progress", done=done, of=of),
            )
            say("answer", **asdict(answer))


if __name__ == "__main__":
    main()
