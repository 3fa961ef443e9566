"""Size and density of the code, against the budgets of docs/design.md. Run by `make check`; exits with 1 over a limit.

    python tools/measure_code.py              the package, recipes and benchmarks, against the budgets
    python tools/measure_code.py --rooms      also each folder of the package, and the densest files
    python tools/measure_code.py FOLDER       the figures of any folder, without a verdict

A line of code is a line that is not blank, not a comment and not part of a docstring. Densities are per 1,000 of them:

    comprehensions  list, set, dict and generator expressions
    conditionals    `a if b else c`
    packed          assignments of several values at once, as in `a, b = x, y`
"""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The budgets (docs/design.md) of the redesign. Sizes are above theirs: they stay under limits. A commit that raises a
# limit says what the lines are for; with everything that is planned they are 13,500 and 9,800
BUDGET = {"lines": 11_000, "code": 8_000, "scripts": 2_300}
LIMIT = {"lines": 21_170, "code": 15_365, "scripts": 2_655}  # scripts: lines of recipes and benchmarks together
MAX_FILE = 450
MAX_FUNCTION = 60
MAX_DENSITY = {"comprehensions": 35, "conditionals": 20, "packed": 6}

# The same figures of codebases known to read well, measured once (2026-11)
ANCHORS = {
    "nanochat": {"lines": 6_700, "code": 4_270, "comprehensions": 19, "conditionals": 15, "packed": 7},
    "nano-vllm": {"lines": 1_400, "code": 1_244, "comprehensions": 15, "conditionals": 7, "packed": 3},
    "httpx": {"lines": 8_900, "code": 5_773, "comprehensions": 10, "conditionals": 14, "packed": 1},
    "tinker-cookbook": {"lines": 72_700, "code": 43_527, "comprehensions": 16, "conditionals": 9, "packed": 0},
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)


@dataclass
class Figures:
    """Counts of one file, or sums over several."""

    lines: int = 0
    code: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MAX_DENSITY, 0))
    long_functions: list[str] = field(default_factory=list)

    def add(self, other: "Figures") -> None:
        self.lines += other.lines
        self.code += other.code
        self.long_functions += other.long_functions
        for name, count in other.counts.items():
            self.counts[name] += count

    def density(self, name: str) -> float:
        """Occurrences per 1,000 lines of code."""
        return 1000 * self.counts[name] / max(1, self.code)


def measure(path: Path) -> Figures:
    """The figures of one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    figures = Figures(lines=text.count("\n"), code=len(code_lines(text) - docstring_lines(tree)))
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            figures.counts["comprehensions"] += 1
        elif isinstance(node, ast.IfExp):
            figures.counts["conditionals"] += 1
        elif isinstance(node, ast.Assign) and is_packed(node):
            figures.counts["packed"] += 1
        elif isinstance(node, FUNCTIONS):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION:
                figures.long_functions.append(f"{path}:{node.lineno} {node.name} has {length} lines")
    return figures


def is_packed(node: ast.Assign) -> bool:
    return isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold a token other than a comment."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            found.update(range(token.start[0], token.end[0] + 1))
    return found


def docstring_lines(tree: ast.AST) -> set[int]:
    """Numbers of the lines of docstrings, those of attributes too."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED):
            for statement in node.body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found.update(range(statement.lineno, statement.end_lineno + 1))
    return found


def total(paths: Iterable[Path]) -> Figures:
    figures = Figures()
    for path in paths:
        figures.add(measure(path))
    return figures


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def row(name: str, figures: Figures) -> str:
    densities = "".join(f"{figures.density(kind):16.1f}" for kind in MAX_DENSITY)
    return f"{name:28}{figures.lines:8,}{figures.code:8,}{densities}"


def heading() -> str:
    return f"{'':28}{'lines':>8}{'code':>8}" + "".join(f"{kind:>16}" for kind in MAX_DENSITY)


def print_rooms(package: Path) -> None:
    rooms = {"(top)": sorted(package.glob("*.py"))}
    for folder in sorted(path for path in package.iterdir() if path.is_dir()):
        if found := sources(folder):
            rooms[folder.name] = found
    for name, paths in rooms.items():
        print(row(name, total(paths)))
    print("\nfiles with most comprehensions, conditionals and packed assignments over budget:")
    excess: list[tuple[float, Path]] = []
    for path in sources(package):
        figures = measure(path)
        over = 0.0
        for kind, limit in MAX_DENSITY.items():
            over += max(0.0, figures.counts[kind] - limit * figures.code / 1000)
        excess.append((over, path))
    for over, path in sorted(excess, reverse=True)[:15]:
        print(f"  {over:5.1f}  {path.relative_to(package.parent)}")


def over(sizes: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """The sizes that are more than allowed, a line each."""
    names = {"lines": "lines of the package", "code": "lines of code", "scripts": "lines of recipes and benchmarks"}
    return [
        f"{sizes[key]:,} {name}, {allowed[key]:,} allowed" for key, name in names.items() if sizes[key] > allowed[key]
    ]


def problems(package: Figures, sizes: dict[str, int], files: Iterable[Path]) -> list[str]:
    """What is over its limit, a line each."""
    found = over(sizes, LIMIT)
    for kind, limit in MAX_DENSITY.items():
        if package.density(kind) > limit:
            found.append(f"{package.density(kind):.1f} {kind} per 1,000 lines of code, the budget is {limit}")
    for path in files:
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_FILE:
            found.append(f"{path.relative_to(ROOT)} has {lines} lines, the budget of a file is {MAX_FILE}")
    return found + package.long_functions


def main() -> int:
    parser = argparse.ArgumentParser(description="size and density of the code, against its budgets")
    parser.add_argument("folder", nargs="?", type=Path, help="print the figures of this folder alone")
    parser.add_argument("--rooms", action="store_true", help="also print the folders of the package")
    options = parser.parse_args()
    print(heading())
    if options.folder:
        print(row(options.folder.name, total(sources(options.folder))))
        return 0
    package_files = sources(ROOT / "diffucoder")
    package = total(package_files)
    scripts = total([*sources(ROOT / "recipes"), *sources(ROOT / "benchmarks")])
    print(row("diffucoder", package))
    print(row("recipes and benchmarks", scripts))
    limits = "".join(f"{limit:16.1f}" for limit in MAX_DENSITY.values())
    print(f"{'budget of the package':28}{BUDGET['lines']:8,}{BUDGET['code']:8,}{limits}")
    for name, figures in ANCHORS.items():
        densities = "".join(f"{figures[kind]:16.1f}" for kind in MAX_DENSITY)
        print(f"{name:28}{figures['lines']:8,}{figures['code']:8,}{densities}")
    if options.rooms:
        print()
        print_rooms(ROOT / "diffucoder")
    sizes = {"lines": package.lines, "code": package.code, "scripts": scripts.lines}
    for line in over(sizes, BUDGET):
        print(f"above the budget: {line}")
    found = problems(package, sizes, package_files)
    for line in found:
        print(f"over the limit: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
