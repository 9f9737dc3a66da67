"""What is to be served. Apart from loading.py, so that a wrong name is told before torch is there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from respkv.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is served, and the cache behind it.

    folder:    with config.json, weights and tokenizer; nothing is downloaded.
    name:      what clients call it; the folder's name when empty.
    url:       of a respkv server; None: an engine in this process, of ``settings``.
    config, settings: of the embedded engine: a file, and what wins over it, such as maxmemory; as
               respkv.open_sync takes them.
    kv_memory: bytes for the KV of what runs, and of what ran until their room is needed.
    always_load: stored KV is loaded even where computing it is expected to take less time.
    threads:   of torch; None leaves its default.
    """

    folder: Path
    name: str = ""
    url: str | None = None
    config: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    namespace: str | None = None
    page_tokens: int = 64
    kv_memory: int = 1 << 30
    always_load: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if not (self.folder / "config.json").is_file():
            raise ConfigError(
                f"--model {str(self.folder)!r}: accepted is a folder with a checkpoint"
                " (config.json, weights, tokenizer.json)"
            )
