"""Samples: what a model answers to the tasks of a benchmark, or anybody's answers from a file.

A sample is a line of samples.jsonl: `task_id`, `sample` (its number), `solution` or `completion` as EvalPlus writes
them, and what it cost; its trace may stand in traces.jsonl beside it. Lines are written a batch at a time; a batch that
was cut short is generated anew, whole, so that a run that was stopped gives the samples of one that was not.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffucoder.errors import ConfigError, PromptError
from diffucoder.evaluation.benchmarks import PREFILL, Task
from diffucoder.grading.extract import completed, program_from

if TYPE_CHECKING:
    from diffucoder.decoding.generate import DiffuCoder, Generation
    from diffucoder.decoding.params import DecodingParams
    from diffucoder.decoding.trace import Trace

_ALL = 1 << 30  # steps: more than there are
Sample = dict[str, Any]  # a line of samples.jsonl, or of verdicts.jsonl
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]  # (things, how many, what they are) -> the things


def silent(things: Iterable[Any], count: int, what: str) -> Iterable[Any]:
    """No progress shown."""
    return things


@dataclass(frozen=True)
class Generator:
    """Answers tasks with a model; `raw` continues the prompt, as base models need."""

    coder: "DiffuCoder"
    params: "DecodingParams"
    raw: bool = False
    batch: int = 8
    traces: bool = False  # kept, with entropies: of all steps of the first `maps` tasks, of others at the first pass
    maps: int = 0

    def samples(self, tasks: Sequence[Task], path: Path, progress: Progress = silent) -> list[Sample]:
        """`params.num_samples` samples for every task, from `path` as far as they are there, else appended to it."""
        chunks = [tasks[at : at + self.batch] for at in range(0, len(tasks), self.batch)]
        sizes = [len(chunk) * self.params.num_samples for chunk in chunks]
        wanted = [{"task_id": t.task_id, "sample": n} for t in tasks for n in range(self.params.num_samples)]
        done = agreeing(read_lines(path), wanted)
        whole = next(n for n in range(len(chunks), -1, -1) if sum(sizes[:n]) <= len(done))
        done = done[: sum(sizes[:whole])]  # a batch that was cut short is generated anew, whole, as it was
        write_lines(path, done)
        traces = path.with_name("traces.jsonl")
        if self.traces:
            answered = {_id(sample) for sample in done}
            write_lines(traces, (line for line in read_lines(traces) if line.get("id") in answered))
        for at in progress(range(whole, len(chunks)), len(chunks) - whole, "batches generated"):
            entropies = 0 if not self.traces else _ALL if at * self.batch < self.maps else 1
            fresh = self._answer(chunks[at], entropies)
            kept = [(_id(sample), sample.pop("trace")) for sample in fresh if "trace" in sample]
            if self.traces:  # first: a sample that is there has its trace
                _append(traces, [_trace_line(name, trace) for name, trace in kept])
            _append(path, fresh)
            done += fresh
        return done

    def _answer(self, tasks: Sequence[Task], entropies: int = 0) -> list[Sample]:
        if any(task.suffix for task in tasks):
            return [sample for task in tasks for sample in self._infilled(task)]
        prompts = [self._prompt(task) for task in tasks]
        try:
            canvas = self.coder.canvas(prompts, self.params, chat=False)
        except PromptError as error:
            if len(tasks) == 1:
                return self._unanswered(tasks[0], error)
            return [sample for task in tasks for sample in self._answer([task], entropies)]
        results = self.coder.decode(canvas, self.params, entropies=entropies)
        samples = []
        for at, result in enumerate(results):
            task, number = tasks[at // self.params.num_samples], at % self.params.num_samples
            answer = {"solution": self._solution(task, result.text), "text": result.text}
            samples.append(_sample(task, number, answer, result, result.seconds / len(results)))
        return samples

    def _prompt(self, task: Task) -> str:
        if self.raw:
            return task.prompt
        asked = self.coder.tokenizer.chat(task.request)
        return asked + PREFILL if task.judged and not task.asserts else asked  # our own model writes no fences

    def _solution(self, task: Task, text: str) -> str:
        return completed(task.prompt, text, task.entry_point) if self.raw else program_from(text)

    def _infilled(self, task: Task) -> list[Sample]:
        samples = []
        for number in range(self.params.num_samples):
            params = self.params.replace(num_samples=1, seed=self.params.seed + number, stop=())
            try:
                result = self.coder.infill(task.prompt, task.suffix, params=params)
            except PromptError as error:
                return self._unanswered(task, error)
            samples.append(_sample(task, number, {"completion": result.text}, result, result.seconds))
        return samples

    def _unanswered(self, task: Task, error: PromptError) -> list[Sample]:
        """A prompt that the model cannot take is a task that it does not solve."""
        empty = {"solution": "", "tokens": 0, "forward_passes": 0, "finish_reason": f"not asked: {error}", "seconds": 0}
        return [{"task_id": task.task_id, "sample": n, **empty} for n in range(self.params.num_samples)]


def _sample(task: Task, number: int, answer: Mapping[str, str], result: "Generation", seconds: float) -> Sample:
    return {
        "task_id": task.task_id,
        "sample": number,
        **answer,
        "tokens": len(result.tokens),
        "forward_passes": result.forward_passes,
        "finish_reason": result.finish_reason,
        "seconds": round(seconds, 4),
        "trace": result.trace,
    }


def _id(sample: Sample) -> str:
    """What a sample's trace is called."""
    return f"{sample['task_id']}#{sample['sample']}"


def _trace_line(name: str, trace: "Trace") -> dict[str, Any]:
    from diffucoder.decoding.trace import as_json  # late: it brings torch, which grading does without

    return as_json(replace(trace, id=name))


def _append(path: Path, lines: Iterable[Sample]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_samples(path: Path, tasks: Sequence[Task]) -> list[Sample]:
    """Anybody's samples, JSONL or gzipped: `task_id` and `completion` or `solution`. In the tasks' order.

    Raises ConfigError naming the line for what is no sample, or of another benchmark.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"samples {str(path)!r} cannot be read ({error}); check the path") from None
    order = {task.task_id: at for at, task in enumerate(tasks)}
    counts: dict[str, int] = {}
    samples = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            sample = _checked(line, f"{path}, line {number}", order)
            task_id = sample["task_id"]
            samples.append({**sample, "sample": counts.get(task_id, 0)})
            counts[task_id] = counts.get(task_id, 0) + 1
    if not samples:
        raise ConfigError(f"samples {str(path)!r} holds none; write one JSON object a line, as EvalPlus does")
    return sorted(samples, key=lambda sample: (order[sample["task_id"]], sample["sample"]))


def _checked(line: str, where: str, known: Mapping[str, int]) -> Sample:
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}); write one object a line") from None
    if not isinstance(sample, dict):
        raise ConfigError(f"{where} is no JSON object; write one a line, as EvalPlus does")
    given = sample.get("task_id")
    if not isinstance(given, str) or given not in known:
        raise ConfigError(f"{where}: task_id={given!r} is not in this benchmark; its first is {next(iter(known))!r}")
    answers = [key for key in ("solution", "completion") if key in sample]
    if not answers:
        raise ConfigError(f"{where} has keys {sorted(sample)}; it needs 'completion' or 'solution', a string")
    for key in answers:
        if not isinstance(sample[key], str):
            raise ConfigError(f"{where}: {key}={sample[key]!r} is no string; write the program, or what continues it")
    return sample


def sweep(
    params: "DecodingParams", steps: str | None, temperature: str | None, policy: str | None = None
) -> Iterator["DecodingParams"]:
    """`params` by each of the policies, at each of the steps and temperatures, which are separated by commas."""
    for each in policy.split(",") if policy else [params.policy]:
        for count in _numbers("steps", steps, int) or [params.steps]:
            for heat in _numbers("temperature", temperature, float) or [params.temperature]:
                yield params.replace(steps=count, temperature=heat, policy=each)


def _numbers(name: str, text: str | None, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be numbers separated by commas, as in --{name} 512,256") from None


def read_lines(path: Path) -> list[Sample]:
    """The whole lines of a file that may have been cut short."""
    if not path.exists():
        return []
    lines: list[Sample] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            found = json.loads(line)
        except ValueError:
            break
        if not isinstance(found, dict):
            break
        lines.append(found)
    return lines


def agreeing(lines: Sequence[Sample], wanted: Sequence[Sample]) -> list[Sample]:
    """The first of `lines`, as long as each is about the same sample as its place in `wanted`."""
    keys = ("task_id", "sample")
    same = (all(line.get(key) == want[key] for key in keys) for line, want in zip(lines, wanted, strict=False))
    return list(lines[: sum(takewhile(bool, same))])


def write_lines(path: Path, lines: Iterable[Sample]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)
