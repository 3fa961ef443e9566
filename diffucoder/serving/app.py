"""The server: OpenAI's completions and chat, llama.cpp's `/infill`, holes and edits, over one engine.

For: HTTP in, requests for the engine, texts, streams and errors out. Not for: shapes (`protocol`), batches (`engine`).

    from diffucoder.serving.app import create_app
    app = create_app(DiffuCoder.load())  # any ASGI server runs it; `diffucoder serve` runs uvicorn

Every error is OpenAI's: `{"error": {"message", "type", "param", "code"}}`, with a message that says what to do.
"""

import asyncio
import difflib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from diffucoder.decoding import generate
from diffucoder.decoding.generate import DiffuCoder, Generation
from diffucoder.errors import ConfigError, DiffuCoderError
from diffucoder.grading.extract import program_from
from diffucoder.serving.answers import (
    Json,
    completion_logprobs,
    denoise,
    fitting,
    infilled,
    piece,
    shown_canvas,
    token_logprobs,
    traced,
    usage,
    with_holes,
)
from diffucoder.serving.edge import ApiError, BodyLimit, add_errors, api_error, authorised
from diffucoder.serving.engine import Engine, Job
from diffucoder.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    EditRequest,
    FillRequest,
    InfillRequest,
    SamplingRequest,
    StreamOptions,
    TokenizeRequest,
)
from diffucoder.serving.settings import ServerSettings
from diffucoder.serving.streaming import Settling


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

    def submit(self, request: generate.Request, *, watched: bool = False) -> Job:
        """Hand a request to the engine. Raises ConfigError for one of too many rows, and what `Engine.submit` does."""
        most, rows = self.settings.engine.max_rows, len(request.canvas.tokens)
        if rows > most:
            raise ConfigError(f"{rows} rows (answers, times lengths tried) are over {most}; ask for a smaller n")
        return self.engine.submit(request, watched=watched)

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
    add_errors(app)
    protected = [Depends(authorised(settings.api_key))] if settings.api_key else []
    _add_openai(app, server, protected)
    _add_own(app, server, protected)
    _add_state(app, server)
    _add_page(app)
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
    def about() -> Json:
        told = {"id": server.coder.name, "object": "model", "created": 0, "owned_by": "diffucoder"}
        return told | {"max_model_len": server.coder.model.max_length, "infill": True}

    @app.get("/v1/models", dependencies=dependencies, responses=_ERRORS)
    async def models() -> Json:
        return {"object": "list", "data": [about()]}

    @app.get("/v1/models/{model:path}", dependencies=dependencies, responses=_ERRORS)
    async def model(model: str) -> Json:
        server.check_model(model)
        return about()

    @app.post("/v1/completions", dependencies=dependencies, responses=_STREAMS, response_model=None)
    async def completions(asked: CompletionRequest, http: Request) -> Json | Response:
        server.check_model(asked.model)
        params = asked.params(server.settings.decoding)
        if asked.suffix is None:
            request = server.coder.request(asked.prompt, params, chat=False)
        else:
            request = server.coder.infill_request(asked.prompt, asked.suffix, params, length=asked.max_tokens)
        if asked.stream:
            return _streamed(server, asked, request, "cmpl")
        results = await server.results(server.submit(request), http)

        def choice(result: Generation) -> Json:
            told, echoed = None, asked.prompt * asked.echo
            if asked.logprobs is not None:
                told = completion_logprobs(server.coder, result, asked.logprobs, echoed)
            return {"text": echoed + result.text, "logprobs": told}

        return _answer(server, "cmpl", "text_completion", request, results, choice)

    @app.post("/v1/chat/completions", dependencies=dependencies, responses=_STREAMS, response_model=None)
    async def chat(asked: ChatRequest, http: Request) -> Json | Response:
        server.check_model(asked.model)
        messages = [message.plain() for message in asked.messages]
        request = server.coder.request(messages, asked.params(server.settings.decoding))
        if asked.stream:
            return _streamed(server, asked, request, "chatcmpl")
        results = await server.results(server.submit(request), http)

        def choice(result: Generation) -> Json:
            told = {"content": token_logprobs(server.coder, result), "refusal": None} if asked.logprobs else None
            message = {"role": "assistant", "content": result.text, "refusal": None}
            return {"message": message, "logprobs": told}

        return _answer(server, "chatcmpl", "chat.completion", request, results, choice)


def _add_own(app: FastAPI, server: Server, dependencies: Sequence[Any]) -> None:  # Any: FastAPI's Depends
    @app.post("/v1/fill", dependencies=dependencies, responses=_STREAMS, response_model=None)
    async def fill(asked: FillRequest, http: Request) -> Json | Response:
        """Fill every hole of a text, all of them jointly; a stream has its text in the last chunk."""
        server.check_model(asked.model)
        request = server.coder.fill_request(asked.text, asked.params(server.settings.decoding))

        def choice(result: Generation) -> Json:
            return {"text": result.text, "holes": result.pieces}

        if asked.stream:
            return _streamed(server, asked, request, "fill", choice)
        results = await server.results(server.submit(request), http)
        return _answer(server, "fill", "fill", request, results, choice)

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
    async def infill(asked: InfillRequest, http: Request) -> Json | list[Json]:
        """llama.cpp's infilling, which editor plug-ins speak."""
        server.check_model(asked.model)
        coder, params = server.coder, asked.params(server.settings.decoding)
        results: list[Generation | None] = [None] * asked.n_cmpl
        if asked.n_predict != 0:
            most = None if asked.n_predict == -1 else asked.n_predict
            request = coder.infill_request(*fitting(coder, asked), params, most=most)
            results[:] = await server.results(server.submit(request), http)
        told = [infilled(coder, result, asked.response_fields) for result in results]
        return told if asked.n_cmpl > 1 else told[0]

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


def _add_page(app: FastAPI) -> None:
    folder = Path(__file__).parent / "page"
    # nothing from elsewhere, by the browser's own rule too
    safe = {"Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        """The page that shows decoding."""
        return FileResponse(folder / "index.html", headers=safe)

    app.mount("/page", StaticFiles(directory=folder))
    app.mount("/canvas", StaticFiles(directory=folder.parents[1] / "data" / "canvas"))  # the report on order has it too


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


_KINDS = {"cmpl": "text_completion", "chatcmpl": "chat.completion.chunk", "fill": "fill"}


def _streamed(
    server: Server,
    asked: SamplingRequest,
    request: generate.Request,
    prefix: str,
    whole: Callable[[Generation], Json] | None = None,
) -> Response:
    """Text as it settles from the left, and what else was asked for, as server-sent events.

    With `whole` nothing is told of a text but that, in its last chunk.
    """
    options = asked.stream_options or StreamOptions()
    job = server.submit(request, watched=True)  # its errors are answers, not events
    created = int(time.time())
    about = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": _KINDS[prefix], "created": created}
    about["model"] = server.coder.name
    # where lengths are tried nothing is known before all are done
    known = whole is None and len(request.canvas.tokens) == asked.n
    settling = [Settling(server.coder.tokenizer, request, row) for row in range(asked.n if known else 0)]

    def chunk(index: int, content: Json, reason: str | None = None) -> str:
        return _event({**about, "choices": [{"index": index, "finish_reason": reason, **content}]})

    def text(fresh: str) -> Json:
        return {"delta": {"content": fresh}} if prefix == "chatcmpl" else {"text": fresh, "logprobs": None}

    async def steps() -> AsyncIterator[str]:
        if options.denoise:
            for row in range(len(request.canvas.tokens)):
                yield _event({**about, "choices": [], "denoise": shown_canvas(server.coder, request, row)})
        with server.latency.time():
            async for event in job.events():
                if options.denoise:
                    yield _event({**about, "choices": [], "denoise": denoise(server.coder, request, event)})
                if settling and (fresh := settling[event.row].add(event.step)):
                    yield chunk(event.row, text(fresh))

    def ends() -> Iterator[str]:
        results = job.results_now()
        for index, result in enumerate(results):
            sent = settling[index].sent if settling else ""
            content = text(result.text[len(sent) :]) if whole is None else whole(result)
            more = traced(job, result) if options.denoise else {}
            yield chunk(index, {**content, **more}, result.finish_reason)
        if options.include_usage:
            yield _event({**about, "choices": [], "usage": usage(request, results)})

    async def events() -> AsyncIterator[str]:
        try:
            if prefix == "chatcmpl":
                for index in range(asked.n):
                    yield chunk(index, {"delta": {"role": "assistant", "content": ""}})
            async for each in steps():
                yield each
            for each in ends():
                yield each
        except DiffuCoderError as error:  # too late for a status
            yield _event(api_error(error).body)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(content: Json) -> str:
    return f"data: {json.dumps(content)}\n\n"


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
