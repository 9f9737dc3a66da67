"""A gateway on a socket, served by a thread of this process."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import uvicorn

from respkv.gateway.app import make_app
from respkv.gateway.model import Model
from respkv.gateway.protocol import protocol_of
from respkv.gateway.serve import listen
from respkv.gateway.settings import GatewaySettings
from respkv.gateway.state import Gateway
from tests.gateway.scripted import ScriptedRunner

WAIT_S = 60.0


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The error of a body that has one, whose form is always the same."""
        (name, error), *rest = self.json.items()
        assert name == "error"
        assert not rest
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[tuple[str | None, Any]]:
        """Server-sent events: name and data, as JSON or as it is."""
        return list(events_of(self.body.decode()))


def events_of(text: str) -> Iterator[tuple[str | None, Any]]:
    for block in text.split("\n\n")[:-1]:
        name, data = None, None
        for line in block.split("\n"):
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                assert data is None
                data = value if value == "[DONE]" else json.loads(value)
        if data is not None:
            yield name, data


class Client:
    """Asks a gateway at a port."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self.ask("GET", path, None, headers or {})

    def post(self, path: str, body: object = None, **headers: str) -> Reply:
        """Post bytes as they are, anything else as JSON. headers: with _ for -."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", path, data, {"content-type": "application/json", **named})

    def ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read())
        finally:
            connection.close()

    def open(self, method: str, path: str, body: object) -> socket.socket:
        """Send a request and return the socket, from which nothing is read yet."""
        raw = socket.socket()
        raw.settimeout(WAIT_S)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)  # it takes little ahead
        raw.connect(("127.0.0.1", self.port))
        data = json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        raw.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        return raw


class Running(Client):
    """A gateway, until it is closed. model: None for one that is never loaded."""

    def __init__(
        self,
        model: Model | None,
        settings: GatewaySettings,
        runner: ScriptedRunner | None = None,
    ) -> None:
        self.gateway = Gateway(settings)
        self.model = model
        self._runner = runner
        if model is not None:
            self.gateway.install(model)
        self.app = make_app(self.gateway)
        config = uvicorn.Config(
            self.app,
            http=protocol_of(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=settings.keep_alive_s,
        )
        self.server = uvicorn.Server(config)
        listener = listen(replace(settings, port=0))
        super().__init__(listener.getsockname()[1])
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self._thread.start()

    @property
    def runner(self) -> ScriptedRunner:
        assert self._runner is not None
        return self._runner

    def close(self) -> None:
        if self._runner is not None:
            self._runner.gate.set()
        self.server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        if self.model is not None:
            self.model.close(0.0)
