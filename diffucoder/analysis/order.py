"""The order in which a model writes, in figures: AR-ness, what is committed first, how unsure it is where, diversity.

For: traces of any Steps (`decoding.trace`), with verdicts where there are any, to figures with intervals over prompts.
Not for: decoding and grading (`evaluation` leaves run folders that are read here), or drawing (`report`).

A figure of a prompt is the mean over its samples; a run's figure is the mean over its prompts, its interval a 95 %
bootstrap that draws prompts again. Two runs are compared prompt by prompt, over the prompts that both have.
"""

import ast
import io
import json
import keyword
import math
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from diffucoder.analysis.settings import Conventions
from diffucoder.decoding.trace import Trace, commit_order, committed_before, global_ar_ness, local_ar_ness, read_traces
from diffucoder.errors import ConfigError
from diffucoder.grading.extract import parsed, program_from
from diffucoder.metrics import bootstrap_columns, pass_at_k
from diffucoder.models.checkpoint import load_tokenizer
from diffucoder.tokenizer import Tokenizer

LOCAL, GLOBAL = range(1, 10), range(1, 5)  # the k of the paper's figures
CLASSES = ("keyword", "name", "operator", "literal", "indentation", "comment", "text", "end")
ROUNDS, _SEED = 2000, 2506  # of the bootstrap

Json = dict[str, Any]  # Any: JSON


@dataclass(frozen=True)
class Answer:
    """A trace with its text: pieces and classes of the tokens from the first hole on."""

    task: str  # the prompt that it answers
    trace: Trace
    prompt: str
    pieces: list[str]
    classes: list[str]  # of CLASSES
    length: int  # tokens of the answer, its terminator included
    revoked: list[tuple[int, str, int, int]]  # as in the trace, with text
    passed: bool | None  # None: not graded

    @classmethod
    def of(cls, trace: Trace, tokenizer: Tokenizer, *, task: str, passed: bool | None = None) -> "Answer":
        """Read a trace."""
        given, tokens = trace.tokens[: trace.prompt_length], trace.tokens[trace.prompt_length :]
        end = next((at for at, token in enumerate(tokens) if token in tokenizer.terminator_ids), len(tokens))
        pieces = _pieces(tokens, tokenizer)
        classes = token_classes(pieces[:end]) + ["end"] * (len(tokens) - end)
        prompt = tokenizer.decode(given, skip_special=False)
        text = {token: tokenizer.decode([token], skip_special=False) for _, token, _, _ in trace.revoked}
        revoked = [(at, text[token], made, taken) for at, token, made, taken in trace.revoked]
        return cls(task, trace, prompt, pieces, classes, min(end + 1, len(tokens)), revoked, passed)

    @property
    def program(self) -> str:
        """What tells its solution from others: its syntax tree, or its text where that is no Python."""
        kept = zip(self.pieces, self.classes, strict=True)
        text = program_from("".join(piece for piece, kind in kept if kind != "end"))
        try:
            return ast.dump(parsed(text))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return text.strip()

    def ar_ness(self, conventions: Conventions) -> tuple[list[float], list[float]]:
        """Local AR-ness@k and global AR-ness@k, for `LOCAL` and `GLOBAL` k."""
        length = self.length if conventions.span == "answer" else len(self.pieces)
        return ar_ness(self.trace.steps[:length], conventions, self.trace.confidence[:length])

    @property
    def ranks(self) -> np.ndarray:
        """(L,) when each token of the answer was committed, from 0 = first to 1 = last; nan elsewhere."""
        order = commit_order(self.trace.steps[: self.length])
        ranks = np.full(len(self.pieces), np.nan)
        ranks[order] = np.arange(len(order)) / max(len(order) - 1, 1)
        return ranks


@dataclass(frozen=True)
class Run:
    """The answers of one model by one setting."""

    settings: Json  # the model's name, and its decoding parameters
    answers: list[Answer]
    label: str = ""  # what tells it from the runs that it is reported with


def ar_ness(
    steps: Sequence[int], conventions: Conventions, sure: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """Local and global AR-ness from the step of each position, counted from the first hole; -1 where none did."""
    order = commit_order(steps, sure if conventions.several == "surest_first" else None)
    before = committed_before(order, steps) if conventions.several == "at_once" else None
    local = []
    for k in LOCAL:
        boundary, run, known = conventions.boundary, order, before
        if boundary == "prompt":  # the k tokens to the left of the first hole were read one after the other
            boundary, run = "exclude", [*range(-k, 0), *order]
            known = None if before is None else [*range(k), *(k + n for n in before)]
        local.append(local_ar_ness(run, k, ordered=conventions.ordered, boundary=boundary, before=known))
    return local, [global_ar_ness(order, k, before=before) for k in GLOBAL]


# --- tokens and their classes ----------------------------------------------------------------------------------------


def _pieces(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; of a character that is split over several, the last has it."""
    pieces = [tokenizer.decode([token], skip_special=False) for token in tokens]
    if "\ufffd" in "".join(pieces):
        texts = [tokenizer.decode(tokens[:at], skip_special=False) for at in range(len(tokens) + 1)]
        ends = [len(text.rstrip("\ufffd")) for text in texts[:-1]]
        pieces = [texts[-1][start:end] for start, end in pairwise([*ends, len(texts[-1])])]
    return pieces


def token_classes(pieces: Sequence[str]) -> list[str]:
    """What each piece of an answer is to Python: the class of its first character that is no white space.

    White space alone, line breaks among it, is indentation; what stands around the program or is no Python is text.
    """
    kinds, classes, at = _kinds("".join(pieces)), [], 0
    for piece in pieces:
        found = (kinds[at + n] for n, character in enumerate(piece) if not character.isspace())
        classes.append(next(found, "indentation"))
        at += len(piece)
    return classes


def _kinds(text: str) -> list[str]:
    """The class of each character, by Python's own tokenizer."""
    kinds, program = ["text"] * len(text), program_from(text)
    start = text.find(program)
    if start < 0:
        start, program = 0, text
    lines = np.cumsum([start, *(len(line) for line in program.splitlines(keepends=True))]).tolist()
    for token in _tokens(program):
        if kind := _kind(token):
            begin, end = (lines[row - 1] + column for row, column in (token.start, token.end))
            kinds[begin:end] = [kind] * (end - begin)
    return kinds


def _tokens(program: str) -> Iterator[tokenize.TokenInfo]:
    """Python's tokens; of broken code, from the line on where it gives up, those of each line by itself."""
    done = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(program).readline):
            yield token
            done = token.end[0]
    except (tokenize.TokenError, SyntaxError):
        lines = program.splitlines(keepends=True)
        for row in range(done, len(lines) if len(lines) > 1 else 0):
            for token in _tokens(lines[row]):
                start, end = ((at + row, column) for at, column in (token.start, token.end))
                yield token._replace(start=start, end=end)


def _kind(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    if token.type in (tokenize.STRING, tokenize.NUMBER) or tokenize.tok_name[token.type].startswith("FSTRING"):
        return "literal"
    return {tokenize.OP: "operator", tokenize.COMMENT: "comment"}.get(token.type)


# --- runs ------------------------------------------------------------------------------------------------------------


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Runs from the folders of a sweep, with its verdicts, or from files of traces, one for each model and setting.

    Raises ConfigError where there are none; CheckpointError where a model's tokenizer is not to be found.
    """
    groups: dict[str, tuple[Json, list[Answer]]] = {}
    for path in paths:
        file = path / "traces.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{str(path)!r} holds no traces; give a folder of diffucoder order, or a file of traces")
        verdicts, asked = _verdicts(file.with_name("verdicts.jsonl")), _asked(file.with_name("settings.json"))
        for trace in read_traces(file):
            settings = {"model": trace.model, **asked, **{k: v for k, v in trace.params.items() if k != "seed"}}
            set_ = {k: v for k, v in settings.items() if v is not None}  # older traces know fewer settings
            key = json.dumps([str(path) if path.is_dir() else "", set_], sort_keys=True)
            prompt = tuple(trace.tokens[: trace.prompt_length])
            task = trace.id.rpartition("#")[0] or f"prompt {zlib.crc32(repr(prompt).encode()):08x}"
            answer = Answer.of(trace, _tokenizer(trace.model), task=task, passed=verdicts.get(trace.id))
            groups.setdefault(key, (settings, []))[1].append(answer)
    if not groups:
        raise ConfigError("there is no trace in what was given; give folders or files that hold some")
    return labelled([Run(*group) for group in groups.values()])


def labelled(runs: Sequence[Run]) -> list[Run]:
    """Runs named by the settings in which they differ, or by the model."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [key for key in keys if len({json.dumps(run.settings.get(key)) for run in runs}) > 1]
    labels: list[str] = []
    for run in runs:
        values = {key: run.settings.get(key) for key in differing}
        parts = [str(value) if key == "model" else f"{key} {value}" for key, value in values.items()]
        label = ", ".join(parts) or str(run.settings.get("model"))
        labels.append(f"{label} ({labels.count(label) + 1})" if label in labels else label)
    return [Run(run.settings, run.answers, label) for run, label in zip(runs, labels, strict=True)]


@cache
def _tokenizer(model: str) -> Tokenizer:
    return load_tokenizer(None if model == "tiny" else model)


def _asked(path: Path) -> Json:
    """What the run of a folder was asked, so that code and mathematics are told apart."""
    told: Json = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"prompts": told["benchmark"]} if "benchmark" in told else {}


def _verdicts(path: Path) -> dict[str, bool]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = map(json.loads, lines)
    return {f"{verdict['task_id']}#{verdict['sample']}": verdict["passed"] for verdict in found}


# --- figures ---------------------------------------------------------------------------------------------------------


def analyse(runs: Sequence[Run], conventions: Conventions) -> Json:
    """What report.json holds: the figures of every run, and how runs differ, each with its interval and its counts."""
    tables = [_by_prompt(run, conventions) for run in runs]
    told = [_of_run(run, table) for run, table in zip(runs, tables, strict=True)]
    pairs = combinations(range(len(runs)), 2)
    return {
        "conventions": conventions.model_dump(),
        "interval": f"95 %, bootstrap over prompts, {ROUNDS} rounds",
        "runs": told,
        "differences": [_difference(runs, tables, a, b) for a, b in pairs],
    }


def _by_prompt(run: Run, conventions: Conventions) -> dict[str, dict[str, float]]:
    """The figures of every prompt: means over its samples, and what only several samples have."""
    groups: dict[str, list[Answer]] = {}
    for answer in run.answers:
        groups.setdefault(answer.task, []).append(answer)
    fewest = min(map(len, groups.values()))
    table = {}
    for task, answers in groups.items():
        each = [_of_answer(answer, conventions) for answer in answers]
        names, values = _table(each)
        figures = dict(zip(names, _mean(values).tolist(), strict=True))
        figures["distinct"] = len({answer.program for answer in answers})
        if all(answer.passed is not None for answer in answers):
            right = [answer for answer in answers if answer.passed]
            figures["distinct_right"] = len({answer.program for answer in right})
            for k in range(1, fewest + 1):
                figures[f"pass@{k}"] = pass_at_k(len(answers), len(right), k)
        table[task] = figures
    return table


def _of_answer(answer: Answer, conventions: Conventions) -> dict[str, float]:
    local, overall = answer.ar_ness(conventions)
    figures = {f"local_ar_ness@{k}": value for k, value in zip(LOCAL, local, strict=True)}
    figures |= {f"global_ar_ness@{k}": value for k, value in zip(GLOBAL, overall, strict=True)}
    ranks, kinds = answer.ranks, np.array(answer.classes)
    for kind in CLASSES:
        own = ranks[kinds == kind]
        if not np.isnan(own).all():
            figures[f"rank_{kind}"] = float(np.nanmean(own))
    figures["tokens"] = len(kinds) - answer.classes.count("end")  # before the terminator, as everywhere
    figures["tokens_per_forward"] = figures["tokens"] / max(answer.trace.forward_passes, 1)
    figures["revisions"] = len(answer.trace.revoked)
    return figures


def _of_run(run: Run, table: Mapping[str, Mapping[str, float]]) -> Json:
    names, values = _table(list(table.values()))
    answers = run.answers
    kinds = [kind for answer in answers for kind in answer.classes[: answer.length]]
    first = {id(answer): answer.trace.entropy_map[:1] for answer in answers}
    return {
        "label": run.label,
        "settings": run.settings,
        "prompts": len(table),
        "samples": len(answers),
        "graded": sum(answer.passed is not None for answer in answers),
        "tokens_of_class": {kind: kinds.count(kind) for kind in CLASSES},
        "figures": dict(zip(names, _rows(values), strict=True)),
        "rank_by_position": _rows(_stacked(run, {id(answer): answer.ranks[None] for answer in answers})),
        "first_pass_entropy_by_position": _rows(_stacked(run, first)),
        "by_prompt": {task: {name: _plain(value) for name, value in own.items()} for task, own in table.items()},
    }


def _table(rows: Sequence[Mapping[str, float]]) -> tuple[list[str], np.ndarray]:
    """The names that any of the rows has, and (N, K) their values, nan where a row has none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, np.array([[row.get(name, math.nan) for name in names] for row in rows])


def _stacked(run: Run, rows: Mapping[int, np.ndarray]) -> np.ndarray:
    """(N, L) for each prompt the mean row of its answers, nan where they end; `rows` (0 or 1, L) by the answer's id."""
    longest = max(row.shape[1] for row in rows.values())
    groups: dict[str, list[np.ndarray]] = {}
    for answer in run.answers:
        groups.setdefault(answer.task, []).extend(
            np.pad(row, (0, longest - len(row)), constant_values=np.nan) for row in rows[id(answer)]
        )
    filled = [_mean(np.stack(group)) for group in groups.values() if group]
    return np.stack(filled) if filled else np.zeros((0, 0))


def _rows(values: np.ndarray) -> list[Json]:
    """Mean, interval and number of prompts of each column of `values` (N, K)."""
    if not values.size:
        return []
    low, high = bootstrap_columns(values, np.random.default_rng(_SEED), rounds=ROUNDS)
    means, counts = _mean(values), (~np.isnan(values)).sum(0)
    return [
        {"mean": _plain(mean), "low": _plain(lo), "high": _plain(hi), "prompts": int(count)}
        for mean, lo, hi, count in zip(means, low, high, counts, strict=True)
    ]


def _difference(runs: Sequence[Run], tables: Sequence[Mapping[str, Mapping[str, float]]], a: int, b: int) -> Json:
    """How much higher the figures of run `b` are than those of `a`, prompt by prompt."""
    shared = [task for task in tables[a] if task in tables[b]]
    told: Json = {"a": runs[a].label, "b": runs[b].label, "prompts": len(shared), "figures": {}}
    if shared:
        both = [(tables[a][task], tables[b][task]) for task in shared]
        names, values = _table([{name: two[name] - one[name] for name in one if name in two} for one, two in both])
        told["figures"] = dict(zip(names, _rows(values), strict=True))
    return told


def mean_map(maps: Sequence[np.ndarray], most: int = 64) -> np.ndarray:
    """(S, L) mean of maps of several sizes, nan where none has a value; neighbours averaged down to `most` each way."""
    kept = [each for each in maps if len(each) > 1]
    if not kept:
        return np.zeros((0, 0))
    height, width = (max(each.shape[axis] for each in kept) for axis in (0, 1))
    total, count = np.zeros((2, height, width))
    for each in kept:
        total[: each.shape[0], : each.shape[1]] += np.nan_to_num(each)
        count[: each.shape[0], : each.shape[1]] += ~np.isnan(each)
    for axis in (0, 1):
        cuts = np.unique(np.linspace(0, total.shape[axis], min(most, total.shape[axis]), endpoint=False).astype(int))
        total, count = (np.add.reduceat(each, cuts, axis=axis) for each in (total, count))
    return _ratio(total, count)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean of each column, nan where all are."""
    return _ratio(np.nansum(values, 0), (~np.isnan(values)).sum(0))


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    ratio = np.full(total.shape, np.nan)
    np.divide(total, count, out=ratio, where=count > 0)
    return ratio


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
