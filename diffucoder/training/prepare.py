"""Make exercises for reinforcement learning of what others have published, and keep benchmarks out of them.

For: `diffucoder prepare`. Not for: reading exercises (`exercises`), how an overlap is found (`overlap`), how programs
are made into tests (`codeio`).

* `acecode` (DiffuCoder, appendix B.1): problems on which two models do badly but not always equally so. "hard" keeps
  what is in the lowest fifth by the mean of their pass rates, and among that what is high by their standard deviation:
  in the top 40 % (`paper`), or not in the lowest 40 % (`released`, what the published script does).
* `mbpp`: the train and validation problems that MBPP+ does not have.
* `reasoning-gym`: programs with generators of inputs.
* any other source is JSONL of exercises.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from diffucoder.config import Settings
from diffucoder.errors import ConfigError
from diffucoder.grading.extract import parsed
from diffucoder.grading.sandbox import Sandbox
from diffucoder.training import codeio
from diffucoder.training.exercises import (
    Exercise,
    Solved,
    read_exercises,
    tests_of,
    told,
    write_exercises,
    write_whole,
)
from diffucoder.training.overlap import WORDS, HeldOut, Overlaps
from diffucoder.training.sources import Json, Parse, Skipped, parsed_rows, text_of

Difficulty = Literal["hard", "medium", "easy", "all"]
Spread = Literal["paper", "released"]

_ACECODE = "hub:TIGER-Lab/AceCode-87K"
_MODELS = ("qwen_coder_2.5", "llama3_instruct")  # whose pass rates say how hard a problem is
_SPREADS: Mapping[Spread, int] = {"paper": 60, "released": 40}  # percentile of the standard deviations to be reached
_STUB = 'Please complete the following problem:\n```\n{}:\n    """\n    {}\n    """\n```\n'

_MBPP = ("Mbpp-TrainVal.jsonl.gz", "Mbpp-TrainVal.jsonl")
_MBPP_PLUS = ("MbppPlus.jsonl.gz", "MbppPlus.jsonl")
_MBPP_HUB = "hub:google-research-datasets/mbpp/full"
_MBPP_PLUS_HUB = "hub:evalplus/mbppplus@test"

_Stream = Generator[Solved | Skipped, None, None]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]  # Any: hands on what it counts


class PrepareSettings(Settings):
    """What is read, and what of it is kept."""

    data: str | None = Field(
        default=None, description="file or folder of what SOURCE publishes, or hub:owner/name; found if left out"
    )
    against: str = Field(default="", description="benchmarks to keep out, as in humaneval,mbpp,bigcodebench-hard")
    benchmarks: Path | None = Field(default=None, description="folder of the benchmarks' files; the hub if left out")
    difficulty: Difficulty | None = Field(default=None, description="acecode: hard (if left out), medium, easy, all")
    spread: Spread | None = Field(
        default=None, description="acecode, hard: released (if left out) keeps the top 60 % by spread, paper 40 %"
    )
    stubs: bool = Field(default=True, description="acecode: ask again with the function's first lines")
    limit: int | None = Field(default=None, ge=1, description="exercises written, at most")
    seed: int | None = Field(default=None, description="shuffle by it; the published order if left out")


def prepare(
    source: str,
    out: Path,
    settings: PrepareSettings,
    benchmarks: Mapping[str, Iterable[HeldOut]],
    *,
    progress: Progress = lambda things, count, what: things,
) -> dict[str, Any]:
    """Write the exercises of `source` that overlap no task of `benchmarks`, and beside them the report it returns."""
    if out.suffix != ".jsonl":
        raise ConfigError(f"OUT={str(out)!r} is no .jsonl file; name one, as in exercises.jsonl")
    if any(
        place and out.exists() and Path(place).exists() and out.samefile(place) for place in (source, settings.data)
    ):
        raise ConfigError(f"OUT={str(out)!r} is what is read; name another file")
    for name in ("difficulty", "spread"):
        if source != "acecode" and (value := getattr(settings, name)) is not None:
            raise ConfigError(f"{name}={value!r} is for acecode alone, and SOURCE is {source!r}; leave it out")
    rows, expand = _open(source, settings)
    if settings.seed is not None:
        random.Random(settings.seed).shuffle(rows)
    sifted = _Sifted()
    with closing(expand(progress(rows, len(rows), "preparing"))) as found:
        sifted.fill(found, Overlaps(benchmarks), settings.limit)
    if not sifted.kept:
        raise ConfigError(f"no exercise of {source!r} is left: {sifted.reasons() or 'it is empty'}; give other data")
    shared = Counter(name for each in sifted.dropped for name in each["overlaps"])
    report = {
        "source": source,
        "settings": settings.model_dump(mode="json"),
        "rows": len(rows),
        "exercises": len(sifted.kept),
        "left_out": dict(sifted.left_out.most_common()),
        "words_in_a_row": WORDS,
        "overlaps": {name: shared[name] for name in benchmarks},
        "dropped": sifted.dropped,
    }
    write_exercises(out, sifted.kept)
    write_whole(out.with_suffix(".report.json"), json.dumps(report, indent=1) + "\n")
    return report


def summary(report: Mapping[str, Any]) -> str:
    """The report in a few lines."""
    count, rows = (f"{report[what]:,} {what.rstrip('s')}{'s' * (report[what] != 1)}" for what in ("exercises", "rows"))
    lines = [f"{report['source']}: {count} of {rows}"]
    lines += [f"  left out {count:6,}   {why}" for why, count in report["left_out"].items()]
    lines += [f"  overlaps {count:6,}   {name}" for name, count in report["overlaps"].items()]
    if report["dropped"]:
        lines.append(f"  dropped: {', '.join(each['id'] for each in report['dropped'])}")
    return "\n".join(lines)


@dataclass
class _Sifted:
    """What becomes of the exercises that were found."""

    kept: list[Exercise] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # how many, by reason
    dropped: list[dict[str, Any]] = field(default_factory=list)  # for what they share with a benchmark

    def fill(self, found: Iterable[Solved | Skipped], overlaps: Overlaps, limit: int | None) -> None:
        for each in found:
            if isinstance(each, Skipped):
                self.left_out[each.why] += 1
            elif not all(map(_is_python, each[0].tests)):
                self.left_out["has a test that is no Python"] += 1
            elif shared := overlaps.find(*each):
                self.dropped.append({"id": each[0].id, "overlaps": shared})
            else:
                self.kept.append(each[0])
            if len(self.kept) == limit:
                return

    def reasons(self) -> str:
        counts = [f"{count:,} {why}" for why, count in self.left_out.most_common()]
        return ", ".join([*counts, *([f"{len(self.dropped):,} overlap a benchmark"] if self.dropped else [])])


def _is_python(test: str) -> bool:
    try:
        parsed(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _open(source: str, settings: PrepareSettings) -> tuple[list[Any], Callable[[Iterable[Any]], _Stream]]:
    """The rows of a source, and what makes exercises of them. Any: each source has rows of its own."""
    if source == "acecode":
        path = settings.data or _ACECODE
        return _read([path], _acecode_row), lambda some: _acecode(list(some), settings)
    if source == "mbpp":
        return _read(_mbpp_sources(settings.data), _mbpp_row), partial(_mbpp, elsewhere=_mbpp_plus(settings))
    if source == "reasoning-gym":
        path = _in_folder(settings.data, (codeio.FILE,)) if settings.data else codeio.installed()
        return _read([path], codeio.program), _programs
    if settings.data is not None:
        raise ConfigError(
            f"data={settings.data!r} is for a named source, and SOURCE={source!r} names its own; leave it out"
        )
    return list(read_exercises([source])), lambda some: ((each, "") for each in some)


def _read(sources: Sequence[str], parse: Parse[Any]) -> list[Any]:
    return list(told(parsed_rows(sources, parse), ", ".join(sources)))


def _in_folder(data: str, names: Sequence[str]) -> str:
    """`data` itself where it is no folder; else the first of these files in it."""
    folder = Path(data)
    if not folder.is_dir():
        return data
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ConfigError(f"folder {data!r} has no {' or '.join(names)}; put it there, or name the file")
    return str(path)


def _programs(programs: Iterable[codeio.Program]) -> _Stream:
    with Sandbox() as sandbox:
        yield from codeio.exercises(programs, sandbox)


# --- AceCode ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A problem of AceCode."""

    exercise: Exercise
    accuracies: tuple[float, ...]  # pass rates of the two models' answers
    best: str  # of all models' answers the one with the highest pass rate


def _acecode_row(where: str, fields: Json) -> _Row:
    inferences = fields.get("inferences")
    if not isinstance(inferences, list) or not all(isinstance(each, dict) for each in inferences):
        raise ValueError("field 'inferences' is no list of answers")
    try:
        rates = [(float(each["pass_rate"]), each) for each in inferences]
        accuracies = tuple(rate for rate, each in rates if each["model_name"] in _MODELS)
        best = max(rates, key=lambda pair: pair[0])[1]["completion"] if accuracies else ""
    except (KeyError, TypeError) as error:
        raise ValueError(f"an answer of 'inferences' has no usable {error}") from None
    if not accuracies:
        raise ValueError(f"has no answer of {' or '.join(_MODELS)}")
    question = text_of(fields.get("question"), "field 'question'")
    about = Exercise(str(fields.get("id", Path(where).name)), question, tests_of(fields), "acecode")
    return _Row(about, accuracies, str(best))


def _acecode(rows: Sequence[_Row], settings: PrepareSettings) -> _Stream:
    """The rows of the wanted difficulty; after each, where that can be had, the same one asked by a stub."""
    difficulty = settings.difficulty or "hard"
    wanted = select([row.accuracies for row in rows], difficulty, settings.spread or "released")
    for row, chosen in zip(rows, wanted, strict=True):
        if not chosen:
            yield Skipped(row.exercise.id, f"not {difficulty} by pass rates")
            continue
        yield replace(row.exercise, prompt=with_test(row.exercise)), row.best
        stub = stub_of(row.exercise.prompt, row.best) if settings.stubs else None
        if stub is not None:
            yield replace(row.exercise, id=f"{row.exercise.id}/stub", prompt=stub), row.best


def select(accuracies: Sequence[Sequence[float]], difficulty: Difficulty, spread: Spread) -> list[bool]:
    """Which problems are of a difficulty; percentiles are those of all problems, standard deviations a population's."""
    import numpy as np  # late: the command line's help reads the settings above, and must not wait for it

    means = np.array([np.mean(each) for each in accuracies])
    stds = np.array([np.std(each) for each in accuracies])
    quarter, three_quarters = np.percentile(means, (25, 75))
    chosen = {
        "hard": (means <= np.percentile(means, 20)) & (stds >= np.percentile(stds, _SPREADS[spread])),
        "medium": (means >= quarter) & (means <= three_quarters),
        "easy": means >= three_quarters,
        "all": means >= 0,
    }
    return [bool(each) for each in chosen[difficulty]]


def stub_of(question: str, completion: str) -> str | None:
    """The question as the docstring of a function that is to be completed, whose head is that of `completion`.

    As released: none for a question that has "you" anywhere in it, "young" included, or where what stands before the
    first ":\\n", blanks aside, does not begin with "def "; of a long question only the first line is indented.
    """
    head = completion.partition(":\n")[0].strip()
    return None if "you" in question.lower() or not head.startswith("def ") else _STUB.format(head, question)


def with_test(exercise: Exercise) -> str:
    """The question as it is trained on: behind it the first test, which names the function, unless it shows code."""
    asked = exercise.prompt
    return asked if "\n```\n" in asked else f"{asked}\nTest cases: {exercise.tests[0]}"


# --- MBPP ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mbpp:
    exercise: Exercise
    number: int
    code: str
    setup: str  # what must run before the tests


def _mbpp_sources(data: str | None) -> list[str]:
    if data is None:
        return [f"{_MBPP_HUB}@validation", f"{_MBPP_HUB}@train"]
    return [_in_folder(data, _MBPP)]


def _mbpp_row(where: str, fields: Json) -> _Mbpp:
    tests = tests_of(fields)
    statement = text_of(fields.get("text"), "field 'text'").strip()
    # as MBPP's own prompts have it: one test names the function and shows what it takes
    prompt = f"{statement}\nYour code should pass this test:\n{tests[0]}"
    number, code = int(str(fields.get("task_id"))), str(fields.get("code", ""))
    return _Mbpp(
        Exercise(f"mbpp/{number}", prompt, tests, "mbpp"), number, code, str(fields.get("test_setup_code", ""))
    )


def _mbpp_plus(settings: PrepareSettings) -> frozenset[int]:
    """The numbers of MBPP+'s tasks."""
    folders = [folder for folder in (settings.benchmarks, settings.data and Path(settings.data)) if folder]
    folders = [folder if folder.is_dir() else folder.parent for folder in folders]
    paths = [str(folder / name) for folder in folders for name in _MBPP_PLUS if (folder / name).is_file()]
    if folders and not paths:
        raise ConfigError(
            f"{_MBPP_PLUS[0]}, whose tasks are left out of mbpp, is in neither --data nor --benchmarks; put it there"
        )
    return frozenset(_read(paths[:1] or [_MBPP_PLUS_HUB], _plus_number))


def _plus_number(where: str, fields: Json) -> int:
    return int(str(fields.get("task_id")).removeprefix("Mbpp/"))


def _mbpp(rows: Iterable[_Mbpp], *, elsewhere: frozenset[int]) -> _Stream:
    for row in rows:
        if row.number in elsewhere:
            yield Skipped(row.exercise.id, "stands in MBPP+")
        elif row.setup:
            yield Skipped(row.exercise.id, "needs code before its tests")
        else:
            yield row.exercise, row.code
