"""Records what the code does now, for `test_golden.py` to hold later code against.

    python tests/golden/record.py decoding server training     # writes the fixtures of these parts
    python tests/golden/record.py --check decoding --only NAME  # which cases do not hold on other machines

Record again only where behaviour is meant to change, and say in the commit what changed and why. A case is fit to be a
fixture only where rounding does not change its tokens: `--check` computes it again as other machines would (by AVX2, by
two threads), in float64, and with weights moved by a few units of rounding, and names the cases that differ.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from golden_adapter import ask, decode, load_coder, server, train
from golden_cases import DECODING, REQUESTS, TRAINING

FOLDER = Path(__file__).parent
PARTS = ("decoding", "server", "training")
FIGURES = ("loss", "grad_norm", "lr", "tokens", "accuracy", "unweighted", "reward", "solved", "length", "ratio", "kl")

# what `--check` varies: variables of the environment, threads, and what is done to the model
VARIANTS: dict[str, tuple[dict[str, str], int, str]] = {
    "avx2": ({"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, 1, ""),
    "aten-avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, 1, ""),
    "two-threads": ({}, 2, ""),
    "avx2-two-threads": (
        {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        2,
        "",
    ),
    "float64": ({}, 1, "float64"),
    "moved-1": ({}, 1, "1"),
    "moved-2": ({}, 1, "2"),
    "moved-3": ({}, 1, "3"),
}
MOVED = 5e-6  # share by which weights are moved: some fifty units of float32


def changed_coder(change: str) -> Any:
    """The shipped model as it is, in float64, or with weights moved by random numbers of this seed."""
    coder = load_coder()
    if change == "float64":
        coder.model.double()
    elif change:
        generator = torch.Generator().manual_seed(int(change))
        with torch.no_grad():
            for parameter in coder.model.parameters():
                parameter.mul_(1 + MOVED * torch.randn(parameter.shape, generator=generator))
    return coder


def record_decoding(wanted: Callable[[str], bool], change: str = "") -> dict[str, Any]:
    """The rows of every case."""
    coder = changed_coder(change)
    return {case["name"]: decode(coder, case) for case in DECODING if wanted(case["name"])}


def record_server(wanted: Callable[[str], bool], change: str = "") -> dict[str, Any]:
    """The answer to every request, one after the other."""
    with server(changed_coder(change)) as client:
        return {request["name"]: ask(client, request) for request in REQUESTS if wanted(request["name"])}


def record_training(wanted: Callable[[str], bool], change: str = "") -> dict[str, Any]:
    """The loss curve of every run, and the figures beside it: a list of numbers each."""
    curves = {}
    for name, case in TRAINING.items():
        if not wanted(name) or change:
            continue
        with tempfile.TemporaryDirectory() as folder:
            lines = train(case, Path(folder))
        curves[name] = {figure: [line[figure] for line in lines] for figure in FIGURES if figure in lines[0]}
    return curves


RECORD = {"decoding": record_decoding, "server": record_server, "training": record_training}


def tolerance(part: str) -> dict[str, float]:
    """By how much fractions may differ: `atol + rtol * |recorded|`. A trace has log-probabilities of four decimals."""
    return {"rtol": 1e-3, "atol": 1e-5 if part == "training" else 3e-4}


def differences(left: Any, right: Any, place: str = "", *, rtol: float, atol: float) -> list[str]:
    """Where `right` is not what `left` says: fractions may differ by `atol + rtol * |left|`, nothing else may."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [d for key in left for d in differences(left[key], right[key], f"{place}.{key}", rtol=rtol, atol=atol)]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [d for at, (a, b) in pairs for d in differences(a, b, f"{place}[{at}]", rtol=rtol, atol=atol)]
    if isinstance(left, float) and isinstance(right, int | float):
        return [] if abs(left - right) <= atol + rtol * abs(left) else [f"{place}: {left} became {right}"]
    return [] if left == right else [f"{place}: {left!r} became {right!r}"]


def read(part: str) -> dict[str, Any]:
    """The fixtures of a part."""
    fixtures: dict[str, Any] = json.loads((FOLDER / f"{part}.json").read_text(encoding="utf-8"))
    return fixtures


def write(part: str, fixtures: dict[str, Any], path: Path) -> None:
    """One line a case, so that a change shows in a diff which cases it is about."""
    lines = [f"{json.dumps(name)}: {json.dumps(fixtures[name], separators=(',', ':'))}" for name in fixtures]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def check(parts: Sequence[str], only: str) -> int:
    """Compare every variant with the machine as it is; the number of cases that differ somewhere."""
    unfit: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = _apart("plain", ({}, 1, ""), parts, only, Path(folder))
        for name, variant in VARIANTS.items():
            there = _apart(name, variant, parts, only, Path(folder))
            for case, told in there.items():
                if found := differences(plain[case], told, **tolerance(case.partition("/")[0])):
                    unfit.setdefault(case, []).append(f"{name} {found[0]} ({len(found)})")
    for case, why in unfit.items():
        print(f"{case}: {len(why)} variants differ; {why[0][:200]}; {[each.split()[0] for each in why]}")
    return len(unfit)


def _apart(
    name: str, variant: tuple[dict[str, str], int, str], parts: Sequence[str], only: str, folder: Path
) -> dict[str, Any]:
    """Record in a process of its own, which reads its environment when it starts."""
    environment, threads, change = variant
    path, began = folder / f"{name}.json", time.monotonic()
    command = [sys.executable, __file__, *parts, "--only", only, "--threads", str(threads)]
    command += ["--change", change, "--into", str(path)]
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Record, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them if left out")
    parser.add_argument("--check", action="store_true", help="write nothing, name the cases that rounding changes")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="of torch; fixtures are recorded with 1")
    parser.add_argument("--change", default="", help="float64, or the seed by which weights are moved")
    parser.add_argument("--into", type=Path, help="write all parts into this one file instead of the fixtures")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if arguments.only and not (arguments.check or arguments.into):
        parser.error("--only would leave fixtures of a few cases; add --into FILE, or leave it out")
    if arguments.check:
        sys.exit(bool(check(parts, arguments.only)))
    torch.set_num_threads(arguments.threads)
    everything: dict[str, Any] = {}
    for part in parts:
        fixtures = RECORD[part](lambda name: arguments.only in name, arguments.change)
        everything |= {f"{part}/{name}": each for name, each in fixtures.items()}
        if not arguments.into:
            write(part, fixtures, FOLDER / f"{part}.json")
    if arguments.into:
        write("all", everything, arguments.into)


if __name__ == "__main__":
    main()
