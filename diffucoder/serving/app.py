"""The server: OpenAI's completions and chat, llama.cpp's `/infill`, holes and edits, over one engine.

For: the routes, from an HTTP request to a request for the engine and back. Not for: the fields of bodies (`protocol`),
the JSON of answers (`responses`), errors (`edge`), or batches (`engine`).

    from diffucoder.serving.app import create_app
    app = create_app(DiffuCoder.load())  # any ASGI server runs it; `diffucoder serve` runs uvicorn
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import fastapi
from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from diffucoder.decoding.coder import DiffuCoder, Span
from diffucoder.decoding.requests import Generation, Request
from diffucoder.errors import ConfigError
from diffucoder.serving import protocol, responses
from diffucoder.serving.edge import ApiError, BodyLimit, add_error_handlers, require_key
from diffucoder.serving.engine import STATS, Engine, Job
from diffucoder.serving.responses import Answer, Json, Stream, token_text
from diffucoder.serving.settings import ServerSettings

_ERRORS: dict[int | str, Json] = {
    status: {"description": description, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, description in {
        400: "what is wrong with the request, and what to do",
        401: "no or a wrong API key",
        404: "no such model or path",
        408: "the deadline passed; ask for less",
        413: "the request is too large",
        422: "never used: an invalid body is answered with 400",
        429: "too many requests wait; Retry-After says when to try again",
        500: "decoding this request failed",
        503: "the server is shutting down",
    }.items()
}
_STREAMS: dict[int | str, Json] = {
    200: {"description": "the answer; with stream its pieces", "content": {"text/event-stream": {"schema": {}}}}
}
_PAGE = Path(__file__).parent / "page"
_CANVAS = Path(__file__).parents[1] / "data" / "canvas"  # the report on order has it too
# the browser must not load anything from elsewhere
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
}
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds


class Server:
    """What the routes share: the engine, and how a request is submitted and answered."""

    def __init__(self, coder: DiffuCoder, settings: ServerSettings) -> None:
        self.coder = coder
        self.settings = settings
        self.engine = Engine(coder, settings.engine)
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(self.engine))
        self.latency = Histogram(
            "diffucoder_request_seconds", "from acceptance to the last token", buckets=_BUCKETS, registry=self.registry
        )

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for a request to another model."""
        if name not in (None, self.coder.name):
            message = f"the model {name!r} is not here; this server has {self.coder.name!r}"
            raise ApiError(404, message, param="model")

    def submit(self, request: Request, *, watched: bool = False) -> Job:
        """Submit to the engine. Raises ConfigError for too many rows, and what `Engine.submit` raises."""
        limit = self.settings.engine.max_rows
        rows = len(request.canvas.tokens)
        if rows > limit:
            raise ConfigError(f"{rows} rows (answers, times lengths tried) are over {limit}; ask for a smaller n")
        return self.engine.submit(request, watched=watched)

    async def reply(self, answer: Answer, http: fastapi.Request) -> Json | Response:
        """Decode a request, and answer it whole or as a stream."""
        if not answer.body.stream:
            return answer.whole(await self.results(answer.request, http))
        job = self.submit(answer.request, watched=True)  # its errors are answers with a status, not events
        events = self._timed(Stream(answer, job).events())
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def results(self, request: Request, http: fastapi.Request) -> list[Generation]:
        """Decode a request, unless its client disconnects before it is finished."""
        results = asyncio.create_task(self.submit(request).results())
        disconnect = asyncio.create_task(_disconnected(http))
        try:
            with self.latency.time():
                await asyncio.wait({results, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise ApiError(499, "the client disconnected", "client_closed_request")  # which nobody reads
            return results.result()
        finally:
            results.cancel()
            disconnect.cancel()

    async def _timed(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        with self.latency.time():
            async for event in events:
                yield event


async def _disconnected(http: fastapi.Request) -> None:
    """Wait until the client is gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


class _EngineCollector:
    """The engine's counts for Prometheus."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, value in self.engine.stats().items():
            family = GaugeMetricFamily if name in ("waiting", "running") else CounterMetricFamily
            yield family(f"diffucoder_{name}", STATS[name], value=value)


def create_app(coder: DiffuCoder, settings: ServerSettings | None = None) -> FastAPI:
    """Return the application that serves `coder`. When it shuts down, what was accepted is finished first."""
    settings = settings or ServerSettings()
    server = Server(coder, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)

    # FastAPI's own pages are off, since they fetch scripts from elsewhere; /openapi.json is there
    app = FastAPI(title="DiffuCoder", summary="Code in any order", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(BodyLimit, max_bytes=settings.max_body)
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
    add_error_handlers(app)
    protected = []
    if settings.api_key:
        protected.append(Depends(require_key(settings.api_key)))
    for router in (_openai_routes(server), _own_routes(server)):
        app.include_router(router, dependencies=protected, responses=_ERRORS)
    app.include_router(_state_routes(server))
    app.mount("/page", StaticFiles(directory=_PAGE))
    app.mount("/canvas", StaticFiles(directory=_CANVAS))
    return app


def _openai_routes(server: Server) -> APIRouter:
    router = APIRouter()
    coder = server.coder
    model_card = {
        "id": coder.name,
        "object": "model",
        "created": 0,
        "owned_by": "diffucoder",
        "max_model_len": coder.model.max_length,
        "infill": True,
    }

    @router.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [model_card]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Json:
        server.check_model(model)
        return model_card

    @router.post("/v1/completions", responses=_STREAMS, response_model=None)
    async def completions(body: protocol.CompletionRequest, http: fastapi.Request) -> Json | Response:
        server.check_model(body.model)
        params = body.params(server.settings.decoding)
        if body.suffix is None:
            request = coder.request(body.prompt, params, chat=False)
        else:
            request = coder.infill_request(body.prompt, body.suffix, params, length=body.max_tokens)
        return await server.reply(responses.CompletionAnswer(coder, request, body), http)

    @router.post("/v1/chat/completions", responses=_STREAMS, response_model=None)
    async def chat(body: protocol.ChatRequest, http: fastapi.Request) -> Json | Response:
        server.check_model(body.model)
        messages = [message.plain() for message in body.messages]
        request = coder.request(messages, body.params(server.settings.decoding))
        return await server.reply(responses.ChatAnswer(coder, request, body), http)

    return router


def _own_routes(server: Server) -> APIRouter:
    router = APIRouter()
    coder = server.coder

    @router.post("/v1/fill", responses=_STREAMS, response_model=None)
    async def fill(body: protocol.FillRequest, http: fastapi.Request) -> Json | Response:
        """Fill every hole of a text, all of them jointly; a stream has the text in its last chunk."""
        server.check_model(body.model)
        request = coder.fill_request(body.text, body.params(server.settings.decoding))
        return await server.reply(responses.FillAnswer(coder, request, body), http)

    @router.post("/v1/edit")
    async def edit(body: protocol.EditRequest, http: fastapi.Request) -> Json:
        """Rewrite spans of a text while the rest is frozen, or change it by an instruction."""
        server.check_model(body.model)
        params = body.params(server.settings.decoding)
        if body.instruction is None:
            spans = [Span(span.start, span.end, span.tokens) for span in body.spans]
            request = coder.edit_request(body.text, spans, params)
        else:
            request = coder.request(f"{body.instruction}\n\n```python\n{body.text}\n```", params)
        return responses.EditAnswer(coder, request, body).whole(await server.results(request, http))

    @router.post("/infill")
    async def infill(body: protocol.InfillRequest, http: fastapi.Request) -> Json | list[Json]:
        """Infill as llama.cpp does, for editor plug-ins."""
        server.check_model(body.model)
        params = body.params(server.settings.decoding)
        results = [responses.EMPTY] * body.n_cmpl
        if body.n_predict != 0:
            most = None if body.n_predict == -1 else body.n_predict
            prefix, suffix = responses.fit_into_context(coder, body)
            results = await server.results(coder.infill_request(prefix, suffix, params, most=most), http)
        answers = [responses.infill_answer(coder, result, body.response_fields) for result in results]
        return answers if body.n_cmpl > 1 else answers[0]

    @router.post("/tokenize")
    async def tokenize(body: protocol.TokenizeRequest) -> Json:
        ids = coder.tokenizer.encode(body.content, special=body.add_special)
        if not body.with_pieces:
            return {"tokens": ids}
        return {"tokens": [{"id": token, "piece": token_text(coder, token)} for token in ids]}

    return router


def _state_routes(server: Server) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Json:
        """Whether the process lives."""
        return {"status": "ok"}

    @router.get("/ready", responses={503: _ERRORS[503]}, response_model=None)
    async def ready() -> Json | Response:
        """Whether requests are accepted."""
        if not server.engine.alive:
            raise ApiError(503, "no requests are accepted: the server is stopping, or its engine has", "server_error")
        return {"status": "ok", "model": server.coder.name}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(server.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        """The page that shows decoding."""
        return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)

    return router
