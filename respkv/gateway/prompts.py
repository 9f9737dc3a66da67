"""From what a client sent to a job: tokens, limits checked, one request for each answer.

Tokenizing a long text takes a while, so it happens in worker threads, a few at a time; a short one is
done sooner than a thread would begin.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio
import anyio.to_thread

from respkv.batching.request import BadRequest, GenerationRequest, Sampling
from respkv.gateway.failures import Refused, shown
from respkv.gateway.generation import Job
from respkv.gateway.inputs import NEW_TOKENS_DEFAULT, GenerateRequest
from respkv.gateway.model import Model
from respkv.gateway.openai_inputs import ChatCompletionRequest, CompletionRequest, OpenAIRequest
from respkv.gateway.settings import GatewaySettings
from respkv.gateway.tokenizer import PLAIN_STOP, Message

TOKENIZING_MAX = 2
SHORT_CHARS = 4096
# Below this the likeliest token is as good as certain, and far below it the logits overflow.
TEMPERATURE_LEAST = 0.01
COMPLETION_TOKENS_DEFAULT = 16
_SEEDS = 1 << 64

# What a turn of a conversation costs beside its text.
TURN_CHARS = 16

# Tokens of all prompts; it may refuse one that has far more than so many.
Encode = Callable[[int], list[list[int]]]


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a request says beside its prompt."""

    new_tokens: int
    sampling: Sampling
    stops: Sequence[str]
    num_answers: int = 1
    use_cache: bool = True
    use_prefix_cache: bool = True
    session: str | None = None
    salt: str | None = None


class Prompts:
    """Makes jobs for a model, within the limits of the settings."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._tokenizing = anyio.CapacityLimiter(TOKENIZING_MAX)

    async def of_generate(self, request: GenerateRequest, model: Model, started: float) -> Job:
        """Return the job of a /generate. Raises Refused for what is over a limit."""
        most = self._settings.max_new_tokens
        if not (request.use_cache or self._settings.recompute):
            raise Refused(
                400,
                "recompute_refused",
                "use_cache = false is not accepted here: every token would compute everything again",
                param="use_cache",
            )
        wish = _Wish(
            new_tokens=self._new_tokens(
                request.max_new_tokens, min(NEW_TOKENS_DEFAULT, most), "max_new_tokens"
            ),
            sampling=_sampling(request.temperature, request.top_p, request.top_k, request.seed),
            stops=_stops(request.stop),
            use_cache=request.use_cache,
            use_prefix_cache=request.use_prefix_cache,
            session=request.session,
            salt=request.cache_salt,
        )
        prompt = request.prompt
        return await self._job(
            lambda most: [model.coder.encode(prompt, most=most)],
            len(prompt),
            wish,
            model,
            started,
        )

    async def of_completion(self, request: CompletionRequest, model: Model, started: float) -> Job:
        """Return the job of a /v1/completions. Raises Refused for what is over a limit."""
        wish = self._openai_wish(request, request.max_tokens, COMPLETION_TOKENS_DEFAULT)
        prompts = _prompts(request)
        self._check_choices(len(prompts), wish.num_answers)

        def encode(most: int) -> list[list[int]]:
            return [
                model.coder.encode(each, most=most) if isinstance(each, str) else each
                for each in prompts
            ]

        num_chars = sum(len(each) for each in prompts)
        return await self._job(encode, num_chars, wish, model, started)

    async def of_chat(self, request: ChatCompletionRequest, model: Model, started: float) -> Job:
        """Return the job of a /v1/chat/completions. Raises Refused for what is over a limit."""
        self._new_tokens(request.max_tokens, 1, "max_tokens")  # checked, even if the other wins
        asked = request.max_completion_tokens or request.max_tokens
        messages = _messages(request)
        more = () if model.coder.has_template else (PLAIN_STOP,)
        wish = self._openai_wish(request, asked, self._settings.max_new_tokens, more)
        self._check_choices(1, wish.num_answers)

        def encode(most: int) -> list[list[int]]:
            return [model.coder.encode_chat(messages, most=most)]

        # Without a number the answer is as long as the room behind the prompt.
        num_chars = sum(len(each["content"]) + TURN_CHARS for each in messages)
        return await self._job(
            encode,
            num_chars,
            wish,
            model,
            started,
            param="messages",
            may_shorten=asked is None,
        )

    def _openai_wish(
        self, request: OpenAIRequest, asked: int | None, default: int, more: Sequence[str] = ()
    ) -> _Wish:
        default = min(default, self._settings.max_new_tokens)
        new_tokens = self._new_tokens(asked, default, "max_tokens")
        temperature = 1.0 if request.temperature is None else request.temperature
        return _Wish(
            new_tokens=new_tokens,
            sampling=_sampling(temperature, request.top_p, request.top_k, request.seed),
            stops=[*_stops(request.stop), *more],
            num_answers=request.n or 1,
            session=request.session,
            salt=request.cache_salt,
        )

    def _check_choices(self, num_prompts: int, num_answers: int) -> None:
        most = self._settings.choices_max
        if num_prompts * num_answers > most:
            raise Refused(
                400,
                "too_many_choices",
                f"{num_prompts} prompts of n = {num_answers} make more answers"
                f" than the {most} that one request may ask for",
                param="n",
            )

    def _new_tokens(self, asked: int | None, default: int, param: str) -> int:
        most = self._settings.max_new_tokens
        if asked is not None and asked > most:
            raise Refused(
                400,
                "too_many_new_tokens",
                f"{shown(asked)} new tokens are more than the {most} that one request may ask for",
                param=param,
            )
        return default if asked is None else asked

    async def _job(
        self,
        encode: Encode,
        num_chars: int,
        wish: _Wish,
        model: Model,
        started: float,
        *,
        param: str = "prompt",
        may_shorten: bool = False,
    ) -> Job:
        """Tokenize, check, and make a request for each answer.

        Cancelled: the thread may go on for a moment, for nobody.
        """
        begin = time.perf_counter()
        most = self._prompt_max(model)
        try:
            if num_chars <= SHORT_CHARS:
                prompts = encode(most)
            else:
                prompts = await anyio.to_thread.run_sync(
                    encode, most, abandon_on_cancel=True, limiter=self._tokenizing
                )
        except Refused as failure:
            failure.param = param
            raise
        tokenize_s = time.perf_counter() - begin
        requests = []
        for tokens in prompts:
            room = self._room(tokens, model, param)
            new_tokens = min(wish.new_tokens, room) if may_shorten else wish.new_tokens
            if new_tokens > room:
                raise Refused(
                    400,
                    "context_length_exceeded",
                    f"a prompt of {len(tokens)} tokens leaves room for {room} new ones,"
                    f" not for {new_tokens}: the model takes {model.tokens_max} in all",
                    param=param,
                )
            together = self._settings.max_recompute_tokens
            if not wish.use_cache and len(tokens) + new_tokens > together:
                raise Refused(
                    400,
                    "too_many_recompute_tokens",
                    f"a prompt of {len(tokens)} tokens and {new_tokens} new ones are more than the {together}"
                    " that a request with use_cache = false may have",
                    param="use_cache",
                )
            for index in range(wish.num_answers):
                requests.append(_request(tokens, new_tokens, wish, model, index))
        return Job(requests, wish.stops, started, tokenize_s, wish.num_answers)

    def _prompt_max(self, model: Model) -> int:
        return min(self._settings.max_prompt_tokens, model.tokens_max - 1)

    def _room(self, tokens: Sequence[int], model: Model, param: str) -> int:
        """Check a prompt; return how many tokens may follow, at least one."""
        most = self._prompt_max(model)
        if not tokens:
            raise Refused(400, "empty_prompt", "the prompt has no tokens", param=param)
        if len(tokens) > most:
            raise Refused(
                400,
                "context_length_exceeded",
                f"the prompt has {len(tokens)} tokens, which is more than the {most} allowed",
                param=param,
            )
        if max(tokens) >= model.vocab_size:
            raise Refused(
                400,
                "unknown_token",
                f"token {shown(max(tokens))} is not one of the model's {model.vocab_size}",
                param=param,
            )
        return model.tokens_max - len(tokens)


def _request(
    tokens: Sequence[int], new_tokens: int, wish: _Wish, model: Model, index: int
) -> GenerationRequest:
    sampling = wish.sampling
    if sampling.seed is not None and index:
        # Answers to one request differ, and each is the same the next time.
        seed = (sampling.seed + index) % _SEEDS
        sampling = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
    try:
        return GenerationRequest(
            tokens=tokens,
            max_new_tokens=new_tokens,
            sampling=sampling,
            stop_tokens=model.stop_tokens,
            use_cache=wish.use_cache,
            use_prefix_cache=wish.use_prefix_cache,
            salt=wish.salt,
            session=wish.session,
        )
    except BadRequest as error:  # a name with no encoding, or with too long a one
        raise Refused(400, "invalid_request", str(error)) from error


def _sampling(
    temperature: float, top_p: float | None, top_k: int | None, seed: int | None
) -> Sampling:
    warmth = temperature if temperature >= TEMPERATURE_LEAST else 0.0
    return Sampling(warmth, top_k, top_p, None if seed is None else seed % _SEEDS)


def _stops(stop: str | list[str] | None) -> list[str]:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else list(stop)


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    first = prompt[0]
    if isinstance(first, int):
        return [[each for each in prompt if isinstance(each, int)]]
    return [each for each in prompt if not isinstance(each, int)]


def _messages(request: ChatCompletionRequest) -> list[Message]:
    messages = []
    for each in request.messages:
        content = each.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        # What newer models call the developer, templates call the system.
        role = "system" if each.role == "developer" else each.role
        message = {"role": role, "content": text}
        messages.append(message | ({"name": each.name} if each.name is not None else {}))
    return messages
