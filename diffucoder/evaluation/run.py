"""Evaluate: benchmark + model → samples.jsonl → verdicts.jsonl → report.json, in a run folder.

Each stage reads what the stage before it wrote, and continues where it was stopped. So nothing is generated or graded
twice, and a run that was killed ends with the same report.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from diffucoder.errors import ConfigError
from diffucoder.evaluation.benchmarks import Task, load
from diffucoder.evaluation.judge import Progress, grade_samples, silent, split_by_imports
from diffucoder.evaluation.report import ratio, report
from diffucoder.evaluation.run_folder import content_hash, default_folder, open_run_folder, run_key, weights_hash
from diffucoder.evaluation.samples import Generator, read_samples
from diffucoder.evaluation.settings import EvaluateSettings, OrderSettings, RunSettings
from diffucoder.files import Json, write_json
from diffucoder.grading.sandbox import Sandbox


def evaluate(settings: EvaluateSettings, progress: Progress = silent) -> Iterator[tuple[Json, Path | None]]:
    """Yield the report and the folder of each run: one for each of `settings.sweep()`, or one on a file of samples.

    The folder is None for samples from a file. Raises ConfigError where settings, files or a run folder do not fit.
    """
    tasks = load(settings.benchmark, settings.data)
    if all(task.tests is None for task in tasks):
        raise ConfigError(
            f"{settings.benchmark!r} has no tests to evaluate answers by; use diffucoder order to analyse their order"
        )
    with Sandbox(settings.workers, packages=settings.packages, unsafe=settings.unsafe) as sandbox:
        evaluation = Evaluation(settings.benchmark, tasks, sandbox, settings.limit, progress)
        shown = task_settings(settings.benchmark, tasks, settings.limit, settings.packages)
        if settings.samples is not None:
            shown["samples"] = content_hash(settings.samples)
            yield evaluation.of_samples(settings.samples, settings.run, shown), None
            return
        several = len(settings.sweep()) > 1
        for generator, run_settings in _generators(settings, settings.model, tasks, shown):
            folder = settings.run or default_folder(Path("runs/evaluate"), run_settings)
            if settings.run and several:
                folder /= f"steps-{generator.params.steps}-temperature-{generator.params.temperature:g}"
            if settings.run and generator.hole is not None and len(settings.holes()) > 1:
                folder /= f"hole-{generator.hole}"
            yield evaluation.of_model(generator, folder, run_settings), folder


def record_orders(settings: OrderSettings, progress: Progress = silent) -> list[Path]:
    """Return the files and folders of traces to analyse. Models answer the prompts first, if there are any.

    Answers are graded where the prompts have tests. Raises ConfigError as `evaluate` does.
    """
    folders = list(settings.traces)
    if settings.prompts is None:
        return folders
    tasks = load(settings.prompts, settings.data)
    with Sandbox(unsafe=settings.unsafe) as sandbox:
        evaluation = Evaluation(settings.prompts, tasks, sandbox, settings.limit, progress)
        shown = task_settings(settings.prompts, tasks, settings.limit, ())
        for source in settings.model or (None,):
            for generator, run_settings in _generators(settings, source, tasks, shown, maps=settings.maps):
                folders.append(default_folder(settings.folder, run_settings))
                evaluation.of_model(generator, folders[-1], run_settings)
    return folders


def _generators(
    settings: RunSettings, source: str | None, tasks: Sequence[Task], shown: Json, *, maps: int | None = None
) -> Iterator[tuple[Generator, Json]]:
    """Load a model. Yield a generator of answers for each of the decoding settings, and all settings of that run."""
    import torch  # here, because grading does without it

    from diffucoder.decoding.coder import DiffuCoder

    sweep = settings.sweep()
    holes: Sequence[str | int | None] = settings.holes()
    if all(task.suffix is None for task in tasks):
        if settings.hole is not None:
            raise ConfigError(
                f"hole={settings.hole!r} is for infilling benchmarks, and this one has no holes; leave it out"
            )
        holes = [None]
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    coder = DiffuCoder.load(source, dtype=dtype, device=settings.device)
    weights = weights_hash(source)
    for params, hole in product(sweep, holes):
        generator = Generator(coder, params, settings.raw, settings.batch, hole, maps)
        yield generator, shown | model_settings(generator, weights)


@dataclass(frozen=True)
class Evaluation:
    """One benchmark, and the sandbox of its programs."""

    name: str
    tasks: Sequence[Task]
    sandbox: Sandbox
    limit: int | None = None  # number of tasks, from the first on
    progress: Progress = silent

    def of_model(self, generator: Generator, run: Path, settings: Json) -> Json:
        """Generate, grade and report in the folder `run`. Raises ConfigError if it belongs to other settings."""
        open_run_folder(run, run_key(settings))
        tasks, skipped = split_by_imports(self.tasks[: self.limit], self.sandbox)
        samples = generator.samples(tasks, run / "samples.jsonl", self.progress)
        return self._judged(samples, skipped, settings, run)

    def of_samples(self, path: Path, run: Path | None, settings: Json) -> Json:
        """Grade the samples of a file, and report; nothing is kept without `run`."""
        if run is not None:
            open_run_folder(run, run_key(settings))
        tasks, skipped = split_by_imports(self.tasks[: self.limit], self.sandbox)
        runnable = {task.task_id for task in tasks}
        every = read_samples(path, self.tasks)
        samples = [sample for sample in every if sample["task_id"] in runnable]
        if not samples:
            if not skipped.keys().isdisjoint(sample["task_id"] for sample in every):
                raise ConfigError(f"no task of {self.name!r} with a sample can be run here; give --packages FOLDER")
            rule = f"leaves none of the tasks that {self.name!r} has samples of"
            raise ConfigError(f"limit={self.limit} {rule}; raise it or leave it out")
        return self._judged(samples, skipped, settings, run)

    def _judged(self, samples: Sequence[Json], skipped: Mapping[str, str], settings: Json, run: Path | None) -> Json:
        path = run / "verdicts.jsonl" if run else None
        verdicts = grade_samples(self.tasks, samples, self.sandbox, path=path, progress=self.progress)
        content = report(self.name, self.tasks[: self.limit], samples, verdicts, settings, skipped)
        if run:
            write_json(run / "report.json", content)
        content["tokens_per_second"] = ratio(samples, "tokens", "seconds")  # changes from run to run
        return content


def task_settings(benchmark: str, tasks: Sequence[Task], limit: int | None, packages: Sequence[Path]) -> Json:
    """Return the settings that select the tasks, for the report and the key of the run."""
    content = " ".join(task.content for task in tasks)
    content_key = hashlib.sha256(content.encode()).hexdigest()[:16]
    settings: Json = {"benchmark": benchmark, "limit": limit, "content": content_key}
    if packages:
        settings["packages"] = [str(folder) for folder in packages]
    return settings


def model_settings(generator: Generator, weights: str) -> Json:
    """Return the settings that decide the answers of a model, whose weights have the hash `weights`."""
    settings: Json = {} if generator.maps is None else {"maps": generator.maps}
    if generator.hole is not None:
        settings["hole"] = generator.hole
    return settings | {
        "model": generator.coder.name,
        "weights": weights,
        "dtype": str(generator.coder.model.dtype).removeprefix("torch."),
        "raw": generator.raw,
        "batch": generator.batch,
        "params": generator.params.model_dump(mode="json"),
    }
