"""What a gateway may be told: where it listens and what it takes from a client."""

from dataclasses import dataclass, field, fields

from respkv.errors import ConfigError

MIB = 1 << 20
# The most answers to one request: prompts times n.
CHOICES_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Limits and addresses; every one has to be positive where it is a number.

    token:      what clients have to send as `Authorization: Bearer TOKEN`; None lets all in.
    *_s:        seconds; *_bytes: bytes; *_tokens: tokens of one request.
    Raises ConfigError that names the field, its value and what is accepted.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    token: str | None = field(default=None, repr=False)
    max_prompt_tokens: int = 8192
    max_new_tokens: int = 1024
    recompute: bool = True  # whether use_cache = false is taken
    max_recompute_tokens: int = 2048  # of such a request, prompt and answer together
    max_concurrency: int = 32  # sequences in the model loop at once
    max_waiting: int = 256  # sequences that wait for their turn
    max_connections: int = 1024
    max_body_bytes: int = 4 * MIB
    bodies_bytes: int = 64 * MIB  # of all requests under way, together
    head_timeout_s: float = 10.0  # until a request's head is there
    body_timeout_s: float = 30.0  # until its body is
    read_timeout_s: float = 30.0  # a client that takes nothing for so long is dropped
    keep_alive_s: int = 15  # an idle connection
    heartbeat_s: float = 15.0  # a stream without news
    stop_timeout_s: int = 20  # what is in flight may take after SIGTERM
    retry_after_s: int = 1  # what a 503 tells the client

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "port":
                if not 0 <= value <= 65535:
                    raise ConfigError(f"port = {value}: accepted are 0 to 65535")
            elif isinstance(value, int | float) and each.name != "recompute" and not value > 0:
                raise ConfigError(f"{each.name} = {value}: accepted are values above 0")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            # The value itself stays out of the message: it is a secret.
            raise ConfigError("token: accepted are printable ASCII characters")
        if self.token is not None and (not self.token or " " in self.token):
            raise ConfigError("token: accepted are one character or more, none of them a space")

    @property
    def choices_max(self) -> int:
        """The most answers to one request, which have to fit into the queue together."""
        return min(CHOICES_MAX, self.max_waiting)
