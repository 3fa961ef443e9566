"""The tiny problems: requests for short Python functions, each with a solution and asserts, composed from blocks.

A block (blocks.txt) does one thing to a value of one type and has several phrasings. Blocks compose into three kinds of
problem: a chain ("keep the even numbers, then sum them"), a branch ("if the string is a palindrome, ..., otherwise
...") and a guard ("return 0 if the list is empty, otherwise ..."). Splits are made **by composition**: a held-out
problem combines blocks as no training problem does, whatever its wording, names and constants.

The expected values in the asserts come from running the blocks, which are our own code, in this process.
"""

import hashlib
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from string import Template, ascii_lowercase
from typing import Any, Literal, get_args

from diffucoder.errors import ConfigError

Split = Literal["train", "dev", "test"]
Value = Any  # an input or output of a block: int, str, list, dict or bool
Example = tuple[Value, Value]  # an input and its output

HERE = Path(__file__).parent
WORDING = tomllib.loads((HERE / "wording.toml").read_text(encoding="utf-8"))
WORDS = WORDING["words"].split()
VERBS = WORDING["verbs"].split()
OBJECTS = WORDING["objects"].split()
INPUT_TYPES = {"nums": 27, "words": 21, "text": 25, "num": 17, "table": 10}  # how often each is drawn
KINDS = {"chain": 75, "branch": 14, "guard": 11}  # how often each is drawn
LENGTHS = {"chain": (18, 52, 30), "guard": (60, 40)}  # weights of one, two and three blocks
EXAMPLES = 5  # asserts of a problem
FALLBACKS = {"0": "0", "-1": "-1", "None": "None", "an empty list": "[]", "an empty string": '""'}  # phrase -> code
FALLBACK = object()  # the output of a guarded problem until its wording chooses the constant


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
class BlockUse:
    """A block with its slots filled and a phrasing chosen."""

    block: Block
    slots: tuple[tuple[str, str], ...]
    phrase: str = field(compare=False)

    def code(self, template: str, variable: str) -> str:
        return Template(template).substitute(dict(self.slots), x=variable)

    def apply(self, value: Value) -> Value:
        return compile_block(self)(value)


@dataclass(frozen=True)
class Plan:
    """What a problem computes: `steps`, or where `condition` holds `exception` (branch) or a constant (guard)."""

    kind: str
    takes: str
    steps: tuple[BlockUse, ...]
    condition: BlockUse | None = None
    exception: BlockUse | None = None

    @property
    def uses(self) -> list[BlockUse]:
        """All blocks, in the order of the composition."""
        return [*filter(None, (self.condition, self.exception)), *self.steps]

    def run(self, value: Value) -> Value:
        """The output for an input. Raises whatever a block raises, OverflowError for values that grow too large."""
        if self.condition is None or not self.condition.apply(value):
            return run_chain(self.steps, value)
        if self.exception is None:
            return FALLBACK
        return run_chain([self.exception], value)


@dataclass(frozen=True)
class Problem:
    """A request, a solution that satisfies it, and asserts that test whether another program does."""

    prompt: str
    name: str  # of the function
    solution: str
    tests: tuple[str, ...]
    composition: tuple[str, ...]  # kind and block ids: what the splits are made by


def problems(split: Split, count: int, *, seed: int, hard: bool = False) -> Iterator[Problem]:
    """Yield `count` distinct problems of one split, a function of the seed; hard ones are chains of three blocks."""
    if split not in get_args(Split):
        raise ConfigError(f"split={split!r} is not one of {', '.join(get_args(Split))}")
    if count < 1:
        raise ConfigError(f"count={count} gives no problems; use at least 1")
    rng = random.Random(f"{split}-{seed}-hard" if hard else f"{split}-{seed}")
    prompts: set[str] = set()
    while len(prompts) < count:
        problem = draw_problem(rng, hard=hard)
        if problem and split_of(problem.composition) == split and problem.prompt not in prompts:
            prompts.add(problem.prompt)
            yield problem


def split_of(composition: Sequence[str]) -> Split:
    """A tenth of the compositions is held out for reported figures, a twentieth for decisions during development."""
    if len(composition) <= 2:  # the kind and one block
        return "train"
    bucket = int(hashlib.blake2b("|".join(composition).encode(), digest_size=4).hexdigest(), 16) % 100
    if bucket < 10:
        return "test"
    if bucket < 15:
        return "dev"
    return "train"


def draw_problem(rng: random.Random, *, hard: bool) -> Problem | None:
    """Draw kind, blocks, constants, names and wording; None where they make no problem. Its split may be any."""
    plan = draw_plan(rng, hard=hard)
    examples = draw_examples(rng, plan) if plan else None
    if plan is None or examples is None:
        return None
    problem = write_problem(rng, plan, examples)
    outputs = {test.rpartition(" == ")[2] for test in problem.tests}
    if len(outputs) == 1:  # a guard's constant may equal all other outputs
        return None
    return problem


@cache
def load_blocks() -> tuple[Block, ...]:
    """The blocks of blocks.txt, in its order."""
    blocks: list[Block] = []
    takes = gives = ""
    text = (HERE / "blocks.txt").read_text(encoding="utf-8")
    for heading, body in re.findall(r"^([^ #\n].*)\n((?: {4}.*\n)*)", text, re.MULTILINE):
        if heading.startswith("@"):
            takes, _, gives = heading[2:].split()
            continue
        *statements, result = [line[4:] for line in body.splitlines()]
        blocks.append(Block(takes, gives, tuple(heading.split(" | ")), tuple(statements), result.removeprefix("=> ")))
    return tuple(blocks)


@cache
def blocks_of(takes: str, gives: str | None = None, *, flags: bool = True) -> tuple[Block, ...]:
    """The blocks that take a type; only those that give `gives`, and without `flags` none that give a flag."""
    blocks = [block for block in load_blocks() if block.takes == takes and gives in (None, block.gives)]
    return tuple([block for block in blocks if flags or block.gives != "flag"])


def draw_plan(rng: random.Random, *, hard: bool) -> Plan | None:
    """Draw kind, input type and blocks; None where the blocks do not fit together."""
    kind = rng.choices(tuple(KINDS), (1, 0, 0) if hard else tuple(KINDS.values()))[0]
    takes = rng.choices(tuple(INPUT_TYPES), tuple(INPUT_TYPES.values()))[0]
    if kind == "branch":
        condition = draw_use(rng, blocks_of(takes, "flag"))
        exception = draw_use(rng, blocks_of(takes, flags=False))
        otherwise = draw_use(rng, blocks_of(takes, exception.block.gives))
        if exception.block == otherwise.block:
            return None
        return Plan(kind, takes, (otherwise,), condition, exception)
    steps = draw_chain(rng, takes, (0, 0, 1) if hard else LENGTHS[kind])
    if not steps:
        return None
    guard = draw_use(rng, blocks_of(takes, "flag")) if kind == "guard" else None
    return Plan(kind, takes, steps, guard)


def draw_chain(rng: random.Random, takes: str, lengths: Sequence[int]) -> tuple[BlockUse, ...]:
    """Different blocks that fit together; `lengths` weighs 1, 2, 3, ... of them. Empty where the draw does not fit."""
    uses: list[BlockUse] = []
    length = rng.choices(range(1, len(lengths) + 1), lengths)[0]
    for position in range(length):
        blocks = blocks_of(takes, flags=position == length - 1)
        if not blocks:
            return ()
        uses.append(draw_use(rng, blocks))
        takes = uses[-1].block.gives
    if len({use.block for use in uses}) < length:
        return ()
    return tuple(uses)


def draw_use(rng: random.Random, blocks: Sequence[Block]) -> BlockUse:
    """Choose one of the blocks, its constants and its phrasing."""
    block = rng.choice(blocks)
    letters = rng.sample(ascii_lowercase, 2)
    slots = {"k": str(rng.randint(2, 9)), "m": str(rng.randint(10, 60)), "c": letters[0], "d": letters[1]}
    slots["w"] = rng.choice(WORDS) if rng.random() < 0.7 else invent_word(rng)
    phrase = rng.choice(block.phrasings)
    mentioned = " ".join((phrase, *block.statements, block.result))
    used = tuple([(name, value) for name, value in slots.items() if f"${name}" in mentioned])
    return BlockUse(block, used, Template(phrase).safe_substitute(dict(used)))


def invent_word(rng: random.Random) -> str:
    """A word of one to three open syllables: a model can only copy it."""
    word = ""
    for _ in range(rng.randint(1, 3)):
        word += rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou")
    return word


@lru_cache(maxsize=20_000)
def compile_block(use: BlockUse) -> Callable[[Value], Value]:
    lines = ["def block(x):", *write_chain([use], use.block.takes, "x", indent=4)]
    namespace: dict[str, Any] = {}
    exec("\n".join(lines), namespace)  # our own table, never a model's program (see the module docstring)
    return namespace["block"]


def run_chain(uses: Sequence[BlockUse], value: Value) -> Value:
    """Raises OverflowError for a value that would make a later block slow or an assert unreadable."""
    for use in uses:
        value = use.apply(value)
        if isinstance(value, int):
            too_large = abs(value) > 400 and (use is not uses[-1] or abs(value) >= 10**9)
        else:
            too_large = len(value) > 40 or len(repr(value)) > 120
        if too_large:
            raise OverflowError
    return value


def draw_examples(rng: random.Random, plan: Plan) -> list[Example] | None:
    """Examples that differ in their outputs and meet both sides of a condition; None for a degenerate problem."""
    examples: list[Example] = []
    slots: dict[str, str] = {}
    for use in plan.uses:
        slots.update(use.slots)
    for _ in range(4 * EXAMPLES):
        value = draw_input(rng, plan.takes, slots)
        try:
            examples.append((value, plan.run(value)))
        except (ArithmeticError, ValueError, IndexError, KeyError, TypeError, AttributeError):
            continue  # the blocks do not fit this input
    distinct: dict[str, Example] = {}
    for example in examples:
        distinct.setdefault(repr(example[1]), example)
    chosen = [*distinct.values(), *[each for each in examples if each not in distinct.values()]]  # new outputs first
    if len(distinct) < 2 or len(chosen) < EXAMPLES:
        return None
    if plan.condition is not None:
        sides: dict[bool, Example] = {}
        for example in reversed(chosen):  # so that the first example of each side stays
            sides[bool(plan.condition.apply(example[0]))] = example
        if len(sides) < 2:
            return None
        chosen = [*sides.values(), *[each for each in chosen if each not in sides.values()]]
    return chosen[:EXAMPLES]


def draw_input(rng: random.Random, takes: str, slots: dict[str, str]) -> Value:
    """A value of type `takes`, sometimes empty, biased towards the problem's constants so that they matter."""
    empty: dict[str, Value] = {"nums": [], "words": [], "text": "", "table": {}}
    if takes in empty and rng.random() < 0.05:
        return empty[takes]
    k = int(slots.get("k", "3"))
    if takes == "num":
        return rng.choice((rng.randint(0, 20), rng.randint(-9, 60), k * rng.randint(1, 8)))
    if takes == "nums":
        low = rng.choice((0, 0, -9))
        pool = [rng.randint(low, 12), rng.randint(low, 70), k, k * rng.randint(1, 9), 0]
        return [rng.choice((*pool, rng.randint(low, 20))) for _ in range(rng.randint(1, 7))]
    words = []
    for _ in range(6):
        known = (rng.choice(WORDS), rng.choice(WORDS), slots.get("w", "apple"))
        words.append(rng.choice((*known, slots.get("c", "") + rng.choice(WORDS))))
    if takes == "words":
        return words[: rng.randint(1, 5)] + rng.choice(([], words[:1]))
    if takes == "table":
        keys = words[: rng.randint(1, 5)]
        return {key: rng.choice((rng.randint(-3, 12), k, rng.randint(5, 40))) for key in keys}
    return draw_text(rng, words[: rng.randint(1, 3)])


def draw_text(rng: random.Random, words: list[str]) -> str:
    text = rng.choice((" ", " ", ",", "")).join(words)
    style = rng.random()
    if style < 0.25:
        text = text.title()
    elif style < 0.35:
        text += rng.choice("!?.") + str(rng.randint(0, 99))
    elif style < 0.45:
        text = "".join([rng.choice((c, c.upper(), str(rng.randint(0, 9)))) for c in text])
    elif style < 0.5:
        text = f" {text}  "
    elif style < 0.58:
        text = text[:3] + text[:3][::-1]
    return text[:24]


def write_problem(rng: random.Random, plan: Plan, examples: Sequence[Example]) -> Problem:
    """Choose names and wording."""
    fallback = rng.choice(tuple(FALLBACKS))
    noun = rng.choice(WORDING["nouns"][plan.takes])
    parameter = rng.choice(WORDING["parameters"][plan.takes])
    name = draw_name(rng)
    person = "third_person" if rng.random() < 0.5 else "imperative"
    if rng.random() < 0.12:  # unnamed: always the same name, so that the request still determines the tests
        parameter = WORDING["parameters"][plan.takes][0]
        name = "solve"
        frame = WORDING["frames"][f"unnamed_{person}"]
    else:
        frame = rng.choice(WORDING["frames"][person])
    request = write_request(rng, plan, fallback, third=person == "third_person")
    signature = f"{name}({parameter})"
    prompt = frame.format(signature=signature, noun=noun, parameter=parameter, name=name, request=request)
    constant = FALLBACKS[fallback]
    tests = []
    for value, output in examples:
        expected = constant if output is FALLBACK else repr(output)
        tests.append(f"assert {name}({value!r}) == {expected}")
    composition = (plan.kind, *[use.block.id for use in plan.uses])
    return Problem(prompt, name, write_solution(plan, name, parameter, constant), tuple(tests), composition)


def draw_name(rng: random.Random) -> str:
    style = rng.random()
    if style < 0.75:
        return f"{rng.choice(VERBS)}_{rng.choice(OBJECTS)}"
    if style < 0.85:
        return rng.choice([*VERBS, *WORDING["short_names"].split()])
    return f"{invent_word(rng)}_{invent_word(rng)}"


def write_request(rng: random.Random, plan: Plan, fallback: str, third: bool) -> str:
    if plan.condition is None:
        return join_clauses(rng, plan.steps, third)
    condition = plan.condition.phrase
    if plan.exception is None:
        verb = "returns" if third else "return"
        return f"{verb} {fallback} if {condition}, otherwise {join_clauses(rng, plan.steps, third)}"
    yes = join_clauses(rng, [plan.exception], third)
    no = join_clauses(rng, plan.steps, third)
    return rng.choice((f"{yes} if {condition}, otherwise {no}", f"{yes} if {condition} and {no} otherwise"))


def join_clauses(rng: random.Random, uses: Sequence[BlockUse], third: bool) -> str:
    """A chain in words: imperative, or third person for "a function that ..."."""
    clauses = []
    for use in uses:
        phrase = use.phrase
        if use.block.gives == "flag":
            phrase = rng.choice(("check whether ", "tell whether ", "return whether ")) + phrase
        clauses.append(third_person(phrase) if third else phrase)
    if len(clauses) == 1:
        return clauses[0]
    joiner = rng.choice((", then ", ", then ", " and then "))
    if len(clauses) == 3 and rng.random() < 0.5:
        return f"{clauses[0]}, {clauses[1]} and finally {clauses[2]}"
    return joiner.join(clauses)


def third_person(phrase: str) -> str:
    verb, _, rest = phrase.partition(" ")
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}".rstrip()


def write_solution(plan: Plan, name: str, parameter: str, constant: str) -> str:
    lines = [f"def {name}({parameter}):"]
    if plan.condition is not None:
        lines.append(f"    if {plan.condition.code(plan.condition.block.result, parameter)}:")
        if plan.exception is None:
            lines.append(f"        return {constant}")
        else:
            lines += write_chain([plan.exception], plan.takes, parameter, indent=8)
    lines += write_chain(plan.steps, plan.takes, parameter, indent=4)
    return "\n".join(lines) + "\n"


def write_chain(uses: Sequence[BlockUse], takes: str, parameter: str, indent: int) -> list[str]:
    """One line for each block that is an expression; a value keeps its variable while its type stays the same."""
    variables = {takes: parameter}
    current = parameter
    lines: list[str] = []
    for use in uses:
        lines += [use.code(line, current) for line in use.block.statements]
        result = use.code(use.block.result, current)
        if use is uses[-1]:
            lines.append(f"return {result}")
        else:
            current = variables.setdefault(use.block.gives, WORDING["parameters"][use.block.gives][0])
            lines.append(f"{current} = {result}")
    return [" " * indent + line for line in lines]
