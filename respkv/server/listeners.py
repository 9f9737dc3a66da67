"""The sockets that a server listens on, bound before anything else is started."""

import errno
import os
import socket
import stat
from pathlib import Path

from respkv.config import Config
from respkv.errors import CacheError


def open_listeners(config: Config) -> list[socket.socket]:
    """Bind what the settings ask for. Raises CacheError when an address cannot be had."""
    listeners: list[socket.socket] = []
    try:
        if config.port >= 0:
            listeners.append(_tcp(config.host, config.port))
        if config.unixsocket:
            listeners.append(_unix(config.unixsocket, config.unixsocketperm))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def port_of(listeners: list[socket.socket]) -> int:
    """Return the TCP port that was bound, or 0."""
    for listener in listeners:
        if listener.family != socket.AF_UNIX:
            return int(listener.getsockname()[1])
    return 0


def close_listeners(listeners: list[socket.socket], config: Config) -> None:
    """Close the sockets and remove the Unix socket's file if it is still ours."""
    for listener in listeners:
        if listener.family == socket.AF_UNIX and listener.fileno() >= 0:
            Path(config.unixsocket).unlink(missing_ok=True)
        listener.close()


def _tcp(host: str, port: int) -> socket.socket:
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
        listener.listen()
    except OSError as error:
        listener.close()
        raise CacheError(_why(f"{host}:{port}", error, "port")) from error
    return listener


def _unix(path: str, mode: int) -> socket.socket:
    """Listen on a path that nobody else may use, not even for an instant (CVE-2023-45145)."""
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
    os.chmod(path, mode)
    listener.listen()
    return listener


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
