"""Traces: which tokens were generated in which order, one line for each sample; and AR-ness, a measure of that order.

The format, version 3: JSON lines, each with `format` ("diffucoder-trace"), `version` and the fields of `Trace`. Files
may be cut and concatenated.
"""

import base64
import math
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from diffucoder.errors import ConfigError
from diffucoder.files import parse_json_line, read_lines, write_jsonl

FORMAT = "diffucoder-trace"
VERSION = 3
LONGEST_ANSWER = 2**15  # tokens; this and the next limits hold for files of traces from anybody
_MOST_STEPS = 10**6
_HOTTEST = 10**9  # temperature; larger ones cannot be drawn
LARGEST_MAP = 2**24  # entropies of a trace, as 4,096 steps of 4,096 tokens have


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One generated sample. L positions are counted from the first hole on."""

    tokens: list[int]  # the finished row, without padding
    prompt_length: int  # how many of `tokens` are before the first hole
    steps: list[int]  # for each of the L tokens, the step that committed it; -1 = none did
    confidence: list[float]  # for the same tokens: the score of the commitment, 4 significant digits; 0 where none
    log_probs: list[float]  # the same: the log-probability each had when it was committed, 4 decimals; 0 where none
    forward_passes: int  # spent until the last commitment of the row
    params: dict[str, Any] = field(default_factory=dict)  # the DecodingParams. Any: JSON
    model: str = ""  # its name, as the user gave it
    id: str = ""  # the task and the number of the sample, such as "tiny/7#0"
    # revoked commitments: [position of L, token, step that made it, step that revoked it]
    revoked: list[list[int]] = field(default_factory=list)
    # base64 of zlib of little-endian float16, (S, L): the entropy in nats of each position before each of the first S
    # steps; nan where none was scored; "" if not recorded
    entropies: str = ""

    @property
    def entropy_map(self) -> np.ndarray:
        """(S, L) float32 nats, nan where nothing was scored; S = 0 if not recorded. Raises ValueError or zlib.error."""
        packed = b""
        if self.entropies:
            unpacking = zlib.decompressobj()
            packed = unpacking.decompress(base64.b64decode(self.entropies), 2 * LARGEST_MAP)
            if unpacking.unconsumed_tail or not unpacking.eof:
                raise ValueError(f"over {LARGEST_MAP:,} numbers, or cut short")
        return np.frombuffer(packed, "<f2").reshape(-1, max(len(self.steps), 1)).astype(np.float32)

    @property
    def order(self) -> list[int]:
        """Positions in `tokens` in the order of their commitment; several of one step from left to right."""
        return [self.prompt_length + at for at in commit_order(self.steps)]

    @property
    def mean_log_prob(self) -> float:
        """Mean log-probability of the committed tokens; minus infinity if none was committed."""
        committed = [value for value, step in zip(self.log_probs, self.steps, strict=True) if step >= 0]
        return sum(committed) / len(committed) if committed else -math.inf


def commit_order(steps: Sequence[int], confidence: Sequence[float] | None = None) -> list[int]:
    """Return positions in the order of their commitment, given the step of each. Step -1 is left out.

    Positions of one step come from left to right, or with `confidence` the most confident first.
    """
    committed = []
    for position, step in enumerate(steps):
        if step >= 0:
            first = 0.0 if confidence is None else -confidence[position]
            committed.append((step, first, position))
    return [position for _, _, position in sorted(committed)]


def pack_entropies(entropies: Sequence[Tensor]) -> str:
    """Return the field `entropies` for the (L,) of each step, without steps that scored nothing."""
    scored = [entropy.to(torch.float16).numpy() for entropy in entropies if not entropy.isnan().all()]
    if not scored:
        return ""
    return base64.b64encode(zlib.compress(np.stack(scored).astype("<f2").tobytes())).decode()


def as_json(trace: Trace) -> dict[str, Any]:
    """Return a trace as an object of the format."""
    return {"format": FORMAT, "version": VERSION, **asdict(trace)}


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Write a file of traces. Raises ConfigError for a path that cannot be written."""
    try:
        write_jsonl(path, (as_json(trace) for trace in traces))
    except OSError as error:
        raise ConfigError(f"trace file {str(path)!r} cannot be written ({error.strerror}); check the path") from None


def read_traces(path: str | Path) -> list[Trace]:
    """Read a file that `write_traces` wrote. Raises ConfigError for another format or version."""
    traces: list[Trace] = []
    try:
        for number, line in read_lines(path):
            if line.strip():
                traces.append(_parse(line, f"{path}:{number}"))
    except OSError as error:
        raise ConfigError(f"trace file {str(path)!r} cannot be read ({error.strerror}); check the path") from None
    return traces


def _parse(line: bytes, place: str) -> Trace:
    try:
        content = parse_json_line(line)
        kind = content.pop("format")
        version = content.pop("version")
    except (ValueError, KeyError):
        raise ConfigError(f"{place} is not a {FORMAT} line; give a file that write_traces wrote") from None
    if kind != FORMAT or version != VERSION:
        found = f"{repr(kind)[:40]} version {repr(version)[:40]}"
        raise ConfigError(f"{place} is {found}, not {FORMAT!r} version {VERSION}; write it again")
    if content.keys() != {field.name for field in fields(Trace)}:
        raise ConfigError(f"{place} does not have the fields of {FORMAT} version {version}; write it again")
    try:
        trace = TypeAdapter(Trace).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{place}: {where} is {str(first['input'])[:40]!r}: {first['msg']}") from None
    problem = _problem(trace)
    if problem:
        raise ConfigError(f"{place}: {problem}; no model writes that, record it again")
    return trace


def _problem(trace: Trace) -> str | None:
    """Return a fault that no trace of a model has, or None. The analysis relies on this."""
    length = len(trace.steps)
    revoked = [row for row in trace.revoked if len(row) == 4]
    steps = [*trace.steps, *(step for row in revoked for step in row[2:])]
    if not 0 <= trace.prompt_length == len(trace.tokens) - length:
        return f"prompt_length={trace.prompt_length} and {length} steps are not all tokens"
    if length > LONGEST_ANSWER:
        return f"its answer has {length:,} tokens, over {LONGEST_ANSWER:,}"
    if not len(trace.confidence) == len(trace.log_probs) == length:
        return f"confidence and log_probs do not have {length} values as steps has"
    if not all(0 <= token < 2**31 for token in [*trace.tokens, *(row[1] for row in revoked)]):
        return "a token is not from 0 to 2**31 - 1"
    if not all(-1 <= step < _MOST_STEPS for step in steps) or not 0 <= trace.forward_passes <= _MOST_STEPS:
        return f"forward_passes={str(trace.forward_passes)[:20]} or a step is not from 0 to {_MOST_STEPS:,}"
    if not all(row[0] in range(length) and row[2] >= 0 and row[3] >= 0 for row in revoked) or revoked != trace.revoked:
        return "an entry of revoked is not a position, a token and two steps"
    if not all(value < 0.01 for value in trace.log_probs):
        return "a log-probability is not 0 or less"
    for name, value in trace.params.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(each, list | dict) for each in values):
            return f"params.{name[:40]} is not a value of a setting"
    temperature = trace.params.get("temperature") or 0.0
    if not isinstance(temperature, int | float) or not 0 <= temperature <= _HOTTEST:
        return f"params.temperature is {str(temperature)[:40]!r}, not a number from 0 to {_HOTTEST:,}"
    try:
        if np.isinf(trace.entropy_map).any():
            return "an entropy is infinite"
    except (ValueError, zlib.error) as error:
        return f"entropies are not rows of {length} packed numbers ({error})"
    return None


def local_ar_ness(
    order: Sequence[int],
    k: int,
    *,
    ordered: bool = False,
    boundary: Literal["exclude", "include"] = "exclude",
    before: Sequence[int] | None = None,
    end: int | None = None,
) -> float:
    """Share of commitments that continue a run: the `k` positions before a token are the k committed just before it.

    This is local AR-ness@k of DiffuCoder (arXiv 2506.20639) §4.1, which compares sets. With `ordered`, the run must
    also go from left to right. The first k commitments have no k predecessors: they are left out, or count as failures
    with `boundary="include"`. `before` (`committed_before`) shows which commitments share a step. Positions from `end`
    on interrupt runs but are not counted. nan if nothing is counted.
    """
    before = range(len(order)) if before is None else before
    arrange = list if ordered else sorted
    runs = 0
    counted = 0
    for known, position in zip(before, order, strict=True):
        if end is not None and position >= end:
            continue
        if known >= k:
            counted += 1
            runs += arrange(order[known - k : known]) == list(range(position - k, position))
        else:
            counted += boundary == "include"
    return runs / counted if counted > 0 else math.nan


def global_ar_ness(
    order: Sequence[int], k: int, *, before: Sequence[int] | None = None, end: int | None = None
) -> float:
    """Share of commitments to one of the `k` leftmost masked positions (DiffuCoder §4.1); nan if there are none.

    `before` and `end` as in `local_ar_ness`.
    """
    before = range(len(order)) if before is None else before
    in_place = iter(sorted(order))
    leftmost = list(islice(in_place, k))  # of the masked positions
    committed = set[int]()
    early = 0
    counted = 0
    for known, position in zip(before, order, strict=True):
        for earlier in order[len(committed) : known]:
            committed.add(earlier)
            if earlier in leftmost:
                leftmost.remove(earlier)
                leftmost += islice((after for after in in_place if after not in committed), 1)
        if end is not None and position >= end:
            continue
        early += position in leftmost
        counted += 1
    return early / counted if counted > 0 else math.nan


def committed_before(order: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Return, for each of `order`, how many were committed before the step that committed it."""
    in_order = [steps[position] for position in order]
    return [bisect_left(in_order, step) for step in in_order]
