"""Answers that are made while they are sent, whole or in pieces, and clients that go away.

Both begin when the route has returned, so that nothing of the request's body is held until they end.
A request is cancelled as soon as its client is gone, streamed or not. A client that reads slowly
holds up nobody: its tokens wait in its ticket, and when it takes nothing for too long protocol.py
drops the connection, which looks like any other client that went away.
"""

from collections.abc import Awaitable, Callable, Iterator

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from respkv.batching.ticket import Ticket
from respkv.gateway.events import HEARTBEAT, Events
from respkv.gateway.failures import Refused
from respkv.gateway.generation import Answer, Generation
from respkv.gateway.outputs import Output

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx, do not wait for more
}
# Nobody reads it; nginx's number for the log and the metrics.
CLIENT_GONE = 499


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[None]]) -> bool:
    """Do work while the client is there; returns whether it was done.

    receive: of a request whose body has been read.
    Raises Refused, as the work does.
    """
    failure: Refused | None = None
    is_gone = False
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            nonlocal is_gone
            while (await receive())["type"] != "http.disconnect":
                pass
            is_gone = True
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            await work()
        except Refused as error:
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return not is_gone


def let_go(scope: Scope) -> None:
    """Give back the room that the request's body took: it has been read, and is not there any more."""
    scope["state"]["let_go"]()


class WholeAnswer(Response):
    """A generation as one body of JSON.

    written: makes the body, when all of it is there; when_over: called after that.
    """

    def __init__(
        self, generation: Generation, written: Callable[[], Output], when_over: Callable[[], None]
    ) -> None:
        super().__init__()
        self._generation = generation
        self._written = written
        self._when_over = when_over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or nothing to a client that has gone. Raises Refused."""
        let_go(scope)

        async def work() -> None:
            await self._generation.run(_drop)

        if not await unless_gone(receive, work):
            return
        self._when_over()
        body = self._written().model_dump_json()
        await Response(body, media_type="application/json")(scope, receive, send)


class EventStream(Response):
    """A generation as server-sent events.

    Nothing is submitted before the response is sent, so that nothing is left over if it never is;
    when the loop does not take it the answer is an error with its status, as without a stream.
    """

    def __init__(
        self,
        generation: Generation,
        events: Events,
        heartbeat_s: float,
        when_over: Callable[[], None],
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._when_over = when_over
        self._generation = generation
        self._events = events
        self._heartbeat_s = heartbeat_s
        self._lock = anyio.Lock()
        self._news = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        let_go(scope)
        try:
            with self._generation.submitted() as tickets:
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)

                async def work() -> None:
                    await self._run(tickets, send)

                if await unless_gone(receive, work):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Refused as failure:
            await failure.response()(scope, receive, send)
        self._when_over()

    async def _run(self, tickets: list[Ticket], send: Send) -> None:
        generation, events = self._generation, self._events

        async def say(parts: Iterator[bytes]) -> None:
            body = b"".join(parts)
            if body:
                self._news = True
                async with self._lock:
                    await send({"type": "http.response.body", "body": body, "more_body": True})

        async def on_text(answer: Answer, text: str) -> None:
            await say(events.piece(answer, text))

        async def beat() -> None:
            while True:
                self._news = False
                await anyio.sleep(self._heartbeat_s)
                if not self._news:
                    await say(iter([HEARTBEAT]))

        async with anyio.create_task_group() as group:
            group.start_soon(beat)
            try:
                await say(events.begin(generation))
                await generation.read(tickets, on_text)
                await say(events.end(generation))
            except Refused as failure:
                await say(events.failed(failure))
            group.cancel_scope.cancel()


async def _drop(answer: Answer, text: str) -> None:
    """Nobody reads along."""
