"""Benchmarks: named lists of tasks, read in their published form from a folder or from the Hugging Face Hub.

A task has the text for a model and the tests for its programs. `judge` runs the programs.
"""

import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from diffucoder.config import suggestion
from diffucoder.errors import ConfigError, install
from diffucoder.evaluation.evalplus import Arguments, read_arguments
from diffucoder.files import decode_text, parse_json, read_unpacked, without_nulls
from diffucoder.grading.extract import future_first
from diffucoder.grading.reading import read_limited
from diffucoder.grading.syntax import imported_packages

PREFILL = "Here is the code to solve this problem:\n```python\n"  # begins the answer of instruct models: Tables 5 and 6
_REQUEST = "Please complete the following problem:\n```\n{}\n```\n"  # Table 5
_BARE_REQUEST = "```\n{}\n```\n"  # Table 6

_SHIPPED_DATA = Path(__file__).parents[1] / "data"
_MBPP_V010_IDS = "9d4da6f2122db161"  # hash of the 399 ids of MBPP+ v0.1.0; v0.2.0 withdrew 21 of them

_CODE_LINE = re.compile(  # a line that prose does not have
    r'^(?:(?:async )?def \w+\(|class \w+[(:]|import \w|from [\w.]+ import |@\w|\w+ = |#|["\']{3})', re.MULTILINE
)

_Row = Mapping[str, Any]  # one row of a published file


@dataclass(frozen=True)
class Calls:
    """Calls of the entry point; results must equal those of the published solution (EvalPlus)."""

    base: tuple[Arguments, ...]
    plus: tuple[Arguments, ...] | None = None  # the further inputs of EvalPlus; None: this benchmark has none
    atol: float = 0.0
    in_order: bool = False  # MBPP+ v0.1.0, which lacks the rule that compares some results as sets

    @property
    def inputs(self) -> tuple[Arguments, ...]:
        """All inputs, the base ones first."""
        return self.base + (self.plus or ())


@dataclass(frozen=True)
class Asserts:
    """Assert statements about the entry point."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Script:
    """Code to run after the program: it raises (HumanEval), or defines `TestCases` (BigCodeBench)."""

    code: str


@dataclass(frozen=True)
class Task:
    """One problem of a benchmark."""

    task_id: str
    entry_point: str
    prompt: str  # text that a base model continues
    request: str  # user's turn for an instruct model; "": the benchmark has no such form
    canonical: str  # the published solution, a whole program
    tests: Calls | Asserts | Script | None = None  # None: answers cannot be judged
    prefill: str = ""  # beginning of an instruct model's answer, which the model continues
    head: str = ""  # code to run before every program (BigCodeBench): its imports and an empty function
    suffix: str | None = None  # text after the hole, in infilling tasks
    libraries: tuple[str, ...] = ()  # packages beyond the standard library that the task's own code imports
    content: str = field(default="", compare=False)  # a hash of the row that it was made of

    @property
    def middle(self) -> str:
        """The published solution's text in the hole of an infilling task."""
        return self.canonical.removeprefix(self.prompt).removesuffix(self.suffix or "")

    def program(self, sample: Mapping[str, str]) -> str:
        """Return the program that is judged. Raises ConfigError for a sample that has none.

        As in EvalPlus, `solution` is a whole program and `completion` continues the prompt.
        """
        if "solution" in sample:
            return future_first(self.head + sample["solution"])
        if "completion" in sample:
            return future_first(self.head + self.prompt + sample["completion"] + (self.suffix or ""))
        raise ConfigError(f"sample of {self.task_id} has keys {sorted(sample)}; it needs 'completion' or 'solution'")


def load(name: str, data: Path | None = None) -> list[Task]:
    """Return the tasks of a benchmark in their published order, from files in `data`, else from the Hub.

    A name that ends in .jsonl is a file of your own (see docs/evaluation.md). Raises ConfigError for an unknown name, a
    missing or broken file, and rows that the Hub lacks.
    """
    if name.endswith(".jsonl"):
        benchmark = _Benchmark((Path(name).name,), _own_task)
        data = Path(name).parent
        if not (Path(name).exists() or Path(f"{name}.gz").exists()):
            raise ConfigError(f"file {name!r} is not there; check the path")
    elif name in _BENCHMARKS:
        benchmark = _BENCHMARKS[name]
    else:
        raise ConfigError(f"unknown benchmark {name!r}; {suggestion(name, list(_BENCHMARKS))}")
    if name == "tiny":
        data = _SHIPPED_DATA
    rows = _rows_from_hub(name, benchmark) if data is None else _rows_from_folder(name, benchmark, data)
    tasks = []
    try:
        for row in rows:
            content = hashlib.sha256(json.dumps(row, default=str).encode()).hexdigest()
            task = replace(benchmark.task(without_nulls(row)), content=content)
            _check_text(task)
            tasks.append(task)
    except (KeyError, TypeError, ValueError, SyntaxError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"rows of {name!r} from {data or benchmark.repository} are not in their published form "
            f"(row {len(tasks) + 1}: {type(error).__name__}: {error}); fetch {benchmark.files[0]} again"
        ) from None
    ids = " ".join(sorted(task.task_id for task in tasks))
    in_order = hashlib.sha256(ids.encode(errors="surrogatepass")).hexdigest().startswith(_MBPP_V010_IDS)
    for number, task in enumerate(tasks):
        tests = task.tests
        if isinstance(tests, Calls):
            plus = tests.plus if name.endswith("+") else None
            tests = replace(tests, plus=plus, in_order=in_order and name.startswith("mbpp"))
        tasks[number] = replace(task, task_id=task.task_id or f"{Path(name).stem}/{number}", tests=tests)
    return tasks


def _check_text(task: Task) -> None:
    """Raise ValueError if a field of a task that must be text is something else in the file."""
    for name in ("task_id", "entry_point", "prompt", "request", "canonical", "prefill", "head"):
        if not isinstance(getattr(task, name), str):
            raise ValueError(f"{name} is {type(getattr(task, name)).__name__}, not text")


# --- rows to tasks ---------------------------------------------------------------------------------------------------


def _humaneval(row: _Row) -> Task:
    """A row of HumanEval, of MBPP, or of an infilling benchmark made from HumanEval.

    It is judged by the inputs of EvalPlus if the row has them, else by its own test code.
    """
    suffix = row.get("suffix")
    tests: Calls | Script
    if "base_input" in row:
        base = read_arguments(row["task_id"], row["base_input"])
        plus = read_arguments(row["task_id"], row["plus_input"]) if "plus_input" in row else None
        tests = Calls(base, plus, atol=float(row.get("atol", 0)))
    else:
        tests = Script(f"{row['test']}\ncheck({row['entry_point']})\n")
    return Task(
        task_id=row["task_id"],
        entry_point=row["entry_point"],
        prompt=row["prompt"],
        request=_REQUEST.format(row["prompt"]) if suffix is None else "",
        canonical=row["prompt"] + row["canonical_solution"] + (suffix or ""),
        tests=tests,
        prefill=PREFILL,
        suffix=suffix,
    )


def _mbpp(row: _Row) -> Task:
    return replace(_humaneval(row), request=_BARE_REQUEST.format(row["prompt"]))


def _bigcodebench(row: _Row) -> Task:
    prompt = row["complete_prompt"]
    canonical = prompt + row["canonical_solution"]
    return Task(
        task_id=row["task_id"],
        entry_point=row["entry_point"],
        prompt=prompt,
        request=_REQUEST.format(prompt),
        canonical=canonical,
        tests=Script(row["test"]),
        prefill=PREFILL,
        head=f"{row['code_prompt']}\n    pass\n",  # "calibrated", as its published verdicts are
        libraries=_libraries(canonical, row["test"]),
    )


def _bigcodebench_instruct(row: _Row) -> Task:
    return replace(_bigcodebench(row), request=_BARE_REQUEST.format(row["instruct_prompt"]))


def _own_task(row: _Row) -> Task:
    """A row of a user's file: a request, and optionally the asserts that judge an answer.

    A base model continues it as a comment, unless it is code itself.
    """
    prompt, prefill, lines = row["prompt"], row.get("prefill", ""), row.get("tests", [])
    if not isinstance(prompt, str) or not isinstance(prefill, str):
        raise ValueError("prompt must be a string, and prefill too")
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("tests must be a list of asserts")
    tests = Asserts(tuple(lines)) if lines else None
    entry_point = row.get("entry_point", "")
    text = prompt if _CODE_LINE.search(prompt) else textwrap.indent(prompt.strip(), "# ", lambda _: True) + "\n"
    return Task(str(row.get("id", "")), entry_point, text, prompt, row.get("solution", ""), tests, prefill)


def _gsm8k(row: _Row) -> Task:
    """A mathematics question, whose answer is not judged."""
    question = row["question"]
    return Task("", "", f"Question: {question}\nAnswer:", question, row["answer"])


def _libraries(*programs: str) -> tuple[str, ...]:
    """Names of the packages that `programs` import, without the standard library."""
    packages: set[str] = set()
    for program in programs:
        packages.update(read_limited(imported_packages, program, otherwise=[]))
    return tuple(sorted(packages - sys.stdlib_module_names))


# --- where rows come from --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Benchmark:
    files: tuple[str, ...]  # the first one that is in the folder is read
    task: Callable[[_Row], Task]
    repository: str = ""  # on the Hub; "": its rows there are not the published ones
    config: str | None = None
    split: str = "test"


def _infilling(kind: str) -> _Benchmark:
    name = f"HumanEval-{kind}Infilling"
    return _Benchmark((f"{name}.jsonl",), _humaneval, "loubnabnl/humaneval_infilling", name)


def _bigcode(name: str, task: Callable[[_Row], Task]) -> _Benchmark:
    return _Benchmark((f"{name}.json", f"{name}.jsonl"), task, f"bigcode/{name.lower()}", split="v0.1.4")


_BENCHMARKS = {  # the further inputs of EvalPlus count where a name ends in +
    "humaneval": _Benchmark(("HumanEvalPlus.jsonl", "HumanEval.jsonl"), _humaneval, "openai/openai_humaneval"),
    "humaneval+": _Benchmark(("HumanEvalPlus.jsonl",), _humaneval),
    "mbpp": _Benchmark(("MbppPlus.jsonl",), _mbpp),
    "mbpp+": _Benchmark(("MbppPlus.jsonl",), _mbpp),
    "gsm8k": _Benchmark(("gsm8k.jsonl", "test.jsonl"), _gsm8k, "openai/gsm8k", "main"),
    "humaneval-infilling": _infilling("SingleLine"),
    "humaneval-infilling-multi-line": _infilling("MultiLine"),
    "humaneval-infilling-random-span": _infilling("RandomSpan"),
    "humaneval-infilling-random-span-light": _Benchmark(("HumanEval-RandomSpanInfillingLight.jsonl",), _humaneval),
    "bigcodebench": _bigcode("BigCodeBench", _bigcodebench),
    "bigcodebench-instruct": _bigcode("BigCodeBench", _bigcodebench_instruct),
    "bigcodebench-hard": _bigcode("BigCodeBench-Hard", _bigcodebench),
    "bigcodebench-hard-instruct": _bigcode("BigCodeBench-Hard", _bigcodebench_instruct),
    "tiny": _Benchmark(("tiny_problems.jsonl",), _own_task),  # no training problem combines the same blocks
}


def _rows_from_folder(name: str, benchmark: _Benchmark, data: Path) -> list[_Row]:
    names = [file + ending for file in benchmark.files for ending in (".gz", "")]
    present = [data / file for file in names if (data / file).is_file()]
    if not present:
        raise ConfigError(f"benchmark {name!r} is not in {str(data)!r}: none of {', '.join(names)}; put one there")
    try:
        return _parse_rows(decode_text(read_unpacked(present[0])))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(present[0])!r} cannot be read ({error}); fetch it again") from None


def _parse_rows(text: str) -> list[_Row]:
    """Rows from JSON lines, or from one JSON document: rows by task id (BigCodeBench-Hard), a list, or one row."""
    try:
        document = parse_json(text)
    except ValueError:
        rows: list[_Row] = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                if line.strip():
                    rows.append(parse_json(line))
            except ValueError as error:
                raise ValueError(f"line {number} is {error}") from None
        return rows
    if isinstance(document, list):
        return document
    if isinstance(document, dict) and all(isinstance(row, dict) for row in document.values()):
        return list(document.values())
    return [document]


def _rows_from_hub(name: str, benchmark: _Benchmark) -> Iterable[_Row]:
    if not benchmark.repository:
        raise ConfigError(
            f"benchmark {name!r} has no rows with inputs on the hub; put {benchmark.files[0]}.gz, from its release, "
            "into a folder and name that with --data"
        )
    try:
        datasets = import_module("datasets")  # here, because it is optional and takes seconds
    except ModuleNotFoundError:
        raise ConfigError(f"benchmark {name!r} needs datasets; {install('train')}, or give --data") from None
    try:
        rows: Iterable[_Row] = datasets.load_dataset(benchmark.repository, benchmark.config, split=benchmark.split)
    except (OSError, ValueError, RuntimeError) as error:  # offline, removed, or in a form that it cannot read
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{benchmark.repository} cannot be loaded from the hub ({reason}); use --data") from None
    return rows
