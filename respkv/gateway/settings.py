"""What a gateway may be told: where it listens and what it takes from a client."""

import ipaddress
import re
from dataclasses import dataclass, field, fields

from respkv.errors import ConfigError

MIB = 1 << 20
# The most answers to one request: prompts times n.
CHOICES_MAX = 16
# The longest time that can be set; the system takes milliseconds in 32 bits.
SECONDS_MAX = 1_000_000
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/A-Z]+|\*")
_NAME = re.compile(r"[^\s/:]+|\*")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Limits and addresses; every one has to be positive where it is a number.

    token:      what clients have to send as `Authorization: Bearer TOKEN`; None lets all in.
    allow_origin: origins of web pages that may ask, such as https://chat.example; * is all.
    allow_host: names that this gateway has beside those that nobody else can have; * is any.
    *_s:        seconds; *_bytes: bytes; *_tokens: tokens of one request.
    Raises ConfigError that names the field, its value and what is accepted.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    token: str | None = field(default=None, repr=False)
    allow_origin: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
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
            elif each.name.endswith("_s") and value > SECONDS_MAX:
                raise ConfigError(f"{each.name} = {value}: accepted are values up to {SECONDS_MAX}")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            # The value itself stays out of the message: it is a secret.
            raise ConfigError("token: accepted are printable ASCII characters")
        if self.token is not None and (not self.token or " " in self.token):
            raise ConfigError("token: accepted are one character or more, none of them a space")

        for origin in self.allow_origin:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allow_origin = {origin!r}: accepted are origins as browsers send them, such as"
                    " https://chat.example or http://localhost:3000, and *"
                )
        for name in self.allow_host:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"allow_host = {name!r}: accepted are names without scheme and port, such as"
                    " llm.example, and *"
                )

    @property
    def is_local(self) -> bool:
        """Whether the address is one that only this machine reaches."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def choices_max(self) -> int:
        """The most answers to one request, which have to fit into the queue together."""
        return min(CHOICES_MAX, self.max_waiting)
