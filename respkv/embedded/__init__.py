"""The engine inside this process: a cache without a server, and without a socket.

``with respkv.open_sync(maxmemory="1gb") as cache`` and ``async with respkv.open(...) as cache`` give
what ``Client`` and ``AsyncClient`` are, method for method, because they are these clients: only the
stream that their connections talk over is another one (stream.py). It hands bytes to the session of
a server that has no sockets, so every command, check and answer is the server's own, and there is
no second way to do anything. The other approach, methods that call the engine directly, would have
saved the parsing of some hundred bytes a command, and needed a second copy of what a command means.
"""

from respkv.embedded.aio import AsyncEmbeddedCache, open  # noqa: A004  (it is respkv.open)
from respkv.embedded.sync import EmbeddedCache, open_sync

__all__ = ["AsyncEmbeddedCache", "EmbeddedCache", "open", "open_sync"]
