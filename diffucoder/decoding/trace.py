"""Traces: what was generated, in which order, on one line a sample; and AR-ness, which measures that order.

For: writing down generations so that their order can be studied later, elsewhere. Not for: sweeps and reports.

The format, version 3: JSON lines, each a sample that stands by itself (files may be cut and concatenated), with

    format          "diffucoder-trace"
    version         3; version 2, which has no id, revoked and entropies, is read too
    id              what the sample answers, as "tiny/7#0": the first sample of a task; "" where nobody said
    model           name of the model, as the user gave it
    params          the DecodingParams
    tokens          the finished row, without padding
    prompt_length   how many of `tokens` stand before the first hole
    steps           for each token from there on, the step that committed it; -1 = none did (text between holes, and
                    what was filled behind a terminator)
    confidence      for the same tokens, the score behind the commitment, 4 significant digits; 0 where none
    log_probs       for the same tokens, the log-probability each had when it was committed, 4 decimals; 0 where none
    forward_passes  spent until the last commitment of the row
    revoked         commitments that were taken back: [position, token, step that made it, step that revoked it], with
                    positions counted from the first hole
    entropies       base64 of zlib of little-endian float16, (S, L): the entropy in nats of each of the L positions from
                    the first hole on, before each of the first S steps; nan where none was scored; "": nobody asked
"""

import base64
import json
import math
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffucoder.decoding.canvas import Canvas, leftmost
from diffucoder.decoding.denoise import Step
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError

FORMAT, VERSION = "diffucoder-trace", 3
_SINCE_3 = {"id", "revoked", "entropies"}


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
    id: str = ""
    revoked: list[list[int]] = field(default_factory=list)
    entropies: str = ""

    @property
    def entropy_map(self) -> np.ndarray:
        """(S, L) float32 nats, nan where nothing was scored; S = 0 where nobody asked."""
        kept = np.frombuffer(zlib.decompress(base64.b64decode(self.entropies)) if self.entropies else b"", "<f2")
        return kept.reshape(-1, max(len(self.steps), 1)).astype(np.float32)

    @property
    def order(self) -> list[int]:
        """Positions in `tokens` in the order of their commitment; several of one step from left to right."""
        return [self.prompt_length + at for at in commit_order(self.steps)]

    @property
    def mean_log_prob(self) -> float:
        """How likely the committed tokens were on average; 0 where none was committed."""
        committed = [value for value, step in zip(self.log_probs, self.steps, strict=True) if step >= 0]
        return sum(committed) / max(len(committed), 1)


def commit_order(steps: Sequence[int], sure: Sequence[float] | None = None) -> list[int]:
    """Positions in the order of their commitment, from the step of each; -1, which none committed, is left out.

    Several of one step come from left to right, or the surest of them first.
    """
    first = [0.0] * len(steps) if sure is None else [-each for each in sure]
    return [at for _, _, at in sorted((step, first[at], at) for at, step in enumerate(steps) if step >= 0)]


def record(steps: Iterable[Step], canvas: Canvas, *, params: DecodingParams, model: str = "") -> list[Trace]:
    """Traces of the rows of a generation, from its Steps (all of them) and the canvas and params they began with."""
    canvas = canvas.repeat(params.num_samples)
    tokens = canvas.tokens.cpu()
    committed_by = torch.full_like(tokens, -1)  # (B, T)
    confidence, log_probs = torch.zeros(2, *tokens.shape)  # (B, T) each
    passes = torch.zeros(len(tokens), dtype=torch.long)  # (B,)
    revoked: list[list[list[int]]] = [[] for _ in tokens]
    entropies: list[Tensor] = []  # (B, T) each
    starts, padding = leftmost(canvas.masked.cpu()).tolist(), (~canvas.valid).sum(-1).tolist()
    for step in steps:
        before, tokens, committed = tokens, step.canvas.cpu(), step.committed.cpu()
        committed_by[committed] = step.index
        if step.revoked is not None:
            for row, at in step.revoked.cpu().nonzero().tolist():
                made = int(before[row, at]), int(committed_by[row, at])
                revoked[row].append([at - starts[row], *made, step.index])
            committed_by[step.revoked.cpu()] = -1
        if step.entropy is not None:
            entropies.append(step.entropy.cpu())
        confidence = step.confidence.cpu().where(committed, confidence)
        log_probs = step.log_prob.cpu().where(committed, log_probs)
        passes[committed.any(-1)] = step.forward_passes
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
            revoked=revoked[row],
            entropies=_packed([entropy[row, start:] for entropy in entropies]),
        )
        for row, start in enumerate(starts)
    ]


def _packed(entropies: Sequence[Tensor]) -> str:
    """The field `entropies`, of the (L,) of each step; without the steps after the row's end, which scored nothing."""
    scored = [entropy.to(torch.float16).numpy() for entropy in entropies if not entropy.isnan().all()]
    return base64.b64encode(zlib.compress(np.stack(scored).astype("<f2").tobytes())).decode() if scored else ""


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
    if kind != FORMAT or version not in (2, VERSION):
        raise ConfigError(f"{place} is {kind!r} version {version!r}, not {FORMAT!r} version {VERSION}; write it anew")
    if content.keys() != {f.name for f in fields(Trace)} - (_SINCE_3 if version == 2 else set()):
        raise ConfigError(f"{place} does not have the fields of {FORMAT} version {version}; write it anew")
    return Trace(**content)


def local_ar_ness(
    order: Sequence[int],
    k: int,
    *,
    ordered: bool = False,
    boundary: Literal["exclude", "include"] = "exclude",
    before: Sequence[int] | None = None,
) -> float:
    """Share of commitments that continue a run: the `k` positions before a token are the k committed before it.

    DiffuCoder (arXiv 2506.20639) §4.1, local AR-ness@k, where sets are compared; `ordered` wants the run itself from
    left to right, as the caption of its figure 3 does. The first k commitments have no k predecessors: we leave them
    out, so that left to right is 1; `boundary="include"` counts them as failures. nan where that leaves nothing.
    `before` (`committed_before`) tells which commitments share a step and so follow none of each other; left out, each
    of `order` is a step of its own.
    """
    arrange = list if ordered else sorted
    known = range(len(order)) if before is None else before
    followers = [(n, position) for n, position in zip(known, order, strict=True) if n >= k]
    runs = sum(arrange(order[n - k : n]) == list(range(position - k, position)) for n, position in followers)
    counted = len(followers) if boundary == "exclude" else len(order)
    return runs / counted if counted > 0 else math.nan


def global_ar_ness(order: Sequence[int], k: int, *, before: Sequence[int] | None = None) -> float:
    """Share of commitments to one of the `k` leftmost masked positions (DiffuCoder §4.1); nan where there are none.

    `before` as in `local_ar_ness`: commitments of one step all find what was masked before it.
    """
    left, gone, early = sorted(order), 0, 0
    for known, position in zip(range(len(order)) if before is None else before, order, strict=True):
        for earlier in order[gone:known]:
            del left[bisect_left(left, earlier)]
        gone = known
        early += bisect_left(left, position) < k
    return early / len(order) if order else math.nan


def committed_before(order: Sequence[int], steps: Sequence[int]) -> list[int]:
    """How many of `order` were committed before the step that committed each of them."""
    made = [steps[at] for at in order]
    return [bisect_left(made, step) for step in made]
