"""Many replicas under Ray Serve, which starts, watches and scales the processes and hands requests to them.

diffucoder serve --ray --replicas 1:4                             # this process starts Ray, or uses $RAY_ADDRESS
serve run diffucoder.serving.scale:app replicas=1:4 model=cpgrpo  # on a Ray cluster
"""

import math
import os
import signal
import socket
import threading
from typing import Any

import ray
import torch
from fastapi import FastAPI
from prometheus_client import Info
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from diffucoder.decoding.coder import DiffuCoder
from diffucoder.errors import ConfigError
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.serving.app import create_app
from diffucoder.serving.engine import load_in_own_thread
from diffucoder.serving.run import announce, read_api_key, restore_signals
from diffucoder.serving.settings import ScaleSettings

_NAME = "diffucoder"
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def app(settings: ScaleSettings) -> serve.Application:
    """Return the replicas as an application of Ray Serve; `serve run` and `serve deploy` call this too."""
    settings = ScaleSettings(**(dict(settings) | {"api_key": settings.api_key or read_api_key(None)}))
    least, most = settings.bounds
    max_batch = settings.engine.max_batch

    def build() -> FastAPI:
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        coder = load_in_own_thread(lambda: DiffuCoder.load(settings.model, dtype=dtype, device=settings.device))
        app = create_app(coder, settings)
        replica = Info("diffucoder_replica", "the replica that answers", registry=app.state.server.registry)
        replica.info({"id": serve.get_replica_context().replica_id.unique_id})
        return app

    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            """Raise an error if Ray should replace this replica."""
            if not self.app.state.server.engine.alive:  # type: ignore[attr-defined]  # Ray sets `app`
                raise RuntimeError("the engine has stopped")

    deployment = serve.deployment(
        Replica,
        autoscaling_config=AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=max_batch),
        ray_actor_options=_resources(settings),
        # more than an engine accepts, since its 429 says when to try again
        max_ongoing_requests=2 * (max_batch + settings.engine.max_waiting),
        health_check_period_s=1,
        graceful_shutdown_timeout_s=settings.engine.deadline,
        logging_config=_QUIET,
    )
    return deployment.bind()


def run_replicas(settings: ScaleSettings, *, host: str, port: int) -> None:
    """Serve until a signal ends it, after what was accepted is answered. Raises ConfigError."""
    load_tokenizer(settings.model)  # fails before Ray has started
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level="warning")
    else:
        ray.init("local", logging_level="warning", include_dashboard=False, object_store_memory=128 * 2**20)
    stop = threading.Event()

    def begin_to_stop(*_: object) -> None:
        stop.set()
        restore_signals()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, begin_to_stop)
    if not port:  # one that is free
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as probe:
            port = probe.getsockname()[1]
    serve.start(http_options=HTTPOptions(host=host, port=port), proxy_location="HeadOnly", logging_config=_QUIET)
    try:
        serve.run(app(settings), name=_NAME)
        announce(host, port)
        stop.wait()
        serve.delete(_NAME)
    except RuntimeError as error:  # Ray has tried three times, and printed why
        raise ConfigError("no replica could be started; the reason is above, or in Ray's log") from error
    finally:
        ray.shutdown()


def _resources(settings: ScaleSettings) -> dict[str, Any]:
    """CPU cores and GPUs of a replica: as set, or an equal share of this machine."""
    _, most = settings.bounds
    cpus = settings.cpus
    if cpus is None:
        cpus = (os.cpu_count() or 1) // most
    gpus = settings.gpus
    if gpus is None and settings.device != "cpu" and torch.cuda.is_available():
        sharing = math.ceil(most / torch.cuda.device_count())  # 3 replicas on 2 GPUs: half a GPU each
        gpus = int(1e4 / sharing) / 1e4  # Ray counts in steps of 1e-4
    return {"num_cpus": cpus, "num_gpus": gpus or 0}
