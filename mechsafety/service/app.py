"""The app: ``/generate``, ``/score``, ``/healthz``, ``/metrics`` and the OpenAPI docs."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import lens_model, prompt_list
from mechsafety.models import LensModel
from mechsafety.monitors.features import check_fitted_on
from mechsafety.output import json_text
from mechsafety.service.figures import Figures
from mechsafety.service.gate import Gate, Gone, Refused
from mechsafety.service.judge import Judge, Protection
from mechsafety.service.limits import ServiceLimits
from mechsafety.service.worker import Busy, Closing, Done, Failed, Job, Worker
from mechsafety.version import __version__

Finish = Literal["end", "length", "stopped", "blocked"]


class Message(BaseModel):
    """One turn of a chat prompt."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: str


class ReplyRequest(BaseModel):
    """A prompt to reply to."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | list[Message] = Field(description="A text, or chat messages that end in the user's turn.")
    max_new_tokens: int = Field(64, ge=1, description="Largest number of tokens in the reply.")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0 is greedy.")
    seed: int = Field(0, ge=0, description="Seed of the draws, with a temperature.")
    stream: bool = Field(False, description="Whether the reply comes as server-sent events, one per piece of text.")


class GuardVerdict(BaseModel):
    """What the guard says of a prompt."""

    unsafe: bool
    probability: float
    threshold: float


class Reply(BaseModel):
    """A whole reply; in a stream, the data of its last event."""

    id: str = Field(description="The request's id, as in the header x-request-id and in the log.")
    text: str
    prompt_tokens: int
    new_tokens: int
    finish: Finish = Field(
        description="end: the model ended it. length: max_new_tokens was reached. stopped: a monitor flagged the next "
        "token. blocked: the guard judged the prompt unsafe, so nothing was generated."
    )
    verdict: GuardVerdict | None = Field(description="The guard's verdict; null without a guard.")
    scores: list[list[float]] | None = Field(
        description="One score per monitor for each token, in order, a flagged one at the end; null without monitors."
    )


class ScoreRequest(BaseModel):
    """Prompts to score."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[str | list[Message]] = Field(min_length=1)


class MonitorScore(BaseModel):
    """What one monitor says of a prompt."""

    score: float
    p_value: float
    threshold: float
    flagged: bool


class PromptScore(BaseModel):
    """What guard and monitors say of one prompt."""

    unsafe: bool = Field(description="Whether the guard or a monitor flags the prompt.")
    probability: float | None = Field(description="The guard's probability of an unsafe reply; null without a guard.")
    threshold: float | None
    monitors: list[MonitorScore]


class Scores(BaseModel):
    """One entry per prompt, in order."""

    id: str
    results: list[PromptScore]


class Health(BaseModel):
    """The state of the service."""

    status: Literal["ok"]
    model: str
    version: str
    guard: bool
    waiting: int
    running: int


class Problem(BaseModel):
    """What is wrong with a request, in one line."""

    error: str


ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "No valid bearer token"},
    413: {"model": Problem, "description": "The body or the prompt is too long"},
    422: {"model": Problem, "description": "Not a valid request"},
    429: {"model": Problem, "description": "The queue is full"},
    504: {"model": Problem, "description": "The answer took too long"},
}


def build_app(
    model: LensModel,
    guard: Protection | None = None,
    *,
    limits: ServiceLimits | None = None,
    token: str | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The service as an ASGI app, for any ASGI server; `serve` runs it.

    One thread runs the model, one request after the other. A reply is therefore that of `LensModel.generate` for its
    prompt alone, whatever else is asked at the time.

    Args:
        model: The model that replies.
        guard: A guard, whose monitors watch each reply; or a monitor by itself. Prompts that the guard judges unsafe
            get no reply, and a reply ends before the first token that a monitor flags.
        limits: Sizes, times and numbers.
        token: Bearer token that requests need; None asks for none.
        hosts: Names under which the service may be called. None takes every name.

    Raises:
        MechsafetyError: ``model`` is no `LensModel`, or the guard belongs to another model.

    Example:
        >>> from fastapi.testclient import TestClient
        >>> from mechsafety.service import build_app
        >>> with TestClient(build_app(model, guard), "http://localhost") as client:
        ...     client.get("/healthz").status_code
        200
    """
    model, limits = lens_model(model), limits or ServiceLimits()
    if guard is not None:
        check_fitted_on("guard", guard.weights.provenance, model)
    figures, judge = Figures(), Judge(model, guard)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.worker = Worker(limits.waiting)
        figures.follow(app.state.worker)
        try:
            yield
        finally:
            await asyncio.to_thread(app.state.worker.close)

    app = FastAPI(
        title="mechsafety",
        version=__version__,
        description=f"Replies of {model.name}, and what its guard says of prompts.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.add_middleware(Gate, limits=limits, token=token, hosts=hosts, count=figures.request)
    _answer_in_one_line(app)

    @app.post("/generate", response_model=Reply, responses=ERRORS)
    async def generate(asked: ReplyRequest, request: Request) -> Any:
        """Reply to a prompt, whole or as server-sent events (``token``, then ``end``; or ``error``)."""
        if "max_new_tokens" not in asked.model_fields_set:
            asked.max_new_tokens = min(asked.max_new_tokens, limits.new_tokens)
        if asked.max_new_tokens > limits.new_tokens:
            raise Refused(422, f"max_new_tokens={asked.max_new_tokens}; expected at most {limits.new_tokens}")
        about = request.scope["mechsafety"]
        work = _replying(model, judge, limits, asked, about, figures)
        events = _events(request, work, limits)
        first = await anext(events)
        if asked.stream:
            return _EventStream(first, events, about["fields"])
        await events.aclose()
        return JSONResponse(first.value)

    @app.post("/score", response_model=Scores, responses={**ERRORS, 404: {"model": Problem}})
    async def score(asked: ScoreRequest, request: Request) -> Any:
        """Score prompts with the guard and its monitors; nothing is generated."""
        if not judge:
            raise Refused(404, "this service has no guard; start it with --guard FILE")
        if len(asked.prompts) > limits.prompts:
            raise Refused(422, f"{len(asked.prompts)} prompts; expected at most {limits.prompts}")
        about = request.scope["mechsafety"]

        def work(job: Job) -> dict[str, Any]:
            prompts = prompt_list([_prompt(prompt) for prompt in asked.prompts])
            about["fields"]["prompt_tokens"] = sum(_length(model, prompt, limits) for prompt in prompts)
            # nobody reads what a cancelled job returns
            results = [judge.score(prompt) for prompt in prompts if not job.cancelled]
            return {"id": about["id"], "results": results}

        events = _events(request, work, limits)
        done = await anext(events)
        await events.aclose()
        return JSONResponse(done.value)

    @app.get("/healthz", response_model=Health, responses={503: {"model": Problem}})
    async def healthz(request: Request) -> Any:
        """Whether the service runs, and how much waits; it needs no token."""
        worker = request.app.state.worker
        if not worker.alive:
            raise Refused(503, "the thread that runs the model has ended; start the service anew")
        row = {"status": "ok", "model": model.name, "version": __version__, "guard": bool(judge)}
        return JSONResponse({**row, "waiting": worker.waiting, "running": worker.running})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Any:
        """Figures in the text format of Prometheus."""
        text, kind = figures.text()
        return Response(text, media_type=kind)

    return app


def _answer_in_one_line(app: FastAPI) -> None:
    """Every error of the app is ``{"error": "..."}``. It may quote what the client sent, to that client alone."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # where several forms are allowed, the one that got farthest is the one that was meant
        meant = max(error.errors(), key=lambda one: len(one["loc"]))
        where = ".".join(map(str, meant["loc"]))
        said = {
            "json_invalid": f"the body is no JSON ({meant.get('ctx', {}).get('error', 'malformed')})",
            "model_attributes_type": f"{where}: expected a JSON object, sent with 'content-type: application/json'",
            "extra_forbidden": f"{where}: unknown field; /openapi.json lists the fields",
        }
        return JSONResponse({"error": said.get(meant["type"], f"{where}: {meant['msg']}")}, 422)

    @app.exception_handler(MechsafetyError)
    async def mistake(_: Request, error: MechsafetyError) -> Response:
        return JSONResponse({"error": " ".join(str(error).split())}, 422)

    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


def _prompt(asked: str | list[Message]) -> Any:
    return asked if isinstance(asked, str) else [message.model_dump() for message in asked]


def _length(model: LensModel, prompt: str, limits: ServiceLimits) -> int:
    found = model.n_tokens(prompt)
    if found > limits.prompt_tokens:
        raise Refused(413, f"a prompt of {found} tokens; expected at most {limits.prompt_tokens}")
    return found


def _replying(
    model: LensModel,
    judge: Judge,
    limits: ServiceLimits,
    asked: ReplyRequest,
    about: dict[str, Any],
    figures: Figures,
) -> Callable[[Job], dict[str, Any]]:
    """What the model's thread does for a reply. A streamed one emits its pieces of text."""

    def work(job: Job) -> dict[str, Any]:
        fields = about["fields"]
        (prompt,) = prompt_list([_prompt(asked.prompt)])
        fields["prompt_tokens"] = _length(model, prompt, limits)
        verdict, watch, ids = judge.verdict(prompt), judge.watch(), list[int]()
        blocked = verdict is not None and verdict.unsafe
        options: dict[str, Any] = {"temperature": asked.temperature, "seed": asked.seed, "watch": watch}
        tokens = model.stream(prompt, asked.max_new_tokens, **options)
        for token in () if blocked else tokens:
            ids.append(token.id)
            if asked.stream and token.text:
                job.emit(token.text)
            if job.cancelled:
                break
        seen = None if watch is None else watch.reply()
        finish: Finish = "end" if ids and ids[-1] in model.end_ids else "length"
        if blocked or (seen is not None and seen.flagged is not None):
            finish = "blocked" if blocked else "stopped"
        fields |= {"new_tokens": len(ids), "finish": "cancelled" if job.cancelled else finish}
        figures.reply(fields["finish"], len(ids))
        return {
            "id": about["id"],
            "text": model.decode([ids])[0],
            "prompt_tokens": fields["prompt_tokens"],
            "new_tokens": len(ids),
            "finish": finish,
            "verdict": None if verdict is None else GuardVerdict(**_fields_of(verdict)).model_dump(),
            "scores": None if seen is None else [list(row) for row in seen.scores],
        }

    return work


def _fields_of(verdict: Any) -> dict[str, Any]:
    return {"unsafe": verdict.unsafe, "probability": verdict.probability, "threshold": verdict.threshold}


async def _events(
    request: Request, work: Callable[[Job], dict[str, Any]], limits: ServiceLimits
) -> AsyncGenerator[Any, None]:
    """A job's events as they come, `Done` at the end; the job ends with whoever reads them.

    Raises:
        Refused: The queue is full, the service stops, or the time is over.
        Gone: The client went away.
    """
    worker: Worker = request.app.state.worker
    try:
        job = worker.submit(work)
    except Busy:
        raise Refused(429, "the queue is full; try again later", {"retry-after": "1"}) from None
    except Closing:
        raise Refused(503, "the service stops") from None
    gone = asyncio.ensure_future(_gone(request))
    deadline = request.scope["mechsafety"]["deadline"]
    try:
        while True:
            event = asyncio.ensure_future(job.events.get())
            await asyncio.wait({event, gone}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                if gone.done():
                    raise Gone
                raise Refused(504, f"the answer took longer than {limits.seconds:g} s")
            found = event.result()
            if isinstance(found, Failed):
                raise found.error
            yield found
            if isinstance(found, Done):
                return
    finally:
        gone.cancel()
        worker.cancel(job)


async def _gone(request: Request) -> None:
    """Return once the client is gone; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events of a reply: ``token`` with a piece of text, ``end`` with the whole reply, or ``error``.

    The response closes the events whatever happens, so that a client that is killed frees its place.
    """

    media_type = "text/event-stream"

    def __init__(self, first: Any, events: AsyncGenerator[Any, None], fields: dict[str, Any]) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._first, self._events, self._fields = first, events, fields

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        """Send the events."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await send(_event(self._first))
            try:
                async for event in self._events:
                    await send(_event(event))
            except Refused as refused:
                self._fields["finish"] = "timeout"
                await send(_piece("error", {"error": str(refused)}))
            except Gone:
                self._fields["status"] = 499
                return
            except Exception:
                await send(_piece("error", {"error": "an error inside the service"}))
                await send({"type": "http.response.body", "body": b""})
                raise
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._events.aclose()


def _event(event: Any) -> dict[str, Any]:
    return _piece("end", event.value) if isinstance(event, Done) else _piece("token", {"text": event})


def _piece(name: str, data: dict[str, Any]) -> dict[str, Any]:
    body = f"event: {name}\ndata: {json_text(data, indent=None)}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}
