"""What every request passes: its number, token, size and time, the log line and the figures of the metrics."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from mechsafety.output import json_text
from mechsafety.service.figures import PATHS
from mechsafety.service.limits import ServiceLimits
from mechsafety.service.logs import described, log

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
# paths that tell nothing of the model's inputs and outputs
OPEN = ("/healthz", "/docs", "/openapi.json")
# how long the rest of a refused body is read, and dropped, after the answer
LINGER_SECONDS = 2.0


class Refused(Exception):
    """A request that is answered with one line.

    Args:
        status: HTTP status.
        problem: The line.
        headers: Further headers of the answer.
    """

    def __init__(self, status: int, problem: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(problem)
        self.status = status
        self.headers = headers or {}


class Gate:
    """ASGI middleware around the whole app.

    It answers before the app is asked: 401 without the token, 421 for another host's name, 413 for a large body, 408
    for a slow one. It adds ``x-request-id``, and logs one line per request. An unexpected exception becomes a 500, and
    its message is not logged.

    Args:
        app: The app.
        limits: Sizes and times.
        token: The bearer token; None if none is asked for.
        hosts: Names under which the service is called, where no token is asked for. A page from elsewhere whose name
            was pointed at this address is thus refused (DNS rebinding). None takes every name.
        count: Called with the path, the status and the seconds of each request.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        limits: ServiceLimits,
        token: str | None,
        hosts: Collection[str] | None,
        count: Callable[[str, int, float], object],
    ) -> None:
        self._app = app
        self._limits = limits
        self._token = None if token is None else hashlib.sha256(token.encode()).digest()
        self._hosts = hosts
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, number, status, refusal = time.monotonic(), uuid.uuid4().hex, 0, False
        body = _Body(receive)
        fields: dict[str, Any] = {}
        scope["mechsafety"] = {"id": number, "deadline": begun + self._limits.seconds, "fields": fields}

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            self._check(scope)
            whole = await self._whole(scope, body, begun + self._limits.seconds)
            await self._app(scope, _replayed(whole, receive), answer)
        except Refused as refused:
            refusal = True
            await _say(answer, refused)
        except Gone:
            status = 499
        except Exception as error:
            log("failed", logging.ERROR, id=number, path=_path(scope), **described(error))
            if not status:
                refusal = True
                await _say(answer, Refused(500, "an error inside the service; its log has the request's id"))
        finally:
            seconds = time.monotonic() - begun
            status = fields.pop("status", status) or 499
            self._count(scope["path"], status, seconds)
            row = {"id": number, "method": scope["method"], "path": _path(scope), "status": status}
            log("request", **row, seconds=round(seconds, 4), **fields)
        if refusal:
            await body.dropped()
            await send({"type": "http.response.body", "body": b""})

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            # digests have one length, so that the comparison takes one time whatever is given
            same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._token)
            if kind.lower() != b"bearer" or not same:
                raise Refused(401, "no valid bearer token", {"www-authenticate": "Bearer"})
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts is not None and _name(host) not in self._hosts:
            raise Refused(421, f"the host name {host!r} is not this service's; expected one of {sorted(self._hosts)}")

    async def _whole(self, scope: Scope, body: "_Body", deadline: float) -> bytes:
        most = self._limits.body_bytes
        refused = Refused(413, f"a body of more than {most} bytes", {"connection": "close"})
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise refused
        whole = bytearray()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while body.more:
                    whole += await body.piece()
                    if len(whole) > most:
                        raise refused
            return bytes(whole)
        except TimeoutError:
            raise Refused(
                408, f"the body took longer than {self._limits.seconds:g} s", {"connection": "close"}
            ) from None


class Gone(Exception):
    """The client went away before its answer was complete."""


class _Body:
    """The body of a request, piece by piece.

    Attributes:
        more: Whether some of it was not read yet.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.more = True

    async def piece(self) -> bytes:
        """The next piece.

        Raises:
            Gone: The client went away.
        """
        message = await self._receive()
        self.more = message["type"] == "http.request" and bool(message.get("more_body"))
        if message["type"] == "http.disconnect":
            raise Gone
        return bytes(message.get("body", b""))

    async def dropped(self) -> None:
        """Read what is left and drop it, for `LINGER_SECONDS` at most.

        A connection that is closed over unread bytes is reset, and a reset takes the answer from a client that is still
        sending (RFC 9112, section 9.6).
        """
        with contextlib.suppress(TimeoutError, Gone):
            async with asyncio.timeout(LINGER_SECONDS):
                while self.more:
                    await self.piece()


def _path(scope: Scope) -> str:
    """The path for the log; ``other`` for one that the service lacks, since its text is the client's."""
    return str(scope["path"]) if scope["path"] in PATHS else "other"


def _name(host: str) -> str:
    """The name in a host header, without its port."""
    name, _, port = host.rpartition(":")
    return name if port.isdigit() and (":" not in name or name.endswith("]")) else host


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read, and then what the client does."""
    read = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _say(send: Send, refused: Refused) -> None:
    """Send the answer. The caller ends the response."""
    body = json_text({"error": str(refused)}, indent=None).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": True})
