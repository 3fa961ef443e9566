"""Samples: the answers of a model to the tasks of a benchmark, or answers from a file of anybody.

A sample is a line of samples.jsonl: `task_id`, `sample` (its number), `solution` or `completion` (see `Task.program`),
and what it cost. Its trace may be in traces.jsonl beside it. Lines are written a batch at a time. A batch that was cut
short is generated again as a whole, so that a run that was stopped gives the same samples as one that was not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from diffucoder.errors import ConfigError, PromptError
from diffucoder.evaluation.benchmarks import Asserts, Task
from diffucoder.evaluation.judge import Progress, matching_lines, silent
from diffucoder.files import (
    Json,
    append_jsonl,
    parse_json_line,
    read_lines,
    read_whole_lines,
    without_nulls,
    write_jsonl,
)
from diffucoder.grading.extract import answered, called_names, completed, program_from

if TYPE_CHECKING:
    from diffucoder.decoding.coder import DiffuCoder
    from diffucoder.decoding.params import DecodingParams
    from diffucoder.decoding.requests import Generation, Request
    from diffucoder.decoding.trace import Trace

_ALL_STEPS = 1 << 30


@dataclass(frozen=True)
class Generator:
    """Answers tasks with a model; `raw` continues the prompt, as base models need."""

    coder: "DiffuCoder"
    params: "DecodingParams"
    raw: bool = False
    batch: int = 8  # tasks decoded together
    hole: str | int | None = None  # tokens of holes: a number, "oracle" or "likeliest"; None: likeliest
    maps: int | None = None  # keep traces; those of so many tasks have the entropies of all steps, others of the first

    def samples(self, tasks: Sequence[Task], path: Path, progress: Progress = silent) -> list[Json]:
        """Return `params.num_samples` samples for every task. Read those in `path`, and append the new ones."""
        from diffucoder.decoding.trace import as_json  # here, because it imports torch, which grading does without

        done = self._finished_batches(tasks, path)
        traces = path.with_name("traces.jsonl")
        if self.maps is not None:
            names = {_trace_id(sample) for sample in done}
            write_jsonl(traces, [line for line in read_whole_lines(traces) if str(line.get("id")) in names])
        starts = range(len(done) // self.params.num_samples, len(tasks), self.batch)
        for start in progress(starts, len(starts), "batches generated"):
            samples: list[Json] = []
            trace_lines: list[Json] = []
            for sample, trace in self._answer(tasks[start : start + self.batch], self._steps_with_entropies(start)):
                samples.append(sample)
                if trace is not None:
                    trace_lines.append(as_json(replace(trace, id=_trace_id(sample))))
            if self.maps is not None:  # first, so that every sample in the file has its trace
                append_jsonl(traces, trace_lines)
            append_jsonl(path, samples)
            done += samples
        return done

    def _finished_batches(self, tasks: Sequence[Task], path: Path) -> list[Json]:
        """Return the samples of whole batches in `path`, and remove others from it."""
        count = self.params.num_samples
        wanted: list[Json] = []
        for task in tasks:
            wanted += [{"task_id": task.task_id, "sample": number} for number in range(count)]
        done = matching_lines(read_whole_lines(path), wanted, _has_answer)
        if len(done) < len(wanted):
            done = done[: len(done) - len(done) % (self.batch * count)]
        write_jsonl(path, done)
        return done

    def _steps_with_entropies(self, start: int) -> int:
        if self.maps is None:
            return 0
        return _ALL_STEPS if start < self.maps else 1

    def _answer(self, tasks: Sequence[Task], entropies: int) -> "Iterator[tuple[Json, Trace | None]]":
        """Decode one batch. Yield each sample with its trace."""
        requests: list[Request] = []
        failures: dict[str, str] = {}
        for task in tasks:
            try:
                requests.append(self._request(task))
            except PromptError as error:  # a prompt that the model cannot take counts as not solved
                failures[task.task_id] = f"not asked: {error}"
        results = iter(self.coder.run(requests, entropies=entropies))
        total = len(requests) * self.params.num_samples
        for task in tasks:
            if task.task_id not in failures:
                for generation in next(results):
                    yield self._sample(task, generation, generation.seconds / total), generation.trace
                continue
            for number in range(self.params.num_samples):
                cost = {"tokens": 0, "forward_passes": 0, "finish_reason": failures[task.task_id], "seconds": 0}
                yield {"task_id": task.task_id, "sample": number, "solution": "", **cost}, None

    def _request(self, task: Task) -> "Request":
        """Return the request of a task, with `params.num_samples` results. Raises PromptError."""
        if task.suffix is not None:
            length = self.hole if isinstance(self.hole, int) else None  # None: the likeliest of several
            if self.hole == "oracle":
                length = len(self.coder.tokenizer.encode(task.middle))
            from diffucoder.decoding.requests import WindowedRequest  # here: it imports torch

            request = self.coder.infill_request(task.prompt, task.suffix, self.params, length=length)
            if isinstance(request, WindowedRequest):  # the published scores are of models that read it all
                raise PromptError(f"task {task.task_id} exceeds the model's context")
            return request
        if self.raw:
            return self.coder.request(task.prompt, self.params, chat=False)
        return self.coder.request(task.request, self.params, prefill=task.prefill)

    def _sample(self, task: Task, result: "Generation", seconds: float) -> Json:
        if task.suffix is not None:
            answer = {"completion": result.text}
        elif self.raw:
            answer = {"solution": completed(task.prompt, result.text, task.entry_point), "text": result.text}
        else:
            answer = {"solution": _solution(task, task.prefill + result.text), "text": result.text}
        return {
            "task_id": task.task_id,
            "sample": result.index,
            **answer,
            "tokens": len(result.tokens),
            "forward_passes": result.forward_passes,
            "finish_reason": result.finish_reason,
            "seconds": round(seconds, 4),
        }


def _solution(task: Task, reply: str) -> str:
    """Return the program in an instruct model's reply, which begins with the prefill of the prompt."""
    if isinstance(task.tests, Asserts):  # which may be about several names
        return program_from(reply, names=[task.entry_point, *called_names(task.tests.lines)])
    return answered(task.prompt, reply, task.entry_point) if task.entry_point else program_from(reply)


def _has_answer(sample: Json) -> bool:
    """Return whether a line of a run folder, which anybody may have written, can be judged."""
    return isinstance(sample.get("solution", sample.get("completion")), str)


def _trace_id(sample: Json) -> str:
    return f"{sample['task_id']}#{sample['sample']}"


def read_samples(path: Path, tasks: Sequence[Task]) -> list[Json]:
    """Return the samples of a JSONL file, plain or gzipped, in the order of the tasks.

    A line has `task_id`, and `completion` or `solution`. Raises ConfigError for a line that is not a sample of `tasks`.
    """
    by_task: dict[str, list[Json]] = {task.task_id: [] for task in tasks}
    try:
        for number, line in read_lines(path):
            if line.strip():
                sample = _parse_sample(line, f"{path}, line {number}", by_task)
                same_task = by_task[sample["task_id"]]
                same_task.append({**sample, "sample": len(same_task)})
    except OSError as error:
        raise ConfigError(f"samples {str(path)!r} cannot be read ({error}); check the path") from None
    samples = list(chain.from_iterable(by_task.values()))
    if not samples:
        raise ConfigError(f"samples {str(path)!r} holds none; write one JSON object a line, as EvalPlus does")
    return samples


def _parse_sample(line: bytes, where: str, tasks: Mapping[str, object]) -> Json:
    try:
        sample = without_nulls(parse_json_line(line))
    except ValueError as error:
        raise ConfigError(f"{where} is {error}; write one object a line, as EvalPlus does") from None
    task_id = sample.get("task_id")
    if not isinstance(task_id, str) or task_id not in tasks:
        raise ConfigError(
            f"{where}: task_id={repr(task_id)[:200]} is not in this benchmark; its first is {next(iter(tasks))!r}"
        )
    if "solution" not in sample and "completion" not in sample:
        raise ConfigError(
            f"{where} has keys {str(sorted(sample))[:200]}; it needs 'completion' or 'solution', a string"
        )
    for key in ("solution", "completion"):
        if not isinstance(sample.get(key, ""), str):
            raise ConfigError(
                f"{where}: {key}={repr(sample[key])[:200]} is not a string; write the program, or text that continues "
                "the prompt"
            )
    return sample
