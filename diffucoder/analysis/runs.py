"""Recorded answers to analyse: traces with their text and verdicts, grouped into runs; and the AR-ness of an answer."""

import json
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from diffucoder.analysis.settings import Conventions
from diffucoder.analysis.tokens import token_classes
from diffucoder.decoding.trace import Trace, commit_order, committed_before, global_ar_ness, local_ar_ness, read_traces
from diffucoder.errors import ConfigError, DiffuCoderError, printable
from diffucoder.files import Json, read_json, read_whole_lines
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.models.hub import find
from diffucoder.tokenizer import Tokenizer

LOCAL = range(1, 10)  # k of local AR-ness, as in the paper's figures
GLOBAL = range(1, 5)  # k of global AR-ness
MOST_RUNS = 64  # every two of them are compared


@dataclass(frozen=True)
class Answer:
    """A trace with its text: pieces and classes of the tokens from the first hole on."""

    task: str  # the prompt that it answers
    trace: Trace
    prompt: str
    pieces: list[str]
    classes: list[str]  # of CLASSES
    end: int  # tokens before the terminator
    revoked: list[tuple[int, str, int, int]]  # as in the trace, with text
    passed: bool | None  # None: not graded

    @classmethod
    def of(cls, trace: Trace, tokenizer: Tokenizer, *, task: str, passed: bool | None = None) -> "Answer":
        """Read a trace."""
        tokens = trace.tokens[trace.prompt_length :]
        end = 0
        while end < len(tokens) and tokens[end] not in tokenizer.terminator_ids:
            end += 1
        pieces = tokenizer.pieces(tokens)
        classes = token_classes(pieces[:end]) + ["end"] * (len(tokens) - end)
        before, _, after = _template(tokenizer)
        prompt = tokenizer.decode(trace.tokens[: trace.prompt_length], skip_special=False)
        if prompt.startswith(before) and prompt.endswith(after):
            prompt = prompt.removeprefix(before).removesuffix(after)
        revoked = []
        for position, token, committed, taken_back in trace.revoked:
            revoked.append((position, tokenizer.pieces([token])[0], committed, taken_back))
        return cls(task, trace, prompt, pieces, classes, end, revoked, passed)

    @property
    def length(self) -> int:
        """Tokens of the answer, its terminator included."""
        return min(self.end + 1, len(self.pieces))

    def ar_ness(self, conventions: Conventions) -> tuple[list[float], list[float]]:
        """Local AR-ness@k and global AR-ness@k, for `LOCAL` and `GLOBAL` k."""
        length = self.length if conventions.span == "answer" else len(self.pieces)
        end = self.length if conventions.span == "interrupted" else None
        return ar_ness(self.trace.steps[:length], conventions, self.trace.confidence[:length], end=end)

    @property
    def ranks(self) -> np.ndarray:
        """(L,) when each token of the answer was committed, from 0 = first to 1 = last; nan elsewhere."""
        order = commit_order(self.trace.steps[: self.length])
        ranks = np.full(len(self.pieces), np.nan)
        ranks[order] = np.arange(len(order)) / max(len(order) - 1, 1)
        return ranks


@dataclass(frozen=True)
class Run:
    """The answers of one model with one setting."""

    settings: Json  # name of the model, and its decoding parameters
    answers: list[Answer] = field(default_factory=list)
    label: str = ""  # its name among the runs that it is reported with


def ar_ness(
    steps: Sequence[int], conventions: Conventions, confidence: Sequence[float] | None = None, *, end: int | None = None
) -> tuple[list[float], list[float]]:
    """Return local and global AR-ness, given the step of each position from the first hole on; -1 if none.

    Commitments to positions from `end` on interrupt runs, and are not counted themselves.
    """
    first = confidence if conventions.several == "surest_first" else None
    order = commit_order(steps, first)
    before: Sequence[int] = range(len(order))
    if conventions.several == "at_once":
        before = committed_before(order, steps)
    boundary: Literal["exclude", "include"] = "include" if conventions.boundary == "include" else "exclude"
    local_values = []
    for k in LOCAL:
        run = order
        known = before
        if conventions.boundary == "prompt":  # the k tokens to the left of the first hole were read in order
            run = [*range(-k, 0), *order]
            known = [*range(k), *(k + count for count in before)]
        value = local_ar_ness(run, k, ordered=conventions.ordered, boundary=boundary, before=known, end=end)
        local_values.append(value)
    return local_values, [global_ar_ness(order, k, before=before, end=end) for k in GLOBAL]


def read_runs(paths: Iterable[Path], model: str | None = None) -> list[Run]:
    """Return runs from run folders, with their verdicts, or from files of traces: one for each model and setting.

    `model` is the one whose tokenizer reads them all; without it each names its own, which must be on this machine: a
    file asks for no download. Raises ConfigError for no runs or too many, and CheckpointError for an unfit tokenizer.
    """
    runs: dict[str, Run] = {}
    given = load_tokenizer(None if model == "tiny" else model) if model else None
    for path in paths:
        file = path / "traces.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{str(path)!r} holds no traces; give a folder of diffucoder order, or a file of traces")
        verdicts: dict[str, bool] = {}
        prompts = _prompts(file.with_name("settings.json"))
        for verdict in read_whole_lines(file.with_name("verdicts.jsonl")):
            if isinstance(verdict.get("after_step"), int):  # of training
                prompts["after_step"] = verdict["after_step"]
            verdicts[f"{verdict.get('task_id')}#{verdict.get('sample')}"] = bool(verdict.get("passed"))
        for trace in read_traces(file):
            tokenizer = given or _tokenizer_of(trace.model, file)
            _check_tokens(trace, tokenizer, file)
            settings = {"model": trace.model, **prompts, **trace.params} | {"model": trace.model}
            settings.pop("seed", None)
            set_values = {name: value for name, value in settings.items() if value is not None}  # old traces lack some
            key = json.dumps([str(path) if path.is_dir() else "", set_values], sort_keys=True)
            answer = Answer.of(trace, tokenizer, task=_task(trace), passed=verdicts.get(trace.id))
            runs.setdefault(key, Run(settings)).answers.append(answer)
            if len(runs) > MOST_RUNS:
                raise ConfigError(f"{str(path)!r} holds over {MOST_RUNS} models and settings; give a part of its lines")
    if not runs:
        raise ConfigError("there is no trace in the given folders or files; give others")
    return labelled(list(runs.values()))


def labelled(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each named by the settings in which they differ, or by its model."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs}) > 1]
    labels: list[str] = []
    for run in runs:
        parts = []
        for name in differing:
            value = run.settings.get(name)
            parts.append(str(value) if name == "model" else f"{name.replace('_', ' ')} {value}")
        label = printable(" ".join((", ".join(parts) or str(run.settings.get("model"))).split()))[:200]
        if label in labels:
            label = f"{label} ({labels.count(label) + 1})"
        labels.append(label)
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


@cache
def _tokenizer_of(name: str, file: Path) -> Tokenizer:
    """Return the tokenizer of the model that a file names. Raises ConfigError if it is not on this machine."""
    try:
        folder = find(name, fetch=False)
    except OSError:  # CheckpointError, or a name that cannot be a path
        raise ConfigError(
            f"{str(file)!r} names the model {name[:200]!r}, which is not on this machine, and names in files are not "
            "downloaded; give the model, or one with its tokenizer: --model NAME"
        ) from None
    return load_tokenizer(folder)


@cache
def _template(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """What the chat template writes before a request, the request's place, and what follows; nothing if it fails."""
    with suppress(DiffuCoderError):
        return tokenizer.chat("\0").partition("\0")
    return "", "", ""


def _check_tokens(trace: Trace, tokenizer: Tokenizer, file: Path) -> None:
    """Raise ConfigError if a trace has tokens that the tokenizer lacks."""
    largest = max([0, *trace.tokens, *(row[1] for row in trace.revoked)])
    if largest >= tokenizer.vocab_size:
        raise ConfigError(
            f"{str(file)!r}: trace {trace.id[:100]!r} has token {largest} of {tokenizer.vocab_size} tokens; "
            "give the model that wrote it: --model NAME"
        )


def _prompts(path: Path) -> Json:
    """Return the name of the prompts of a run folder, which distinguishes code from mathematics; none in training."""
    try:
        settings = read_json(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error}); remove it") from None
    if "benchmark" not in settings:
        return {}
    return {"prompts": str(settings["benchmark"])[:200]}


def _task(trace: Trace) -> str:
    """Return the task that a trace answers; without an id, one made from its prompt."""
    prompt = tuple(trace.tokens[: trace.prompt_length])
    return trace.id.rpartition("#")[0] or f"prompt {zlib.crc32(repr(prompt).encode()):08x}"
