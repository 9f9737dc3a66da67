"""What clients may send to /generate, and the fields that the OpenAI endpoints have in common with it.

Everything is strict: no "5" for 5, no unknown field, so that a misspelt one does not pass in silence.
Limits that a gateway is started with are added to the OpenAPI document by openapi.py and checked by
prompts.py.
"""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from respkv.gateway.failures import VALUE_CHARS, clean, is_text

# What every reader of JSON takes exactly: beyond, many round.
SEED_MAX = (1 << 53) - 1
NEW_TOKENS_DEFAULT = 64
# More fields than any object here has.
FIELDS_MAX = 64
# An error that names its field itself, as it is found before fields are looked at.
OF_A_FIELD = "of_a_field"


def _whole(value: object) -> object:
    """Return 5 for 5.0, which to JSON is the same number; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Behind the limits, so that they stay in the schema.
WHOLE = BeforeValidator(_whole)
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopString | Annotated[list[StopString], Field(max_length=4)]
Temperature = Annotated[
    float,
    Field(
        ge=0, le=2, allow_inf_nan=False, description="0, or less than 0.01: always the likeliest."
    ),
]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=1, le=1_000_000), WHOLE]
Seed = Annotated[
    int,
    Field(ge=-SEED_MAX, le=SEED_MAX, description="The same seed gives the same tokens."),
    WHOLE,
]
# The salt of a prompt's pages and the name of a conversation, of which the cache takes 256 bytes:
# prompts.py refuses a name of fewer characters and more bytes.
Word = Annotated[str, Field(min_length=1, max_length=128)]


class Input(BaseModel):
    """What comes from a client: strict, and nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _is_readable(cls, given: object) -> object:
        """Refuse what pydantic would let pass, or tell at too great a length."""
        if not isinstance(given, dict):
            raise PydanticCustomError("object_type", "Input should be an object")
        is_long = len(given) > FIELDS_MAX  # then one unknown field is told, not a million
        for name, value in given.items():
            if is_long and name not in cls.model_fields:
                told = "no such field, so it is not permitted"
                raise PydanticCustomError(OF_A_FIELD, told, {"field": clean(name)})
            if isinstance(value, str) and not is_text(value):
                told = "Input should be text, and half of a surrogate pair is no character"
                raise PydanticCustomError(
                    OF_A_FIELD, told, {"field": clean(name), "value": clean(value[:VALUE_CHARS])}
                )
        return given


class GenerateRequest(Input):
    """A prompt, and how it is to go on."""

    prompt: Annotated[str, Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        None, description=f"{NEW_TOKENS_DEFAULT} if it is not given, or the limit if that is less."
    )
    use_cache: bool = Field(
        True, description="False: no KV cache at all, each token computes everything again."
    )
    use_prefix_cache: bool = Field(
        True, description="False: nothing is taken from other prompts, and nothing kept for them."
    )
    temperature: Temperature = 0.0
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool = Field(False, description="Answer with server-sent events.")
    session: Word | None = Field(None, description="The conversation, whose pages are kept longer.")
    cache_salt: Word | None = Field(
        None, description="Pages are shared only with requests of the same salt."
    )
