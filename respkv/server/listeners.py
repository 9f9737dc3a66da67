"""The sockets of a server. A TCP address is bound before anything else is started, so that one in use
is told at once, and listens only when the server can answer, so that no client waits meanwhile. A
Unix socket's file is what others wait for, so it is made last.
"""

import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from respkv.config import Config
from respkv.errors import CacheError


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket, and for a Unix socket its file."""

    socket: socket.socket
    path: str = ""
    inode: int = -1

    @property
    def port(self) -> int:
        """The TCP port, 0 for a Unix socket."""
        return 0 if self.path else int(self.socket.getsockname()[1])


def open_tcp(config: Config) -> list[Listener]:
    """Bind the TCP address, if there is one. Raises CacheError when it cannot be had."""
    return [_tcp(config.host, config.port)] if config.port >= 0 else []


def open_unix(config: Config) -> list[Listener]:
    """Listen on the Unix socket, if there is one; its file appears when clients may come.

    Raises CacheError when the path cannot be had.
    """
    return [_unix(config.unixsocket, config.unixsocketperm)] if config.unixsocket else []


def close_listeners(listeners: list[Listener]) -> None:
    """Close the sockets; remove a Unix socket's file if it is still ours."""
    for listener in listeners:
        listener.socket.close()
        if listener.path and _inode(listener.path) == listener.inode:
            Path(listener.path).unlink(missing_ok=True)


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1


def _tcp(host: str, port: int) -> Listener:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CacheError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise CacheError(_why(f"{host}:{port}", error, "port")) from error
    return Listener(listener)


def _unix(path: str, mode: int) -> Listener:
    """Bind a path that nobody else may use, not even for an instant (CVE-2023-45145)."""
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise CacheError(_why(path, error, "unixsocket")) from error
    finally:
        os.umask(before)
    listener.listen()
    os.chmod(path, mode)
    return Listener(listener, path, _inode(path))


def _remove_stale(path: str) -> None:
    """Remove the socket file of a server that has died; a live one is left alone."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise CacheError(f"unixsocket {path}: there is a file that is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
            return
        except OSError:
            return
    raise CacheError(f"unixsocket {path}: another server is listening there")


def _why(where: str, error: OSError, setting: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"cannot listen on {where}: it is in use; choose another {setting} or stop its owner"
    return f"cannot listen on {where}: {error.strerror}"
