"""What the small model is trained on: Python source under permissive licences, and requests made of it.

    python recipes/small/corpus.py runs/small/data --against ../shared/data --tokenizer runs/small/start

Read are the standard library of this interpreter and the wheels that packages.txt names with their versions, which
`pip download` fetches once. A package whose metadata names anything but MIT, BSD, Apache or PSF licences is left out
and named. Of the rest: no tests, no vendored or generated files, nothing twice, nothing that shares ten words in a row
with a task of HumanEval, MBPP or BigCodeBench. Written are

* `corpus.jsonl.gz`: all of it, and `best.jsonl`: short, documented files, what a small budget reads;
* `pairs.jsonl`: request → function, mined from docstrings, and `chat.jsonl`: those and the tiny problems;
* `exercises.jsonl`: tiny problems with their tests;
* `held_out.jsonl`, `held_out_chat.jsonl`, `held_out_exercises.jsonl`: one file in fifty, of which nothing else is made,
  and the tiny problems' dev split;
* `manifest.json`: every package with its version, licence, files and tokens.
"""

import ast
import builtins
import gzip
import hashlib
import json
import platform
import random
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Annotated, Any

import typer

from diffucoder.errors import DiffuCoderError
from diffucoder.evaluation.benchmarks import PREFILL, load
from diffucoder.grading.extract import parsed
from diffucoder.problems import problems
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.exercises import Exercise

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "rl_data"))
from overlap import HeldOut, Overlaps  # noqa: E402  # a script of the neighbouring recipe

BENCHMARKS = ("humaneval", "mbpp", "bigcodebench", "bigcodebench-hard")

_ALLOWED = re.compile(r"MIT(-0)?|0?BSD(-[234]-Clause)?|Apache(-2\.0)?|(PSF|Python)-2\.0(\.1)?|PSF")
_WORDED = re.compile(
    r"(The )?(MIT|BSD|(new|modified|3-clause|2-clause) BSD|BSD[- ][23][- ]Clause|Apache|PSF|Python Software Foundation)"
    r"([- ]2(\.0)?)?( Software)?( License)?(,? (v|version )?2\.0)?( \(.*\))?",
    re.IGNORECASE,
)
_SKIPPED = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|third_?party|_?externals?|extern|_bundled|benchmarks?|asv_bench|migrations|"
    r"pydoc_data|lib2to3|idle_test|site-packages|dist-packages|node_modules|[^/]*\.data|[^/]*_vendor)/"
    r"|(^|/)(test_[^/]*|[^/]*_tests?|conftest|[^/]*_pb2(_grpc)?|_version|versioneer|[^/]*(humaneval|mbpp|bigcodebench)[^/]*)\.py$",
    re.IGNORECASE,
)
_GENERATED = re.compile(
    r"(auto-?|automatically )?generated (by|from|file|code|using|with)|do not (edit|modify)", re.IGNORECASE
)
_BROKEN = (SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass(frozen=True)
class File:
    """One file of source that was kept."""

    package: str
    path: str
    text: str
    tree: ast.Module

    @property
    def held_out(self) -> bool:
        """One in fifty, by its path."""
        return hashlib.sha256(f"{self.package}/{self.path}".encode()).digest()[0] % 50 == 0


@dataclass
class Package:
    """One line of the manifest; `left_out` counts its files by reason."""

    name: str
    version: str
    licence: str
    files: int = 0
    characters: int = 0
    tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def main(
    folder: Annotated[Path, typer.Argument(help="where the files go")],
    against: Annotated[Path | None, typer.Option(help="folder of the benchmarks' files, which are kept out")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="folder of the tokenizer that counts tokens")] = None,
    packages: Annotated[Path, typer.Option(help="names and versions, one a line")] = HERE / "packages.txt",
    wheels: Annotated[Path | None, typer.Option(help="read the wheels of this folder, and fetch none")] = None,
    problem_count: Annotated[int, typer.Option("--problems", help="tiny problems among the requests")] = 20_000,
    library: Annotated[bool, typer.Option(help="the standard library too")] = True,
    sample: Annotated[int, typer.Option(help="count tokens in one file of so many, and scale by characters")] = 1,
) -> None:
    """Make every file; a finished folder is left as it is."""
    if (folder / "manifest.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if wheels is None:
        wheels = folder / "wheels"
        fetch(packages, wheels)
    overlaps, kept_out = benchmarks(against)
    count = Tokenizer.load(tokenizer) if tokenizer else None
    sieve = Sieve(overlaps)
    found, refused, chosen = [], {}, Chosen(folder)
    sources = [standard_library()] if library else []
    sources += [unpacked(wheel) for wheel in sorted(wheels.glob("*.whl"))]
    with gzip.open(folder / "corpus.jsonl.gz", "wt", encoding="utf-8", compresslevel=5) as corpus:
        for package, files in sources:
            if not package.licence:
                refused[f"{package.name} {package.version}"] = "licence is not among those allowed"
                continue
            kept = list(sieve.kept(package, files))
            chosen.add(kept)
            write(corpus, ({"text": file.text} for file in kept if not file.held_out))
            if count:
                package.tokens = tokens(count, [file.text for file in kept], sample)
            found.append(package)
            print(f"{package.name} {package.version}: {package.files} files, {package.tokens:,} tokens", flush=True)
    chosen.finish(problem_count)
    told = {"tokens_counted_in_one_file_of": sample} | manifest(found, refused, kept_out, chosen.counts)
    (folder / "manifest.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


# --- where source comes from -----------------------------------------------------------------------------------------

Files = Iterable[tuple[str, bytes]]


def fetch(packages: Path, wheels: Path) -> None:
    """Download what `packages` names and `wheels` lacks; wheels alone, of which nothing is run."""
    wheels.mkdir(parents=True, exist_ok=True)
    held = {tuple(wheel.name.lower().split("-")[:2]) for wheel in wheels.glob("*.whl")}
    for line in packages.read_text(encoding="utf-8").split():
        name, _, version = line.partition("==")
        if (re.sub(r"[-_.]+", "_", name).lower(), version) in held:
            continue
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", str(wheels), line])
        if done.returncode:
            print(f"{line} cannot be fetched, and is left out", file=sys.stderr)


def standard_library() -> tuple[Package, Files]:
    """That of this interpreter."""
    root = Path(sysconfig.get_path("stdlib"))
    files = ((path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*.py")))
    return Package("python", platform.python_version(), "PSF-2.0"), files


def unpacked(wheel: Path) -> tuple[Package, Files]:
    """A wheel's name, version and licence by its metadata, and its Python files."""
    with zipfile.ZipFile(wheel) as archive:
        about = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1)
        metadata = BytesParser().parsebytes(archive.read(about))
    return Package(metadata["Name"], metadata["Version"], licence(metadata)), _members(wheel)


def _members(wheel: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py"):
                yield name, archive.read(name)


def licence(metadata: Message) -> str:
    """The licence in a wheel's metadata; empty where there is none, or one of them is not allowed."""
    if expression := metadata.get("License-Expression"):
        parts = [part for part in re.split(r"\s+(?:AND|OR)\s+|[()\s]+", expression) if part]
        return expression if all(_ALLOWED.fullmatch(part) for part in parts) else ""
    told = [c.split("::")[-1].strip() for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    told = [each for each in told if each != "OSI Approved"] or [str(metadata.get("License", "")).strip()]
    return ", ".join(told) if all(_WORDED.fullmatch(each) or _ALLOWED.fullmatch(each) for each in told) else ""


# --- what is kept ----------------------------------------------------------------------------------------------------


def benchmarks(folder: Path | None) -> tuple[Overlaps, list[str]]:
    """What must stay out, and the names of the benchmarks that were there to be read."""
    tasks: dict[str, list[HeldOut]] = {}
    for name in BENCHMARKS if folder else ():
        try:
            found = load(name, folder)
        except DiffuCoderError as error:
            print(f"{name} is not kept out: {error}", file=sys.stderr)
            continue
        # words of the solutions too: a file may hold one without its request
        tasks[name] = [HeldOut(t.task_id, t.entry_point, f"{t.prompt}\n{t.canonical}", t.canonical) for t in found]
    return Overlaps(tasks), list(tasks)


class Sieve:
    """Which files are kept; it remembers what it has seen."""

    def __init__(self, overlaps: Overlaps) -> None:
        self.overlaps, self.seen = overlaps, set[bytes]()

    def kept(self, package: Package, files: Files) -> Iterator[File]:
        for path, content in files:
            file = self._judged(package.name, path, content)
            if isinstance(file, str):
                package.left_out[file] += 1
            else:
                package.files, package.characters = package.files + 1, package.characters + len(file.text)
                yield file

    def _judged(self, package: str, path: str, content: bytes) -> File | str:
        """The file, or why it is left out."""
        if _SKIPPED.search(path):
            return "test, vendored or versioning"
        if not 200 <= len(content) <= 200_000:
            return "too short or too long"
        try:
            text = content.decode("utf-8").replace("\r\n", "\n").strip() + "\n"
            tree = parsed(text)
        except _BROKEN:
            return "no Python 3 in UTF-8"
        lines = text.splitlines()
        if _GENERATED.search("\n".join(lines[:20])) or max(map(len, lines)) > 1000 or len(text) > 100 * len(lines):
            return "generated, or data"
        digest = hashlib.sha256("".join(text.split()).encode()).digest()
        if digest in self.seen:
            return "seen before"
        self.seen.add(digest)
        if self.overlaps.find(Exercise(path, text, (), package)):
            return "overlaps a benchmark"
        return File(package, path, text, tree)


def tokens(tokenizer: Tokenizer, texts: Sequence[str], sample: int = 1) -> int:
    """How many tokens the texts have, each with an end of text; estimated from one in `sample`."""
    read = texts[::sample]
    chunks = (read[at : at + 64] for at in range(0, len(read), 64))
    found = sum(len(ids) + 1 for chunk in chunks for ids in tokenizer.encode_batch(list(chunk), special=False))
    return round(found * sum(map(len, texts)) / max(1, sum(map(len, read))))


class Chosen:
    """The files beside the corpus: the best of it, what is held out, and requests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts = folder, Counter[str]()
        self._pairs: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
        self._best, self._held_out = list[str](), list[str]()

    def add(self, files: Sequence[File]) -> None:
        """At most 300 good files of a package, so that no one of them sets the tone."""
        good = sorted(
            (file for file in files if is_good(file)), key=lambda file: hashlib.md5(file.text.encode()).digest()
        )
        self._best += [file.text for file in good if not file.held_out][:300]
        self._held_out += [file.text for file in good if file.held_out]
        for file in files:
            self._pairs["held_out" if file.held_out else "train"] += pairs(file)

    def finish(self, problem_count: int) -> None:
        """Write everything, shuffled by fixed seeds."""
        drawn = {split: list(problems(name, count, seed=0)) for split, name, count in _splits(problem_count)}
        chats = {
            split: [*self._pairs[split], *({"prompt": p.prompt, "answer": p.solution} for p in drawn[split])]
            for split in self._pairs
        }
        for rows in (self._best, self._held_out, *chats.values(), self._pairs["train"]):
            random.Random(0).shuffle(rows)  # type: ignore[arg-type]  # any list
        texts = {"best": self._best, "held_out": self._held_out}
        written: dict[str, list[Any]] = {name: [{"text": text} for text in some] for name, some in texts.items()}
        written |= {"pairs": self._pairs["train"], "chat": chats["train"], "held_out_chat": chats["held_out"]}
        written |= {
            f"{prefix}exercises": [
                {"id": p.name, "prompt": p.prompt, "tests": list(p.tests)} for p in drawn[split][:4000]
            ]
            for split, prefix in (("train", ""), ("held_out", "held_out_"))
        }
        for name, rows in written.items():
            with (self.folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                write(file, rows)
            self.counts[name] = len(rows)


def _splits(count: int) -> Iterator[tuple[str, Any, int]]:
    yield "train", "train", count
    yield "held_out", "dev", max(1, count // 20)


def is_good(file: File) -> bool:
    """Short, made of functions, most of them documented, and not crowded."""
    functions = [node for node in ast.walk(file.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    public = [each for each in functions if not each.name.startswith("_")]
    documented = sum(ast.get_docstring(each) is not None for each in public)
    lines = [line for line in file.text.splitlines() if line.strip()]
    mean = sum(map(len, lines)) / len(lines)
    return 400 <= len(file.text) <= 12_000 and len(public) >= 2 and documented * 2 >= len(public) and mean < 55


# --- requests --------------------------------------------------------------------------------------------------------


def pairs(file: File) -> Iterator[dict[str, str]]:
    """A request and its answer for every short, documented function that needs nothing but the standard library."""
    imports = _imports(file.tree)
    for node in file.tree.body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            needed = _needed(node, imports)
            says = _first_paragraph(node)
            if needed is not None and says:
                yield _pair(node, needed, says)


def _pair(node: ast.FunctionDef, needed: Sequence[str], says: str) -> dict[str, str]:
    """In one of three forms, by its name: as HumanEval asks, as MBPP asks, and as anybody asks."""
    head = "".join(f"{line}\n" for line in needed) + ("\n" if needed else "")
    signature = f"def {node.name}({ast.unparse(node.args)}):"
    body = "\n".join("    " + line for each in node.body[1:] for line in ast.unparse(each).splitlines())
    code = f"{head}{signature}\n{body}"
    form = hashlib.sha256(node.name.encode()).digest()[0] % 3
    if form == 0:
        stub = f'{head}{signature}\n    """{says}"""'
        whole = f"{stub}\n{body}"
        return {
            "prompt": f"Please complete the following problem:\n```\n{stub}\n```\n",
            "answer": f"{PREFILL}{whole}\n```",
        }
    if form == 1:
        asked = f'"""\n{says}\nThe function is called {node.name}.\n"""'
        return {"prompt": f"```\n{asked}\n```\n", "answer": f"{PREFILL}{code}\n```"}
    return {"prompt": f"Write a Python function `{signature[4:-1]}`: {says}", "answer": code}


def _first_paragraph(node: ast.FunctionDef) -> str:
    """What the docstring says first, if it is a sentence in plain words."""
    first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    plain = 20 <= len(first) <= 200 and first.isascii() and not re.search(r":\w+:|>>>|``|@|TODO|[dD]eprecated", first)
    return first if plain and len(node.body) > 1 and not node.name.startswith("_") else ""


def _imports(tree: ast.Module) -> dict[str, str]:
    """What the file's imports of the standard library bind, and the line that does."""
    bound = {}
    for node in tree.body:
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            origin = node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
            if origin.split(".")[0] in sys.stdlib_module_names and getattr(node, "level", 0) == 0:
                bound[(alias.asname or alias.name).split(".")[0]] = ast.unparse(
                    type(node)(**{**vars(node), "names": [alias]})
                )
    return bound


def _needed(node: ast.FunctionDef, imports: dict[str, str]) -> list[str] | None:
    """The import lines that a function needs; None where it is too long or needs more than those."""
    if node.end_lineno is None or node.end_lineno - node.lineno > 30 or sum(1 for _ in ast.walk(node)) > 160:
        return None
    names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
    bound = {each.id for each in names if isinstance(each.ctx, ast.Store)}
    bound |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)} | {node.name}
    bound |= {
        each.name for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.ExceptHandler) and each.name
    }
    free = {each.id for each in names} - bound - set(vars(builtins))
    inner = any(isinstance(each, ast.Import | ast.ImportFrom | ast.Global) for each in ast.walk(node))
    return None if inner or free - set(imports) else sorted({imports[name] for name in free})


# --- what is told ----------------------------------------------------------------------------------------------------


def write(file: Any, rows: Iterable[dict[str, str]]) -> None:  # Any: a text file, gzipped or not
    file.writelines(json.dumps(row) + "\n" for row in rows)


def manifest(
    found: Sequence[Package], refused: dict[str, str], kept_out: Sequence[str], written: Counter[str]
) -> dict[str, Any]:
    """What was read, under which licence, and what came of it."""
    total = {name: sum(getattr(each, name) for each in found) for name in ("files", "characters", "tokens")}
    left_out = sum((each.left_out for each in found), Counter[str]())
    rows = [
        {"name": p.name, "version": p.version, "licence": p.licence, "files": p.files, "tokens": p.tokens}
        for p in found
    ]
    return {
        "total": total,
        "records": dict(written),
        "left_out": dict(left_out.most_common()),
        "kept_out": list(kept_out),
        "refused": refused,
        "packages": sorted(rows, key=lambda row: -row["tokens"]),
    }


if __name__ == "__main__":
    typer.run(main)
