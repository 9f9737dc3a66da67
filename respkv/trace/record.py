"""A proxy that writes down what a server is asked: ``respkv trace record``.

It stands between clients and any server that speaks RESP. What comes from one side goes to the other
as it came, chunk by chunk, and is read only beside that: a chunk is passed on before it is looked at,
large arguments and bulks are stepped over by their length, and what cannot be understood is passed on
all the same and no longer written down. Nothing is read from one side before the other has taken what
was read last, so a slow reader slows the writer as it would without a proxy.

A line of the recording is one command with its reply (notes.py says what is in it), written when the
reply is whole. ``t`` is when the command was whole, in seconds from the start of the recording;
``latency_us`` ends with the reply's last byte.
"""

import json
import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import IO, Any

import anyio

from respkv.client.url import Settings
from respkv.errors import CacheError, ProtocolError
from respkv.trace.groups import answers_alone
from respkv.trace.notes import Noted, Notes, Skipped, describe, is_tokens
from respkv.trace.pipe import Pipe, accept, connect, listen
from respkv.trace.recorded import FORMAT, VERSION
from respkv.trace.scan import ReplyScanner
from respkv.wire.parser import Limits, RequestParser
from respkv.wire.tokenizer import Tokenizer

CHUNK_BYTES = 64 * 1024
FEED_BYTES = 16 * 1024  # the parser searches all that it takes; of a page it needs the first bytes
TOKENS_BYTES_MAX = 64 << 20  # of a prompt that is collected to be hashed
FLUSH_S = 1.0


@dataclass(slots=True)
class _Waiting:
    noted: Noted
    began: float


class Recording:
    """The file of a recording, and how many commands are in it.

    Raises CacheError from ``write`` and ``flush`` when the file cannot be written.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.start = perf_counter()
        self.num_commands = 0
        self._write({"format": FORMAT, "version": VERSION})

    def write(self, number: int, noted: Noted, began: float, reply: dict[str, Any]) -> None:
        """Write one command of connection ``number`` that began then."""
        self.num_commands += 1
        took = perf_counter() - began
        head = {"t": round(began - self.start, 6), "conn": number}
        tail = {"latency_us": round(took * 1e6)}
        self._write(head | noted.fields | reply | tail)

    def flush(self) -> None:
        """Hand all that was written to the system."""
        try:
            self._file.flush()
        except OSError as error:
            raise CacheError(f"the recording cannot be written: {error}") from error

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            raise CacheError(f"the recording cannot be written: {error}") from error


class Ear:
    """Follows one connection's bytes and writes its commands down. No sockets.

    is_lost: what is said is not understood any more, or answers no command; nothing is written then.
    """

    def __init__(
        self, number: int, notes: Notes, recording: Recording, tokenizer: Tokenizer
    ) -> None:
        self.is_lost = False
        self._number = number
        self._notes = notes
        self._recording = recording
        # A held_max above the server's: the server refuses what is too much, we only listen.
        self._parser = RequestParser(tokenizer, Limits(bulk_max=1 << 62, held_max=1 << 30))
        self._scanner = ReplyScanner()
        self._waiting: deque[_Waiting] = deque()
        self._skip = 0  # bytes of a large argument that are still to come
        self._tokens: bytearray | None = None  # where they are collected, when they are a prompt
        self._nbytes = 0

    def sent(self, data: bytes) -> None:
        """Follow what the client sent."""
        view = memoryview(data)
        while view and not self.is_lost:
            if self._skip:
                step = min(self._skip, len(view))
                if self._tokens is not None:
                    self._tokens += view[:step]
                self._skip -= step
                view = view[step:]
                if not self._skip:
                    self._end_body()
                continue
            part = view[:FEED_BYTES]
            view = view[FEED_BYTES:]
            self._note(self._parser.feed(bytes(part), len(part)))
            self._follow()

    def answered(self, data: bytes) -> None:
        """Follow what the server sent."""
        if self.is_lost:
            return
        try:
            answers = self._scanner.feed(data)
        except ProtocolError:
            self._lose()
            return
        for answer in answers:
            if not self._waiting:
                self._lose()  # nobody asked for it
                return
            waiting = self._waiting.popleft()
            self._notes.answered(waiting.noted, is_error=answer.kind in "-!")
            reply = describe(waiting.noted.command, answer)
            self._recording.write(self._number, waiting.noted, waiting.began, reply)

    def _follow(self) -> None:
        """Go on behind large arguments of which all bytes have come, and stop at one of which not."""
        while (body := self._parser.body) is not None and not self.is_lost:
            self._nbytes = body.nbytes
            is_prompt = is_tokens(body.head, body.nbytes) and body.nbytes <= TOKENS_BYTES_MAX
            self._tokens = bytearray(body.early) if is_prompt else None
            self._skip = body.nbytes - len(body.early)
            if self._skip:
                return
            self._note(self._close_body())
        if self._parser.error is not None:
            self._lose()

    def _end_body(self) -> None:
        self._note(self._close_body())
        self._follow()

    def _close_body(self) -> Any:
        tokens, self._tokens = self._tokens, None
        return self._parser.end_body(Skipped(self._nbytes) if tokens is None else bytes(tokens))

    def _note(self, commands: Any) -> None:
        began = perf_counter()
        for args in commands:
            noted = self._notes.command(args)
            if noted.ends_order:
                self._recording.write(self._number, noted, began, {"reply": "untracked"})
                self._lose()
                return
            self._waiting.append(_Waiting(noted, began))

    def _lose(self) -> None:
        self.is_lost = True
        self._waiting.clear()


class Recorder:
    """Serves the clients of a recording. target: where the server is; TLS is not spoken."""

    def __init__(self, target: Settings, notes: Notes, recording: Recording) -> None:
        self._target = target
        self._notes = notes
        self._recording = recording
        self._tokenizer = Tokenizer()
        self._numbers = count(1)
        self.num_refused = 0  # connections for which the server was away

    async def serve(self, client: Pipe) -> None:
        """Pass on what a client and the server say to each other until one of them has gone."""
        try:
            try:
                server = await connect(self._target)
            except OSError:
                self.num_refused += 1
                return
            try:
                await self._serve(client, server)
            finally:
                server.close()
        finally:
            client.close()

    async def _serve(self, client: Pipe, server: Pipe) -> None:
        ear = Ear(next(self._numbers), self._notes, self._recording, self._tokenizer)
        async with anyio.create_task_group() as group:
            group.start_soon(_pass_on, client, server, ear.sent)
            await _pass_on(server, client, ear.answered)
            group.cancel_scope.cancel()  # a server that has gone reads nothing more


def run(
    recorder: Recorder, recording: Recording, at: Settings, tell: Callable[[str], None]
) -> None:
    """Record in an event loop of its own until SIGINT or SIGTERM.

    tell: told where clients connect, once they can.
    Raises ConfigError when nobody can listen there, CacheError when the file cannot be written.
    """
    with answers_alone():
        anyio.run(_run, recorder, recording, at, tell, backend_options={"use_uvloop": True})


async def _run(
    recorder: Recorder, recording: Recording, at: Settings, tell: Callable[[str], None]
) -> None:
    async with listen(at) as (listener, where), anyio.create_task_group() as group:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            group.start_soon(record, recorder, listener, recording)
            tell(where)
            async for _ in signals:
                group.cancel_scope.cancel()
                return


async def record(recorder: Recorder, listener: socket.socket, recording: Recording) -> None:
    """Accept clients until cancelled; what was recorded is in the file then.

    listener: from ``listen``.
    """
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_flush_often, recording)
            await accept(listener, recorder.serve)
    finally:
        recording.flush()


async def _pass_on(source: Pipe, sink: Pipe, hear: Callable[[bytes], None]) -> None:
    """Send what comes until it ends; then say so to the other side."""
    while data := await source.receive(CHUNK_BYTES):
        if not await sink.send(data):
            return
        hear(data)
    sink.end()


async def _flush_often(recording: Recording) -> None:
    while True:
        await anyio.sleep(FLUSH_S)
        recording.flush()
