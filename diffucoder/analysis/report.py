"""What `diffucoder order` writes: report.json with every figure, drawings, and a page that needs nothing else."""

import base64
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffucoder.analysis.figures import FEW, draw
from diffucoder.analysis.order import analyse, mean_map, plain
from diffucoder.analysis.runs import Answer, Run, read_runs
from diffucoder.analysis.settings import Conventions
from diffucoder.analysis.tokens import CLASSES
from diffucoder.errors import printable
from diffucoder.files import Json, write_json, write_text
from diffucoder.ramp import ramp

_HERE = Path(__file__).parent
_SHARED = _HERE.parent / "data" / "canvas"  # the server's page draws canvases by these files too
_MOST = 128  # steps and positions of a map in the page; neighbours are averaged where there are more
_COLUMNS = ("local_ar_ness@1", "global_ar_ness@1", "pass@1", "pass@10", "distinct", "tokens_per_forward", "revisions")


def write(
    folder: Path, paths: Sequence[Path], conventions: Conventions, *, show: int = 100, model: str | None = None
) -> Json:
    """Analyse what is recorded in `paths`, by the tokenizer of `model` (see `read_runs`). Return report.json's content.

    The page shows the first `show` samples of each run. The same traces give the same bytes.
    """
    runs = read_runs(paths, model)
    report = analyse(runs, conventions)
    folder.mkdir(parents=True, exist_ok=True)
    shown = [_shown_run(run, conventions, show) for run in runs]
    write_text(folder / "index.html", _page(report, shown, draw(report, folder)))
    write_json(folder / "report.json", report)
    return report


def _page(report: Json, shown: Sequence[Json], drawings: dict[str, Json]) -> str:
    """Return the page, with styles, script, drawings and samples in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here, because only pages need it

    columns = [
        name for name in _COLUMNS if any(run["figures"].get(name, {}).get("high") is not None for run in report["runs"])
    ]
    data = {"runs": shown, "classes": CLASSES, "differences": report["differences"], "columns": columns}
    environment = Environment(
        autoescape=True, loader=FileSystemLoader(_HERE), undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        report=report,
        few=FEW,
        ramp=ramp,
        printable=printable,
        columns=columns,
        drawings=drawings,
        style=(_SHARED / "canvas.css").read_text(encoding="utf-8") + (_HERE / "page.css").read_text(encoding="utf-8"),
        script=_script(),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no text of a model ends the script
    )


def _script() -> str:
    """Return both scripts as one that neither exports nor imports."""
    shared = (_SHARED / "canvas.js").read_text(encoding="utf-8")
    own = (_HERE / "page.js").read_text(encoding="utf-8")
    return re.sub(r"^export ", "", shared, flags=re.MULTILINE) + re.sub(r"^import .*\n", "", own, flags=re.MULTILINE)


def _shown_run(run: Run, conventions: Conventions, show: int) -> Json:
    whole = mean_map((answer.trace.entropy_map for answer in run.answers), _MOST)
    samples = [_shown_sample(answer, conventions) for answer in run.answers[:show]]
    return {"label": run.label, "map": _as_bytes(whole), "samples": samples}


def _shown_sample(answer: Answer, conventions: Conventions) -> Json:
    """Return a sample as the script reads it: lists have an entry for each position from the first hole on."""
    trace = answer.trace
    local_ar_ness, global_ar_ness = answer.ar_ness(conventions)
    return {
        "name": trace.id or answer.task,
        "prompt": answer.prompt,
        "pieces": answer.pieces,
        "steps": trace.steps,
        "sure": [round(100 * math.exp(log)) for log in trace.log_probs],
        "kinds": "".join(str(CLASSES.index(kind)) for kind in answer.classes),
        "revoked": answer.revoked,
        "passed": answer.passed,
        "length": answer.length,
        "passes": trace.forward_passes,
        "local": plain(local_ar_ness[0]),
        "global": plain(global_ar_ness[0]),
        "map": _as_bytes(mean_map([trace.entropy_map], _MOST)),
    }


def _as_bytes(entropies: np.ndarray) -> Json | None:
    """Return a map in bytes: 40 a nat, 255 where there is nothing."""
    if not entropies.size:
        return None
    levels = np.clip(np.nan_to_num(entropies) * 40, 0, 254)
    levels = np.where(np.isnan(entropies), 255, levels).astype(np.uint8)
    return {"rows": len(levels), "columns": levels.shape[1], "bytes": base64.b64encode(levels.tobytes()).decode()}


def summary(report: Json, folder: Path) -> str:
    """Return the first figures of every run, for a terminal."""
    lines = []
    for run in report["runs"]:
        lines.append(f"{run['label']}: {run['prompts']} prompts, {run['samples']} samples")
        for name in ("local_ar_ness@1", "global_ar_ness@1", "pass@1"):
            row = run["figures"].get(name)
            if row is not None and row["mean"] is not None:
                lines.append(f"  {name:20} {row['mean']:6.3f}   (95 %: {row['low']:.3f} - {row['high']:.3f})")
    lines.append(f"look at {folder / 'index.html'}; all figures are in {folder / 'report.json'}")
    return "\n".join(lines)
