"""The server: OpenAI's completions and chat, llama.cpp's `/infill`, holes and edits, over one engine.

For: HTTP in, requests for the engine, texts, streams and errors out. Not for: shapes (`protocol`), batches (`engine`).

    from diffucoder.serving.app import create_app
    app = create_app(DiffuCoder.load())  # any ASGI server runs it; `diffucoder serve` runs uvicorn

Every error is OpenAI's: `{"error": {"message", "type", "param", "code"}}`, with a message that says what to do.
"""

import asyncio
import difflib
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffucoder.decoding import generate
from diffucoder.decoding.generate import DiffuCoder, Generation
from diffucoder.errors import ConfigError, DiffuCoderError
from diffucoder.grading.extract import program_from
from diffucoder.serving.answers import (
    Json,
    completion_logprobs,
    denoise,
    fitting,
    piece,
    token_logprobs,
    usage,
    with_holes,
)
from diffucoder.serving.engine import (
    BusyError,
    ClosingError,
    Engine,
    FailedError,
    Job,
    LateError,
)
from diffucoder.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    EditRequest,
    FillRequest,
    InfillRequest,
    Sampling,
    TokenizeRequest,
)
from diffucoder.serving.settings import ServerSettings
from diffucoder.serving.streaming import Settling


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, kind: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}

    @property
    def response(self) -> JSONResponse:
        """What is sent."""
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: DiffuCoderError) -> ApiError:
    """How an error of ours is said to clients."""
    if isinstance(error, BusyError):
        return ApiError(429, str(error), kind="rate_limit_error", Retry_After=f"{error.retry_after:.0f}")
    if isinstance(error, ClosingError):
        return ApiError(503, str(error), kind="server_error", Retry_After="5")
    if isinstance(error, LateError):
        return ApiError(408, str(error), kind="timeout_error")
    if isinstance(error, FailedError):
        return ApiError(500, str(error), kind="server_error")
    return ApiError(400, str(error), kind="invalid_request_error")


class Server:
    """What the routes share: the engine, and how requests become answers."""

    def __init__(self, coder: DiffuCoder, settings: ServerSettings) -> None:
        self.coder, self.settings = coder, settings
        self.engine = Engine(coder, settings.engine)
        self.registry = CollectorRegistry()
        self.registry.register(_Figures(self.engine))
        buckets = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self.latency = Histogram(
            "diffucoder_request_seconds", "from acceptance to the last token", buckets=buckets, registry=self.registry
        )

    def check_model(self, name: str | None) -> None:
        """Refuse to answer in another model's name."""
        if name not in (None, self.coder.name):
            message = f"the model {name!r} is not here; this server has {self.coder.name!r}"
            raise ApiError(404, message, kind="invalid_request_error", param="model")

    def submit(self, request: generate.Request) -> Job:
        """Hand a request to the engine. Raises ConfigError for one of too many rows, and what `Engine.submit` does."""
        most, rows = self.settings.engine.max_rows, len(request.canvas.tokens)
        if rows > most:
            raise ConfigError(f"{rows} rows (answers, times lengths tried) are over {most}; ask for a smaller n")
        return self.engine.submit(request)

    async def results(self, job: Job, http: Request) -> list[Generation]:
        """Wait for an answer, for as long as there is somebody to hear it."""

        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        answer, left = asyncio.create_task(job.results()), asyncio.create_task(gone())
        try:
            with self.latency.time():
                await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ApiError(499, "the client left", kind="client_closed_request")  # which nobody reads
            return answer.result()
        finally:
            answer.cancel()
            left.cancel()


def create_app(coder: DiffuCoder, settings: ServerSettings | None = None) -> FastAPI:
    """The application that serves `coder`; its lifespan starts the engine's end: what was accepted is finished."""
    settings = settings or ServerSettings()
    server = Server(coder, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)

    # no page of FastAPI's: it would fetch its scripts from elsewhere; /openapi.json is there
    app = FastAPI(title="DiffuCoder", summary="Code in any order", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(BodyLimit, most=settings.max_body)
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
    _add_errors(app)
    protected = [Depends(_authorised(settings.api_key))] if settings.api_key else []
    _add_openai(app, server, protected)
    _add_own(app, server, protected)
    _add_state(app, server)
    return app


# --- routes ----------------------------------------------------------------------------------------------------------

_ERRORS: dict[int | str, Json] = {
    status: {"description": about, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, about in {
        400: "what is wrong with the request, and what to do",
        401: "no or a wrong API key",
        404: "no such model or path",
        408: "the deadline passed; ask for less",
        413: "the request is too large",
        422: "never: it is 400",
        429: "too many requests wait; Retry-After says when to come again",
        500: "decoding this request broke",
        503: "the server is shutting down",
    }.items()
}


_STREAMS: dict[int | str, Json] = _ERRORS | {
    200: {"description": "the answer; with stream its pieces", "content": {"text/event-stream": {"schema": {}}}}
}


def _add_openai(app: FastAPI, server: Server, dependencies: Sequence[Any]) -> None:  # Any: FastAPI's Depends
    @app.get("/v1/models", dependencies=dependencies, responses=_ERRORS)
    async def models() -> Json:
        about = {"id": server.coder.name, "object": "model", "created": 0, "owned_by": "diffucoder"}
        about |= {"max_model_len": server.coder.model.max_length, "infill": True}
        return {"object": "list", "data": [about]}

    @app.post("/v1/completions", dependencies=dependencies, responses=_STREAMS, response_model=None)
    async def completions(asked: CompletionRequest, http: Request) -> Json | Response:
        server.check_model(asked.model)
        params = asked.params(server.settings.decoding)
        if asked.suffix is None:
            request = server.coder.request(asked.prompt, params, chat=False)
        else:
            params = params.replace(stop=())
            request = server.coder.infill_request(asked.prompt, asked.suffix, params, length=asked.max_tokens)
        if asked.stream:
            return _streamed(server, asked, request, "cmpl", lambda text: {"text": text, "logprobs": None}, {})
        results = await server.results(server.submit(request), http)

        def choice(result: Generation) -> Json:
            told = None if asked.logprobs is None else completion_logprobs(server.coder, result, asked.logprobs)
            return {"text": asked.prompt * asked.echo + result.text, "logprobs": told}

        return _answer(server, "cmpl", "text_completion", request, results, choice)

    @app.post("/v1/chat/completions", dependencies=dependencies, responses=_STREAMS, response_model=None)
    async def chat(asked: ChatRequest, http: Request) -> Json | Response:
        server.check_model(asked.model)
        messages = [message.plain() for message in asked.messages]
        request = server.coder.request(messages, asked.params(server.settings.decoding))
        if asked.stream:
            first = {"role": "assistant", "content": ""}
            return _streamed(server, asked, request, "chatcmpl", lambda text: {"delta": {"content": text}}, first)
        results = await server.results(server.submit(request), http)

        def choice(result: Generation) -> Json:
            told = {"content": token_logprobs(server.coder, result), "refusal": None} if asked.logprobs else None
            message = {"role": "assistant", "content": result.text, "refusal": None}
            return {"message": message, "logprobs": told}

        return _answer(server, "chatcmpl", "chat.completion", request, results, choice)


def _add_own(app: FastAPI, server: Server, dependencies: Sequence[Any]) -> None:  # Any: FastAPI's Depends
    @app.post("/v1/fill", dependencies=dependencies, responses=_ERRORS, response_model=None)
    async def fill(asked: FillRequest, http: Request) -> Json | Response:
        """Fill every hole of a text, all of them jointly."""
        server.check_model(asked.model)
        request = server.coder.fill_request(asked.text, asked.params(server.settings.decoding))
        if asked.stream:
            raise ConfigError("filled text settles in any order; ask for it as a whole, or watch /v1/completions")
        results = await server.results(server.submit(request), http)
        return _answer(
            server, "fill", "fill", request, results, lambda result: {"text": result.text, "holes": result.pieces}
        )

    @app.post("/v1/edit", dependencies=dependencies, responses=_ERRORS)
    async def edit(asked: EditRequest, http: Request) -> Json:
        """Write spans of a text anew, everything else frozen; or do to it what the instruction says."""
        server.check_model(asked.model)
        params = asked.params(server.settings.decoding)
        if asked.instruction is None:
            request = server.coder.fill_request(with_holes(server.coder, asked), params)
        else:
            told = f"{asked.instruction}\n\n```python\n{asked.text}\n```"
            request = server.coder.request(told, params)
        results = await server.results(server.submit(request), http)

        def choice(result: Generation) -> Json:
            text = result.text if asked.instruction is None else program_from(result.text)
            before, after = asked.text.splitlines(keepends=True), text.splitlines(keepends=True)
            return {"text": text, "diff": "".join(difflib.unified_diff(before, after, "before", "after"))}

        return _answer(server, "edit", "edit", request, results, choice)

    @app.post("/infill", dependencies=dependencies, responses=_ERRORS)
    async def infill(asked: InfillRequest, http: Request) -> Json:
        """llama.cpp's infilling, which editor plug-ins speak."""
        server.check_model(asked.model)
        coder, params = server.coder, asked.params(server.settings.decoding)
        about: Json = {"model": coder.name, "stop": True, "truncated": False, "generation_settings": {}}
        if asked.n_predict == 0:
            return about | {"content": "", "tokens_predicted": 0, "tokens_evaluated": 0, "stop_type": "limit"}
        prefix, suffix = fitting(coder, asked)
        request = coder.infill_request(prefix, suffix, params, length=asked.n_predict)
        result = (await server.results(server.submit(request), http))[0]
        timings = {
            "predicted_n": len(result.tokens),
            "predicted_ms": 1e3 * result.seconds,
            "predicted_per_second": result.tokens_per_second,
        }
        return about | {
            "content": result.text,
            "tokens_predicted": len(result.tokens),
            "tokens_evaluated": len(result.trace.tokens) - len(result.tokens),
            "stop_type": "limit",
            "timings": timings,
        }

    @app.post("/tokenize", dependencies=dependencies, responses=_ERRORS)
    async def tokenize(asked: TokenizeRequest) -> Json:
        ids = server.coder.tokenizer.encode(asked.content, special=asked.add_special)
        if not asked.with_pieces:
            return {"tokens": ids}
        return {"tokens": [{"id": id_, "piece": piece(server.coder, id_)} for id_ in ids]}


def _add_state(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Json:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: _ERRORS[503]}, response_model=None)
    async def ready() -> Json | Response:
        """Whether requests are taken."""
        if not server.engine.alive:
            return ApiError(503, "the server is shutting down", kind="server_error").response
        return {"status": "ok", "model": server.coder.name}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(server.registry), media_type=CONTENT_TYPE_LATEST)


# --- answers ---------------------------------------------------------------------------------------------------------


def _answer(
    server: Server,
    prefix: str,
    kind: str,
    request: generate.Request,
    results: Sequence[Generation],
    choice: Callable[[Generation], Json],
) -> Json:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": server.coder.name,
        "choices": [
            {"index": index, "finish_reason": result.finish_reason, **choice(result)}
            for index, result in enumerate(results)
        ],
        "usage": usage(request, results),
    }


def _streamed(
    server: Server,
    asked: Sampling,
    request: generate.Request,
    prefix: str,
    choice: Callable[[str], Json],
    first: Json,
) -> Response:
    """Text as it settles from the left, and what else was asked for, as server-sent events."""
    options = asked.stream_options
    job = server.submit(request)  # its errors are answers, not events
    kind = "text_completion" if prefix == "cmpl" else "chat.completion.chunk"
    about = {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": server.coder.name,
    }
    # where lengths are tried nothing is known before all are done
    whole = len(request.canvas.tokens) != asked.n
    settling = [] if whole else [Settling(server.coder.tokenizer, request, row) for row in range(asked.n)]

    def chunk(index: int, text: str, reason: str | None = None) -> str:
        return _event({**about, "choices": [{"index": index, "finish_reason": reason, **choice(text)}]})

    async def events() -> AsyncIterator[str]:
        try:
            if first:
                for index in range(asked.n):
                    yield _event({**about, "choices": [{"index": index, "finish_reason": None, "delta": first}]})
            with server.latency.time():
                async for event in job.events():
                    if options is not None and options.denoise:
                        yield _event({**about, "choices": [], "denoise": denoise(server.coder, request, event)})
                    if settling and (text := settling[event.row].add(event.step)):
                        yield chunk(event.row, text)
            results = job.results_now()
            for index, result in enumerate(results):
                sent = settling[index].sent if settling else ""
                yield chunk(index, result.text[len(sent) :], result.finish_reason)
            if options is not None and options.include_usage:
                yield _event({**about, "choices": [], "usage": usage(request, results)})
        except DiffuCoderError as error:  # too late for a status
            yield _event(api_error(error).body)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(content: Json) -> str:
    return f"data: {json.dumps(content)}\n\n"


# --- around the routes -----------------------------------------------------------------------------------------------


def _authorised(key: str) -> Callable[[Request], None]:
    async def check(http: Request) -> None:
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, kind="authentication_error", WWW_Authenticate="Bearer")

    return check  # type: ignore[return-value]  # FastAPI awaits it


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def own(_: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(DiffuCoderError)
    async def ours(_: Request, error: DiffuCoderError) -> Response:
        return api_error(error).response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"][1:]) or "the request"
        if found["type"] == "extra_forbidden":
            message = f"{where} is not supported here; leave it out"
        else:
            message = f"{where}: {found['msg'].removeprefix('Value error, ')}"
        return ApiError(400, message, kind="invalid_request_error", param=where).response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return ApiError(500, "the server made a mistake; its log has the reason", kind="server_error").response

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        status = error.status_code
        found = ApiError(status, message, kind="invalid_request_error")
        found.headers |= dict(error.headers or {})
        return found.response


class BodyLimit:
    """Reads bodies, and refuses those that are too large, said or sent, before they are read to the end."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = ApiError(413, f"the request is over {self.most:,} bytes; send less", kind="invalid_request_error")
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self.most:
            await refusal.response(scope, receive, send)
            return
        body, more = b"", True
        while more and len(body) <= self.most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self.most:
            await refusal.response(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replayed, send)


class _Figures:
    """The engine's counts as Prometheus wants them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> list[Metric]:
        """A sample of each."""
        now = self.engine.figures()
        made: list[Metric] = []
        for name, about in (("waiting", "requests without a place"), ("running", "rows with a place")):
            made.append(GaugeMetricFamily(f"diffucoder_{name}", about, value=getattr(now, name)))
        for name, about in (
            ("passes", "forward passes"),
            ("rows", "rows of all passes"),
            ("committed", "tokens committed"),
            ("finished", "requests answered"),
            ("failed", "requests that broke"),
            ("late", "requests past their deadline"),
            ("cancelled", "requests nobody waited for"),
            ("refused", "requests refused for the queue"),
            ("busy_seconds", "seconds spent in passes"),
        ):
            made.append(CounterMetricFamily(f"diffucoder_{name}", about, value=getattr(now, name)))
        return made
