"""`diffucoder evaluate`: measure a model, or a file of completions, on a benchmark."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from diffucoder.cli.common import AsJson, show_progress
from diffucoder.evaluation.settings import EvaluateSettings
from diffucoder.options import with_options


@partial(with_options, of=EvaluateSettings, into="settings", argument="benchmark")
def evaluate(*, settings: EvaluateSettings, as_json: AsJson = False) -> None:
    """Measure a model, or anybody's completions, on a benchmark: pass@1 and a verdict for every task.

    A run that was stopped is continued. Programs run in the sandbox.
    """
    from diffucoder.evaluation.run import evaluate as run_evaluation

    for report, folder in run_evaluation(settings, show_progress):
        if as_json:
            print(json.dumps(report))
        else:
            print_report(report, folder)


def print_report(report: dict[str, Any], folder: Path | None) -> None:
    """Print the figures of a report as a table."""
    counts = [f"{report['tasks']} tasks", f"{report['samples']} samples"]
    for what in ("missing", "skipped"):
        if report[what]:
            counts.append(f"{len(report[what])} {what}")
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
