"""Named benchmarks, each a list of tasks: what is asked, and what a program must do to solve it.

Rows come in their published form from a folder, or from the hub; nothing here runs them. A task is judged by one of
three: calls whose results are compared (`base` and `plus`, see `evalplus`), test code, or asserts.
"""

import ast
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from diffucoder.errors import ConfigError
from diffucoder.evaluation.evalplus import arguments
from diffucoder.grading.extract import parsed
from diffucoder.problems import problems

PREFILL = "Here is the code to solve this problem:\n```python\n"  # begins an instruct model's answer: Tables 5 and 6
MBPP_V010 = 399  # tasks of MBPP+ v0.1.0; v0.2.0 withdrew 21
TINY = 500  # held-out problems that make up the benchmark `tiny`

_REQUEST = "Please complete the following problem:\n```\n{}\n```\n"  # Table 5
_BARE_REQUEST = "```\n{}\n```\n"  # Table 6
_Row = Mapping[str, Any]  # one line of a published file


@dataclass(frozen=True)
class Task:
    """One problem of a benchmark. `canonical` is the published solution, a whole program."""

    task_id: str
    entry_point: str
    prompt: str  # what a base model continues
    request: str  # what an instruct model is asked, its answer begun with PREFILL; "": the benchmark has no such form
    canonical: str
    head: str = ""  # code that BigCodeBench runs before every program: its imports and an empty function
    suffix: str = ""  # infilling: what follows the hole
    base: tuple[tuple[Any, ...], ...] = ()  # arguments of the calls that judge a program
    plus: tuple[tuple[Any, ...], ...] | None = None  # EvalPlus's further ones; None: this benchmark has none
    atol: float = 0.0
    in_order: bool = False  # judged by MBPP+ v0.1.0's rules (`evalplus.correct`)
    tests: str = ""  # code that raises after a wrong program (HumanEval), or a unittest.TestCase (BigCodeBench)
    asserts: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()  # imports beyond the standard library that the task's own code makes

    @property
    def judged(self) -> bool:
        """Whether there is anything to judge an answer by."""
        return bool(self.base or self.plus or self.tests or self.asserts)


def load(name: str, data: Path | None = None) -> list[Task]:
    """The tasks of a benchmark in their published order, from files in `data`, else from the hub.

    A name that ends in .jsonl is a file of one's own: `prompt`, and maybe `tests` (asserts) and `id`, a line.
    `humaneval` has EvalPlus's inputs where its file is in the folder, else its own test code.
    Raises ConfigError for an unknown name, a missing or broken file, and what the hub cannot give.
    """
    if name == "tiny":
        return _tiny()
    own = Path(name) if name.endswith(".jsonl") else None
    if own is None and name not in _BENCHMARKS:
        close = get_close_matches(name, [*_BENCHMARKS, "tiny"], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join([*_BENCHMARKS, 'tiny'])}"
        raise ConfigError(f"unknown benchmark {name!r}; {hint}")
    if own is not None:
        benchmark, data = _Benchmark((own.name,), _prompt), own.parent
    else:
        benchmark = _BENCHMARKS[name]
    rows = _from_hub(name, benchmark) if data is None else _from_folder(name, benchmark, data)
    try:
        tasks = [benchmark.task(row) for row in rows]
        tasks = [replace(t, task_id=t.task_id or f"{Path(name).stem}/{at}") for at, t in enumerate(tasks)]
        return [replace(task, in_order=True) for task in tasks] if len(tasks) == MBPP_V010 else tasks
    except (KeyError, TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise ConfigError(
            f"rows of {name!r} from {data or benchmark.repository} are not in their published form "
            f"({type(error).__name__}: {error}); fetch {benchmark.files[0]} anew"
        ) from None


def program(task: Task, sample: Mapping[str, str]) -> str:
    """The program in a sample as EvalPlus writes them: `solution` is one, `completion` continues the prompt."""
    if "solution" in sample:
        return task.head + sample["solution"]
    if "completion" in sample:
        return task.head + task.prompt + sample["completion"] + task.suffix
    raise ConfigError(f"sample of {task.task_id} has keys {sorted(sample)}; it needs 'completion' or 'solution'")


# --- rows to tasks ---------------------------------------------------------------------------------------------------


def _humaneval(row: _Row) -> Task:
    """HumanEval, and infilling in it; a row may have EvalPlus's inputs in place of test code."""
    suffix = row.get("suffix")
    judged_by_calls = "base_input" in row
    return Task(
        task_id=row["task_id"],
        entry_point=row["entry_point"],
        prompt=row["prompt"],
        request="" if suffix is not None else _REQUEST.format(row["prompt"]),
        canonical=row["prompt"] + row["canonical_solution"] + (suffix or ""),
        suffix=suffix or "",
        base=arguments(row["task_id"], row.get("base_input", ())),
        plus=arguments(row["task_id"], row["plus_input"]) if "plus_input" in row else None,
        atol=float(row.get("atol", 0)),
        tests="" if judged_by_calls else f"{row['test']}\ncheck({row['entry_point']})\n",
    )


def _mbpp(row: _Row) -> Task:
    return replace(_humaneval(row), request=_BARE_REQUEST.format(row["prompt"]))


def _base_only(task: Callable[[_Row], Task]) -> Callable[[_Row], Task]:
    return lambda row: replace(task(row), plus=None)


def _bigcodebench(row: _Row) -> Task:
    prompt = row["complete_prompt"]
    canonical = prompt + row["canonical_solution"]
    return Task(
        task_id=row["task_id"],
        entry_point=row["entry_point"],
        prompt=prompt,
        request=_REQUEST.format(prompt),
        canonical=canonical,
        head=f"{row['code_prompt']}\n    pass\n",  # "calibrated", as its published verdicts are
        tests=row["test"],
        libraries=_libraries(canonical, row["test"]),
    )


def _bigcodebench_instruct(row: _Row) -> Task:
    return replace(_bigcodebench(row), request=_BARE_REQUEST.format(row["instruct_prompt"]))


def _prompt(row: _Row) -> Task:
    """A request, judged by the asserts that it may bring."""
    text, tests = row["prompt"], row.get("tests", ())
    if not isinstance(text, str) or isinstance(tests, str) or not all(isinstance(test, str) for test in tests):
        raise ValueError("prompt must be a string, tests a list of asserts")
    return Task(str(row.get("id", "")), "", text, text, canonical=row.get("solution", ""), asserts=tuple(tests))


def _gsm8k(row: _Row) -> Task:
    """A question of mathematics: nothing here judges its answer."""
    question = row["question"]
    return Task("", "", f"Question: {question}\nAnswer:", question, canonical=row["answer"])


def _libraries(*codes: str) -> tuple[str, ...]:
    nodes = [node for code in codes for node in ast.walk(parsed(code))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return tuple(sorted({name.split(".")[0] for name in names} - sys.stdlib_module_names))


def _tiny() -> list[Task]:
    """The project's own held-out problems: no training problem combines blocks as these do."""
    return [
        Task(f"tiny/{at}", p.name, f"# {p.prompt}\n", p.prompt, p.solution, asserts=p.tests)
        for at, p in enumerate(problems("test", TINY, seed=1))
    ]


# --- where rows come from --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Benchmark:
    files: tuple[str, ...]  # the first that is in the folder is read
    task: Callable[[_Row], Task]
    repository: str = ""  # on the hub; empty where its rows there are not the published ones
    config: str | None = None
    split: str = "test"


def _infilling(kind: str) -> _Benchmark:
    name = f"HumanEval-{kind}Infilling"
    return _Benchmark((f"{name}.jsonl",), _humaneval, "loubnabnl/humaneval_infilling", name)


def _bigcode(name: str, file: str, task: Callable[[_Row], Task]) -> _Benchmark:
    return _Benchmark((f"{file}.json", f"{file}.jsonl"), task, f"bigcode/{name}", split="v0.1.4")


_BENCHMARKS = {
    "humaneval": _Benchmark(
        ("HumanEvalPlus.jsonl", "HumanEval.jsonl"), _base_only(_humaneval), "openai/openai_humaneval"
    ),
    "humaneval+": _Benchmark(("HumanEvalPlus.jsonl",), _humaneval),
    "mbpp": _Benchmark(("MbppPlus.jsonl",), _base_only(_mbpp)),
    "mbpp+": _Benchmark(("MbppPlus.jsonl",), _mbpp),
    "gsm8k": _Benchmark(("gsm8k.jsonl", "test.jsonl"), _gsm8k, "openai/gsm8k", "main"),
    "humaneval-infilling": _infilling("SingleLine"),
    "humaneval-infilling-multi-line": _infilling("MultiLine"),
    "humaneval-infilling-random-span": _infilling("RandomSpan"),
    "humaneval-infilling-random-span-light": _Benchmark(("HumanEval-RandomSpanInfillingLight.jsonl",), _humaneval),
    "bigcodebench": _bigcode("bigcodebench", "BigCodeBench", _bigcodebench),
    "bigcodebench-instruct": _bigcode("bigcodebench", "BigCodeBench", _bigcodebench_instruct),
    "bigcodebench-hard": _bigcode("bigcodebench-hard", "BigCodeBench-Hard", _bigcodebench),
    "bigcodebench-hard-instruct": _bigcode("bigcodebench-hard", "BigCodeBench-Hard", _bigcodebench_instruct),
}


def _from_folder(name: str, benchmark: _Benchmark, data: Path) -> list[_Row]:
    names = [file + ending for file in benchmark.files for ending in (".gz", "")]
    path = next((data / file for file in names if (data / file).is_file()), None)
    if path is None:
        raise ConfigError(f"benchmark {name!r} is not in {str(data)!r}: none of {', '.join(names)}; put one there")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        return _rows(text)
    except (OSError, EOFError, ValueError) as error:  # gzip and json raise these
        raise ConfigError(f"{str(path)!r} cannot be read ({error}); fetch it anew") from None


def _rows(text: str) -> list[_Row]:
    """A row a line, or one JSON document: rows by task id, as BigCodeBench-Hard is published, or a list of them."""
    try:
        whole = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(whole, dict) and all(isinstance(row, dict) for row in whole.values()):
        return list(whole.values())
    return whole if isinstance(whole, list) else [whole]


def _from_hub(name: str, benchmark: _Benchmark) -> Iterable[_Row]:
    if not benchmark.repository:
        raise ConfigError(
            f"benchmark {name!r} has no rows with inputs on the hub; put {benchmark.files[0]}.gz, from its release, "
            "into a folder and name that with --data"
        )
    try:
        datasets = import_module("datasets")  # late: it is optional, and takes seconds
    except ModuleNotFoundError:
        raise ConfigError(f'benchmark {name!r} needs datasets; pip install "diffucoder[train]", or --data') from None
    try:
        rows: Iterable[_Row] = datasets.load_dataset(benchmark.repository, benchmark.config, split=benchmark.split)
    except (OSError, ValueError, RuntimeError) as error:  # offline, gone, of a form that datasets no longer reads
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{benchmark.repository} cannot be loaded from the hub ({reason}); use --data") from None
    return rows
