"""Preset `fast`: what it stands for, for a model on this machine and a canvas.

For: turning `preset="fast"` into settings of `exact`. Not for: what the settings do (`params`, `passes`).

Two questions, and two ways to answer them. What costs no quality has been measured once, on the shipped model
(docs/log.md): a bound on the entropy that a step may commit, and tokens whose keys and values stay as the pass after
their commitment found them. What is quickest depends on the machine: narrow passes pay where arithmetic is scarce,
drafts where the width of a pass is free. So each way's pass is timed here, once for a size of canvas, and weighed with
the passes that it takes. The times are kept in `passes.json` in the user's cache, which may be deleted.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import CheckpointError
from diffucoder.models.denoiser import Denoiser

ENTROPY_BOUND, THRESHOLD = 0.01, 0.99  # the second where the order does not go by entropy


@dataclass(frozen=True)
class Way:
    """One way to arrange passes."""

    name: str
    settings: dict[str, Any]  # Any: each field of DecodingParams has its own type
    passes: float = (
        1.0  # it takes, relative to plain ones: dev problems, ENTROPY_BOUND, the shipped model (docs/log.md)
    )
    rows: int = 1  # canvases looked at for each request
    fed: float | None = None  # the share of the positions from the first mask on that a pass is fed; None: the canvas


WAYS = (
    Way("whole", {}),
    Way("delayed", {"cache": "delayed"}, passes=1.05, fed=0.57),
    Way("drafts", {"drafts": 3}, passes=0.91, rows=4),
)
_RULES = {"threshold", "factor", "entropy_bound", "ar_bound", "adaptive", "steps"}
_ARRANGED = {"block", "horizon", "cache", "refresh_every", "vicinity", "cache_delay"}
_AHEAD = {"drafts", "branches", "revoke", "adaptive", "ar_bound"}
_LEAST = 32  # canvases are timed in multiples of this
_KNOWN = TypeAdapter(dict[str, dict[str, float]])
_ROUNDS = 8  # times each way is timed; the best counts
_SLOW = 0.25  # seconds: a pass that takes longer is timed once


def tuned(params: DecodingParams, model: Denoiser, canvas: Canvas) -> DecodingParams:
    """The settings that the preset `fast` stands for; those of any other preset as they are.

    Whatever `params` say beyond the preset stays: a rule of their own, or an arrangement of passes.
    """
    if params.preset != "fast":
        return params
    fields = DecodingParams.model_fields
    own = {name for name in fields if getattr(params, name) != fields[name].default}
    changes: dict[str, Any] = {"preset": "exact"}  # Any: each field has its own type
    if not own & _RULES:
        changes |= {"entropy_bound": ENTROPY_BOUND} if params.policy == "entropy" else {"threshold": THRESHOLD}
    if not own & (_ARRANGED | _AHEAD):
        changes |= quickest(model, canvas, params.num_samples).settings
    return params.replace(**changes)


def quickest(model: Denoiser, canvas: Canvas, num_samples: int = 1) -> Way:
    """The way that takes least time, by passes and by what a pass takes on this machine."""
    spread = (canvas.masked.cumsum(-1) > 0).sum(-1)  # (B,) positions from the first mask on
    width, answer = (_rounded(int(each.max())) for each in (canvas.valid.sum(-1), spread))
    requests = 1 << (len(canvas.tokens) * num_samples - 1).bit_length()
    times = _times(model, requests, width, min(answer, width))
    return min((way for way in WAYS if way.name in times), key=lambda way: way.passes * times[way.name])


def _rounded(width: int) -> int:
    return -(-width // _LEAST) * _LEAST


def _times(model: Denoiser, requests: int, width: int, answer: int) -> Mapping[str, float]:
    """Seconds of one pass each way, for so many canvases of `width` with `answer` positions to decode."""
    key = json.dumps([*_identity(model), requests, width, answer, *(way.name for way in WAYS)])
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffucoder" / "passes.json"
    known: dict[str, dict[str, float]] = {}
    with suppress(OSError, ValueError):  # pydantic's errors are ValueErrors
        known = _KNOWN.validate_json(path.read_bytes())
    if key not in known:
        known[key] = measure(model, requests, width, answer)
        with suppress(OSError):  # a cache: without it the next process measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            beside.replace(path)
    return known[key]


def _identity(model: Denoiser) -> list[Any]:
    """What the time of a pass depends on, besides its size."""
    device, config = model.device, model.config
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    sizes = [config.num_hidden_layers, config.hidden_size, config.intermediate_size, model.vocab_size]
    return [name, torch.get_num_threads(), torch.__version__, str(model.compute_dtype), model.compiled, *sizes]


@torch.no_grad()
def measure(model: Denoiser, requests: int, width: int, answer: int) -> dict[str, float]:
    """Seconds of one pass each way that the model can go; what stands in the canvas does not matter to the time."""
    passes: dict[str, Callable[[], object]] = {}
    for way in WAYS:
        with suppress(CheckpointError):  # no lean body, no cache
            passes[way.name] = _pass(model, way, requests, width, answer)
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(_ROUNDS):  # in turns, so that whatever else the machine does is in the way of all
        for name, run in passes.items():
            if taken[name] and min(taken[name]) > _SLOW:
                continue
            began = time.perf_counter()
            run()
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            taken[name].append(time.perf_counter() - began)
    return {name: min(each) for name, each in taken.items()}


def _pass(model: Denoiser, way: Way, requests: int, width: int, answer: int) -> Callable[[], object]:
    """One pass as `way` has it."""
    rows = requests * way.rows
    fed = width if way.fed is None else max(1, round(way.fed * answer))
    tokens = torch.full((rows, fed), model.mask_id)  # on the host, as passes of decoding have them
    where = torch.cartesian_prod(torch.arange(rows), torch.arange(max(0, fed - answer), fed))  # (M, 2)
    more: dict[str, Any] = {"rows": where, "reduce": lambda logits, _: logits.argmax(-1)}
    if way.fed is not None:
        more["cache"] = model.new_cache(torch.full((rows,), width))
        more["positions"] = torch.arange(width - fed, width).expand(rows, -1)
    return lambda: model(tokens, **more)
