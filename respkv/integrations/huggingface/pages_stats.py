"""What ``PromptPages`` has done."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PagesStats:
    """What was done since the beginning.

    matches, match_tokens: how often it was asked, and the tokens found. loads, loaded_tokens,
    loaded_bytes, load_s: what was brought, and the seconds it took. leased_bytes: of them, those
    that were copied out of the server's memory, without a socket; gpu_bytes: of these, those that
    never left the GPU. stores, stored_pages,
    stores_dropped: what was stored; dropped is what found no room in the queue, or failed.
    errors, last_error: of the cache.
    """

    matches: int = 0
    match_tokens: int = 0
    loads: int = 0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    leased_bytes: int = 0
    gpu_bytes: int = 0
    load_s: float = 0.0
    stores: int = 0
    stored_pages: int = 0
    stores_dropped: int = 0
    errors: int = 0
    last_error: str = ""
