"""What `diffucoder order` leaves: report.json with every figure. Not for: the figures themselves (`order`)."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffucoder.analysis.order import Json, analyse, read_runs
from diffucoder.analysis.settings import Conventions


def write(folder: Path, paths: Sequence[Path], conventions: Conventions, *, show: int = 100) -> Json:
    """Analyse what was recorded in `paths`, as in `read_runs`; what report.json now holds.

    The same traces give the same bytes.
    """
    told = analyse(read_runs(paths), conventions)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "report.json", json.dumps(told, indent=1) + "\n")
    return told


def summary(told: Json, folder: Path) -> str:
    """The first figures of every run, for a terminal."""
    lines = []
    for each in told["runs"]:
        lines.append(f"{each['label']}: {each['prompts']} prompts, {each['samples']} samples")
        for name in ("local_ar_ness@1", "global_ar_ness@1", "pass@1"):
            found = each["figures"].get(name)
            if found is not None and found["mean"] is not None:
                lines.append(f"  {name:20} {found['mean']:6.3f}   (95 %: {found['low']:.3f} - {found['high']:.3f})")
    return "\n".join([*lines, f"look at {folder / 'index.html'}; all figures are in {folder / 'report.json'}"])


def _write(path: Path, text: str) -> None:
    """Write whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
