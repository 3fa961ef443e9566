"""`diffucoder serve`: an HTTP server for one model."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffucoder.cli.common import load_model, naming_extra, with_options
from diffucoder.config import load_settings
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError
from diffucoder.serving.settings import EngineSettings, ScaleSettings


@partial(
    with_options, of=ScaleSettings, into="settings", without=("api_key", "hosts", "max_body", "decoding", "engine")
)
def serve(
    *,
    settings: ScaleSettings,
    host: Annotated[str, typer.Option(help="address to bind (0.0.0.0: all interfaces)")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to bind (0: any free port)")] = 8000,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="default decoding setting as name=value; repeatable")
    ] = None,
    limits: Annotated[
        list[str] | None, typer.Option("--limit", help="name=value: max_batch, max_waiting, deadline, ...; repeatable")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file of the key that clients must send; else $DIFFUCODER_API_KEY, else none")
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="allow an address of other machines without a key")] = False,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="name by which clients reach a server without a key; repeatable"),
    ] = None,
    log_level: Annotated[
        Literal["error", "warning", "info", "debug"], typer.Option(help="info adds a line for each request")
    ] = "error",
    ray: Annotated[bool, typer.Option("--ray", help="serve by replicas of Ray, here or at $RAY_ADDRESS")] = False,
) -> None:
    """Serve a model over HTTP.

    The protocols are OpenAI's completions and chat, llama.cpp's infilling, and our own for holes and edits.
    """
    with naming_extra("serve", "serving needs"):
        from diffucoder.serving.run import check_address, check_exposure, check_origins, read_api_key, run
    if not ray and settings.model_fields_set & {"replicas", "cpus", "gpus"}:
        raise ConfigError("--replicas, --cpus and --gpus are for Ray's replicas; add --ray")
    more = {
        "api_key": read_api_key(api_key_file),
        "hosts": (host, *(allowed_hosts or ())),
        "decoding": load_settings(DecodingParams, overrides=changes or ()),
        "engine": load_settings(EngineSettings, overrides=limits or ()),
    }
    settings = ScaleSettings(**(dict(settings) | more))
    check_exposure(host, settings, no_key)
    check_origins(settings.cors)
    check_address(host, port)
    if not ray:
        from diffucoder.serving.app import create_app  # after the checks: torch takes seconds
        from diffucoder.serving.engine import load_in_own_thread

        coder = load_in_own_thread(lambda: load_model(settings.model, settings.dtype, settings.device))
        coder.model.config  # noqa: B018  # imports transformers now, not in the first request that needs it
        run(create_app(coder, settings), settings, host=host, port=port, log_level=log_level)
        return
    with naming_extra("scale", "replicas need"):
        from diffucoder.serving.scale import run_replicas
    run_replicas(settings, host=host, port=port)
