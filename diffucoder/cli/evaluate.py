"""The commands that measure models: `diffucoder evaluate` and `diffucoder order`."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from diffucoder.analysis.settings import Conventions
from diffucoder.cli.common import AsJson, naming_extra, with_options
from diffucoder.evaluation.settings import EvaluateSettings, OrderSettings
from diffucoder.progress import progress


@partial(with_options, of=EvaluateSettings, into="settings", argument="benchmark")
def evaluate(*, settings: EvaluateSettings, as_json: AsJson = False) -> None:
    """Measure a model on a benchmark.

    Prints pass@1, and writes a verdict for every task; --samples grades anybody's completions. A stopped run is
    continued. Programs run in the sandbox.
    """
    from diffucoder.evaluation.run import evaluate as run_evaluation

    for report, folder in run_evaluation(settings, _show_progress):
        if as_json:
            print(json.dumps(report))
        else:
            _print_report(report, folder)


@partial(with_options, of=Conventions, into="conventions")
@partial(with_options, of=OrderSettings, into="settings", argument="prompts")
def order(
    *,
    settings: OrderSettings,
    conventions: Conventions,
    show: Annotated[int, typer.Option(min=1, help="samples of each run that the page holds")] = 100,
    as_json: AsJson = False,
) -> None:
    """Analyse the order in which a model writes.

    Measures AR-ness, entropies and what comes first, and writes a page to look at. A run that was stopped is
    continued. Answers are graded, in the sandbox, where there are tests.
    """
    with naming_extra("report", "the report needs"):
        from diffucoder.analysis.report import summary, write
    from diffucoder.evaluation.run import record_orders

    folders = record_orders(settings, _show_progress)
    model = settings.model[0] if settings.traces and settings.model else None
    report = write(settings.folder, folders, conventions, show=show, model=model)
    if as_json:
        print(json.dumps(report))
    else:
        print(summary(report, settings.folder))


def _print_report(report: dict[str, Any], folder: Path | None) -> None:
    """Print the figures of a report as a table."""
    tasks = report["tasks"]
    samples = report["samples"]
    counts = [f"{tasks} task{'s' * (tasks != 1)}", f"{samples} sample{'s' * (samples != 1)}"]
    steps = report["settings"].get("params", {}).get("steps")
    if steps is not None:
        counts.append(f"steps: {steps}")
    for what in ("missing", "skipped"):
        if report[what]:
            counts.append(f"{len(report[what])} {what}")
    if "hole" in report["settings"]:
        counts.append(f"hole: {report['settings']['hole']}")
    print(f"{report['benchmark']}: {', '.join(counts)}")
    for name, figure in report.items():
        if name.startswith(("pass@", "base_pass@")) and isinstance(figure, float):
            interval = ""
            if f"{name}_interval" in report:
                low, high = report[f"{name}_interval"]
                interval = f"   (95 %: {low:.1%} - {high:.1%})"
            print(f"  {name:20} {figure:6.1%}{interval}")
    for name in ("tokens_per_forward", "tokens_per_second"):
        if report.get(name) is not None:
            print(f"  {name:20} {report[name]:6.2f}")
    if report["untrusted"]:
        print(f"  untrusted            {report['untrusted']:6}   verdicts whose tests ran beside the program")
    if folder:
        print(f"  samples, verdicts and report are in {folder}")


def _show_progress(items: Iterable[Any], count: int, what: str) -> Iterator[Any]:
    """Show how far one stage of an evaluation is."""
    with progress(what, count) as update:
        for done, item in enumerate(items, 1):
            yield item
            update(done)
