"""Evaluate: benchmark + model → samples.jsonl → verdicts.jsonl → report.json, in a run folder.

Every stage reads what the one before it wrote and goes on where it was stopped, so nothing is generated or graded twice
and a run that was killed ends with the same report. The report holds no time and no date: the same samples give the
same bytes. How fast the model was stands in samples.jsonl.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import Task, program
from diffucoder.evaluation.judge import importable, judge, references
from diffucoder.evaluation.samples import (
    Generator,
    Progress,
    Sample,
    agreeing,
    read_lines,
    read_samples,
    silent,
    write_lines,
)
from diffucoder.grading.sandbox import Sandbox
from diffucoder.metrics import bootstrap, pass_at_k
from diffucoder.models.hub import SHIPPED

_KS = (1, 5, 10, 100)
_SEED = 2506  # of the bootstrap


def cache_folder() -> Path:
    """Where published solutions' results are kept: `diffucoder` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffucoder"


@dataclass(frozen=True)
class Evaluation:
    """One benchmark, and what its programs run in. Makes reports; `run` is the folder of one, gone on with."""

    name: str
    tasks: Sequence[Task]
    sandbox: Sandbox
    cache: Path
    limit: int | None = None  # the first tasks only
    progress: Progress = silent

    def of_model(self, generator: Generator, run: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Generate, grade, report. Raises ConfigError where `run` belongs to other settings."""
        claim(run, settings)
        tasks, skipped = split_by_imports(self.tasks[: self.limit], self.sandbox)
        samples = generator.samples(tasks, run / "samples.jsonl", self.progress)
        return self._judged(samples, skipped, settings, run)

    def of_samples(self, path: Path, run: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Grade anybody's samples, and report; without `run` nothing is kept."""
        if run is not None:
            claim(run, settings)
        tasks, skipped = split_by_imports(self.tasks[: self.limit], self.sandbox)
        runnable = {task.task_id for task in tasks}
        every = read_samples(path, self.tasks)
        samples = [sample for sample in every if sample["task_id"] in runnable]
        if not samples and not {sample["task_id"] for sample in every} & {*runnable, *skipped}:
            rule = f"leaves none of the tasks that {self.name!r} has samples of"
            raise ConfigError(f"limit={self.limit} {rule}; raise it or leave it out")
        if not samples:
            raise ConfigError(f"no task of {self.name!r} with a sample can be run here; give --packages FOLDER")
        return self._judged(samples, skipped, settings, run)

    def _judged(
        self, samples: Sequence[Sample], skipped: Mapping[str, str], settings: Mapping[str, Any], run: Path | None
    ) -> dict[str, Any]:
        path = run / "verdicts.jsonl" if run else None
        judged = {task.task_id for task in self.tasks if task.judged}
        graded = [sample for sample in samples if sample["task_id"] in judged]
        verdicts = grade_samples(self.tasks, graded, self.sandbox, path=path, cache=self.cache, progress=self.progress)
        told = report(self.name, self.tasks[: self.limit], samples, verdicts, settings, skipped)
        if run:
            write_json(run / "report.json", told)
        speed = tokens_per_second(samples)
        return told if speed is None else {**told, "tokens_per_second": speed}


# --- grade -----------------------------------------------------------------------------------------------------------


def grade_samples(
    tasks: Sequence[Task],
    samples: Sequence[Sample],
    sandbox: Sandbox,
    *,
    path: Path | None = None,
    cache: Path,
    progress: Progress = silent,
) -> list[Sample]:
    """A verdict for every sample, in order; `path` keeps them as they come, and is gone on with."""
    verdicts = [] if path is None else agreeing(read_lines(path), samples)
    if path is not None:
        write_lines(path, verdicts)
    waiting = samples[len(verdicts) :]
    asked = {sample["task_id"] for sample in waiting}
    by_id = {task.task_id: task for task in tasks}
    known = references(
        [task for task in tasks if task.task_id in asked],
        sandbox,
        cache,
        lambda things, count: progress(things, count, "published solutions run"),
    )

    def graded(sample: Sample) -> Sample:
        task = by_id[sample["task_id"]]
        judged = judge(task, program(task, sample), known.get(task.task_id), sandbox)
        return {"task_id": task.task_id, "sample": sample["sample"], **asdict(judged)}

    with ThreadPoolExecutor(sandbox.workers) as pool:
        for verdict in progress(pool.map(graded, waiting), len(waiting), "samples graded"):
            verdicts.append(verdict)
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(verdict) + "\n")
    return verdicts


def split_by_imports(tasks: Sequence[Task], sandbox: Sandbox) -> tuple[list[Task], dict[str, str]]:
    """The tasks that can be run here, and why the others cannot."""
    found = list(importable(tasks, sandbox))
    return [task for task, absent in found if not absent], {
        task.task_id: f"needs {', '.join(absent)}" for task, absent in found if absent
    }


# --- report ----------------------------------------------------------------------------------------------------------


def report(
    benchmark: str,
    tasks: Sequence[Task],
    samples: Sequence[Sample],
    verdicts: Sequence[Sample],
    settings: Mapping[str, Any],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    """The figures of a run. pass@k is unbiased, its interval a 95 % bootstrap over the tasks."""
    by_task: dict[str, list[Sample]] = {}
    for verdict in verdicts:
        by_task.setdefault(verdict["task_id"], []).append(verdict)
    figures: dict[str, Any] = {}
    fewest = min(map(len, by_task.values()), default=0)
    for k in (k for k in _KS if k <= fewest):
        shares = [pass_at_k(len(own), sum(v["passed"] for v in own), k) for own in by_task.values()]
        figures[f"pass@{k}"] = sum(shares) / len(shares)
        figures[f"pass@{k}_interval"] = bootstrap(shares, np.random.default_rng(_SEED))
    if any(verdict["plus"] is not None for verdict in verdicts):
        shares = [pass_at_k(len(own), sum(v["base"] for v in own), 1) for own in by_task.values()]
        figures["base_pass@1"] = sum(shares) / len(shares)
    passes, tokens = (sum(sample.get(key, 0) for sample in samples) for key in ("forward_passes", "tokens"))
    figures["tokens_per_forward"] = tokens / passes if passes else None
    graded = {task.task_id for task in tasks if task.judged} - set(skipped)
    return {
        "benchmark": benchmark,
        **figures,
        "tasks": len(by_task),
        "samples": len(verdicts),
        "untrusted": sum(not verdict["trusted"] for verdict in verdicts),
        "missing": sorted(graded - set(by_task)),
        "skipped": dict(skipped),
        "settings": dict(settings),
        "versions": versions(),
        "verdicts": {task_id: _told(own) for task_id, own in by_task.items()},
    }


def _told(own: Sequence[Sample]) -> Any:
    told = [{key: value for key, value in v.items() if key not in ("task_id", "sample")} for v in own]
    return told[0] if len(told) == 1 else told


def tokens_per_second(samples: Sequence[Sample]) -> float | None:
    """TPS: tokens before the terminator, neither prompt nor padding, by the seconds that generating took."""
    seconds = sum(sample.get("seconds", 0) for sample in samples)
    return sum(sample.get("tokens", 0) for sample in samples) / seconds if seconds else None


def versions() -> dict[str, str]:
    """What a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("diffucoder", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# --- run folders -----------------------------------------------------------------------------------------------------


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the run folder, or go on in it. Raises ConfigError where it belongs to other settings, or cannot be made."""
    path = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if not isinstance(there, dict | None):
            raise ValueError("no JSON object")
        if there is None:
            write_json(path, settings)
    except OSError as error:
        raise ConfigError(f"run folder {str(folder)!r} cannot be used ({error.strerror}); give another --run") from None
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error}); remove it, or give another --run") from None
    if there is not None:
        differ = sorted(key for key in {*there, *settings} if there.get(key) != settings.get(key))
        if differ:
            key = differ[0]
            raise ConfigError(
                f"run folder {str(folder)!r} belongs to {key}={there.get(key)!r}, not {settings.get(key)!r}; "
                "give another --run, or the same settings to go on"
            )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def fingerprint(source: str | Path | None, shipped: Path) -> str:
    """What tells the weights of a model folder from others: a hash of their first megabytes; "" for a hub id."""
    folder = shipped if source is None else Path(source)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16] if folder.is_dir() else ""


def content_hash(path: Path) -> str:
    """What tells a file from others. Raises ConfigError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"file {str(path)!r} cannot be read ({error.strerror}); check the path") from None


def task_settings(benchmark: str, limit: int | None, packages: Sequence[Path]) -> dict[str, Any]:
    """What decides which tasks are asked."""
    settings: dict[str, Any] = {"benchmark": benchmark, "limit": limit}
    if benchmark.endswith(".jsonl"):
        settings["content"] = content_hash(Path(benchmark))
    # left out where there are none: such runs go on that were begun before this was written down
    return {**settings, "packages": [str(folder) for folder in packages]} if packages else settings


def model_settings(tasks: Mapping[str, Any], generator: Generator, source: str | None) -> dict[str, Any]:
    """All that the samples depend on; `tasks` is `task_settings`."""
    coder = generator.coder
    traces = {"maps": generator.maps} if generator.traces else {}  # left out for the same reason
    params = generator.params.model_dump(mode="json")
    if params["ar_bound"] is None:  # the same again
        del params["ar_bound"]
    return {
        **traces,
        **tasks,
        "model": coder.name,
        "weights": fingerprint(source, SHIPPED),
        "dtype": str(coder.model.dtype).removeprefix("torch."),
        "raw": generator.raw,
        "batch": generator.batch,
        "params": params,
    }


def run_folder(
    run: Path | None, settings: Mapping[str, Any], *, several: bool, below: Path = Path("runs/evaluate")
) -> Path:
    """`run`, or a folder `below` named after the settings; one for each of several runs."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    if run is None:
        return below / f"{Path(settings['benchmark']).stem}-{key}"
    params = settings["params"]
    return run / f"steps-{params['steps']}-temperature-{params['temperature']:g}" if several else run
