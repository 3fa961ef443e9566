"""The tiny problems: requests for short Python functions, with a solution and asserts, composed from blocks.

A block (data/blocks.txt) does one thing to a value of one type, and knows several phrasings of the request. Blocks
compose into three kinds of problem: a chain ("keep the even numbers, then sum them"), a branch ("if the string is a
palindrome, ..., otherwise ...") and a guard ("return 0 if the list is empty, otherwise ..."). Splits are made **by
composition**: a held-out problem combines blocks in a way that no training problem does, whatever its wording, names
and constants, while every block by itself is known from training.

The expected values in the asserts come from running the blocks, which are ours, in this process; programs that a model
wrote are run by `grading` alone.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.resources import files
from string import Template, ascii_lowercase
from typing import Any, Literal, get_args

from diffucoder.errors import ConfigError

Split = Literal["train", "dev", "test"]
Kind = Literal["chain", "branch", "guard"]
Value = Any  # an input or output of a block: int, str, list, dict or bool

_TYPES = ("nums", "words", "text", "num", "table")
_WEIGHTS = (27, 21, 25, 17, 10)
_NOUNS = {
    "nums": ("a list of numbers", "a list of integers", "a list of ints"),
    "words": ("a list of words", "a list of strings"),
    "text": ("a string", "a text"),
    "num": ("a number", "an integer"),
    "table": ("a dictionary", "a dictionary from strings to numbers"),
}
_PARAMETERS = {
    "nums": ("nums", "numbers", "values", "xs", "items", "data"),
    "words": ("words", "names", "strings", "tokens", "parts"),
    "text": ("text", "s", "string", "line", "phrase"),
    "num": ("n", "num", "number", "x", "limit"),
    "table": ("table", "scores", "prices", "mapping"),
}
_EMPTY: dict[str, Callable[[], Value]] = {"nums": list, "words": list, "text": str, "table": dict}
_FALLBACKS = (("0", "0"), ("-1", "-1"), ("None", "None"), ("an empty list", "[]"), ("an empty string", '""'))
_FALLBACK = object()  # stands for a guard's constant among the outputs, until the wording chooses one
_VERBS = (
    "compute get find make build process convert filter transform count select handle solve check apply collect "
    "extract format parse reduce clean prepare summarize list pick update adjust combine analyze evaluate measure "
    "create"
).split()
_OBJECTS = (
    "numbers words text items data values string result total entries list parts letters scores table tokens report "
    "digits names output summary answer line keys elements series record sample"
).split()
_WORDS = (
    "apple banana cherry river stone cloud tiger zebra level radar cat dog sun moon tree house green blue red quick "
    "brown fox lazy jumps over the and hello world python code data kayak noon eye book table chair window garden ice "
    "orange umbrella echo alpha beta gamma delta node leaf root"
).split()


@dataclass(frozen=True)
class Block:
    """One thing done to one value. `statements` run first, then `result` is the value; `$` names are slots."""

    takes: str
    gives: str
    phrasings: tuple[str, ...]
    statements: tuple[str, ...]
    result: str

    @property
    def id(self) -> str:
        return f"{self.takes}:{self.phrasings[0]}"


@dataclass(frozen=True)
class Problem:
    """A request, a solution that satisfies it, and asserts that tell whether another program does."""

    prompt: str
    name: str  # of the function asked for
    solution: str
    tests: tuple[str, ...]
    composition: tuple[str, ...]  # kind and block ids: what the splits are made by

    @property
    def split(self) -> Split:
        return split_of(self.composition)


@dataclass(frozen=True)
class _Use:
    """A block with its slots filled and one phrasing chosen."""

    block: Block
    slots: tuple[tuple[str, str], ...]
    phrase: str

    def fill(self, template: str, variable: str) -> str:
        return Template(template).substitute(dict(self.slots), x=variable)

    def __call__(self, value: Value) -> Value:
        return _compiled(self.block, self.slots)(value)


def split_of(composition: Sequence[str]) -> Split:
    """A tenth of the compositions is held out for the figures we report, a twentieth for decisions while developing."""
    if len(composition) <= 2:  # the kind and one block: single blocks are what training is for
        return "train"
    bucket = hashlib.blake2b("|".join(composition).encode(), digest_size=4).digest()
    share = int.from_bytes(bucket, "big") % 100
    return "test" if share < 10 else "dev" if share < 15 else "train"


@cache
def load_blocks() -> tuple[Block, ...]:
    """The table in data/blocks.txt, in its order."""
    blocks: list[Block] = []
    takes = gives = ""
    phrasings: tuple[str, ...] = ()
    body: list[str] = []

    def close() -> None:
        if phrasings:
            blocks.append(Block(takes, gives, phrasings, tuple(body[:-1]), body[-1].removeprefix("=> ")))

    table = (files("diffucoder") / "data" / "blocks.txt").read_text(encoding="utf-8")
    for line in [*table.splitlines(), "@ end -> end"]:
        if line.startswith("    "):
            body.append(line[4:])
        elif line.startswith("#") or not line:
            continue
        else:
            close()
            phrasings, body = (), []
            if line.startswith("@"):
                takes, _, gives = line[2:].split()
            else:
                phrasings = tuple(part.strip() for part in line.split(" | "))
    return tuple(blocks)


def sample_problem(rng: random.Random, *, hard: bool = False) -> Problem:
    """Draw one problem: kind, blocks, constants, names and wording. Compositions of any split may come out."""
    while True:
        kind: Kind = rng.choices(("chain", "branch", "guard"), (1, 0, 0) if hard else (75, 14, 11))[0]
        takes = rng.choices(_TYPES, _WEIGHTS)[0]
        uses = _KINDS[kind][0](rng, takes, *([_HARD] if hard else []))
        if uses is None:
            continue
        outcome = partial(_KINDS[kind][1], uses)
        pairs = _examples(rng, takes, uses, outcome, condition=None if kind == "chain" else uses[0])
        if pairs is not None:
            problem = _worded(rng, kind, takes, uses, pairs)
            if len({test.rpartition(" == ")[2] for test in problem.tests}) > 1:  # a guard's constant may equal the rest
                return problem


def problems(split: Split, count: int, *, seed: int, hard: bool = False) -> Iterator[Problem]:
    """`count` distinct problems of one split; the same seed gives the same problems.

    `hard` ones are chains of three blocks, the longest there are.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split={split!r} is not one of {', '.join(get_args(Split))}")
    if count < 1:
        raise ConfigError(f"count={count} problems asked for; ask for at least 1")
    rng, seen = random.Random(f"{split}-{seed}{'-hard' if hard else ''}"), set[str]()
    while len(seen) < count:
        problem = sample_problem(rng, hard=hard)
        if problem.split == split and problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


# --- choosing blocks -------------------------------------------------------------------------------------------------


@cache
def _from(takes: str, gives: str | None = None, *, flags: bool = True) -> tuple[Block, ...]:
    return tuple(
        b for b in load_blocks() if b.takes == takes and gives in (None, b.gives) and (flags or b.gives != "flag")
    )


def _use(rng: random.Random, block: Block) -> _Use:
    letters = rng.sample(ascii_lowercase, 2)
    slots = {"k": rng.randint(2, 9), "m": rng.randint(10, 60), "c": letters[0], "d": letters[1], "w": _word(rng)}
    phrase = rng.choice(block.phrasings)
    mentioned = " ".join((phrase, *block.statements, block.result))
    used = tuple((name, str(value)) for name, value in slots.items() if f"${name}" in mentioned)
    return _Use(block, used, Template(phrase).safe_substitute(dict(used)))


def _word(rng: random.Random) -> str:
    return rng.choice(_WORDS) if rng.random() < 0.7 else _made_up(rng)


def _made_up(rng: random.Random) -> str:
    """A word of one to three open syllables, which can only be copied."""
    return "".join(rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))


def _chain(rng: random.Random, takes: str, lengths: tuple[int, ...] = (18, 52, 30)) -> list[_Use] | None:
    """Blocks that fit together, so many that `lengths` weighs 1, 2, 3, ... of them; None where they do not."""
    uses: list[_Use] = []
    length = rng.choices(range(1, len(lengths) + 1), lengths)[0]
    for i in range(length):
        choices = _from(takes, flags=i == length - 1)
        if not choices:
            return None
        uses.append(_use(rng, rng.choice(choices)))
        takes = uses[-1].block.gives
    return uses if len({use.block.id for use in uses}) == length else None


def _branch(rng: random.Random, takes: str) -> list[_Use] | None:
    condition = _use(rng, rng.choice(_from(takes, "flag")))
    first = _use(rng, rng.choice(_from(takes, flags=False)))
    second = _use(rng, rng.choice(_from(takes, first.block.gives)))
    return [condition, first, second] if first.block != second.block else None


def _guard(rng: random.Random, takes: str) -> list[_Use] | None:
    chain = _chain(rng, takes, (60, 40, 0))
    return [_use(rng, rng.choice(_from(takes, "flag"))), *chain] if chain else None


# --- running blocks, for the expected values -------------------------------------------------------------------------


@lru_cache(maxsize=20_000)
def _compiled(block: Block, slots: tuple[tuple[str, str], ...]) -> Callable[[Value], Value]:
    lines = [Template(line).substitute(dict(slots), x="x") for line in (*block.statements, "return " + block.result)]
    namespace: dict[str, Any] = {}
    # Our own table, never a model's program (see the module's head)
    exec("def block(x):\n" + "".join(f"    {line}\n" for line in lines), namespace)
    function: Callable[[Value], Value] = namespace["block"]
    return function


def _small(value: Value) -> Value:
    """Refuse what would make a later block slow or an assert unreadable."""
    small = abs(value) <= 400 if isinstance(value, int) else len(value) <= 40 and len(repr(value)) <= 120
    if not small:
        raise OverflowError
    return value


def _run_chain(uses: Sequence[_Use], value: Value) -> Value:
    for use in uses[:-1]:
        value = _small(use(value))
    value = uses[-1](value)
    return value if isinstance(value, int) and abs(value) < 10**9 else _small(value)


def _run_branch(uses: Sequence[_Use], value: Value) -> Value:
    condition, first, second = uses
    return _run_chain([first if condition(value) else second], value)


def _run_guard(uses: Sequence[_Use], value: Value) -> Value:
    return _FALLBACK if uses[0](value) else _run_chain(uses[1:], value)


_HARD = (0, 0, 1)  # weights of the lengths of a hard chain
_KINDS: dict[Kind, tuple[Any, Callable[[Sequence[_Use], Value], Value]]] = {  # Any: the choosers differ in defaults
    "chain": (_chain, _run_chain),
    "branch": (_branch, _run_branch),
    "guard": (_guard, _run_guard),
}


def _examples(
    rng: random.Random,
    takes: str,
    uses: Sequence[_Use],
    outcome: Callable[[Value], Value],
    *,
    condition: Callable[[Value], Value] | None = None,
    wanted: int = 5,
) -> list[tuple[Value, Value]] | None:
    """`wanted` pairs of input and output that tell the problem from a constant, or None for a degenerate one.

    Where there is a `condition`, it holds for some of them and not for others.
    """
    pairs: list[tuple[Value, Value]] = []
    slots = dict(pair for use in uses for pair in use.slots)
    for _ in range(4 * wanted):
        value = _input(rng, takes, slots)
        try:
            pairs.append((value, outcome(value)))
        except (ArithmeticError, ValueError, IndexError, KeyError, TypeError, AttributeError):
            continue  # the blocks do not fit this input; ask for another
    distinct: dict[str, tuple[Value, Value]] = {}
    for value, result in pairs:  # outputs not seen yet come first: they tell most
        distinct.setdefault(repr(result), (value, result))
    chosen = list(distinct.values()) + [p for p in pairs if p not in distinct.values()]
    if len(distinct) < 2 or len(chosen) < wanted:
        return None
    if condition is not None:
        sides = {bool(condition(value)): (value, result) for value, result in reversed(chosen)}  # the first of each
        if len(sides) < 2:
            return None
        chosen = list(sides.values()) + [p for p in chosen if p not in sides.values()]
    return chosen[:wanted]


def _input(rng: random.Random, takes: str, slots: dict[str, str]) -> Value:
    """A value of type `takes`, empty now and then, biased towards the problem's own constants so that they matter."""
    if takes in _EMPTY and rng.random() < 0.05:
        return _EMPTY[takes]()
    k, letter, word = int(slots.get("k", "3")), slots.get("c", ""), slots.get("w", "apple")
    if takes == "num":
        return rng.choice((rng.randint(0, 20), rng.randint(-9, 60), k * rng.randint(1, 8)))
    if takes == "nums":
        low = rng.choice((0, 0, -9))
        pool = [rng.randint(low, 12), rng.randint(low, 70), k, k * rng.randint(1, 9), 0]
        return [rng.choice((*pool, rng.randint(low, 20))) for _ in range(rng.randint(1, 7))]
    words = [rng.choice((rng.choice(_WORDS), rng.choice(_WORDS), word, letter + rng.choice(_WORDS))) for _ in range(6)]
    if takes == "words":
        return words[: rng.randint(1, 5)] + rng.choice(([], words[:1]))
    if takes == "table":
        return {w: rng.choice((rng.randint(-3, 12), k, rng.randint(5, 40))) for w in words[: rng.randint(1, 5)]}
    return _text(rng, words[: rng.randint(1, 3)])


def _text(rng: random.Random, words: list[str]) -> str:
    text = rng.choice((" ", " ", ",", "")).join(words)
    style = rng.random()
    if style < 0.25:
        text = text.title()
    elif style < 0.35:
        text = text + rng.choice("!?.") + str(rng.randint(0, 99))
    elif style < 0.45:
        text = "".join(rng.choice((c, c.upper(), str(rng.randint(0, 9)))) for c in text)
    elif style < 0.5:
        text = " " + text + "  "
    elif style < 0.58:
        text = text[:3] + text[:3][::-1]
    return text[:24]


# --- wording and code ------------------------------------------------------------------------------------------------


def _third_person(phrase: str) -> str:
    verb, _, rest = phrase.partition(" ")
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}".rstrip()


def _clauses(rng: random.Random, uses: Sequence[_Use], third: bool) -> str:
    """The chain in words: imperative, or third person for "a function that ..."."""
    clauses = []
    for use in uses:
        phrase = use.phrase
        if use.block.gives == "flag":
            phrase = rng.choice(("check whether ", "tell whether ", "return whether ")) + phrase
        clauses.append(_third_person(phrase) if third else phrase)
    if len(clauses) == 1:
        return clauses[0]
    joiner = rng.choice((", then ", ", then ", " and then "))
    if len(clauses) == 3 and rng.random() < 0.5:
        return f"{clauses[0]}, {clauses[1]} and finally {clauses[2]}"
    return joiner.join(clauses)


def _request(rng: random.Random, kind: Kind, uses: Sequence[_Use], fallback: str, third: bool) -> str:
    if kind == "chain":
        return _clauses(rng, uses, third)
    condition = uses[0].phrase
    if kind == "guard":
        first = _third_person(f"return {fallback}") if third else f"return {fallback}"
        return f"{first} if {condition}, otherwise {_clauses(rng, uses[1:], third)}"
    yes, no = _clauses(rng, uses[1:2], third), _clauses(rng, uses[2:], third)
    return rng.choice((f"{yes} if {condition}, otherwise {no}", f"{yes} if {condition} and {no} otherwise"))


def _name(rng: random.Random) -> str:
    style = rng.random()
    if style < 0.75:
        return f"{rng.choice(_VERBS)}_{rng.choice(_OBJECTS)}"
    if style < 0.85:
        return rng.choice((*_VERBS, "f", "run", "main", "task", "work", "answer"))
    return f"{_made_up(rng)}_{_made_up(rng)}"


def _worded(
    rng: random.Random, kind: Kind, takes: str, uses: Sequence[_Use], pairs: list[tuple[Value, Value]]
) -> Problem:
    fallback, constant = rng.choice(_FALLBACKS)
    noun, parameter, name = rng.choice(_NOUNS[takes]), rng.choice(_PARAMETERS[takes]), _name(rng)
    third = rng.random() < 0.5
    if rng.random() < 0.12:  # unnamed: always the same name, so that the request still settles the tests
        parameter, name = _PARAMETERS[takes][0], "solve"
        frame = "Write a function that takes {noun} and {request}." if third else "Given {noun}, {request}."
    elif third:
        frame = rng.choice((
            "Write a function {sig} that {request}.",
            "Write a Python function {sig} that {request}.",
            "Please write {sig}, a function that takes {noun} and {request}.",
            "I need a function {sig} that {request}.",
        ))  # fmt: skip
    else:
        frame = rng.choice((
            "Define {sig} to {request}.",
            "Create a function {sig}. It should {request}.",
            "Given {noun} {parameter}, {request}. Call the function {name}.",
            "Implement {sig}: {request}.",
        ))  # fmt: skip
    request = _request(rng, kind, uses, fallback, third)
    prompt = frame.format(sig=f"{name}({parameter})", noun=noun, parameter=parameter, name=name, request=request)
    solution = _solution(kind, uses, name, takes, parameter, constant)
    tests = tuple(
        f"assert {name}({value!r}) == {constant if result is _FALLBACK else repr(result)}" for value, result in pairs
    )
    return Problem(prompt, name, solution, tests, (kind, *(use.block.id for use in uses)))


def _solution(kind: Kind, uses: Sequence[_Use], name: str, takes: str, parameter: str, constant: str) -> str:
    lines = [f"def {name}({parameter}):"]
    if kind == "chain":
        lines += _chain_code(uses, takes, parameter)
    else:
        inner = [f"return {constant}"] if kind == "guard" else _chain_code(uses[1:2], takes, parameter, indent="")
        rest = uses[1:] if kind == "guard" else uses[2:]
        lines += [f"    if {uses[0].fill(uses[0].block.result, parameter)}:", *("        " + line for line in inner)]
        lines += _chain_code(rest, takes, parameter)
    return "\n".join(lines) + "\n"


def _chain_code(uses: Sequence[_Use], takes: str, parameter: str, indent: str = "    ") -> list[str]:
    """One line a block where it is an expression; a value keeps its variable while its type stays the same."""
    variables, current, lines = {takes: parameter}, parameter, list[str]()
    for i, use in enumerate(uses):
        lines += [use.fill(line, current) for line in use.block.statements]
        result = use.fill(use.block.result, current)
        if i == len(uses) - 1:
            lines.append(f"return {result}")
        else:
            current = variables.setdefault(use.block.gives, _PARAMETERS[use.block.gives][0])
            lines.append(f"{current} = {result}")
    return [indent + line for line in lines]
