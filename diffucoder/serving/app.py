"""The server: OpenAI's completions and chat, llama.cpp's `/infill`, holes and edits, over one engine.

For: the routes, from an HTTP request to a request for the engine and back. Not for: the fields of bodies (`protocol`),
the JSON of answers (`responses`), errors (`edge`), or batches (`engine`).

    from diffucoder.serving.app import create_app
    app = create_app(DiffuCoder.load())  # any ASGI server runs it; `diffucoder serve` runs uvicorn
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fastapi
from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic_core import to_json

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.coder import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.repair import ROWS, Judge, Repair, RoundRequest, Rounds, next_step, repair_rounds
from diffucoder.decoding.requests import Generation, Request, Span
from diffucoder.errors import ConfigError
from diffucoder.grading.sandbox import Sandbox
from diffucoder.serving import protocol, responses
from diffucoder.serving.edge import ApiError, add_error_handlers
from diffucoder.serving.engine import BusyError, Engine, LateError
from diffucoder.serving.guard import Guard
from diffucoder.serving.responses import Json
from diffucoder.serving.settings import ServerSettings
from diffucoder.serving.threads import Threads

T = TypeVar("T")
_OBJECT = {"application/json": {"schema": {"type": "object"}}}
_ERRORS: dict[int | str, Json] = {"default": {"description": "an error in OpenAI's form", "content": _OBJECT}}
_STREAMS: dict[int | str, Json] = {
    200: {"description": "the answer; with stream its pieces", "content": {"text/event-stream": {"schema": {}}}}
}
_PAGE = Path(__file__).parent / "page"
_CANVAS = Path(__file__).parents[1] / "data" / "canvas"  # the report on order has it too


def create_app(coder: DiffuCoder, settings: ServerSettings | None = None) -> FastAPI:
    """Return the application that serves `coder`. When it shuts down, what was accepted is finished first."""
    settings = settings or ServerSettings()
    server = Server(coder, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)
        server.threads.close()
        server.judging.close()
        if server.sandbox is not None:
            server.sandbox.close()

    # FastAPI's own pages are off, since they fetch scripts from elsewhere; /openapi.json is there
    app = FastAPI(
        title="DiffuCoder",
        summary="Code in any order",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host header
    )
    app.state.server = server
    app.add_middleware(Guard, settings=settings)
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
    add_error_handlers(app)

    app.get("/v1/models", responses=_ERRORS)(server.models)
    app.get("/v1/models/{model:path}", responses=_ERRORS)(server.model)
    post_or_stream = partial(app.post, responses={**_ERRORS, **_STREAMS}, response_model=None)
    post_or_stream("/v1/completions")(server.completions)
    post_or_stream("/v1/chat/completions")(server.chat)
    post_or_stream("/v1/fill")(server.fill)
    post_or_stream("/v1/edit")(server.edit)
    app.post("/v1/repair", responses=_ERRORS)(server.repair)
    post_or_stream("/infill")(server.infill)
    post_or_stream("/completion")(server.completion)
    app.post("/tokenize", responses=_ERRORS)(server.tokenize)
    app.get("/health")(server.health)
    app.get("/ready", responses=_ERRORS)(server.ready)
    app.get("/metrics", response_class=PlainTextResponse)(server.metrics)
    app.get("/", include_in_schema=False)(server.page)
    app.mount("/page", StaticFiles(directory=_PAGE))
    app.mount("/canvas", StaticFiles(directory=_CANVAS))
    return app


class Server:
    """The engine, and the routes over it."""

    def __init__(self, coder: DiffuCoder, settings: ServerSettings) -> None:
        self.coder = coder
        self.settings = settings
        self.engine = Engine(coder, settings.engine)
        self.threads = Threads()
        self.judging = Threads()  # of repairs
        self.sandbox = Sandbox(1) if settings.run_tests else None
        self.registry = CollectorRegistry()
        self.registry.register(self.engine)

    # --- OpenAI's protocol ---

    async def models(self) -> Json:
        return {"object": "list", "data": [await self.model(self.coder.name)]}

    async def model(self, model: str) -> Json:
        self._check_model(model)
        card = {"id": model, "object": "model", "created": 0, "owned_by": "diffucoder"}
        return {**card, "max_model_len": self.coder.model.max_length, "infill": True}

    async def completions(self, body: protocol.CompletionRequest, http: fastapi.Request) -> Response:
        def request() -> Request:
            params = self._params(body)
            prompts = protocol.prompts_of(body.prompt)
            if body.suffix is None:
                return self._continuation(prompts, params)
            return self.coder.infill_request(str(prompts[0]), body.suffix, params, length=body.max_tokens)

        return await self._reply(request, responses.CompletionAnswer, body, http)

    async def chat(self, body: protocol.ChatRequest, http: fastapi.Request) -> Response:
        messages = [message.plain() for message in body.messages]
        return await self._reply(
            lambda: self.coder.request(messages, self._params(body)), responses.ChatAnswer, body, http
        )

    # --- our own, and llama.cpp's ---

    async def fill(self, body: protocol.FillRequest, http: fastapi.Request) -> Response:
        """Fill every hole of a text, all of them jointly; a stream has the text in its last chunk."""
        return await self._reply(
            lambda: self.coder.fill_request(body.text, self._params_of_holes(body)), responses.FillAnswer, body, http
        )

    async def edit(self, body: protocol.EditRequest, http: fastapi.Request) -> Response:
        """Rewrite spans of a text while the rest is frozen, or change it by an instruction."""

        def request() -> Request:
            if body.instruction is None:
                spans = [Span(span.start, span.end, span.tokens) for span in body.spans]
                return self.coder.edit_request(body.text, spans, self._params_of_holes(body))
            prompt = f"{body.instruction}\n\n```python\n{body.text}\n```"
            return self.coder.request(prompt, self._params(body))

        return await self._reply(request, responses.EditAnswer, body, http)

    async def repair(self, body: protocol.RepairRequest, http: fastapi.Request) -> Response:
        """Find what is wrong in a program, and write that again. Each round is a request of its own for the engine."""
        if body.tests and not self.settings.run_tests:
            message = "this server runs no programs; leave out tests, or start it with --run-tests"
            raise ApiError(400, message, param="tests")
        rows = min(ROWS, self.settings.engine.max_rows)
        judge = Judge(body.tests, self.sandbox)
        rounds = repair_rounds(self.coder, body.text, judge, self._params(body), passes=body.passes, rows=rows)
        deadline = self.settings.engine.deadline
        try:
            async with asyncio.timeout(deadline):
                repair = await _unless_gone(self._repaired(rounds, body.passes), http)
        except TimeoutError:
            raise LateError(f"the repair was not finished within {deadline:.0f} s; ask for fewer passes") from None
        return _printed(responses.repair_answer(self.coder, body.text, repair))

    async def _repaired(self, rounds: Rounds, passes: int) -> Repair:
        """Decode the rounds of a repair. Raises BusyError, and ConfigError for one that may compute too much."""
        if self.judging.pending >= self.settings.engine.max_batch + self.settings.engine.max_waiting:
            raise BusyError(self.judging.pending, retry_after=5)
        step = await self.judging.run(partial(next_step, rounds), size=0)
        if isinstance(step, RoundRequest):
            computed = passes * step.canvas.tokens.shape[1]
            if computed > self.engine.budget.computed:
                raise ConfigError(
                    f"{passes} passes compute up to {computed:,} positions, and the limit is "
                    f"{self.engine.budget.computed:,} (max_computed); ask for fewer passes"
                )
        while isinstance(step, RoundRequest):
            results = await self.engine.submit(step, watched=False).results()
            step = await self.judging.run(partial(next_step, rounds, results), size=0)
        return step

    async def infill(self, body: protocol.InfillRequest, http: fastapi.Request) -> Response:
        """Infill as llama.cpp does, for editor plug-ins."""

        def request(params: DecodingParams) -> Request:
            prefix, suffix = responses.fit_into_context(self.coder, body)
            return self.coder.infill_request(prefix, suffix, params, most=body.n_predict)

        return await self._llama_reply(request, body, http)

    async def completion(self, body: protocol.ContinueRequest, http: fastapi.Request) -> Response:
        """Continue text as llama.cpp does, for plug-ins that write their prompts themselves."""
        return await self._llama_reply(partial(self._continuation, protocol.prompts_of(body.prompt)), body, http)

    async def tokenize(self, body: protocol.TokenizeRequest, http: fastapi.Request) -> Response:
        """Tokens of a text, as llama.cpp's route gives them."""

        def answer() -> Response:
            tokenizer = self.coder.tokenizer
            ids = tokenizer.encode(body.content, special=body.parse_special)
            if body.add_special and tokenizer.bos_id is not None:
                ids.insert(0, tokenizer.bos_id)
            if not body.with_pieces:
                return _printed({"tokens": ids})
            pieces = {token: responses.text_or_bytes(tokenizer.token_bytes(token)) for token in set(ids)}
            return _printed({"tokens": [{"id": token, "piece": pieces[token]} for token in ids]})

        return await self._prepare(answer, http)

    # --- the server's state; no key is needed ---

    async def health(self) -> Json:
        """Whether the process lives."""
        return {"status": "ok"}

    async def ready(self) -> Json:
        """Whether requests are accepted."""
        if not self.engine.alive:
            raise ApiError(503, "no requests are accepted: the server is stopping, or its engine has")
        return {"status": "ok", "model": self.coder.name}

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        """The page that shows decoding."""
        return FileResponse(_PAGE / "index.html")

    # --- from a request to its answer ---

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.coder.name):
            message = f"the model {name[:100]!r} is not here; this server has {self.coder.name!r}"
            raise ApiError(404, message, param="model")

    def _params(self, body: protocol.DecodingRequest) -> DecodingParams:
        """Return the decoding settings of a request. Raises ApiError for another model, and ConfigError."""
        self._check_model(body.model)
        return body.params(self.settings.decoding)

    def _params_of_holes(self, body: protocol.DecodingRequest) -> DecodingParams:
        """As `_params`, but without the server's own `stop`, which is for answers: the text goes on after a hole."""
        params = self._params(body)
        return params.replace(stop=()) if body.stop is None else params

    def _continuation(self, prompts: Sequence[str | Sequence[int | str]], params: DecodingParams) -> Request:
        """What continues each of some prompts as it is. Raises PromptError, and ConfigError for many rows."""
        self.engine.check_rows(len(prompts) * params.num_samples)  # before they are made
        requests = []
        for prompt in prompts:
            if isinstance(prompt, str):
                requests.append(self.coder.request(prompt, params, chat=False))
                continue
            requests.append(self.coder.request_of_ids(responses.ids_of(self.coder, prompt), params))
        return replace(requests[0], canvas=Canvas.stacked([request.canvas for request in requests]))

    async def _llama_reply(
        self, request_of: Callable[[DecodingParams], Request], body: protocol.LlamaRequest, http: fastapi.Request
    ) -> Response:
        self._check_model(body.model)
        count = body.n_cmpl or self.settings.decoding.num_samples
        if isinstance(body, protocol.ContinueRequest):
            count *= len(protocol.prompts_of(body.prompt))
        answers = [responses.llama_answer(self.coder, None, 0)] * count
        if body.n_predict != 0:
            request = await self._prepare(lambda: request_of(self._params(body)), http)
            results = await self._results(request, http)
            answers = [responses.llama_answer(self.coder, each, request.prompt_tokens(each.index)) for each in results]
        if body.stream:
            return Response(responses.llama_events(answers, body.response_fields), media_type="text/event-stream")
        shown = [responses.only_fields(answer, body.response_fields) for answer in answers]
        return _printed(shown if len(shown) > 1 else shown[0])

    async def _reply(
        self,
        request_of: Callable[[], Request],
        kind: type[responses.Answer],
        body: protocol.SamplingRequest,
        http: fastapi.Request,
    ) -> Response:
        request = await self._prepare(request_of, http)
        answer = kind(self.coder, request, body)
        if not body.stream:
            results = await self._results(request, http)
            return await self.threads.run(lambda: _printed(answer.whole(results)), size=request.canvas.tokens.numel())
        job = self.engine.submit(request)  # its errors are answers with a status, not events
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(answer.events(job), media_type="text/event-stream", headers=headers)

    async def _prepare(self, work: Callable[[], T], http: fastapi.Request) -> T:
        """Read what a body says, on a thread. Raises BusyError, and what `work` raises."""
        most = self.settings.engine.max_batch + self.settings.engine.max_waiting
        if self.threads.pending >= most:
            raise BusyError(self.threads.pending, retry_after=5)
        deadline = self.settings.engine.deadline
        try:
            async with asyncio.timeout(deadline):
                return await _unless_gone(self.threads.run(work, size=http.scope.get("body_bytes", 0)), http)
        except TimeoutError:
            raise LateError(f"the text was not read within {deadline:.0f} s; send a shorter one, or later") from None

    async def _results(self, request: Request, http: fastapi.Request) -> list[Generation]:
        """Decode a request, unless its client disconnects before it is finished."""
        return await _unless_gone(self.engine.submit(request, watched=False).results(), http)


async def _unless_gone(work: Coroutine[Any, Any, T], http: fastapi.Request) -> T:
    """Return what `work` returns; cancel it if the client of the request disconnects."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    disconnect = asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client disconnected")  # the client is gone and cannot read this
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()


def _printed(content: Any) -> Response:  # Any: JSON
    """An answer of JSON, printed by a library that is fast enough for an answer of megabytes."""
    return Response(to_json(content, inf_nan_mode="null"), media_type="application/json")
