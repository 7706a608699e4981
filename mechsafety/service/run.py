"""Run the service: its address, its token, its server."""

import ipaddress
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn

from mechsafety.errors import MechsafetyError
from mechsafety.models import LensModel
from mechsafety.service.app import build_app
from mechsafety.service.judge import Protection
from mechsafety.service.limits import ServiceLimits
from mechsafety.service.logs import log, log_to_stderr

MIN_TOKEN = 16
MAX_PORT = 65_535


def read_token(path: str | os.PathLike[str]) -> str:
    r"""The bearer token in a file, without blanks around it.

    Raises:
        MechsafetyError: No file, no token in it, or one that is short or no single word of ASCII characters.

    Example:
        >>> from mechsafety.service import read_token
        >>> path = folder / "token"
        >>> written = path.write_text("a-long-secret-that-nobody-guesses\n")
        >>> read_token(path)
        'a-long-secret-that-nobody-guesses'
    """
    place, hint = Path(path), "python -c 'import secrets; print(secrets.token_urlsafe())' > FILE makes one"
    if not place.is_file():
        raise MechsafetyError(f"no such token file: {path}", expected="a file with a token", hint=hint)
    try:
        found = place.read_bytes().decode("ascii").strip()
    except UnicodeDecodeError:
        found = ""
    if len(found) < MIN_TOKEN or len(found.split()) != 1 or not found.isprintable():
        raise MechsafetyError(
            f"the token file {path} holds no token",
            expected=f"one word of at least {MIN_TOKEN} ASCII characters",
            hint=hint,
        )
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound_socket(host: str, port: int, *, token: bool, without_token: bool = False) -> socket.socket:
    """A socket that is bound to the address and does not listen yet.

    Args:
        host: Name or address of an interface of this machine.
        port: Its port; 0 takes a free one.
        token: Whether the service asks for a token.
        without_token: Whether an address that other machines reach may be served without a token.

    Raises:
        MechsafetyError: No such address or port, it is in use, or others would reach a service without a token.

    Example:
        >>> from mechsafety.service import bound_socket
        >>> with bound_socket("127.0.0.1", 0, token=False) as bound:  # port 0 takes a free one
        ...     bound.getsockname()[0]
        '127.0.0.1'
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= MAX_PORT:
        raise MechsafetyError(f"port={port!r}", expected=f"a whole number from 0 to {MAX_PORT}")
    _check_reach(host, token, without_token)
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise MechsafetyError(
            f"cannot listen on {host}, port {port} ({error.strerror or error})",
            expected="a free port of an address of this machine",
            hint="--port 0 takes a free port",
        ) from None
    return found


def _check_reach(host: str, token: bool, without_token: bool) -> None:
    if not (is_loopback(host) or token or without_token):
        raise MechsafetyError(
            f"host {host!r}, which other machines reach, without a token",
            expected="--token-file FILE, or a loopback address such as 127.0.0.1",
            hint="--without-token serves everybody",
        )


def serve(
    model: LensModel,
    guard: Protection | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    without_token: bool = False,
    limits: ServiceLimits | None = None,
    bound: socket.socket | None = None,
) -> None:
    """Serve a model until SIGINT or SIGTERM; what was accepted by then is finished. Logs are JSON lines on stderr.

    Args:
        model: The model that replies.
        guard: See `build_app`.
        host: Address to listen on. Others than loopback need a token.
        port: Its port; 0 takes a free one, which the log names.
        token: Bearer token that requests need (see `read_token`).
        without_token: Whether an address that other machines reach may be served without a token.
        limits: Sizes, times and numbers.
        bound: A socket that `bound_socket` made, in place of ``host`` and ``port``. Its address needs a token as any
            other does.

    Raises:
        MechsafetyError: As `bound_socket` and `build_app`.

    Example:
        >>> from mechsafety.service import serve
        >>> serve(model, host="0.0.0.0")  # with a token, it would run until SIGINT or SIGTERM
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: host '0.0.0.0', which other machines reach, without a token; expected ...
    """
    limits = limits or ServiceLimits()
    listening = bound or bound_socket(host, port, token=token is not None, without_token=without_token)
    try:
        address, number = listening.getsockname()[:2]
        _check_reach(address, token is not None, without_token)
        shown = f"[{address}]" if ":" in address else address
        # who asks for no token relies on who can reach the address: a page that points its own name at it cannot
        own = {"localhost", "127.0.0.1", "[::1]", shown} if token is None and is_loopback(address) else None
        app = build_app(model, guard, limits=limits, token=token, hosts=own)
        log_to_stderr()
        log("listening", url=f"http://{shown}:{number}", model=model.name, guard=guard is not None)
        _run(app, limits, listening)
        log("stopped")
    finally:
        listening.close()


def _run(app: Any, limits: ServiceLimits, listening: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.INFO,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=max(1, round(limits.grace_seconds)),
    )
    with suppress(KeyboardInterrupt):  # the server raises the signal again once it has stopped as it should
        uvicorn.Server(config).run(sockets=[listening])
