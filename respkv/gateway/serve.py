"""The process of a gateway: listen, load the model meanwhile, serve, and end well.

The port is open and /healthz answers before the model is loaded, so that a supervisor can tell a
slow start from a dead process; /readyz says when requests are taken. SIGTERM or SIGINT: no new
requests, those in flight may take ``stop_timeout_s`` to finish, pages that wait are stored, and the
process ends with 0. A second signal ends it at once.
"""

import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from respkv.errors import CacheError, ConfigError
from respkv.gateway.app import make_app
from respkv.gateway.model import Model
from respkv.gateway.protocol import protocol_of
from respkv.gateway.settings import GatewaySettings
from respkv.gateway.state import Gateway

# Of the time to stop, for saying to the last ones that they were not finished.
FAREWELL_S = 1.0
# Of a connection's answer in the kernel, which doubles it.
SEND_BYTES = 64 * 1024

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn, whose process ends with 0 when it was told to end."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at a signal; it is not raised again afterwards."""
        wanted = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; the second time, stop at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.force_exit:  # what is cut off is no error of its own
            logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        self._on_stop()


class Process:
    """One run of a gateway. load: makes the model, in a thread; raises CacheError when it cannot."""

    def __init__(self, settings: GatewaySettings, load: Callable[[], Model]) -> None:
        self._settings = settings
        self._load = load
        self._gateway = Gateway(settings)
        self._announce: Callable[[str], None] = logger.info
        self._failure: CacheError | None = None
        self._closing: threading.Thread | None = None
        self._loading = threading.Thread(target=self._load_model, name="respkv-load", daemon=True)
        config = uvicorn.Config(
            make_app(self._gateway),
            http=protocol_of(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=settings.stop_timeout_s,
        )
        self._server = _Server(config, self._begin_to_stop)

    def run(self, announce: Callable[[str], None]) -> None:
        """Serve until SIGTERM or SIGINT.

        announce: gets a line when the port is open, and one when the model is loaded.
        Raises ConfigError when the address cannot be had; CacheError when the model cannot be
        loaded.
        """
        _allow_connections()
        with listen(self._settings) as listener:
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._announce = announce
            announce(f"listening on http://{shown}:{port}")
            if self._settings.token is None and not self._settings.is_local:
                announce("no token is set: everybody is let in who reaches this address")
            self._loading.start()
            self._server.run(sockets=[listener])
        self._begin_to_stop()
        self._loading.join(self._settings.stop_timeout_s)
        if self._closing is not None:
            self._closing.join()
        # A signal may have come while the model was loaded, which then nobody waits for.
        if self._failure is not None and not self._loading.is_alive():
            raise self._failure

    def _load_model(self) -> None:
        # A bug is no CacheError: the thread reports it, and the process ends all the same.
        self._failure = CacheError("loading the model crashed; the log has more")
        try:
            model = self._load()
            self._failure = None
            self._gateway.install(model)
            self._announce(f"ready to serve {model.name}")
        except CacheError as error:
            self._failure = error
        finally:
            if self._failure is not None:
                self._server.should_exit = True

    def _begin_to_stop(self) -> None:
        """Refuse new requests and let the others finish; a signal's handler may call this."""
        if self._closing is None:
            model = self._gateway.stop()
            if model is not None:
                drain_s = max(self._settings.stop_timeout_s - FAREWELL_S, 0.0)
                self._closing = threading.Thread(target=self._close, args=[model, drain_s])
                self._closing.start()

    def _close(self, model: Model, drain_s: float) -> None:
        # Not said where the signal came: a handler must not write what may be half written.
        self._announce("stopping: what is under way may finish")
        model.close(drain_s)


def _allow_connections() -> None:
    """Raise the limit of open files: a connection is one, and so is a request's place in the loop."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(settings: GatewaySettings) -> socket.socket:
    """Return a listening socket of a gateway. Raises ConfigError when the address cannot be had."""
    address = (settings.host, settings.port)
    try:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server(address, family=family, backlog=1024)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from error
    # Connections inherit these. A stream needs little room in the kernel, which would give a reader
    # that does not read megabytes; and what nobody takes does not stay there for ever.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    wait_ms = int(settings.read_timeout_s * 1000)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, wait_ms)
    return listener
