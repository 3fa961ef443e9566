"""Many replicas: Ray Serve starts, watches and scales processes, each the application over an engine of its own.

For: replicas, and the front that hands requests to them. Not for: batches (`engine`) and routes (`app`).

    diffucoder serve --ray --replicas 1:4                             # the front is this process
    serve run diffucoder.serving.scale:app replicas=1:4 model=cpgrpo  # the front is behind a Ray cluster's proxies

Why a front: what is under way on a replica that dies Ray's proxy answers with a bare 500 or a torn stream. An answer
depends on its request alone, so the front asks another replica; a stream that has begun ends with an error event.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from typing import Any

import ray
import torch
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from diffucoder.decoding.generate import DiffuCoder
from diffucoder.errors import ConfigError
from diffucoder.models.checkpoint import default_device_and_dtype, load_tokenizer
from diffucoder.serving.app import create_app
from diffucoder.serving.edge import ApiError, BodyLimit, add_errors
from diffucoder.serving.engine import apart
from diffucoder.serving.run import key_from, run
from diffucoder.serving.settings import ScaleSettings

log = logging.getLogger(__name__)

_NAME = "diffucoder"
_SCOPE = "type asgi http_version method scheme path raw_path query_string root_path headers client server".split()
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
_STORE = 128 * 2**20  # bytes of Ray's object store; requests and answers are too small to go through it


class Replica:
    """A process that answers requests as `diffucoder serve` does."""

    def __init__(self, settings: ScaleSettings) -> None:
        """Load the model here."""
        coder = apart(lambda: DiffuCoder.load(settings.model, dtype=_dtype(settings), device=settings.device))
        self.app = create_app(coder, settings)
        self.server = self.app.state.server
        self.name = serve.get_replica_context().replica_id.unique_id

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """What the application sends; giving this up tells it that the client left. Any: as ASGI has it."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        asked: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return asked.pop() if asked else await asyncio.Future()

        async def work() -> None:
            try:
                await self.app(scope, receive, sent.put)
            except Exception:  # which the application has answered
                log.exception("a request broke")
            finally:
                sent.put_nowait(None)

        working = asyncio.create_task(work())
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", self.name.encode())]
                yield message
        finally:
            working.cancel()

    def figures(self) -> tuple[str, str]:
        """This replica's name, and what it has for Prometheus."""
        return self.name, generate_latest(self.server.registry).decode()

    def check_health(self) -> None:
        """Raise where Ray should start another in this one's place."""
        if not self.server.engine.alive:
            raise RuntimeError("the engine's thread ended")


class Front:
    """An ASGI application that hands requests to replicas, and to another one where a replica dies."""

    def __init__(self, replicas: DeploymentHandle[Replica], patience: float) -> None:
        """`patience`: seconds until the first word of an answer."""
        self.answers, self.patience = replicas.options(method_name="answer", stream=True), patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay a request, whose body has been read whole, for as long as its client is there."""
        body = (await receive())["body"]

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        relay, left = asyncio.create_task(self._relay(scope, body, send)), asyncio.create_task(gone())
        try:
            await asyncio.wait({relay, left}, return_when=asyncio.FIRST_COMPLETED)
            if relay.done():
                relay.result()
        finally:
            relay.cancel()
            left.cancel()

    async def _relay(self, scope: Scope, body: bytes, send: Send) -> None:
        asked = {key: scope[key] for key in _SCOPE if key in scope}
        began = ended = False

        async def say(message: Message) -> None:
            nonlocal began, ended
            began, ended = True, message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        for last in (False, True):
            try:
                return await self._once(asked, body, say)
            except RayActorError:
                if ended:
                    return
                message = "the replica that worked on it died; ask again"
                lost = ApiError(503, message, kind="server_error", Retry_After="1")
                if began:
                    event = f"data: {json.dumps(lost.body)}\n\ndata: [DONE]\n\n"
                    return await send({"type": "http.response.body", "body": event.encode()})
                if last:
                    raise lost from None
            except BackPressureError:
                message = "too many requests wait; try again in a moment"
                raise ApiError(429, message, kind="rate_limit_error", Retry_After="1") from None
            except (DeploymentUnavailableError, TimeoutError):
                message = "no replica answers; Ray's log has the reason"
                raise ApiError(503, message, kind="server_error", Retry_After="5") from None

    async def _once(self, asked: Scope, body: bytes, say: Send) -> None:
        """Relay what one replica answers."""
        response = self.answers.remote(asked, body)
        head: Message | None = None
        try:
            async with asyncio.timeout(self.patience) as waiting:
                async for message in response:
                    waiting.reschedule(None)
                    if message["type"] == "http.response.start":
                        head = message  # held back until there is more: so far another replica may answer
                        continue
                    if head is not None:
                        await say(head)
                        head = None
                    await say(message)
        except (asyncio.CancelledError, TimeoutError):
            response.cancel()
            raise


def front(replicas: DeploymentHandle[Replica], settings: ScaleSettings) -> FastAPI:
    """The application before `replicas`: it answers for its own health and everybody's figures, and relays the rest."""

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(_: Request) -> Response:
        told = await replicas.broadcast("figures").results_async(timeout_s=5, return_exceptions=True)
        figures = _Figures([each for each in told if isinstance(each, tuple)])  # not of those who died meanwhile
        return Response(generate_latest(figures), media_type=CONTENT_TYPE_LATEST)

    relay = Front(replicas, settings.engine.deadline + 10)  # a replica gives up before
    routes: list[BaseRoute] = [Route("/health", health), Route("/metrics", metrics), Route("/{path:path}", relay)]
    made = FastAPI(routes=routes, openapi_url=None)
    made.add_middleware(BodyLimit, most=settings.max_body)
    add_errors(made)
    return made


class _Figures(Collector):
    """Those of several replicas under one heading each, told apart by the label `replica`."""

    def __init__(self, told: list[tuple[str, str]]) -> None:
        self.told = told

    def collect(self) -> Iterable[Metric]:
        """The samples of each."""
        joined: dict[str, Metric] = {}
        for replica, text in self.told:
            for family in text_string_to_metric_families(text):
                kept = joined.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    kept.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        return joined.values()


def replicas(settings: ScaleSettings) -> Application:
    """What Ray Serve is to run: replicas without a door of their own."""
    least, most = settings.bounds
    fits = settings.engine.max_batch + settings.engine.max_waiting
    following = AutoscalingConfig(
        min_replicas=least, max_replicas=most, target_ongoing_requests=settings.engine.max_batch
    )
    cpus, gpus = _share(settings)
    deployment = serve.deployment(
        Replica,
        name="replica",
        num_replicas=least if least == most else None,
        autoscaling_config=None if least == most else following,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=2 * fits,  # it is the engine that refuses, and says when to come again
        max_queued_requests=fits,  # those wait for any replica at all
        health_check_period_s=1,
        graceful_shutdown_timeout_s=settings.engine.deadline,  # of one that is replaced or not needed any more
        logging_config=_LOGGING,
    )
    return deployment.bind(settings)


def _share(settings: ScaleSettings) -> tuple[float, float]:
    """CPU cores and GPUs of a replica: where the settings leave it open, those here shared equally."""
    most = settings.bounds[1]
    cores = (os.cpu_count() or 1) // most if settings.cpus is None else settings.cpus
    if settings.gpus is not None:
        return cores, settings.gpus
    here = 0 if settings.device == "cpu" else torch.cuda.device_count()
    return cores, int(1e4 / -(-most // here)) / 1e4 if here else 0  # 3 on 2 GPUs: half of one each; Ray counts in 1e-4


def _dtype(settings: ScaleSettings) -> torch.dtype | None:
    return getattr(torch, settings.dtype) if settings.dtype else None


def app(settings: ScaleSettings) -> Application:
    """For `serve run` and `serve deploy`: a front behind Ray's proxies; deployed anew, replica by replica."""
    settings = settings.model_copy(update={"api_key": settings.api_key or key_from(None)})

    def build() -> FastAPI:
        return front(serve.get_deployment_handle("replica"), settings)

    made = serve.deployment(
        serve.ingress(build)(), name="front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000
    )
    return made.bind(replicas(settings))


def run_replicas(settings: ScaleSettings, *, host: str, port: int) -> None:
    """Serve by replicas, in the cluster of $RAY_ADDRESS or here, until told to stop. Raises ConfigError."""
    load_tokenizer(settings.model)  # a model that is not there is told before Ray has started
    ours = "RAY_ADDRESS" not in os.environ
    if ours:
        _, dtype = default_device_and_dtype(settings.device, _dtype(settings))
        settings = settings.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})  # the same for all
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {  # Any: of several types
        **{"address": "local", "num_cpus": os.cpu_count()},
        **{"include_dashboard": False, "object_store_memory": _STORE},
    }
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(logging_level="warning", **(local if ours else {}))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # in place of Ray's, which kills the replicas first
    _check_room(settings)
    serve.start(proxy_location="Disabled", logging_config=_LOGGING)
    try:
        run(front(_deployed(settings), settings), host=host, port=port)
    finally:
        if not ours:
            serve.delete(_NAME)
        ray.shutdown()  # what was accepted is answered: nothing here is left to wait for


def _check_room(settings: ScaleSettings) -> None:
    """Refuse what Ray would wait for in vain."""
    there, least = ray.cluster_resources(), settings.bounds[0]
    for name, each in zip(("CPU", "GPU"), _share(settings), strict=True):
        if least * each > there.get(name, 0):
            asked = f"{least} replicas of {each:g} {name}s"
            raise ConfigError(f"{asked} are more than the {there.get(name, 0):g} that Ray has; ask for less")


def _deployed(settings: ScaleSettings) -> DeploymentHandle[Replica]:
    try:
        return serve.run(replicas(settings), name=_NAME, route_prefix=None)
    except RuntimeError as error:  # Ray has tried three times, and said why
        raise ConfigError("no replica could be started; the reason is above, or in Ray's log") from error
