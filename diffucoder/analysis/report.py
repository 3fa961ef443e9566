"""What `diffucoder order` leaves: report.json with every figure, drawings, and one page that needs nothing else.

For: a folder that people open from disk. Not for: the figures themselves (`order`), or their drawings (`figures`).
"""

import base64
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffucoder.analysis.figures import draw
from diffucoder.analysis.order import CLASSES, Answer, Json, Run, analyse, mean_map, read_runs
from diffucoder.analysis.settings import Conventions

_HERE = Path(__file__).parent
_SHARED = _HERE.parent / "data" / "canvas"  # what the server's page draws canvases by, too
_MOST = 128  # steps and positions of a map in the page; neighbours are averaged where there are more
_COLUMNS = ("local_ar_ness@1", "global_ar_ness@1", "pass@1", "pass@10", "distinct", "tokens_per_forward", "revisions")


def write(folder: Path, paths: Sequence[Path], conventions: Conventions, *, show: int = 100) -> Json:
    """Analyse what was recorded in `paths`, as in `read_runs`; what report.json now holds.

    The page shows the first `show` samples of each run. The same traces give the same bytes.
    """
    runs = read_runs(paths)
    told = analyse(runs, conventions)
    folder.mkdir(parents=True, exist_ok=True)
    drawings = draw(told, folder)
    _write(folder / "index.html", page(runs, told, conventions, drawings, show=show))
    _write(folder / "report.json", json.dumps(told, indent=1) + "\n")
    return told


def page(runs: Sequence[Run], told: Json, conventions: Conventions, drawings: dict[str, str], *, show: int) -> str:
    """The page, whole: styles, script, drawings and samples are in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # late: only pages need it

    shared, own = (path.read_text(encoding="utf-8") for path in (_SHARED / "canvas.js", _HERE / "page.js"))
    script = re.sub(r"^export ", "", shared, flags=re.MULTILINE) + re.sub(r"^import .*\n", "", own, flags=re.MULTILINE)
    styles = [path.read_text(encoding="utf-8") for path in (_SHARED / "canvas.css", _HERE / "page.css")]
    shown = [_run(run, conventions, show) for run in runs]
    figures = [each["figures"] for each in told["runs"]]
    columns = [
        name for name in _COLUMNS if any(own.get(name, {}).get("high") for own in figures)
    ]  # not what is 0 everywhere
    data = {"runs": shown, "classes": CLASSES, "differences": told["differences"], "columns": columns}
    room = Environment(autoescape=True, loader=FileSystemLoader(_HERE), undefined=StrictUndefined, trim_blocks=True)
    return room.get_template("page.html").render(
        told=told,
        columns=columns,
        drawings=drawings,
        style="".join(styles),
        script=script,
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no text of a model ends the script
    )


def _run(run: Run, conventions: Conventions, show: int) -> Json:
    whole = mean_map([answer.trace.entropy_map for answer in run.answers], _MOST)
    return {"label": run.label, "map": _map(whole), "samples": [_sample(a, conventions) for a in run.answers[:show]]}


def _sample(answer: Answer, conventions: Conventions) -> Json:
    """A sample as the script reads it: a list entry for each position from the first hole on."""
    trace = answer.trace
    local, overall = answer.ar_ness(conventions)
    entropies = trace.entropy_map
    whole = len(entropies) > 1
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
        "local": _short(local[0]),
        "global": _short(overall[0]),
        "map": _map(mean_map([entropies], _MOST)) if whole else None,
    }


def _map(entropies: np.ndarray) -> Json | None:
    """A map in bytes: 40 a nat, 255 where there is nothing."""
    if not entropies.size:
        return None
    levels = np.where(np.isnan(entropies), 255, np.minimum(np.nan_to_num(entropies) * 40, 254)).astype(np.uint8)
    return {"rows": len(levels), "columns": levels.shape[1], "bytes": base64.b64encode(levels.tobytes()).decode()}


def _short(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)


def summary(told: Json, folder: Path) -> str:
    """The first figures of every run, for a terminal."""
    lines = []
    for each in told["runs"]:
        lines.append(f"{each['label']}: {each['prompts']} prompts, {each['samples']} samples")
        for name in ("local_ar_ness@1", "global_ar_ness@1", "pass@1"):
            found: dict[str, Any] | None = each["figures"].get(name)
            if found is not None and found["mean"] is not None:
                lines.append(f"  {name:20} {found['mean']:6.3f}   (95 %: {found['low']:.3f} - {found['high']:.3f})")
    return "\n".join([*lines, f"look at {folder / 'index.html'}; all figures are in {folder / 'report.json'}"])


def _write(path: Path, text: str) -> None:
    """Write whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
