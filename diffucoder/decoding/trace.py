"""Traces: what was generated, in which order, on one line a sample; and AR-ness, which measures that order.

For: writing down generations so that their order can be studied later, elsewhere. Not for: sweeps and reports.

The format, version 2: JSON lines, each a sample that stands by itself (files may be cut and concatenated), with

    format          "diffucoder-trace"
    version         2
    model           name of the model, as the user gave it
    params          the DecodingParams
    tokens          the finished row, without padding
    prompt_length   how many of `tokens` stand before the first hole
    steps           for each token from there on, the step that committed it; -1 = none did (text between holes, and
                    what was filled behind a terminator)
    confidence      for the same tokens, the score behind the commitment, 4 significant digits; 0 where none
    log_probs       for the same tokens, the log-probability each had when it was committed, 4 decimals; 0 where none
    forward_passes  spent until the last commitment of the row
"""

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from diffucoder.decoding.canvas import Canvas, leftmost
from diffucoder.decoding.denoise import Step
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError

FORMAT, VERSION = "diffucoder-trace", 2


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One generated sample; the fields are those of the format."""

    tokens: list[int]
    prompt_length: int
    steps: list[int]
    confidence: list[float]
    log_probs: list[float]
    forward_passes: int
    params: dict[str, Any] = field(default_factory=dict)  # Any: JSON
    model: str = ""

    @property
    def order(self) -> list[int]:
        """Positions in `tokens` in the order of their commitment; several of one step from left to right."""
        return [self.prompt_length + at for at in commit_order(self.steps)]

    @property
    def mean_log_prob(self) -> float:
        """How likely the committed tokens were on average; 0 where none was committed."""
        committed = [value for value, step in zip(self.log_probs, self.steps, strict=True) if step >= 0]
        return sum(committed) / max(len(committed), 1)


def commit_order(steps: Sequence[int]) -> list[int]:
    """Positions in the order of their commitment, from the step of each; -1, which none committed, is left out."""
    return [at for _, at in sorted((step, at) for at, step in enumerate(steps) if step >= 0)]


def record(steps: Iterable[Step], canvas: Canvas, *, params: DecodingParams, model: str = "") -> list[Trace]:
    """Traces of the rows of a generation, from its Steps (all of them) and the canvas and params they began with."""
    canvas = canvas.repeat(params.num_samples)
    tokens = canvas.tokens.cpu()
    committed_by = torch.full_like(tokens, -1)  # (B, T)
    confidence, log_probs = torch.zeros(2, *tokens.shape)  # (B, T) each
    passes = torch.zeros(len(tokens), dtype=torch.long)  # (B,)
    for step in steps:
        tokens, committed = step.canvas.cpu(), step.committed.cpu()
        committed_by[committed] = step.index
        if step.revoked is not None:
            committed_by[step.revoked.cpu()] = -1
        confidence = step.confidence.cpu().where(committed, confidence)
        log_probs = step.log_prob.cpu().where(committed, log_probs)
        passes[committed.any(-1)] = step.forward_passes
    starts, padding = leftmost(canvas.masked.cpu()).tolist(), (~canvas.valid).sum(-1).tolist()
    return [
        Trace(
            tokens=tokens[row, padding[row] :].tolist(),
            prompt_length=start - padding[row],
            steps=committed_by[row, start:].tolist(),
            confidence=[float(f"{score:.4g}") for score in confidence[row, start:].tolist()],
            log_probs=[round(value, 4) for value in log_probs[row, start:].tolist()],
            forward_passes=int(passes[row]),
            params=params.model_dump(mode="json"),
            model=model,
        )
        for row, start in enumerate(starts)
    ]


def as_json(trace: Trace) -> dict[str, Any]:
    """A trace as a line of the format holds it."""
    return {"format": FORMAT, "version": VERSION, **asdict(trace)}


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Write one line a trace, in place of what was there. Raises ConfigError for a path that cannot be written."""
    lines = [json.dumps(as_json(trace), separators=(",", ":")) + "\n" for trace in traces]
    try:
        Path(path).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"trace file {str(path)!r} cannot be written ({error.strerror}); check the path") from None


def read_traces(path: str | Path) -> list[Trace]:
    """Read what `write_traces` wrote. Raises ConfigError for a file of another format or version."""
    with open(path, encoding="utf-8") as file:
        return [_parse(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()]


def _parse(line: str, place: str) -> Trace:
    try:
        content = json.loads(line)
        kind, version = content.pop("format"), content.pop("version")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{place} is no {FORMAT} line; give a file that write_traces wrote") from None
    if (kind, version) != (FORMAT, VERSION):
        raise ConfigError(f"{place} is {kind!r} version {version!r}, not {FORMAT!r} version {VERSION}; write it anew")
    if content.keys() != {f.name for f in fields(Trace)}:
        raise ConfigError(f"{place} does not have the fields of {FORMAT} version {VERSION}; write it anew")
    return Trace(**content)


def local_ar_ness(
    order: Sequence[int], k: int, *, ordered: bool = False, boundary: Literal["exclude", "include"] = "exclude"
) -> float:
    """Share of commitments that continue a run: the `k` positions before a token are the k committed before it.

    DiffuCoder (arXiv 2506.20639) §4.1, local AR-ness@k, where sets are compared; `ordered` wants the run itself from
    left to right, as the caption of its figure 3 does. The first k commitments have no k predecessors: we leave them
    out, so that left to right is 1; `boundary="include"` counts them as failures. nan where that leaves nothing.
    """
    arrange = list if ordered else sorted
    runs = sum(
        arrange(order[t - k : t]) == list(range(position - k, position)) for t, position in enumerate(order) if t >= k
    )
    counted = len(order) - (k if boundary == "exclude" else 0)
    return runs / counted if counted > 0 else math.nan


def global_ar_ness(order: Sequence[int], k: int) -> float:
    """Share of commitments to one of the `k` leftmost masked positions (DiffuCoder §4.1); nan where there are none."""
    left = sorted(order)
    early = 0
    for position in order:
        rank = bisect_left(left, position)
        early += rank < k
        del left[rank]
    return early / len(order) if order else math.nan
